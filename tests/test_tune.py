"""Starting from another model: what is matched by name, what is told, and what stays as it is."""

import dataclasses
import json
import re

import pytest
import torch
from conftest import tiny
from safetensors.torch import load_file, save_file
from test_train import here  # noqa: F401  # a fixture

from config import Config, TrainConfig, override, to_dict
from engine import weights
from engine.optimizer import make_optimizer, set_lr
from engine.tune import inherit_priors, load_weights, take_architecture
from engine.weights import find_weights
from model import Detector, ModelConfig

NAMES = ("Car", "Pedestrian", "Cyclist")
SIZES = ((4.0, 1.5, 1.7), (0.8, 1.8, 0.7), (1.8, 1.7, 0.6))
BASE = ModelConfig(
    backbone="test_resnet",
    size=(96, 320),
    channels=32,
    classes=NAMES,
    size_prior=SIZES,
    depth_mean=(30.0, 20.0, 10.0),
    depth_std=(9.0, 6.0, 3.0),
    score_threshold=0.0,
)


def make(seed=0, **changes):
    torch.manual_seed(seed)
    return Detector(dataclasses.replace(BASE, **changes))


def written(folder, net, config=True):
    folder.mkdir()
    save_file(net.state_dict(), folder / "model.safetensors")
    if config:
        (folder / "config.json").write_text(json.dumps(to_dict(Config(model=net.config))))
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """(folder, detector) of a model whose class outputs differ much."""
    net = make()
    with torch.no_grad():
        net.class_predictor.weight.mul_(50)
        net.class_predictor.bias.copy_(torch.tensor([-1.0, -1.1, -1.2]))
    return written(tmp_path_factory.mktemp("source") / "a", net), net


def test_permuted_classes_detect_the_same_bit_for_bit(source):
    folder, net = source
    order = ("Cyclist", "Car", "Pedestrian")
    asked = dataclasses.replace(BASE, classes=order, size_prior=(), depth_mean=(), depth_std=())
    measured = dataclasses.replace(
        asked, size_prior=((9.0, 9.0, 9.0),) * 3, depth_mean=(1.0,) * 3, depth_std=(1.0,) * 3
    )
    torch.manual_seed(1)
    other = Detector(inherit_priors(Config(model=asked, load_from=str(folder)), measured))
    lines = load_weights(other, folder)
    assert len(lines) == 1
    assert lines[0].endswith("tensors; classes kept Cyclist, Car, Pedestrian")
    image = torch.randint(0, 255, (1, 96, 320, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    K = torch.tensor([[[200.0, 0, 160], [0, 200, 48], [0, 0, 1]]])
    (first,), (second,) = (model.eval().detect(image, K) for model in (net, other))
    net.train()
    names = [[model.config.classes[i] for i in found["label"]] for model, found in ((net, first), (other, second))]
    assert len({*names[0]}) == 3
    assert names[0] == names[1]
    for name in first.keys() - {"label"}:
        assert torch.equal(first[name], second[name]), name


def test_classes_that_are_added_or_removed(source):
    folder, net = source
    other = make(1, classes=("Van", "Car"), size_prior=SIZES[:2])
    fresh = other.class_predictor.weight.clone()
    (line,) = load_weights(other, folder)
    assert line.endswith("tensors; classes kept Car; new Van; dropped Pedestrian, Cyclist")
    assert torch.equal(other.class_predictor.weight[1], net.class_predictor.weight[0])
    assert other.class_predictor.bias[1] == -1
    assert torch.equal(other.class_predictor.weight[0], fresh[0])
    assert torch.equal(other.box_predictor.weight, net.box_predictor.weight)
    nothing = make(1, classes=("Van",), size_prior=SIZES[:1])
    line, more = load_weights(nothing, folder)
    assert line.endswith("; classes new Van; dropped Car, Pedestrian, Cyclist")
    assert more == "  class_predictor: 0 of 2 tensors (2 of other shapes or names)"


def test_outputs_are_matched_by_field(source, tmp_path):
    folder, net = source
    attributes = {"Car": ("moving", "parked")}
    other = make(1, predict_yaw=True, velocity=True, attributes=attributes)
    fresh = other.box_predictor.weight.clone()
    (line,) = load_weights(other, folder)
    assert line.endswith("alpha, direction; new yaw, velocity, attribute (moving, parked)")
    assert torch.equal(other.box_predictor.weight[:22], net.box_predictor.weight)
    assert torch.equal(other.box_predictor.weight[22:], fresh[22:])
    rich = written(tmp_path / "rich", other)
    for names, kept in ((attributes, 2), ({"Car": ("moving", "standing")}, 0)):  # as many, of other meaning
        third = make(2, velocity=True, attributes=names)
        fresh = third.box_predictor.weight.clone()
        (line,) = load_weights(third, rich)
        assert "dropped yaw" in line
        assert torch.equal(
            third.box_predictor.weight[22:24], other.box_predictor.weight[24:26]
        )  # without yaw, velocity moves up
        expected = other.box_predictor.weight[26:] if kept else fresh[24:]
        assert torch.equal(third.box_predictor.weight[24:], expected)


def test_what_does_not_fit_is_told_by_module(source, tmp_path):
    folder, net = source
    other = make(1, channels=16)
    lines = load_weights(other, folder)
    assert re.search(r": \d+ of \d+ tensors; classes new Car, Pedestrian, Cyclist$", lines[0])
    assert lines[1].startswith("  fpn: 0 of 12 tensors (12 of other shapes or names)")
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        "fpn",
        "class_tower",
        "box_tower",
        "class_predictor",
        "box_predictor",
    ]
    assert all(
        torch.equal(value, other.backbone.state_dict()[name]) for name, value in net.backbone.state_dict().items()
    )
    (tmp_path / "foreign").mkdir()
    save_file({"layers.0.q.weight": torch.ones(3, 3)}, tmp_path / "foreign/model.safetensors")
    for text in ("{}", '{"model": "llama"}', "[]"):
        (tmp_path / "foreign/config.json").write_text(text)
        with pytest.raises(
            ValueError, match=r"foreign.model\.safetensors: none of its 1 tensors fits this architecture$"
        ):
            load_weights(make(), tmp_path / "foreign")
    (tmp_path / "foreign/config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not JSON"):
        load_weights(make(), tmp_path / "foreign")
    line, *_ = load_weights(make(), written(tmp_path / "bare", net, config=False))
    assert line.endswith("tensors; class outputs in the order they lie in: no config.json names them")


def test_priors_come_along_where_they_mean_the_same(tmp_path):
    asked = dataclasses.replace(BASE, classes=("Van", "Car"), size_prior=(), depth_mean=(), depth_std=())
    sizes = ((5.0, 2.0, 2.0), (9.0, 9.0, 9.0))
    measured = dataclasses.replace(asked, size_prior=sizes, depth_mean=(1.0,) * 3, depth_std=(2.0,) * 3)

    def inherit(name, asked=asked, **changes):
        folder = written(tmp_path / name, make(**changes))
        return inherit_priors(Config(model=asked, load_from=str(folder)), measured)

    model = inherit("same")
    assert model.size_prior == ((5.0, 2.0, 2.0), SIZES[0])
    assert (model.depth_mean, model.depth_std) == (BASE.depth_mean, BASE.depth_std)
    model = inherit("other metres", virtual_focal=500.0)
    assert (model.depth_mean, model.size_prior[1]) == (measured.depth_mean, SIZES[0])
    assert inherit("all are set", asked=measured) == measured


def test_weights_come_from_the_hub(source, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(weights, "snapshot_download", lambda name, allow_patterns: asked.append(name) or str(source[0]))
    monkeypatch.chdir(tmp_path)
    assert find_weights("someone/cars") == source[0] / "model.safetensors"
    (tmp_path / "runs/type").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"runs/typo: no such run, checkpoint or file; near it are type"):
        find_weights("runs/typo")
    assert asked == ["someone/cars"]

    def missing(name, allow_patterns):
        raise OSError("404\nfor url")

    monkeypatch.setattr(weights, "snapshot_download", missing)
    with pytest.raises(
        ValueError, match="someone/cars: no such folder here, and not loaded from the hub either: 404 for url"
    ):
        find_weights("someone/cars")


def test_the_architecture_comes_along(source, tmp_path):
    config = override(
        Config(), [f"load_from={source[0]}", "load_model=true", "model.classes=Van,Car", f"out={tmp_path}"]
    )
    model = take_architecture(config).model
    assert (model.backbone, model.channels, model.size, model.classes) == ("test_resnet", 32, (96, 320), ("Van", "Car"))
    assert model.size_prior == ()
    with pytest.raises(
        ValueError, match="load_model=true takes the architecture of load_from along, and load_from is empty"
    ):
        override(Config(), ["load_model=true"])
    bare = written(tmp_path / "bare", source[1], config=False)
    with pytest.raises(
        ValueError, match=r"bare: load_model=true expects a config\.json with a section 'model' beside the weights"
    ):
        take_architecture(override(config, [f"load_from={bare}"]))


def test_a_fine_tuned_run_keeps_what_is_frozen_and_goes_on(tiny_run, tmp_path, here):  # noqa: F811
    """Of which may be a whole half of the head."""
    world, whole, _ = tiny_run
    more = [
        f"load_from={whole}",
        "load_model=true",
        "train.freeze=backbone,fpn,box_tower,box_predictor",
        "train.checkpoint_backbone=true",
        "model.classes=Pedestrian,Van,Car",
        "data.neighbours=[]",
    ]
    arguments = [a for a in tiny(world, tmp_path / "a") if not a.startswith(("model.", "train.steps"))]
    code, out, err = here(*arguments, *more, "train.steps=2")
    assert code == 0, err
    assert "load_model: model.backbone=test_resnet, " in out
    assert re.search(
        r"load_from .*: (\d+) of \1 tensors; classes kept Pedestrian, Car; new Van; dropped Cyclist\n", out
    )
    before, after = (load_file(find_weights(folder)) for folder in (whole, tmp_path / "a"))
    still = [name for name in before if name.startswith(("backbone.", "fpn.", "box_"))]
    assert any("running_mean" in name for name in still)
    assert all(torch.equal(before[name], after[name]) for name in still)
    assert not torch.equal(before["class_tower.0.weight"], after["class_tower.0.weight"])
    old, new = (json.loads((folder / "config.json").read_text())["model"] for folder in (whole, tmp_path / "a"))
    assert new["size_prior"][2] == old["size_prior"][0]
    assert new["depth_mean"] == old["depth_mean"]
    code, out, err = here(*arguments, *more, f"load_from={tmp_path / 'gone'}", "train.steps=1")
    assert code == 2
    assert "it has 2 steps, and this run would end after 1" in err  # told once its own checkpoint is loaded
    assert "resumed from" in out
    assert "tensors" not in out


def test_frozen_modules_do_not_learn():
    net = make()
    net.freeze(("backbone.layer1", "class_tower.0.weight"))
    assert not net.class_tower[0].weight.requires_grad
    assert net.class_tower[1].weight.requires_grad
    modes = {
        name.partition(".")[2].partition(".")[0]: module.training
        for name, module in net.named_modules()
        if "bn" in name
    }
    assert modes["layer1"] is False
    assert modes["layer2"] is True
    with pytest.raises(
        ValueError,
        match=r"no parameter lies in 'back', expected backbone, fpn, class_tower, box_tower, class_pre",
    ):
        net.freeze(("back",))
    with pytest.raises(ValueError, match="nothing is left to learn"):
        net.freeze([name for name, _ in net.named_children()])


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd"])
def test_the_backbone_learns_at_its_own_rate(name):
    net = make()
    plain, scaled = (
        make_optimizer(net, TrainConfig(optimizer=name, lr=0.01, backbone_lr=factor)) for factor in (1.0, 0.1)
    )
    assert [len(group["params"]) for group in plain.param_groups] == [
        sum(p.requires_grad and (p.ndim > 1) == matrix for p in net.parameters()) for matrix in (False, True)
    ]
    set_lr(scaled, 0.02)
    rates = {p: (group["lr"], group["weight_decay"]) for group in scaled.param_groups for p in group["params"]}
    assert len(rates) == sum(p.requires_grad for p in net.parameters())
    for key, p in net.named_parameters():
        if p.requires_grad:
            rate, decay = rates[p]
            assert rate == pytest.approx(0.002 if key.startswith("backbone.") else 0.02)
            assert decay == (0.01 if p.ndim > 1 else 0)
    with pytest.raises(ValueError, match=r"train\.backbone_lr is 0\.0, expected > 0; train\.freeze=backbone keeps"):
        override(Config(), ["train.backbone_lr=0"])
