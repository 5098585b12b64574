"""Which cells answer for which objects: hand-made scenes, conflicts, borders, all real labels, no wait for a device."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import KITTI_SIZES
from PIL import Image
from scenes import (
    BEHIND,
    CAR,
    FAR,
    MODEL,
    PERSON,
    SIZE,
    TRUNCATED,
    K,
    all_losses,
    encode,
    make_batch,
    make_sample,
    random_outputs,
)
from torch.utils._python_dispatch import TorchDispatchMode

from data import DataConfig, Detection3D, Frames, Part, collate
from losses import keep_best
from model import Detector, ModelConfig
from scene.frames import Frame, make_labels, whole_view
from scene.geometry import wrap_angle
from targets import assign, level_of, measure_priors, share_out, target_points


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Detector(MODEL)


def cells(targets, model, image=0):
    """{object: sorted pixel positions of its cells} of one image."""
    found = {}
    for slot in targets.positive[image].nonzero()[:, 0].tolist():
        pixel = model.location_pixel[targets.location[image, slot]].tolist()
        found.setdefault(targets.object[image, slot].item(), []).append(tuple(pixel))
    return {key: sorted(value) for key, value in found.items()}


def at_pixel(u, v, side, depth=20.0, name="Car"):
    """An object whose centre projects to (u, v), with a visible box of that side around it."""
    center = ((u - K[0, 2]) / K[0, 0] * depth, (v - K[1, 2]) / K[1, 1] * depth, depth)
    return (name, center, (4, 1.5, 1.8), 0.3, (u - side / 2, v - side / 2, u + side / 2, v + side / 2))


def test_an_object_gets_the_nine_cells_around_its_centre(model):
    batch = make_batch([at_pixel(100, 50, 20)])  # level 0, stride 8: cells at 3.5, 11.5, ...
    found = cells(assign(batch, MODEL), model)
    assert found == {0: sorted((u, v) for u in (91.5, 99.5, 107.5) for v in (43.5, 51.5, 59.5))}


@pytest.mark.parametrize(("side", "stride"), [(20, 8), (24, 8), (25, 16), (64, 16), (65, 32)])
def test_the_longer_side_chooses_the_level(model, side, stride):
    targets = assign(make_batch([at_pixel(150, 48, side)]), MODEL)
    assert set(model.location_stride[targets.location[targets.positive]].tolist()) == {stride}


def test_one_level_needs_no_borders():
    assert level_of(torch.tensor([[0.0, 0, 500, 500]]), ()).tolist() == [0]


def test_cells_outside_the_image_are_left_out(model):
    found = cells(assign(make_batch([at_pixel(2, 2, 4)]), MODEL), model)
    assert found == {0: [(3.5, 3.5), (3.5, 11.5), (11.5, 3.5), (11.5, 11.5)]}


def test_the_nearest_centre_wins_a_cell(model):
    left, right = (
        at_pixel(99.5, 51.5, 20),
        at_pixel(115.5, 51.5, 20, depth=10),
    )  # two cells apart: the column between is shared
    found = cells(assign(make_batch([left, right]), MODEL), model)
    assert len(found[0]) + len(found[1]) == 15
    assert not set(found[0]) & set(found[1])
    assert {(107.5, v) for v in (43.5, 51.5, 59.5)} <= set(found[1])  # equally far: the nearer object wins
    closer = cells(assign(make_batch([at_pixel(101.5, 51.5, 20), right]), MODEL), model)
    assert {(107.5, v) for v in (43.5, 51.5, 59.5)} <= set(closer[0])  # its centre is nearer now


@pytest.mark.parametrize(
    "objects",
    [[CAR, PERSON, FAR], [at_pixel(99.5, 51.5, 20), at_pixel(115.5, 51.5, 20, 10), at_pixel(107.5, 60, 20, 15)]],
)
def test_the_order_of_objects_does_not_matter(model, objects):
    forward, backward = (cells(assign(make_batch(o), MODEL), model) for o in (objects, objects[::-1]))
    assert forward == {len(objects) - 1 - key: value for key, value in backward.items()}


def test_equal_objects_are_settled_by_their_order_and_lose_no_cell(model):
    found = cells(assign(make_batch([CAR, CAR]), MODEL), model)
    assert list(found) == [0]
    assert len(found[0]) == 9


def test_cells_are_shared_out_as_a_plain_loop_does():
    rng = np.random.default_rng(0)
    location = torch.from_numpy(rng.integers(0, 30, (2, 12, 9)))
    proposed, distance = (
        torch.from_numpy(rng.random((2, 12, 9)) < 0.8),
        torch.from_numpy(rng.integers(0, 4, (2, 12, 9)) / 2.0),
    )
    depth = torch.from_numpy(rng.integers(1, 4, (2, 12)) * 10.0)
    place, positive = share_out(location, proposed, distance, depth, 30)
    for image in range(2):
        winners = {}
        for slot in range(12 * 9):
            o, c = divmod(slot, 9)
            if proposed[image, o, c]:
                rank = (distance[image, o, c].item() + 1e-4 * depth[image, o].item(), slot)
                winners[location[image, o, c].item()] = min(winners.get(location[image, o, c].item(), (9, 9)), rank)
        assert {(place[image, s].item(), s) for s in positive[image].nonzero()[:, 0].tolist()} == {
            (p, s) for p, (_, s) in winners.items()
        }


def test_a_truncated_centre_goes_to_the_border_on_the_line_from_the_box(model):
    batch = make_batch([TRUNCATED])
    pixel, point, usable = target_points(batch, *SIZE)
    box = batch["box"][0, 0]
    middle = (box[:2] + box[2:]) / 2
    assert pixel[0, 0, 0] > 319
    assert point[0, 0, 0] == pytest.approx(319)
    share = (319 - middle[0]) / (pixel[0, 0, 0] - middle[0])
    assert point[0, 0, 1].item() == pytest.approx((middle[1] + share * (pixel[0, 0, 1] - middle[1])).item(), abs=1e-3)
    assert usable[0, 0]
    targets = assign(batch, MODEL)
    assert targets.positive.any()
    torch.testing.assert_close(targets.pixel[0, 0], pixel[0, 0])  # the offset still points at the true centre


def test_a_centre_inside_the_image_is_its_own_point():
    pixel, point, _ = target_points(make_batch([CAR, PERSON, FAR]), *SIZE)
    torch.testing.assert_close(pixel[0, :3], point[0, :3])


def test_an_object_behind_the_camera_is_trained_in_2d_only(model):
    targets = assign(make_batch([BEHIND]), MODEL)
    assert targets.positive.any()
    assert not targets.center_ok[targets.positive].any()
    assert not targets.full_ok[targets.positive].any()
    middle = torch.tensor([(200 + 319) / 2, (60 + 95) / 2])
    cell = model.location_pixel[targets.location[targets.positive]]
    assert (cell - middle).abs().max() <= 1.5 * 32
    for field in dataclasses.fields(targets):
        value = getattr(targets, field.name)
        assert torch.isfinite(value.float()).all(), field.name


def test_the_visible_centre_can_be_asked_for():
    batch = make_batch([TRUNCATED])
    _, point, _ = target_points(batch, *SIZE, projected=False)
    torch.testing.assert_close(point[0, 0], (batch["box"][0, 0, :2] + batch["box"][0, 0, 2:]) / 2)


def test_centerness_falls_with_the_distance_in_strides(model):
    targets = assign(make_batch([at_pixel(99.5, 51.5, 20)]), MODEL)  # exactly on a cell
    values = sorted(targets.centerness[targets.positive].tolist())
    expected = [np.exp(-2.5 * d / (2**0.5 * 1.5)) for d in [2**0.5] * 4 + [1] * 4 + [0]]
    np.testing.assert_allclose(values, expected, rtol=1e-5)


def test_an_empty_image_has_no_positive(model):
    targets = assign(make_batch([], [CAR]), MODEL)
    assert targets.positive.sum(1).tolist() == [0, 9]
    assert not targets.location[~targets.positive].any()


def test_padding_is_never_positive():
    batch = make_batch([CAR])
    targets = assign(batch, MODEL)
    assert set(targets.object[targets.positive].tolist()) == {0}
    assert batch["valid"].sum() == 1


def test_ignore_regions_cover_their_cells(model):
    targets = assign(make_batch([CAR], ignore=[(100, 40, 140, 60)]), MODEL)
    pixel = model.location_pixel
    inside = (pixel[:, 0] >= 100) & (pixel[:, 0] <= 140) & (pixel[:, 1] >= 40) & (pixel[:, 1] <= 60)
    assert torch.equal(targets.ignored[0], inside)
    assert inside.any()
    assert not assign(make_batch([CAR]), MODEL).ignored.any()  # padded regions are empty


@pytest.mark.parametrize("objects", [[CAR, PERSON, FAR], [TRUNCATED, CAR], [PERSON]])
def test_decode_inverts_encode(model, objects):
    """Every value of every positive: boxes, depth by both estimators, size, centre, angles."""
    batch = make_batch(objects)
    targets = assign(batch, MODEL)
    decoded = model.decode(encode(targets, model, batch["K"]), targets.location, targets.label, batch["K"])
    rows = targets.positive & targets.center_ok
    assert rows.sum() >= 4

    def same(ours, theirs, **tolerance):
        torch.testing.assert_close(ours[rows], theirs[rows], **{"rtol": 1e-3, "atol": 2e-2, **tolerance})

    for k in range(3):
        same(decoded.depth[..., k], targets.center[..., 2])
    same(decoded.center, targets.center)
    same(decoded.size, targets.size)
    same(decoded.pixel, targets.pixel)
    same(decoded.full_box, targets.full_box, atol=0.05)
    inside = ((model.location_pixel[targets.location] - targets.box[..., :2]).amin(-1) > 0.1) & (
        (targets.box[..., 2:] - model.location_pixel[targets.location]).amin(-1) > 0.1
    )  # the visible box cannot be told from a cell outside it
    torch.testing.assert_close(decoded.box[rows & inside], targets.box[rows & inside], rtol=1e-3, atol=0.05)
    sine, cosine = decoded.double_alpha.unbind(-1)
    assert (torch.cos(torch.atan2(sine, cosine) - 2 * targets.alpha)[rows] > 1 - 1e-5).all()
    assert (torch.cos(torch.atan2(*decoded.yaw_vector.unbind(-1)) - targets.yaw)[rows] > 1 - 1e-5).all()
    known = rows & targets.velocity_ok
    torch.testing.assert_close(decoded.velocity[known], targets.velocity[known])
    known = rows & (targets.attribute >= 0)
    assert torch.equal(decoded.attribute.argmax(-1)[known], targets.attribute[known])


def test_encoded_truth_is_detected_as_it_is(model):
    """The whole way: objects, targets, raw outputs, ranking, suppression, boxes."""
    objects = [CAR, PERSON, FAR]
    batch = make_batch(objects)
    targets = assign(batch, MODEL)
    logits = torch.full((1, len(model.location_stride), 3), -12.0)
    raw = torch.zeros(1, len(model.location_stride), sum(model.fields.values()))
    encoded = encode(targets, model, batch["K"])
    for slot in targets.positive[0].nonzero()[:, 0].tolist():
        logits[0, targets.location[0, slot], targets.label[0, slot]] = 12.0
        raw[0, targets.location[0, slot]] = encoded[0, slot]
    model.forward = lambda image, K: (logits, raw)
    try:
        found = model.detect(batch["image"], batch["K"])[0]
    finally:
        del model.forward
    for i in range(3):
        row = (found["center"] - batch["center"][0, i]).norm(dim=-1).argmin()
        torch.testing.assert_close(found["center"][row], batch["center"][0, i], rtol=1e-3, atol=0.02)
        torch.testing.assert_close(found["size"][row], batch["size"][0, i], rtol=1e-3, atol=1e-3)
        assert abs(wrap_angle(found["yaw"][row] - batch["yaw"][0, i])) < 1e-3
        assert found["label"][row] == batch["label"][0, i]
        assert found["score"][row] > 0.4
        if objects[i] is not FAR:  # whose motion nobody knows
            torch.testing.assert_close(found["velocity"][row], batch["velocity"][0, i])
            assert MODEL.attribute_names[found["attribute"][row]] == objects[i][6]


class NoHostSync(TorchDispatchMode):
    """Fails on operators whose result a host would have to wait for."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.name()
        assert not any(
            word in name
            for word in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")
        ) or (name.startswith(("aten::greater_equal", "aten::less_equal", "aten::not_equal"))), name
        if name.startswith(("aten::index.Tensor", "aten::index_put")):
            assert not any(i is not None and i.dtype == torch.bool for i in arguments[1]), f"{name} with a mask"
        return function(*arguments, **(options or {}))


def said_of(targets, **fields):
    """What `keep_best` reads of a `Decoded`."""
    return SimpleNamespace(**{"box": targets.box, **fields})


def test_an_object_keeps_its_best_cells(model):
    """As many as the overlaps of its nine boxes sum up to, the best by score and overlap; a hopeless one keeps one."""
    batch = make_batch([at_pixel(100, 50, 20), at_pixel(200, 40, 40)])
    targets = assign(batch, MODEL)
    logits, share = (
        torch.zeros(1, len(model.location_stride), len(MODEL.classes)),
        torch.zeros(1, targets.object.shape[1]),
    )
    share[0, :9] = torch.tensor(
        [0.9, 0.5, 0.8, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]
    )  # 2.8 in all; the other object's overlap nowhere
    side = targets.box[..., 2:3] - targets.box[..., :1]
    box = torch.cat(
        [targets.box[..., :2], targets.box[..., 2:3] - side * (1 - share[..., None]), targets.box[..., 3:]], -1
    )
    kept = keep_best(targets, said_of(targets, box=box), logits, 16)
    assert kept.positive[0, :9].nonzero()[:, 0].tolist() == [0, 1, 2]
    assert kept.positive[0, 9:18].sum() == 1
    assert kept.positive.sum() == 4  # and padding none
    logits[0, targets.location[0, 3], targets.label[0, 3]] = 20.0  # sqrt(1) .1 against sqrt(.5) .9, .5, .8
    logits[0, targets.location[0, [0, 1]], targets.label[0, 0]] = -20.0
    kept = keep_best(targets, said_of(targets, box=box), logits, 16)
    assert kept.positive[0, :9].nonzero()[:, 0].tolist() == [2, 3, 4]
    assert keep_best(targets, said_of(targets), logits, 16).positive.equal(
        targets.positive
    )  # who overlaps wholly keeps all


def test_what_is_not_finite_keeps_its_cell(model):
    """Else a broken output would be background, and the loss finite."""
    targets = assign(make_batch([CAR]), MODEL)
    logits, box = torch.zeros(1, len(model.location_stride), len(MODEL.classes)), targets.box.clone()
    box[0, :, 2] = box[0, :, 0] + 0.01
    box[0, 4] = torch.nan
    kept = keep_best(targets, said_of(targets, box=box), logits, 16)
    assert kept.positive[0].nonzero()[:, 0].tolist() == [4]


def test_targets_and_losses_never_wait_for_the_device(model):
    batch = make_batch([CAR, TRUNCATED, BEHIND], [], ignore=[(100, 40, 140, 60)])
    logits, raw = random_outputs(model, 2)
    with NoHostSync():
        losses, _ = all_losses(model, batch, logits, raw, best=True)
        sum(losses.values()).backward()
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoHostSync():
        losses["loss_cls"].item()
    with pytest.raises(AssertionError, match="with a mask"), NoHostSync():
        raw[raw > 0]


def test_shapes_depend_on_the_padded_count_only():
    shapes = {tuple(assign(make_batch(scene), MODEL).location.shape) for scene in ([], [CAR], [CAR] * 16)}
    assert shapes == {(1, 16 * 9)}


def test_every_real_label_gets_a_positive_location(kitti_frames):
    """Cars, pedestrians and cyclists of all real frames, truncated ones too, as seen without augmentation."""
    config, size = ModelConfig(), (384, 1280)
    every = [Frame(id, None, K, labels.moved(offset), offset) for id, labels, K, offset in kitti_frames]
    dataset = Detection3D(every, config, DataConfig())
    count, covered = 0, 0
    for start in range(0, len(every), 64):
        samples = []
        for frame in every[start : start + 64]:
            sample = dataset.sample_from(frame, whole_view(*KITTI_SIZES[round(frame.K[0, 0], 4)], size))
            samples.append({**sample, **dict.fromkeys(("image", "index"), torch.zeros(1))})
        batch = collate(samples)
        targets = assign(batch, config)
        has = torch.zeros(batch["valid"].shape, dtype=torch.long).scatter_add(
            1, targets.object, targets.positive.long()
        )
        count += int(batch["valid"].sum())
        covered += int((has[batch["valid"]] > 0).sum())
    labelled = sum(np.isin(f.labels.name.astype(str), config.classes).sum() for f in every)
    assert covered == count, (covered, count, labelled)
    assert count >= 0.999 * labelled  # those at least a pixel wide and high: nothing else is dropped on the way


def test_priors_are_the_means_of_the_labels(tmp_path):
    Image.new("RGB", (320, 96)).save(tmp_path / "a.png")
    sample_frames = []
    for i, scene in enumerate(([CAR, PERSON], [FAR], [])):
        batch = make_sample(*scene)
        labels = make_labels([o[0] for o in scene], batch["box"].numpy(), [o[2] for o in scene] or np.zeros((0, 3)),
                             [o[1] for o in scene] or np.zeros((0, 3)), [o[3] for o in scene])  # fmt: skip
        sample_frames.append(Frame(str(i), tmp_path / "a.png", K, labels, np.zeros(3)))
    config = dataclasses.replace(MODEL, size_prior=(), depth_mean=(), depth_std=())
    repeated = Frames([Part(sample_frames, repeat=2)])  # repeats do not count twice
    twice = Detection3D(repeated, config, DataConfig(), training=True)
    measured = measure_priors(twice, config)
    np.testing.assert_allclose(measured.size_prior[0], [4.2, 1.55, 1.85], atol=1e-3)
    np.testing.assert_allclose(measured.size_prior[1], [0.7, 1.8, 0.6], atol=1e-3)
    everything = np.mean([CAR[2], PERSON[2], FAR[2]], axis=0)
    np.testing.assert_allclose(measured.size_prior[2], everything, atol=1e-3)  # no cyclist: as all objects
    assert measured.depth_mean[0] == pytest.approx(
        np.mean([16, 12, 40]) * 700 / 185, rel=1e-3
    )  # fewer than four: as all objects
    assert measure_priors(twice, MODEL) == MODEL  # what is set stays
    with pytest.raises(ValueError, match="none of the 1 training frames holds an object of Car, Pedestrian, Cyclist"):
        measure_priors(Detection3D(sample_frames[2:], config, DataConfig(), training=True), config)
