"""The losses: hand-worked values, perfect predictions, edges and extremes, and what they must not depend on."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from scenes import (
    BEHIND,
    CAR,
    CROSSING,
    FAR,
    MODEL,
    PERSON,
    TRUNCATED,
    all_losses,
    count_positives,
    encode,
    make_batch,
    random_outputs,
)

import losses as module
from losses import LossConfig, compute_losses, half_angle, keep_best
from model import IMPOSSIBLE, Decoded, Detector
from targets import Targets, assign

ALL = MODEL.attribute_names
NAMES = tuple(field.name for field in dataclasses.fields(LossConfig))
BOXES = ("loss_bbox", "loss_full_bbox")  # computed at once
SCENES = {
    "empty": [[]],
    "single": [[CAR]],
    "truncated": [[TRUNCATED]],
    "crossing the camera plane": [[CROSSING]],
    "behind the camera": [[BEHIND]],
    "mixed": [[CAR, PERSON, FAR, TRUNCATED], [], [BEHIND, CROSSING, CAR]],
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Detector(MODEL)


def hand_made(slots=1, **changes):
    """Targets of `slots` positives of one image: cars of 4 x 1.5 x 2 m straight ahead at 10 m, yaw 0, box of 10 px."""
    row = lambda *values: torch.tensor(values).expand(1, slots, -1).clone()  # noqa: E731
    one = torch.ones(1, slots, dtype=torch.bool)
    targets = Targets(
        location=torch.arange(slots)[None],
        positive=one,
        object=torch.arange(slots)[None],
        label=torch.zeros(1, slots, dtype=torch.long),
        center=row(0.0, 0.0, 10.0),
        size=row(4.0, 1.5, 2.0),
        yaw=torch.zeros(1, slots),
        alpha=torch.zeros(1, slots),
        box=row(0.0, 0.0, 10.0, 10.0),
        full_box=row(0.0, 0.0, 10.0, 10.0),
        full_ok=one,
        center_ok=one,
        pixel=row(5.0, 5.0),
        centerness=torch.ones(1, slots),
        ignored=torch.zeros(1, 2, dtype=torch.bool),
        velocity=row(3.0, -4.0),
        velocity_ok=one,
        attribute=torch.zeros(1, slots, dtype=torch.long),
    )
    return dataclasses.replace(targets, **{k: torch.as_tensor(v) for k, v in changes.items()})


def truth_of(targets, **changes):
    """`Decoded` that says what the targets say, with deviations."""
    zero = torch.zeros_like(targets.yaw)
    decoded = Decoded(
        box=targets.box,
        full_box=targets.full_box,
        pixel=targets.pixel,
        center=targets.center,
        size=targets.size,
        depth=targets.center[..., 2:].expand(-1, -1, 3),
        log_sigma=zero[..., None].expand(-1, -1, 3),
        double_alpha=torch.stack([torch.sin(2 * targets.alpha), torch.cos(2 * targets.alpha)], -1),
        direction=torch.stack([zero + 30, zero - 30], -1).where((torch.sin(targets.alpha - math.pi / 4) < 0)[..., None],
                                                               torch.stack([zero - 30, zero + 30], -1)),
        yaw_vector=torch.stack([torch.sin(targets.yaw), torch.cos(targets.yaw)], -1),
        centerness=zero + 40,
        velocity=targets.velocity,
        attribute=40 * F.one_hot(targets.attribute.clamp(min=0), 3).float() + torch.tensor([0, 0, IMPOSSIBLE]),
    )  # fmt: skip
    return dataclasses.replace(decoded, **{k: None if v is None else torch.as_tensor(v) for k, v in changes.items()})


CAMERA = torch.tensor([[[100.0, 0, 5], [0, 100, 5], [0, 0, 1]]])


def value_of(name, decoded, targets):
    extra = {
        "loss_location": [torch.full_like(targets.yaw, 8.0)],
        "loss_regress": [CAMERA],
        "loss_relative": [targets.yaw.shape[1]],
        "loss_attribute": [torch.tensor([[True, True, False], [False, False, False]])],
    }
    if name in BOXES:
        return module.loss_boxes(decoded, targets, [name]).item()
    return getattr(module, name)(decoded, targets, *extra.get(name, [])).item()


LN2, ROOT2 = math.log(2), math.sqrt(2)


@pytest.mark.parametrize(
    ("name", "targets", "decoded", "expected"),
    [
        ("loss_bbox", {}, {"box": [[[0.0, 0, 10, 20]]]}, 0.5),  # IoU 1/2, the hull is the union
        ("loss_bbox", {}, {"box": [[[20.0, 0, 30, 10]]]}, 4 / 3),  # apart: hull 300, union 200
        ("loss_full_bbox", {}, {"full_box": [[[-10.0, 0, 10, 10]]]}, 0.5),
        ("loss_full_bbox", {"full_ok": [[False]]}, {"full_box": [[[-10.0, 0, 10, 10]]]}, 0.0),
        ("loss_centerness", {"centerness": [[0.3]]}, {"centerness": [[0.0]]}, LN2),
        ("loss_centerness", {"centerness": [[0.25]]}, {"centerness": [[math.log(3.0)]]}, math.log(4) - math.log(3) / 4),
        ("loss_size", {}, {"size": [[[5.0, 1.5, 1.0]]]}, (0.25 + 0 + 0.5) / 3),
        ("loss_location", {}, {"pixel": [[[13.0, 5.0]]]}, 1 - 1 / 18),  # one stride of 8 px; smooth L1 from 1/9 on
        ("loss_location", {}, {"depth": [[[11.0, 10.0, 8.0]]]}, ROOT2 * (1 + 0 + 2) / 3),
        ("loss_location", {}, {"depth": [[[11.0, 10.0, 8.0]]], "log_sigma": [[[LN2] * 3]]}, ROOT2 / 2 + LN2),
        ("loss_location", {"center_ok": [[False]]}, {"depth": [[[11.0, 10.0, 8.0]]]}, 0.0),
        ("loss_y", {}, {"center": [[[3.0, 0.5, 9.0]]]}, 0.5),
        ("loss_y", {}, {"center": [[[0.0, 0.5, 10.0]]], "size": [[[4.0, 2.5, 2.0]]]}, 1.0),
        ("loss_y", {}, {"center": [[[0.0, -0.5, 10.0]]], "size": [[[4.0, 2.5, 2.0]]]}, 0.0),
        ("loss_regress", {}, {"pixel": [[[25.0, 5.0]]]}, 2 / 3 / 4),  # 20 px at 10 m with f = 100: 2 m sideways
        ("loss_regress", {}, {"depth": [[[12.0, 10.0, 10.0]]]}, 2 / 3 / 4),  # the fused depth only
        ("loss_regress", {}, {"size": [[[6.0, 1.5, 2.0]]]}, 1 / 3 / 4),  # every corner 1 m along the length
        ("loss_regress", {}, {"yaw_vector": [[[1.0, 0.0]]]}, 4 / 3 / 4),  # a quarter turn: (2, 1) to (1, -2) and so on
        ("loss_regress", {}, {"yaw_vector": None, "double_alpha": [[[0.0, -1.0]]]}, 4 / 3 / 4),
        ("loss_direction", {}, {"direction": [[[0.0, 0.0]]]}, LN2),
        ("loss_direction", {"alpha": [[math.pi / 2]]}, {"direction": [[[0.0, math.log(3)]]]}, math.log(4 / 3)),
        ("loss_cos", {}, {"double_alpha": [[[math.sin(math.pi / 3), 0.5]]]}, 0.5),  # 30 degrees off
        ("loss_cos", {}, {"double_alpha": [[[0.0, -1.0]]]}, 2.0),
        ("loss_alpha_constrain", {}, {"yaw_vector": [[[math.sin(math.pi / 3), 0.5]]]}, 0.5),
        ("loss_alpha_constrain", {"center": [[[10.0, 0.0, 10.0]]], "yaw": [[math.pi / 4]]}, {}, 0.0),  # the ray adds 45
        ("loss_alpha_constrain", {"center": [[[10.0, 0.0, 10.0]]]}, {}, 1 - math.cos(math.pi / 4)),
        ("loss_velocity", {}, {"velocity": [[[5.0, -4.0]]]}, 2 - 1 / 18),  # m/s; smooth L1 from 1/9 on
        ("loss_velocity", {}, {"velocity": [[[0.0, 0.0]]]}, 7 - 2 / 18),  # the sum over x and z
        ("loss_velocity", {}, {"velocity": [[[3.1, -4.0]]]}, 0.1**2 / (2 / 9)),
        ("loss_velocity", {"velocity_ok": [[False]]}, {"velocity": [[[5.0, -4.0]]]}, 0.0),
        ("loss_attribute", {}, {"attribute": [[[0.0, 0.0, IMPOSSIBLE]]]}, LN2),  # the third is of another family
        ("loss_attribute", {"attribute": [[1]]}, {"attribute": [[[0.0, math.log(3), IMPOSSIBLE]]]}, math.log(4 / 3)),
        ("loss_attribute", {"attribute": [[-1]]}, {"attribute": [[[0.0, 0.0, IMPOSSIBLE]]]}, 0.0),
        ("loss_attribute", {"attribute": [[2]]}, {"attribute": [[[0.0, 0.0, IMPOSSIBLE]]]}, 0.0),  # no car's
        ("loss_attribute", {"label": [[1]]}, {"attribute": [[[IMPOSSIBLE] * 3]]}, 0.0),  # a class without attributes
    ],
)  # fmt: skip
def test_values_worked_by_hand(name, targets, decoded, expected):
    targets = hand_made(**targets)
    assert value_of(name, truth_of(targets, **decoded), targets) == pytest.approx(expected, abs=1e-6)


def test_loss_cls_by_hand():
    """Logits 0, two locations, two classes, one positive: .25 and .75 times .25 ln 2."""
    targets = hand_made(label=[[1]])
    logits = torch.zeros(1, 2, 2)
    assert module.loss_cls(logits, targets).item() == pytest.approx((0.25 + 3 * 0.75) * 0.25 * LN2)
    ignored = dataclasses.replace(targets, ignored=torch.tensor([[True, True]]))  # a positive counts even there
    assert module.loss_cls(logits, ignored).item() == pytest.approx((0.25 + 0.75) * 0.25 * LN2)
    lost = dataclasses.replace(targets, positive=torch.tensor([[False]]))
    assert module.loss_cls(logits, lost).item() == pytest.approx(4 * 0.75 * 0.25 * LN2)
    logits[0, 0] = torch.tensor([-40.0, 40.0])
    logits[0, 1] = -40
    assert module.loss_cls(logits, targets).item() == pytest.approx(0, abs=1e-8)


def test_loss_relative_by_hand():
    """Two objects at 10 and 20 m, the first e times too far: both ordered pairs are off by 1, Huber .95, times two."""
    targets = hand_made(2, center=[[[0.0, 0, 10], [0, 0, 20]]])
    depth = torch.tensor([[[10 * math.e] * 3, [20.0] * 3]])
    assert value_of("loss_relative", truth_of(targets, depth=depth), targets) == pytest.approx(1.9, rel=1e-5)
    both = torch.tensor([[[30.0] * 3, [60.0] * 3]])
    assert value_of("loss_relative", truth_of(targets, depth=both), targets) == pytest.approx(
        0, abs=1e-6
    )  # only ratios count
    one = dataclasses.replace(targets, positive=torch.tensor([[True, False]]))
    assert value_of("loss_relative", truth_of(one, depth=depth), one) == 0


def test_near_pairs_weigh_more_in_loss_relative():
    """Objects at 10, 11 and 40 m; an error of the near pair costs more than the same error towards the far one."""
    targets = hand_made(3, center=[[[0.0, 0, 10], [0, 0, 11], [0, 0, 40]]])
    near, far = targets.center[..., 2:].repeat(1, 1, 3), targets.center[..., 2:].repeat(1, 1, 3)
    near[0, 0] *= math.e
    far[0, 2] *= math.e
    assert value_of("loss_relative", truth_of(targets, depth=near), targets) > 2 * value_of(
        "loss_relative", truth_of(targets, depth=far), targets
    )


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("loss_cls", "loss_location")])
def test_a_perfect_prediction_costs_nothing(name):
    for alpha, x in ((0.0, 0.0), (0.9, 4.0), (math.pi / 2, -3.0), (-math.pi / 2, 2.0), (2.5, 0.0), (-math.pi, 1.0)):
        center = torch.tensor([[[x, 1.0, 10.0], [2.0, 1.0, 18.0]]])
        angle = torch.full((1, 2), alpha)
        targets = hand_made(2, center=center, alpha=angle, yaw=angle + torch.atan2(center[..., 0], center[..., 2]))
        assert value_of(name, truth_of(targets), targets) == pytest.approx(0, abs=2e-6)


def test_the_centre_part_of_loss_location_vanishes():
    assert value_of("loss_location", truth_of(hand_made()), hand_made()) == 0  # with log sigma 0


def outputs_of_truth(model, batch):
    """Class logits and raw outputs that decode to the objects of a batch."""
    targets = assign(batch, model.config)
    images, count = len(batch["K"]), len(model.location_stride)
    logits = torch.full((images, count, len(model.config.classes)), -20.0)
    raw = torch.zeros(images, count, sum(model.fields.values()))
    encoded = encode(targets, model, batch["K"])
    for image, slot in targets.positive.nonzero().tolist():
        logits[image, targets.location[image, slot], targets.label[image, slot]] = 20.0
        raw[image, targets.location[image, slot]] = encoded[image, slot]
    return logits, raw


RISES = {  # output -> the losses that must rise when it is wrong; all others must stay
    "box": {"loss_bbox"},
    "full_box": {"loss_full_bbox"},
    "centerness": {"loss_centerness"},
    "offset": {"loss_location", "loss_y", "loss_regress", "loss_alpha_constrain"},
    "depth": {"loss_location", "loss_y", "loss_regress", "loss_relative"},
    "size": {"loss_size", "loss_location", "loss_y", "loss_regress", "loss_relative"},
    "alpha": {"loss_cos", "loss_alpha_constrain"},
    "direction": {"loss_direction"},
    "yaw": {"loss_regress", "loss_alpha_constrain"},
    "velocity": {"loss_velocity"},
    "attribute": {"loss_attribute"},
}


@pytest.mark.parametrize("field", RISES)
def test_a_wrong_output_raises_its_losses_and_no_other(model, field):
    batch = make_batch([PERSON, CAR, FAR])
    logits, raw = outputs_of_truth(model, batch)
    before, targets = all_losses(model, batch, logits, raw)
    start = sum(list(model.fields.values())[: list(model.fields).index(field)])
    end = start + model.fields[field]
    wrong = raw.clone()
    rows = targets.location[0, targets.positive[0] & (targets.object[0] == 1)]  # of the car
    right = wrong[0, rows, start:end]
    turn = torch.tensor([0.7, -0.4])
    change = {
        "direction": -2 * right,
        "alpha": turn,
        "yaw": turn,
        "depth": torch.tensor([0.3, 0]),
        "attribute": -2 * right,
    }
    wrong[0, rows, start:end] += change.get(field, torch.full_like(right, 0.4))
    after, _ = all_losses(model, batch, logits, wrong)
    rise = {name: (after[name] - before[name]).item() for name in NAMES}
    for name in RISES[field]:
        assert rise[name] > 1e-4, name
    for name in set(NAMES) - RISES[field]:
        assert abs(rise[name]) < 2e-5, name


def test_a_wrong_class_raises_only_loss_cls(model):
    batch = make_batch([CAR, FAR])
    logits, raw = outputs_of_truth(model, batch)
    before, _ = all_losses(model, batch, logits, raw)
    after, _ = all_losses(model, batch, logits.flip(-1), raw)
    assert after["loss_cls"] > before["loss_cls"] + 1
    assert all(after[name] == before[name] for name in NAMES if name != "loss_cls")


@pytest.mark.parametrize("outputs", ["usual", "+1e4", "-1e4", "mixed 1e4", "zero", "bf16"])
@pytest.mark.parametrize("scene", SCENES)
def test_values_and_gradients_are_finite(model, scene, outputs):
    batch = make_batch(*SCENES[scene], ignore=[(10, 10, 40, 40)])
    logits, raw = random_outputs(model, len(SCENES[scene]), seed=1)
    change = {
        "+1e4": lambda x: x * 0 + 1e4,
        "-1e4": lambda x: x * 0 - 1e4,
        "mixed 1e4": lambda x: x.sign() * 1e4,
        "zero": lambda x: x * 0,
    }
    with torch.no_grad():
        logits, raw = (change.get(outputs, lambda x: x)(x) for x in (logits, raw))
    kind = torch.bfloat16 if outputs == "bf16" else torch.float32
    logits, raw = logits.to(kind).requires_grad_(), raw.to(kind).requires_grad_()
    losses, _ = all_losses(model, batch, logits, raw)
    assert list(losses) == list(NAMES)
    for name, value in losses.items():
        assert value.dtype == torch.float32
        assert torch.isfinite(value), name
        for gradient in torch.autograd.grad(value, (logits, raw), retain_graph=True, allow_unused=True):
            assert gradient is None or torch.isfinite(gradient).all(), name


def test_bf16_outputs_are_computed_in_fp32(model):
    """Under autocast the values are those of the same numbers in fp32, bit for bit."""
    batch = make_batch([CAR, PERSON, FAR])
    logits, raw = (x.detach().bfloat16() for x in random_outputs(model, 1))
    with torch.autocast("cpu", torch.bfloat16):
        half, _ = all_losses(model, batch, logits, raw)
    full, _ = all_losses(model, batch, logits.float(), raw.float())
    assert all(torch.equal(half[name], full[name]) for name in NAMES)


@pytest.mark.parametrize("scene", SCENES)
def test_inputs_stay_as_they_were_and_twice_is_the_same(model, scene):
    batch = make_batch(*SCENES[scene])
    logits, raw = random_outputs(model, len(SCENES[scene]))
    before = {name: value.clone() for name, value in batch.items()}
    old = logits.detach().clone(), raw.detach().clone()
    first, targets = all_losses(model, batch, logits, raw)
    kept = {f.name: getattr(targets, f.name).clone() for f in dataclasses.fields(targets)}
    second = compute_losses(model, logits, raw, targets, batch, LossConfig(), count_positives(targets).clamp(min=1))
    assert all(torch.equal(first[name], value) for name, value in second.items())
    assert all(
        torch.equal(value.nan_to_num(), before[name].nan_to_num()) for name, value in batch.items()
    )  # NaN: velocity unknown
    assert all(torch.equal(value, getattr(targets, name)) for name, value in kept.items())
    assert torch.equal(logits, old[0])
    assert torch.equal(raw, old[1])


def test_the_order_of_objects_does_not_matter(model):
    objects = [CAR, PERSON, FAR, TRUNCATED, BEHIND]
    logits, raw = random_outputs(model, 1)
    forward, _ = all_losses(model, make_batch(objects), logits, raw)
    backward, _ = all_losses(model, make_batch(objects[::-1]), logits, raw)
    for name in NAMES:
        torch.testing.assert_close(forward[name], backward[name], rtol=1e-4, atol=1e-6)


def test_padding_does_not_matter(model):
    batch = make_batch([CAR, PERSON, TRUNCATED], ignore=[(10, 10, 40, 40)])
    wide = {**batch}
    for name in ("label", "center", "size", "yaw", "box", "full_box", "crosses", "velocity", "attribute", "valid"):
        rest = torch.zeros_like(batch[name]) if name == "valid" else batch[name][:, 3:4].expand_as(batch[name])
        wide[name] = torch.cat([batch[name], rest], 1)
    logits, raw = random_outputs(model, 1)
    narrow, wider = all_losses(model, batch, logits, raw)[0], all_losses(model, wide, logits, raw)[0]
    for name in NAMES:
        torch.testing.assert_close(narrow[name], wider[name], rtol=1e-5, atol=1e-7)


def test_a_batch_of_two_equals_two_batches_of_one(model):
    scenes = [[CAR, PERSON, FAR], [TRUNCATED, CROSSING]]
    logits, raw = random_outputs(model, 2)
    both, targets = all_losses(model, make_batch(*scenes), logits, raw)
    sums = dict.fromkeys(NAMES, 0.0)
    for i, scene in enumerate(scenes):
        one, own = all_losses(model, make_batch(scene), logits[i : i + 1], raw[i : i + 1])
        for name in NAMES:
            sums[name] += one[name] * count_positives(own)
    for name in NAMES:
        torch.testing.assert_close(both[name] * count_positives(targets), sums[name], rtol=1e-4, atol=1e-5)


def test_images_do_not_see_each_other(model):
    """The gradient of an image's outputs stays when its neighbour in the batch changes."""
    logits, raw = random_outputs(model, 2)
    gradients = []
    for other in ([FAR], [CROSSING, PERSON]):
        losses, targets = all_losses(model, make_batch([CAR, PERSON], other), logits, raw)
        gradients.append(torch.autograd.grad(sum(losses.values()) * count_positives(targets), raw)[0][0])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_unknown_velocities_and_attributes_teach_nothing(model):
    """Gradients reach outputs at objects whose motion is known, and there only attributes that the class may have."""
    batch = make_batch([CAR, PERSON, FAR])
    assert batch["velocity"][0, 2].isnan().all()
    logits, raw = random_outputs(model, 1)
    losses, targets = all_losses(model, batch, logits, raw)
    columns = dict(zip(model.fields, torch.arange(raw.shape[-1]).split(list(model.fields.values())), strict=True))
    learned = {
        name: torch.autograd.grad(losses[f"loss_{name}"], raw, retain_graph=True)[0][0]
        for name in ("velocity", "attribute")
    }
    for name, gradient in learned.items():
        for number, item in enumerate((CAR, PERSON, FAR)):
            rows = targets.location[0, targets.positive[0] & (targets.object[0] == number)]
            own = gradient[rows][:, columns[name]]
            taught = (
                [item is not FAR] * 2
                if name == "velocity"
                else [n in MODEL.attributes[item[0]] and item is not FAR for n in ALL]
            )
            assert ((own != 0) == torch.tensor(taught)).all(), (name, item)
            gradient[rows[:, None], columns[name]] = 0
        assert not gradient.any()


def test_a_model_without_the_outputs_has_the_twelve_losses():
    plain = Detector(dataclasses.replace(MODEL, velocity=False, attributes={}))
    losses, targets = all_losses(plain, make_batch([CAR]), *random_outputs(plain, 1))
    assert list(losses) == list(NAMES[:12])
    assert targets.velocity is None
    assert targets.attribute is None
    assert list(plain.fields)[-1] == "yaw"


def test_division_is_by_the_positives_of_all_processes(model):
    batch = make_batch([CAR])
    targets = assign(batch, MODEL)
    logits, raw = random_outputs(model, 1)
    nine, eighteen = (
        compute_losses(model, logits, raw, targets, batch, LossConfig(), torch.tensor(n)) for n in (9.0, 18.0)
    )
    for name, value in nine.items():
        torch.testing.assert_close(value, 2 * eighteen[name])


def test_the_best_cells_alone_learn_an_object(model):
    """The others are background; division is by all, so that parts of a step need not know what the others keep."""
    batch = make_batch([CAR, PERSON, FAR], [TRUNCATED])
    logits, raw = random_outputs(model, 2)
    losses, targets = all_losses(model, batch, logits, raw, best=True)
    gathered = raw.gather(1, targets.location[..., None].expand(-1, -1, raw.shape[-1]))
    kept = keep_best(targets, model.decode(gathered, targets.location, targets.label, batch["K"]), logits, 16)
    assert 4 <= kept.positive.sum() < targets.positive.sum()
    size = model.split(torch.autograd.grad(losses["loss_size"], raw, retain_graph=True)[0])["size"]
    taught = torch.zeros(size.shape[:2], dtype=torch.bool)
    for image in range(2):
        taught[image, kept.location[image, kept.positive[image]]] = True
    assert (size != 0).any(-1).equal(taught)
    every = LossConfig(**{name: 1.0 for name in NAMES})
    alone = compute_losses(model, logits, raw, kept, batch, every, count_positives(targets))
    for name in NAMES:
        torch.testing.assert_close(losses[name], alone[name])
    boxless = dataclasses.replace(every, loss_bbox=0.0)  # boxes that nobody learns say nothing of a cell
    (chosen, _), (nine, _) = (all_losses(model, batch, logits, raw, boxless, best) for best in (True, False))
    assert all(torch.equal(chosen[name], nine[name]) for name in nine)


@pytest.mark.parametrize("name", NAMES)
def test_weight_zero_is_not_computed(model, name, monkeypatch):
    def refuse(*_):
        raise AssertionError(f"{name} was computed")

    batch = make_batch([CAR])
    logits, raw = random_outputs(model, 1)
    without = LossConfig(**{n: float(n != name) for n in NAMES})
    if name in BOXES:
        boxes = module.loss_boxes
        monkeypatch.setattr(module, "loss_boxes", lambda *rest: refuse() if name in rest[-1] else boxes(*rest))
    else:
        monkeypatch.setattr(module, name, refuse)
    losses, _ = all_losses(model, batch, logits, raw, without)
    assert list(losses) == [n for n in NAMES if n != name]
    with pytest.raises(AssertionError, match="was computed"):
        all_losses(model, batch, logits, raw)


@pytest.mark.parametrize("alpha", [-math.pi, -3.0, -math.pi / 2, -0.4, 0.0, 1.0, math.pi / 2, 2.2])
@pytest.mark.parametrize("off", [0.0, 0.3, -0.7])
def test_half_angle_and_its_gradient(alpha, off):
    """The value is the half nearer to the reference; the gradient along the unit circle equals finite differences."""
    angle = torch.tensor(alpha + off, dtype=torch.float64)
    reference = torch.tensor(alpha, dtype=torch.float64)

    def halved(a):
        return torch.stack(half_angle(torch.stack([torch.sin(2 * a), torch.cos(2 * a)]), reference))

    expected = torch.stack([torch.sin(angle), torch.cos(angle)])
    torch.testing.assert_close(halved(angle), expected)
    slope = torch.autograd.functional.jacobian(halved, angle)
    step = 1e-6
    numeric = (expected * 0 + torch.stack([torch.sin(angle + step), torch.cos(angle + step)]) - expected) / step
    torch.testing.assert_close(slope, numeric, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("objects", [[], [CAR, TRUNCATED]])
def test_every_parameter_has_a_gradient(objects):
    torch.manual_seed(0)
    detector = Detector(dataclasses.replace(MODEL, norm="batch"))
    batch = make_batch(objects, objects)
    logits, raw = detector(batch["image"], batch["K"])
    losses, _ = all_losses(detector, batch, logits, raw)
    sum(losses.values()).backward()
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize(("name", "value"), [("loss_cls", -1.0), ("loss_y", math.nan), ("loss_bbox", math.inf)])
def test_weights_are_finite_and_not_negative(name, value):
    with pytest.raises(ValueError, match=f"loss.{name} is .*, expected a finite weight >= 0"):
        LossConfig(**{name: value})


def test_box_losses_are_the_same_together_and_alone(model):
    """To the bit, gradients too, whatever lies wholly before the camera and whatever is positive."""
    batch = make_batch([CAR, CROSSING], [PERSON, FAR])
    targets = assign(batch, model.config)
    _, raw = random_outputs(model, 2)
    gathered = raw.detach().gather(1, targets.location[..., None].expand(-1, -1, raw.shape[-1])).requires_grad_()
    decoded = model.decode(gathered, targets.location, targets.label, batch["K"])
    names = ["loss_bbox", "loss_full_bbox"]
    both, alone = (
        module.loss_boxes(decoded, targets, names),
        [module.loss_boxes(decoded, targets, [name]) for name in names],
    )
    assert (targets.positive & ~targets.full_ok).any()
    assert torch.equal(both, torch.cat(alone))
    first, second = (
        torch.autograd.grad(value, gathered, retain_graph=True)[0] for value in (both.sum(), sum(alone).sum())
    )
    assert torch.equal(first, second)


def test_far_away_gradients_survive():
    """A visible box that misses its object, a point or far off, still has a gradient that pulls it back."""
    for box in ([[[50.0, 50, 60, 60]]], [[[5.0, 5, 5.01, 5.01]]]):
        wrong = torch.tensor(box, requires_grad=True)
        targets = hand_made()
        module.loss_boxes(truth_of(targets, box=wrong), targets, ["loss_bbox"]).sum().backward()
        assert wrong.grad.abs().sum() > 0
        assert torch.isfinite(wrong.grad).all()
