"""The detector: backbones, bounds of decode, detections, saving and loading, and refusals in one sentence."""

import copy
import dataclasses
import json
import math
import re

import numpy as np
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file, save_file
from scenes import CAR, FAR, MODEL, PERSON, TRUNCATED, K, all_losses, encode, make_batch, random_outputs
from torchvision.ops import box_iou

from config import Config
from engine.checkpoint import (
    Progress,
    handle_state,
    list_checkpoints,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
    save_weights,
)
from engine.guard import start_accelerator
from engine.mirror import Mirrored, mirror
from engine.tune import load_weights
from engine.weights import find_weights
from formats.jsonl import read_frames
from model import Detector, ModelConfig, checkpoint_backbone
from scene.draw import draw_frame
from scene.frames import Frame, Labels, UserError
from scene.geometry import mirror_bins
from scene.records import write_jsonl
from targets import assign

CAMERA = torch.as_tensor(K, dtype=torch.float32).reshape(1, 3, 3)
BACKBONES = (
    "resnet18",
    "dla34",  # timm counts its stages from 1
    "mobilenetv4_conv_small",
    "convnext_tiny",
    "efficientnet_lite0",
    "swin_tiny_patch4_window7_224",  # built for a size, channels last
    "hgnetv2_b0",
)


def make_detector(**changes):
    torch.manual_seed(0)
    return Detector(dataclasses.replace(MODEL, **changes))


@pytest.fixture(scope="module")
def detector():
    return make_detector(score_threshold=0.0)


@pytest.fixture(scope="module")
def picture():
    return np.random.default_rng(0).integers(0, 255, (96, 320, 3), np.uint8)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_backbones_train_a_step_and_predict(backbone, picture):
    size = (64, 224)
    model = make_detector(backbone=backbone, size=size, score_threshold=0.0)
    batch = make_batch([CAR, PERSON], [FAR], size=size)
    batch["image"] = torch.randint(0, 255, batch["image"].shape, dtype=torch.uint8)
    logits, raw = model(batch["image"], batch["K"])
    cells = sum((size[0] // s) * (size[1] // s) for s in MODEL.strides)
    assert logits.shape == (2, cells, 3)
    losses, _ = all_losses(model, batch, logits, raw)
    loss = sum(losses.values())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    first = next(p for n, p in model.named_parameters() if n.startswith("backbone"))
    before = first.detach().clone()
    optimizer.step()
    assert not torch.equal(before, first)
    found = model.predict(picture, K)
    assert len(found) > 0
    for field in dataclasses.fields(found):
        value = getattr(found, field.name)
        assert value is None or len(value) == len(found)
        assert field.name in ("name", "attribute") or value is None or np.isfinite(value).all(), field.name


def test_channels_that_come_last_are_moved_even_where_they_are_as_many_as_rows():
    strides = {"strides": (4, 8), "level_sizes": (64.0,), "depth_mean": (90.0, 40.0), "depth_std": (40.0, 20.0)}
    model = make_detector(backbone="swin_tiny_patch4_window7_224", size=(384, 128), **strides)
    seen = []
    model.fpn.register_forward_pre_hook(lambda _, arguments: seen.extend(arguments[0].values()))
    with torch.no_grad():
        model(torch.zeros(1, 384, 128, 3, dtype=torch.uint8), CAMERA)
    assert [tuple(level.shape) for level in seen] == [(1, 96, 96, 32), (1, 192, 48, 16)]
    image = (torch.zeros(1, 3, 384, 128) - model.pixel_mean[:, None, None]) / model.pixel_std[:, None, None]
    assert torch.equal(seen[0], model.backbone(image)[0].permute(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"backbone": "resnet81"}, "backbone 'resnet81' is not a timm model; near it: .*resnet18"),
        ({"backbone": "zzzzqqq"}, "backbone 'zzzzqqq' is not a timm model; near it: nothing$"),
        (
            {"backbone": "vit_tiny_patch16_224"},
            r"backbone .* has features at strides \[16, 16, 16\], none at \[8, 32\] of model.strides",
        ),
        (
            {"backbone": "resnet18", "strides": (8, 16, 64), "size": (128, 320)},
            r"backbone .* none at \[64\] of model\.strides",
        ),
        (
            {"backbone": "pit_ti_224"},
            r"backbone 'pit_ti_224' gives features of 64 x 11 x 39, and \(12, 40\) cells are needed",
        ),
        ({"backbone": "resnetv2_50d", "pretrained": True}, "backbone 'resnetv2_50d' .* No pretrained weights exist"),
        (
            {"backbone": "nest_base"},
            r"backbone .* gives no features of \(96, 320\) images in timm: Model only handles square inputs",
        ),
        ({"backbone": "dla34", "drop_path": 0.1}, "backbone 'dla34' .* unexpected keyword argument 'drop_path_rate'"),
        (
            {"size": (100, 320)},
            r"size is \(100, 320\), expected \(height, width\) in multiples of the largest stride, 32",
        ),
        ({"norm": "layer"}, "norm is 'layer', expected 'batch', 'frozen' or 'sync'"),
        ({"strides": (8, 32, 16)}, r"strides is \(8, 32, 16\), expected px per cell, ascending"),
        ({"strides": (), "level_sizes": ()}, r"strides is \(\), expected px per cell, ascending"),
        ({"level_sizes": (64.0,)}, r"level_sizes is \(64\.0,\), expected borders, one fewer than the 3 strides"),
        ({"channels": 6}, "channels is 6, expected a multiple of 32, or of 4 below 128"),
        ({"drop_path": 1.0}, "drop_path is 1.0, expected 0 <= drop_path < 1"),
        ({"centerness_share": 1.5}, "centerness_share is 1.5, expected 0 <= centerness_share < 1"),
        ({"nms_across_classes": 2}, "nms_across_classes is 2, expected an IoU from 0 to 1"),
        ({"classes": ()}, r"classes is \(\), expected class names, each once"),
        ({"classes": ("Car", "Car")}, r"classes is \('Car', 'Car'\), expected class names, each once"),
        ({"depth_mean": (1.0,)}, r"depth_mean is \(1\.0,\), expected 3 entries or none"),
        (
            {"attributes": {"Tram": ("a", "b")}},
            "attributes is .*Tram.*, expected names, once each, of Car, Pedestrian, ",
        ),
        ({"attributes": {"Car": ("parked", "parked")}}, "attributes is .*, expected names, once each"),
        ({"attributes": {"Car": ()}}, r"attributes is {'Car': \(\)}, expected names, .*; {}: none"),
        ({"sigma_scale": (1.0,)}, r"sigma_scale is \(1\.0,\), expected 3 entries or none"),
        ({"sigma_scale": (1.0, 0.0, 1.0)}, r"sigma_scale is \(1\.0, 0\.0, 1\.0\), expected finite numbers > 0"),
        ({"depth_std": (1.0, 0.0, 1.0)}, r"depth_std is \(1\.0, 0\.0, 1\.0\), expected finite numbers > 0"),
        ({"size_prior": ((4, 2, 0),) * 3}, r"size_prior is .*, expected finite numbers > 0"),
        ({"nms_iou": 2}, "nms_iou is 2, expected an IoU above 0, at most 1"),
        ({"candidates": 0}, "candidates is 0, expected more than 0"),
        ({"virtual_focal": -700}, "virtual_focal is -700, expected more than 0"),
        ({"size_prior": ()}, "size_prior, depth_mean and depth_std are not set"),
    ],
)
def test_wrong_models_are_refused_in_one_sentence(changes, words):
    with pytest.raises(UserError, match=f"^model.{words}") as error:
        make_detector(**changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [1e4, -1e4, 0.0, math.pi])
def test_decode_is_bounded(detector, value):
    batch = make_batch([CAR])
    location = torch.arange(len(detector.location_stride))[None]
    raw = torch.full((1, location.shape[1], sum(detector.fields.values())), value)
    for label in range(3):
        decoded = detector.decode(raw, location, torch.full_like(location, label), batch["K"])
        for field in dataclasses.fields(decoded):
            assert torch.isfinite(getattr(decoded, field.name)).all(), field.name
        assert (decoded.size > 0).all()
        assert (decoded.size < 10 * torch.tensor(MODEL.size_prior[label])).all()
        assert (decoded.depth > 0).all()
        assert (decoded.depth[..., 1] < 1e3).all()
        assert (decoded.box[..., 2:] > decoded.box[..., :2]).all()
        assert (decoded.full_box[..., 2:] >= decoded.full_box[..., :2]).all()
        assert (decoded.double_alpha.norm(dim=-1) < 1 + 1e-5).all()
        fused = decoded.log_sigma[..., 0]
        assert (fused <= decoded.log_sigma[..., 1:].amin(-1) + 1e-5).all()  # two estimates are better than one
        low, high = decoded.depth[..., 1:].amin(-1), decoded.depth[..., 1:].amax(-1)
        assert ((decoded.depth[..., 0] >= low * (1 - 1e-5)) & (decoded.depth[..., 0] <= high * (1 + 1e-5))).all()


def test_depth_follows_the_focal_length(detector):
    """The same outputs through twice the focal length mean twice the depth: virtual depth."""
    location = torch.arange(50)[None]
    raw = torch.randn(1, 50, sum(detector.fields.values()), generator=torch.Generator().manual_seed(0))
    K1 = torch.tensor(K, dtype=torch.float32)[None]
    K2 = K1 * torch.tensor([[2.0, 2, 1], [2, 2, 1], [1, 1, 1]])
    one, two = (detector.decode(raw, location, torch.zeros_like(location), k) for k in (K1, K2))
    torch.testing.assert_close(two.depth, 2 * one.depth)
    torch.testing.assert_close(two.log_sigma.exp()[..., 0], 2 * one.log_sigma.exp()[..., 0])
    torch.testing.assert_close(two.size, one.size)


def test_locations_are_cell_centres(detector):
    pixel, stride = detector.location_pixel, detector.location_stride
    assert pixel[0].tolist() == [3.5, 3.5]
    assert pixel[1].tolist() == [11.5, 3.5]
    assert len(pixel) == 12 * 40 + 6 * 20 + 3 * 10
    for s in MODEL.strides:
        level = pixel[stride == s]
        assert level.amin(0).tolist() == [(s - 1) / 2] * 2
        assert level.amax(0).tolist() == [320 - (s + 1) / 2, 96 - (s + 1) / 2]


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_detections_are_finite_at_extreme_outputs(detector, scale):
    count, fields = len(detector.location_stride), sum(detector.fields.values())
    boxes = detector.rank(
        torch.full((1, count, 3), scale),
        torch.full((1, count, fields), scale),
        torch.tensor(K, dtype=torch.float32)[None],
    )
    for name, value in boxes.items():
        assert torch.isfinite(value.float()).all(), name
    assert (boxes["score"] <= 1).all()


def test_detect_respects_its_limits(picture):
    image = torch.from_numpy(np.stack([picture, picture[::-1]]))
    cameras = torch.tensor(np.stack([K, K]))
    every = make_detector(score_threshold=0.0, fuse_duplicates=False).eval()
    few = make_detector(score_threshold=0.0, fuse_duplicates=False, max_detections=3).eval()
    all_found, few_found = every.detect(image, cameras), few.detect(image, cameras)
    limit = float(torch.cat([found["score"] for found in all_found]).median())
    strict_found = make_detector(score_threshold=limit, fuse_duplicates=False).eval().detect(image, cameras)
    for found, some, good in zip(all_found, few_found, strict_found, strict=True):
        assert (found["score"].diff() <= 0).all()  # best first
        assert 3 < len(found["score"]) <= 100
        assert len(some["score"]) == 3
        torch.testing.assert_close(some["center"], found["center"][:3])
        assert (good["score"] > limit).all()
        assert len(good["score"]) == (found["score"] > limit).sum()
        box = found["box"]
        assert (box[:, :2] >= 0).all()
        assert (box[:, 2:] <= torch.tensor([319, 95])).all()
        for label in range(3):
            own = box[found["label"] == label]
            if len(own) > 1:
                overlap = box_iou(own, own)
                overlap.fill_diagonal_(0)
                assert overlap.max() <= MODEL.nms_iou + 1e-4  # of boxes that are not averages
    assert sum(len(f["score"]) for f in all_found) > sum(len(f["score"]) for f in strict_found) > 0 or all(
        f["score"].max() < 0.02 for f in all_found
    )


def test_averaging_moves_detections_and_drops_none(picture):
    image, cameras = torch.from_numpy(picture)[None], torch.tensor(K)[None]
    options = {"score_threshold": 0.0, "nms_iou": 0.1}  # small boxes of an untrained head, hardly any share more
    fused, single = (
        make_detector(fuse_duplicates=fuse, **options).eval().detect(image, cameras)[0] for fuse in (True, False)
    )
    torch.testing.assert_close(fused["score"], single["score"])
    torch.testing.assert_close(fused["sigma"], single["sigma"])
    assert (fused["center"] - single["center"]).abs().max() > 1e-4
    ray = lambda found: found["center"][:, :2] / found["center"][:, 2:]  # noqa: E731
    assert 0 < (ray(fused) - ray(single)).abs().max() < 0.2  # the projected centre moves among those of its duplicates


def test_sigma_scale_moves_sigma_alone(picture):
    image, cameras = torch.from_numpy(picture)[None], torch.tensor(K)[None]
    factors = (2.0, 3.0, 0.5)
    plain, scaled = (
        make_detector(score_threshold=0.0, sigma_scale=scale).eval().detect(image, cameras)[0]
        for scale in ((), factors)
    )
    assert {*plain["label"].tolist()} == {0, 1, 2}
    torch.testing.assert_close(scaled.pop("sigma"), plain.pop("sigma") * torch.tensor(factors)[plain["label"]])
    for name, value in plain.items():
        torch.testing.assert_close(scaled[name], value, msg=name)


def test_centerness_has_its_share_of_the_score(detector):
    count, fields = len(detector.location_stride), sum(detector.fields.values())
    logits, raw = torch.zeros(1, count, 3), torch.zeros(1, count, fields)
    camera = torch.tensor(K, dtype=torch.float32)[None]
    scores = {}
    for share in (0.0, 0.25, 0.5):
        model = make_detector(centerness_share=share)
        raw[..., 0] = 0.0
        half = model.rank(logits, raw, camera)["score"].max()
        raw[..., 0] = -math.log(15)  # a centerness of 1/16 instead of 1/2
        scores[share] = float(model.rank(logits, raw, camera)["score"].max() / half)
    assert scores == pytest.approx({0.0: 1.0, 0.25: 8**-0.25, 0.5: 8**-0.5})


def mirror_all(model, logits, raw):
    """Outputs for an image -> outputs of an exact detector for its mirror image, heading bins included."""
    logits, raw = mirror(model, logits, raw)
    out = model.split(raw)
    out["direction"] = mirror_bins(out["direction"], out["alpha"])
    return logits, torch.cat(list(out.values()), -1)


def test_the_mirror_of_what_a_scene_says_is_what_its_mirror_image_says(detector):
    """Every field, at every cell of every object, with the axis of the camera beside the middle of the canvas."""
    camera = K + np.array([[0, 0, 13.3], [0, 0, 2], [0, 0, 0]])
    headings = [
        ("Car", (x, 1.2, 14), (3, 1.5, 1.6), yaw)
        for x, yaw in zip(range(-9, 10, 3), np.arange(-3, 3, 0.9), strict=True)
    ]
    scenes = [CAR, PERSON, FAR], [TRUNCATED], headings
    raws = []
    for flip in (False, True):
        batch = make_batch(*scenes, K=camera, flip=flip)
        targets = assign(batch, MODEL)
        said = encode(targets, detector, batch["K"])
        raws.append(torch.zeros(len(scenes), len(detector.location_stride), said.shape[-1]))
        image, slot = targets.positive.nonzero(as_tuple=True)
        raws[-1][image, targets.location[image, slot]] = said[image, slot]
    raw, mirrored = raws
    assert (raw != 0).any(-1).sum() > 60
    logits = torch.randn(*raw.shape[:2], 3, generator=torch.Generator().manual_seed(0))
    found_logits, found = mirror_all(detector, logits, mirrored)
    for name, values in detector.split(found).items():
        torch.testing.assert_close(
            values, detector.split(raw)[name], rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    again = mirror_all(detector, found_logits, found)
    assert torch.equal(again[0], logits)
    assert torch.equal(again[1], mirrored)


def test_an_exact_detector_gains_nothing_from_a_mirror_all(detector, picture, monkeypatch):
    logits, raw = (value.detach() for value in random_outputs(detector, 1))
    image = torch.from_numpy(picture)[None]
    camera = torch.tensor(K + np.array([[0, 0, 10], [0, 0, 0], [0, 0, 0]]), dtype=torch.float32)[None]

    def exact(seen, K):
        if torch.equal(seen, image):
            assert torch.equal(K, camera)
            return logits, raw
        assert torch.equal(seen, image.flip(2))
        assert K[0, 0, 2] == 319 - camera[0, 0, 2]
        return mirror_all(detector, logits, raw)

    once = detector.detect(image, camera)  # by the network itself
    monkeypatch.setattr(detector, "forward", exact)
    [alone], [both] = detector.detect(image, camera), Mirrored(detector).detect(image, camera)
    assert len(alone["score"]) > 20
    for name, value in alone.items():
        torch.testing.assert_close(both[name], value, rtol=1e-5, atol=1e-5)
    assert not torch.equal(once[0]["score"], alone["score"])


def test_the_mean_with_a_mirror_image_does_not_know_which_is_which(detector, picture):
    detector.eval()
    image, camera, turned = (
        torch.from_numpy(picture)[None],
        *(torch.tensor(K, dtype=torch.float32)[None].clone() for _ in range(2)),
    )
    camera[:, 0, 2], turned[:, 0, 2] = 170, 149
    with torch.no_grad():
        one, two = Mirrored(detector)(image, camera), Mirrored(detector)(image.flip(2), turned)
        plain = detector(image, camera)
    for value, other in zip(one, mirror_all(detector, *two), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5)
    assert (one[1] - plain[1]).abs().max() > 1e-3


def test_one_thing_may_be_kept_from_being_of_two_classes(picture):
    """By a key that is off by default: of boxes that overlap, whatever their classes, the best one stays."""
    image, cameras = torch.from_numpy(picture)[None], torch.tensor(K, dtype=torch.float32)[None]
    options = {"score_threshold": 0.0, "fuse_duplicates": False, "max_detections": 300}
    plain, single = (
        make_detector(nms_across_classes=across, **options).eval().detect(image, cameras)[0] for across in (0, 0.5)
    )
    worst = lambda found: (box_iou(found["box"], found["box"]) - torch.eye(len(found["box"]))).max()  # noqa: E731
    assert worst(plain) > 0.9
    assert worst(single) <= 0.5
    assert {*single["score"].tolist()} < {*plain["score"].tolist()}
    covered = box_iou(plain["box"], single["box"]).max(1)
    assert ((covered.values > 0.5) & (single["score"][covered.indices] >= plain["score"])).all()


def test_images_of_a_batch_do_not_mix(detector, picture):
    detector.eval()
    image = torch.from_numpy(np.stack([picture, picture[::-1]]))
    cameras = torch.tensor(np.stack([K, K * [[1.5, 1, 1], [1, 1.5, 1], [1, 1, 1]]]))
    both = detector.detect(image, cameras)
    for i in range(2):
        alone = detector.detect(image[i : i + 1], cameras[i : i + 1])[0]
        assert len(alone["score"]) == len(both[i]["score"])
        torch.testing.assert_close(alone["score"], both[i]["score"], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(alone["center"], both[i]["center"], rtol=1e-3, atol=1e-3)


def test_weights_out_of_reach_are_one_sentence(monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    create = timm.create_model

    def offline(*arguments, pretrained=False, **options):
        if pretrained:
            raise LocalEntryNotFoundError("no connection\nand a long story")
        return create(*arguments, pretrained=pretrained, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    words = r"'resnet10t' has weights out of reach; model.pretrained=false.* \(no connection\)$"
    with pytest.raises(UserError, match=words):
        Detector(dataclasses.replace(MODEL, backbone="resnet10t", pretrained=True))


def test_predict_takes_a_path_a_picture_or_an_array(detector, picture, tmp_path):
    Image.fromarray(picture).save(tmp_path / "a.png")
    detector.train()
    found = [
        detector.predict(image, K)
        for image in (picture, Image.fromarray(picture), tmp_path / "a.png", str(tmp_path / "a.png"))
    ]
    assert detector.training  # as it was
    for other in found[1:]:
        for field in dataclasses.fields(other):
            np.testing.assert_array_equal(getattr(other, field.name), getattr(found[0], field.name))
    assert len(detector.predict(picture, K, min_score=found[0].score[3])) == 4
    deep = Image.fromarray(picture[..., 0].astype(np.uint16) * 257)  # 16 bits, not clipped to white
    grey = detector.predict(picture[..., :1].repeat(3, 2), K)
    np.testing.assert_array_equal(detector.predict(deep, K).center, grey.center)
    assert (
        np.cos(found[0].yaw - found[0].alpha - np.arctan2(found[0].center[:, 0], found[0].center[:, 2])) > 1 - 1e-9
    ).all()


def test_velocity_and_attribute_come_out_in_words(detector, picture, tmp_path):
    """From the outputs to JSON lines: m/s on the ground plane, an attribute of the class, none where it has none."""
    found = detector.predict(picture, K)
    assert found.velocity.shape == (len(found), 3)
    assert (found.velocity[:, 1] == 0).all()
    assert np.abs(found.velocity[:, [0, 2]]).min() > 0
    for name, attribute in zip(found.name, found.attribute, strict=True):
        assert attribute in MODEL.attributes.get(name, ("",))
    assert {"Car", "Cyclist"} <= {*found.name}
    write_jsonl(tmp_path / "found.jsonl", [Frame("a", tmp_path / "a.png", K, found)])
    back = read_frames(tmp_path / "found.jsonl", images=False)[0].labels
    np.testing.assert_allclose(back.velocity, found.velocity, atol=1e-6)
    assert back.attribute.tolist() == found.attribute.tolist()
    plain = make_detector(velocity=False, attributes={}, score_threshold=0.0).predict(picture, K)
    assert plain.velocity is None
    assert plain.attribute is None


def test_predict_answers_in_the_pixels_of_any_image(detector):
    """A picture twice as large with its camera is the same scene: the same metres, twice the pixels."""
    small = np.full((96, 320, 3), 90, np.uint8)
    large = small.repeat(2, 0).repeat(2, 1)
    scaled = np.array([[2.0, 0, 0.5], [0, 2, 0.5], [0, 0, 1]]) @ K
    one, two = detector.predict(small, K), detector.predict(large, scaled)
    n = 5
    np.testing.assert_allclose(two.center[:n], one.center[:n], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(
        two.box[:n] + 0.5, 2 * (one.box[:n] + 0.5), rtol=1e-3, atol=1.1
    )  # clipped at the last pixel centre
    wide = detector.predict(np.zeros((50, 500, 3), np.uint8), np.array([[300.0, 0, 250], [0, 300, 25], [0, 0, 1]]))
    assert (wide.box[:, [1, 3]] <= 49).all()
    assert (wide.box[:, [0, 2]] <= 499).all()


def test_predict_refuses_what_it_cannot_use(detector, picture, tmp_path):
    image = "image is {}, expected a path, a PIL image or an array (H, W, 3) of uint8 in RGB: tensor.cpu().numpy(), "
    refused = {
        "K of the image: focal lengths 1, 1 px are implausible for an image of 320x96": (picture, np.eye(3)),
        "got shape (3, 4); formats.kitti.split_projection splits a projection matrix": (picture, np.eye(3, 4)),
        image.format("ndarray of float64 and shape (96, 320, 3)"): (picture / 255, K),
        image.format("ndarray of uint8 and shape (96, 320, 4)"): (np.zeros((96, 320, 4), np.uint8), K),
        image.format("ndarray of uint8 and shape (1, 96, 320, 3)"): (picture[None], K),
        image.format("ndarray of uint8 and shape (96, 320)"): (picture[..., 0], K),
        image.format("Tensor of torch.uint8 and shape (96, 320, 3)"): (torch.tensor(picture), K),
        "image is NoneType": (None, K),
        "2 images came with 3 camera matrices, expected 1 or as many": ([picture, picture], [K, K, K]),
        "its pixels are floating-point numbers of unknown range": (Image.fromarray(np.zeros((96, 320), np.float32)), K),
    }
    for sentence, arguments in refused.items():
        with pytest.raises(ValueError, match=re.escape(sentence)):
            detector.predict(*arguments)
    with pytest.raises(FileNotFoundError, match=r"none\.png: no such image"):
        detector.predict(tmp_path / "none.png", K)
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    with pytest.raises(OSError, match=r"bad\.png: cannot read the image"):
        detector.predict(tmp_path / "bad.png", K)


def test_a_list_of_images_is_a_batch(detector, picture, tmp_path):
    """Each as it would be alone, with one K for all or for each; a tall image, a path and a PIL image among them."""
    Image.fromarray(picture[:, ::-1]).save(tmp_path / "a.png")
    images = [picture, tmp_path / "a.png", Image.fromarray(picture[:, :200])]
    cameras = [K, K * [[1.3, 1, 1], [1, 1.3, 1], [1, 1, 1]], K]
    for given in (cameras, K, torch.from_numpy(K), np.stack(cameras)):
        found = detector.predict(images, given, min_score=0.001)
        for one, image, camera in zip(
            found, images, cameras if len(given) == 3 and np.ndim(given[0]) == 2 else [K] * 3, strict=True
        ):
            alone = detector.predict(image, camera, min_score=0.001)
            assert len(one) == len(alone) > 3
            np.testing.assert_allclose(one.score, alone.score, rtol=1e-4)
            np.testing.assert_allclose(one.box, alone.box, rtol=1e-4, atol=1e-2)
    assert detector.predict([], K) == []
    both = Mirrored(detector)
    assert both.training == detector.training
    flipped = both.predict([picture], K)[0]
    assert not np.array_equal(flipped.score, detector.predict(picture, K).score)
    np.testing.assert_array_equal(flipped.center, both.predict(picture, K).center)


def test_what_predict_returns_is_indexed_drawn_and_written(detector, picture, tmp_path):
    found = detector.predict(picture, K)
    n = len(found)
    for one in (found[:1], found[[0]], found[np.arange(n) == 0]):
        assert len(one) == 1
        assert one.center.tolist() == found.center[:1].tolist()
        assert one.velocity.tolist() == found.velocity[:1].tolist()
    for row in (found[0], found[np.int64(0)], found[-n]):
        assert (row.name, row.score, row.yaw) == (found.name[0], found.score[0], found.yaw[0])
        assert isinstance(row.score, float)
        assert row.center.tolist() == found.center[0].tolist()
        np.testing.assert_array_equal(row.corners(), found.corners()[0])
        assert row.project(K).shape == (8, 2)
        assert json.loads(json.dumps(row.to_dict()))["size"] == found.size[0].tolist()
        with pytest.raises(TypeError):
            len(row)
    assert len(found[found.score > found.score[3]]) == 3
    for beyond in (n, -n - 1):
        with pytest.raises(IndexError):
            found[beyond]
    assert [row.score for row in found] == found.score.tolist()
    assert found.corners().shape == (n, 8, 3)
    told = json.loads(json.dumps(found[:2].to_dict(), allow_nan=False))
    columns = [
        "name",
        "box",
        "size",
        "center",
        "yaw",
        "alpha",
        "truncation",
        "occlusion",
        "score",
        "sigma",
        "velocity",
        "attribute",
    ]
    assert list(told) == columns
    assert told["box"] == found.box[:2].tolist()
    again = Labels(**{name: np.array(values) for name, values in told.items()})
    np.testing.assert_array_equal(again.corners(), found[:2].corners())
    unknown = dataclasses.replace(found[:2], sigma=np.array([np.nan, 1]), velocity=np.full((2, 3), np.nan)).to_dict()
    assert unknown["sigma"] == [None, 1.0]
    assert unknown["velocity"] == [[None] * 3] * 2
    Image.fromarray(picture).save(tmp_path / "a.png")
    shown = [
        draw_frame(image, K, found[:4], min_score=0).tobytes()
        for image in (picture, tmp_path / "a.png", str(tmp_path / "a.png"))
    ]
    assert shown[0] == shown[1] == shown[2]


def test_saved_and_loaded_are_equal(detector, picture, tmp_path):
    detector.save_pretrained(tmp_path / "hub")
    save_weights(tmp_path / "run", detector, Config(model=detector.config), {}, {})
    expected = detector.predict(picture, K)
    for folder in ("hub", "run"):
        again = Detector.from_pretrained(tmp_path / folder)
        assert again.config == detector.config
        for (name, ours), theirs in zip(detector.state_dict().items(), again.state_dict().values(), strict=True):
            assert torch.equal(ours, theirs), name
        np.testing.assert_array_equal(again.predict(picture, K).center, expected.center)
    (tmp_path / "run/config.json").write_text(json.dumps({"out": "x"}))
    with pytest.raises(ValueError, match=r"config\.json has no section 'model'"):
        Detector.from_pretrained(tmp_path / "run")


def test_frozen_norms_stay_frozen():
    model = make_detector(norm="frozen")
    model.train()
    names = [name for name, value in model.backbone.state_dict().items() if "running" in name]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(torch.randint(0, 255, (2, 96, 320, 3), dtype=torch.uint8), CAMERA.repeat(2, 1, 1))
    assert names
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    moving = make_detector(norm="batch")
    before = {name: value.clone() for name, value in moving.state_dict().items()}
    moving(torch.randint(0, 255, (2, 96, 320, 3), dtype=torch.uint8), CAMERA.repeat(2, 1, 1))
    assert any(not torch.equal(value, before[name]) for name, value in moving.state_dict().items())


def test_a_checkpointed_backbone_keeps_less_and_learns_the_same():
    """Where its BatchNorms learn they would count a batch twice, and timm has it for some backbones only."""
    plain, batch = make_detector(backbone="convnext_atto"), torch.randint(0, 255, (2, 96, 320, 3), dtype=torch.uint8)
    counts, gradients = [], []
    for on in (False, True):
        net, sizes = copy.deepcopy(plain), []
        if on:
            checkpoint_backbone(net)
        keep = lambda tensor, sizes=sizes: sizes.append(tensor.numel()) or tensor  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits, raw = net(batch, CAMERA.repeat(2, 1, 1))
        (logits.square().mean() + raw.square().mean()).backward()
        counts.append(sum(sizes))
        gradients.append([p.grad for p in net.parameters()])
    assert counts[1] < 0.8 * counts[0]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    with pytest.raises(UserError, match=r"BatchNorms of .* would count a batch twice; model\.norm=frozen"):
        checkpoint_backbone(make_detector())
    with pytest.raises(UserError, match="'hrnet_w18_small' has no gradient checkpointing in timm"):
        checkpoint_backbone(make_detector(backbone="hrnet_w18_small", norm="frozen"))
    strides = {"strides": (8,), "level_sizes": (), "depth_mean": (90.0,), "depth_std": (40.0,)}
    net = make_detector(backbone="xcit_nano_12_p8_224", norm="frozen", **strides)
    checkpoint_backbone(net)
    assert any(getattr(module, "grad_checkpointing", False) for module in net.backbone.modules())


def test_load_weights_lists_what_does_not_fit(detector, tmp_path):
    weights = {k: v.clone() for k, v in detector.state_dict().items()}
    kept = dict(list(weights.items())[2:])
    kept["class_predictor.bias"] = torch.zeros(7)
    kept["old_head.weight"] = torch.ones(3)
    save_file(kept, tmp_path / "model.safetensors")
    fresh = make_detector()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.add_(1)
    lines = load_weights(fresh, tmp_path)
    assert f": {len(weights) - 3} of {len(weights)} tensors; class outputs in the order they lie in" in lines[0]
    count = sum(name.startswith("backbone.") for name in weights)
    assert lines[1:] == [
        f"  backbone: {count - 2} of {count} tensors (2 missing there)",
        "  class_predictor: 1 of 2 tensors (1 of other shapes or names)",
        "  not used: 1 of old_head",
    ]
    assert torch.equal(fresh.state_dict()["box_predictor.weight"], weights["box_predictor.weight"])
    assert not torch.equal(fresh.state_dict()["class_predictor.bias"], weights["class_predictor.bias"])
    save_file({"something": torch.ones(2)}, tmp_path / "else.safetensors")
    with pytest.raises(ValueError, match=r"else\.safetensors: none of its 1 tensors fits this architecture"):
        load_weights(fresh, tmp_path / "else.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"bad\.safetensors: not a readable safetensors file"):
        load_weights(fresh, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=r"nowhere: no such run, checkpoint or file"):
        find_weights(tmp_path / "nowhere")


def saved(folder, steps=(7,), **changes):
    """A model with one AdamW step behind it, saved as train.py does. Returns (accelerator, (average, net),
    optimizer)."""
    AcceleratorState._reset_state(reset_partial_state=True)
    net = make_detector(**changes)
    config = Config(out=str(folder), model=net.config)
    accelerator = start_accelerator(config.train)
    modules = make_detector(**changes), net
    model, optimizer = accelerator.prepare(net, torch.optim.AdamW(net.parameters(), lr=1e-3))
    handle_state(accelerator, modules)
    if steps:
        logits, raw = model(torch.zeros(1, 96, 320, 3, dtype=torch.uint8), CAMERA)
        (logits.mean() + raw.mean()).backward()
        optimizer.step()
    for step in steps:
        save_checkpoint(accelerator, config, Progress(step=step, data="abc"), modules)
    return accelerator, modules, optimizer


def test_a_checkpoint_restores_everything(tmp_path):
    """But the optimizer's settings, which are the config's."""
    _, modules, optimizer = saved(tmp_path)
    accelerator, others, other_optimizer = saved(tmp_path, steps=())
    other_optimizer.param_groups[0]["weight_decay"] = 0.5
    folder = tmp_path / "checkpoints/step_00000007"
    progress, config = read_checkpoint(folder)
    assert (progress.step, progress.data) == (7, "abc")
    assert config["model"]["channels"] == modules[1].config.channels
    load_checkpoint(accelerator, folder, other_optimizer)
    assert other_optimizer.param_groups[0]["weight_decay"] == 0.5
    for ours, theirs in zip(modules, others, strict=True):
        assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())
    moments, restored = optimizer.state_dict()["state"], other_optimizer.state_dict()["state"]
    assert moments.keys() == restored.keys()
    for index, ours in moments.items():
        assert ours.keys() == restored[index].keys()
        assert all(torch.equal(torch.as_tensor(ours[k]), torch.as_tensor(restored[index][k])) for k in ours)
    published = load_file(folder / "model.safetensors")
    assert all(torch.equal(value, modules[0].state_dict()[name]) for name, value in published.items())
    # no random states: every seed is a function of the step
    assert {p.suffix for p in folder.iterdir()} == {".json", ".safetensors", ".bin"}
    again = Detector.from_pretrained(folder)
    assert torch.equal(again.state_dict()["box_predictor.weight"], published["box_predictor.weight"])


def test_checkpoints_are_complete_or_absent_and_the_newest_stay(tmp_path):
    saved(tmp_path, steps=(2, 4, 6))
    root = tmp_path / "checkpoints"
    assert [p.name for p in list_checkpoints(root)] == ["step_00000006", "step_00000004"]
    assert sorted(p.name for p in root.iterdir()) == ["step_00000004", "step_00000006"]  # nothing half-written is left


def test_foreign_checkpoints_are_named(tmp_path):
    saved(tmp_path)
    accelerator, _, optimizer = saved(tmp_path, steps=(), channels=64)
    with pytest.raises(ValueError, match=r"step_00000007: cannot resume from this checkpoint: .*size mismatch"):
        load_checkpoint(accelerator, tmp_path / "checkpoints/step_00000007", optimizer)


def test_weights_that_lack_tensors_are_refused(tmp_path):
    """from_pretrained would keep random ones in their place."""
    net = make_detector()
    net.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for spoilt in (
        {name: value for name, value in weights.items() if "box" not in name},
        {f"x.{name}": v for name, v in weights.items()},
    ):
        save_file(spoilt, tmp_path / "model.safetensors")
        with pytest.raises(
            ValueError,
            match=r"model\.safetensors: damaged, or of another architecture than config\.json: .*Missing key",
        ):
            Detector.from_pretrained(tmp_path)


def test_a_truncated_object_can_be_said(detector):
    """The border cell of an object whose centre lies outside the image can point at that centre."""
    batch = make_batch([TRUNCATED])
    targets = assign(batch, MODEL)
    decoded = detector.decode(encode(targets, detector, batch["K"]), targets.location, targets.label, batch["K"])
    assert (decoded.pixel[targets.positive][:, 0] > 319).all()


@pytest.mark.parametrize(
    ("name", "levels"), [("hrnet_w18_small", 3), ("efficientnet_lite0", 2), ("coatnet_nano_cc_224", 3)]
)
def test_every_parameter_that_learns_gets_a_gradient(name, levels):
    """Some backbones keep stages that nobody looks at, whose gradient DDP would wait for; coatnet has one size."""
    fewer = {field: getattr(MODEL, field)[:levels] for field in ("strides", "depth_mean", "depth_std")}
    net = make_detector(backbone=name, level_sizes=MODEL.level_sizes[: levels - 1], **fewer)
    logits, raw = net(torch.zeros(1, 96, 320, 3, dtype=torch.uint8), CAMERA)
    (logits.mean() + raw.mean()).backward()
    assert all((p.grad is not None) == p.requires_grad for p in net.parameters())
    assert any(not p.requires_grad for p in net.parameters()) == (not name.startswith("coatnet"))


def test_predicting_leaves_the_callers_image_alone(detector, tmp_path):
    """A JPEG that is decoded at a reduced size would be another image afterwards."""
    Image.fromarray(np.zeros((384, 1280, 3), np.uint8)).save(tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as image:
        detector.predict(image, np.array([[800.0, 0, 640], [0, 800, 192], [0, 0, 1]]))
        assert image.size == (1280, 384)


def test_synchronised_norms_keep_their_activation():
    """timm's BatchNormAct2d holds one, which torch's converter drops."""
    torch.manual_seed(0)
    plain, synced = (
        make_detector(backbone="efficientnet_lite0"),
        make_detector(backbone="efficientnet_lite0", norm="sync"),
    )
    assert any(isinstance(m, torch.nn.SyncBatchNorm) for m in synced.modules())
    synced.load_state_dict(plain.state_dict())
    x = torch.rand(1, 3, 96, 320)
    for ours, theirs in zip(plain.eval().backbone(x), synced.eval().backbone(x), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_drop_path_reaches_the_backbone():
    rates = [
        getattr(m, "drop_prob", None) for m in make_detector(backbone="resnet10t", drop_path=0.3).backbone.modules()
    ]
    assert max(r for r in rates if r) == pytest.approx(0.3)


def test_model_config_survives_json():
    again = ModelConfig(**json.loads(json.dumps(dataclasses.asdict(MODEL))))
    assert again == MODEL
    assert isinstance(again.size_prior[0], tuple)
