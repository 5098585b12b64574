"""nuScenes' relatives against their official packages, dialects of one's own, and what goes wrong in tables like these.

data/nuscenes_relatives_invented.tar.xz holds invented sets (CC0) in the formats of TruckScenes and T4, and what
truckscenes-devkit 1.2.0 and t4-devkit 0.8.0 say of them.
"""

import dataclasses
import gzip
import importlib.util
import json
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import nuscenes_cases
import pytest
from accelerate.state import AcceleratorState
from conftest import ROOT, SHARED
from PIL import Image
from test_nuscenes import changed, numbers_of, table

import evaluate
import train
from config import Config
from data import DataConfig, Detection3D, Source
from formats import nuscenes
from formats.tables import read_annotations, read_samples, read_table, rotations
from metrics.nuscenes import nuscenes_metrics
from metrics.nuscenes_files import merge_cameras, parse_results, write_results
from model import ModelConfig
from scene.frames import UserError
from scene.geometry import CORNER_SIGNS, wrap_angle
from tools import check_data

CASES = ("noisy", "range", "yaw_flipped")  # that are kept here
TRUCKS, T4 = nuscenes.find_dialect("truckscenes"), nuscenes.find_dialect("t4")


@pytest.fixture(scope="module")
def relatives(tmp_path_factory):
    """Folder with truckscenes/ and t4/."""
    folder = tmp_path_factory.mktemp("relatives")
    with tarfile.open(Path(__file__).parent / "data/nuscenes_relatives_invented.tar.xz") as file:
        file.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def trucks(relatives):
    """The invented TruckScenes set, with grey pictures."""
    root = relatives / "truckscenes"
    Image.new("RGB", (1980, 943), (120, 130, 140)).save(root / "grey.jpg")
    for row in json.loads((root / "v1.2-mini/sample_data.json").read_text()):
        if row["width"]:
            path = root / row["filename"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.hardlink_to(root / "grey.jpg")
    return root


def command(*arguments):
    """Exit code of evaluate.py."""
    return evaluate.main([str(argument) for argument in arguments])


# ---- TruckScenes


@pytest.mark.parametrize("case", CASES)
def test_every_number_is_that_of_truckscenes_devkit(relatives, tmp_path, case):
    root, out = relatives / "truckscenes", tmp_path / "out.json"
    content = json.loads((root / "expected.json").read_text())
    expected = content["cases"][case]
    options = ("--dialect", "truckscenes", "--version", "v1.2-mini", "--split", expected["eval_set"], "--json", out)
    assert command("--nuscenes", root, "--results", root / f"cases/{case}.json", *options) == 0
    metrics = json.loads(out.read_text())
    assert metrics["cfg"] == content["config"]
    found, official = numbers_of(metrics), numbers_of({**expected, "kept": {}, "by_tag": {}})
    assert found.keys() == official.keys()
    assert len(found) == 12 * (4 + 1 + 5) + 12
    assert found == pytest.approx(official, abs=1e-9, nan_ok=True)


def test_every_result_file_of_truckscenes(relatives):
    folder = SHARED / "truckscenes"
    if not folder.is_dir():
        pytest.skip(f"the other result files are not here: {folder}")
    splits = ("mini_train", "mini_val")
    truths = {name: nuscenes.read_truth(folder, (name,), "v1.2-mini", TRUCKS) for name in splits}
    cases = json.loads((folder / "expected.json").read_text())["cases"]
    for case in cases.values():
        truth = truths[case["eval_set"]]
        results = json.loads(gzip.decompress((folder / case["file"]).read_bytes()))["results"]
        found = numbers_of(nuscenes_metrics(truth, parse_results(results, truth.tokens, TRUCKS)))
        official = numbers_of({**case, "kept": {}, "by_tag": {}})
        assert found == pytest.approx(official, abs=1e-9, nan_ok=True), case["file"]
    scenes = json.loads((folder / "v1.2-mini/scene.json").read_text())
    samples = json.loads((folder / "v1.2-mini/sample.json").read_text())
    tags = {row["token"]: row["description"].split(";") for row in scenes}
    truth = truths["mini_val"]
    results = json.loads(gzip.decompress((folder / cases["noisy"]["file"]).read_bytes()))["results"]
    for tag in ("weather.clear", "weather.rain"):  # a part of a truth is judged as evaluate_tags judges it
        tokens = {row["token"] for row in samples if tag in tags[row["scene_token"]]} & {*truth.tokens}
        part = truth.of(tokens)
        some = parse_results({token: results[token] for token in tokens}, part.tokens, TRUCKS)
        official = {name: one for name, one in cases["noisy"]["by_tag"][tag].items() if name != "file"}
        metrics = nuscenes_metrics(part, some)
        assert numbers_of({name: metrics[name] for name in official}) == pytest.approx(numbers_of(official), abs=1e-9)


def test_random_cases_agree_with_truckscenes_devkit(tmp_path):
    devkit = nuscenes_cases.load_devkit("truckscenes")
    if devkit is None:
        pytest.skip("the official devkit is not installed: pip install --no-deps truckscenes-devkit pyquaternion")
    scenes = devkit.splits.create_splits_scenes()
    for split, names in TRUCKS.splits.items():
        assert {*scenes[split]} == {*names}
    assert max(nuscenes_cases.compare(devkit, seed, tmp_path, TRUCKS) for seed in range(20)) < 1e-9


def test_the_splits_of_truckscenes_are_the_official_ones():
    splits = TRUCKS.splits
    counts = {split: len({*scenes}) for split, scenes in splits.items()}
    expected = {"train": 523, "train_detect": 523, "val": 75, "test": 149, "mini_train": 8, "mini_val": 2}
    assert counts == expected
    assert len({*splits["train"], *splits["val"], *splits["test"]}) == 747
    assert (
        {*splits["mini_val"]}
        == {
            "scene-13f4b71b1bd04a9e88747ad8f58a3f67-4",
            "scene-0044384af3d8494e913fb8b14915239e-3",
        }
        <= {*splits["val"]}
    )
    assert {*splits["mini_train"]} <= {*splits["train"]}


@pytest.mark.parametrize(("pose", "golden"), [("image", "own_pose"), ("sample", "devkit")])
def test_boxes_in_the_cameras_of_truckscenes_by_both_rules_of_poses(trucks, pose, golden):
    config = DataConfig(root=str(trucks), index=str(trucks / "index"))
    splits = ("mini_train", "mini_val")
    frames = nuscenes.frames(Source(kind="nuscenes", dialect="truckscenes", split=splits, pose=pose), config)
    frame_of = {str(frame.image.relative_to(trucks)): frame for frame in frames}
    files = {row["token"]: row["filename"] for row in json.loads((trucks / "v1.2-mini/sample_data.json").read_text())}
    annotations = json.loads((trucks / "v1.2-mini/sample_annotation.json").read_text())
    place = {row["token"]: np.array(row["translation"]) for row in annotations}
    rows, labelled = json.loads((trucks / "cameras.json").read_text())["rows"], 0
    for row in rows:
        frame, expected = frame_of[files[row["sample_data"]]], row[golden]
        center = frame.pose[:3, :3].T @ (place[row["annotation"]] - frame.pose[:3, 3])
        np.testing.assert_allclose(center, expected["center"], atol=1e-8)
        at = np.flatnonzero(np.abs(frame.labels.center - expected["center"]).max(1) < 1e-6)
        for one in frame.labels[at]:
            labelled += 1
            np.testing.assert_allclose(one.center, expected["center"], atol=1e-8)
            np.testing.assert_allclose(one.size, np.array(row["size_wlh"])[[1, 2, 0]])
            assert abs(wrap_angle(one.yaw - expected["yaw"])) < 1e-9
    assert len(rows) == 100
    assert labelled == 57
    truth = nuscenes.read_truth(trucks, splits, dialect=TRUCKS)
    reference = json.loads((trucks / "reference.json").read_text())
    assert truth.vehicle[:, :3, 3].tolist() == [reference[token] for token in truth.tokens]


def test_ground_truth_of_truckscenes_through_cameras_and_file(trucks, tmp_path):
    frames = nuscenes.read_frames(trucks, ("mini_val",), dialect=TRUCKS)
    found = {frame.id: frame.labels[np.isin(frame.labels.name.astype(str), [*TRUCKS.ranges])] for frame in frames}
    merged = merge_cameras(frames, found, TRUCKS)
    write_results(tmp_path / "results.json", merged)
    truth = nuscenes.read_truth(trucks, ("mini_val",), dialect=TRUCKS)
    results = parse_results(json.loads((tmp_path / "results.json").read_text())["results"], truth.tokens, TRUCKS)
    metrics = nuscenes_metrics(truth, results)
    assert {"traffic_sign", "animal", "other_vehicle"} <= {*results.name}
    for name, errors in metrics["label_tp_errors"].items():
        if metrics["mean_dist_aps"][name] > 0:
            assert max(errors["trans_err"], errors["scale_err"]) < 1e-6
            assert not errors["attr_err"] > 0
            assert not errors["orient_err"] > 2e-3  # boxes that are pitched and rolled lose that
    assert "construction_vehicle" not in metrics["label_aps"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"detection_name": "construction_vehicle"}, "detection_name is 'construction_vehicle', expected one of car"),
        ({"attribute_name": "traffic_sign.none"}, "attribute_name is 'traffic_sign.none', expected one of cycle"),
    ],
)
def test_what_truckscenes_devkit_refuses_is_refused(relatives, tmp_path, capsys, change, sentence):
    root = relatives / "truckscenes"
    content = json.loads((root / "cases/noisy.json").read_text())
    next(boxes for boxes in content["results"].values() if boxes)[0].update(change)
    (tmp_path / "bad.json").write_text(json.dumps(content))
    options = ("--dialect", "truckscenes", "--split", "mini_val")
    assert command("--nuscenes", root, "--results", tmp_path / "bad.json", *options) == 2
    assert sentence in capsys.readouterr().err


def test_the_run_file_of_truckscenes_trains_and_is_checked(trucks, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    cameras = ["CAMERA_RIGHT_FRONT"]
    source = {"kind": "nuscenes", "dialect": "truckscenes", "split": ["mini_train"], "cameras": cameras}
    classes = ["car", "trailer", "other_vehicle"]
    words = [
        str(ROOT / "configs/truckscenes.py"), f"data.root={trucks}", f"model.classes={json.dumps(classes)}",
        f"data.train={json.dumps([source])}", f"data.val={json.dumps([{**source, 'limit': 2}])}", "data.workers=0",
        "data.index=none", 'model.attributes={"car": ["vehicle.moving", "vehicle.parked"]}', "model.size=64,128",
        "model.backbone=test_resnet", "model.pretrained=false", "model.norm=batch", "model.channels=32",
    ]  # fmt: skip
    quick = ("train.batch_size=2", "train.steps=2", "train.log_every=1", "train.mixed_precision=no")
    train.main([*words, f"out={tmp_path / 'run'}", *quick, "train.warmup=0"])
    metrics = json.loads((tmp_path / "run/best/metrics.json").read_text())
    assert len(metrics["label_aps"]) == 12
    assert metrics["NDS"] >= 0
    AcceleratorState._reset_state(reset_partial_state=True)
    capsys.readouterr()
    assert check_data.main(words) == 0
    assert "other_vehicle" in capsys.readouterr().out


# ---- T4


def straight(root, folder):
    """The T4 set with a table that tells of no distortion."""
    shutil.copytree(root, folder)
    path = folder / "annotation/calibrated_sensor.json"
    path.write_text(json.dumps([{**row, "camera_distortion": []} for row in json.loads(path.read_text())]))
    return folder


def test_every_box_of_a_t4_set_is_that_of_t4_devkit(relatives, tmp_path):
    root = straight(relatives / "t4/invented", tmp_path / "t4")
    frames = nuscenes.frames(Source(kind="nuscenes", dialect="t4", split=("all",)), DataConfig(root=str(root)))
    frame_of = {str(frame.image.relative_to(root)): frame for frame in frames}
    rows = {name: {row["token"]: row for row in json.loads((root / f"annotation/{name}.json").read_text())}
            for name in ("sample_data", "sample_annotation")}  # fmt: skip
    levels, names, labelled, ignored = {}, set(), 0, 0
    for row in json.loads((relatives / "t4/golden.json").read_text())["rows"]:
        file = rows["sample_data"][row["sample_data"]]["filename"]
        if not row["is_valid"]:
            assert file not in frame_of  # its picture is not there
            ignored += 1
            continue
        frame, annotation = frame_of[file], rows["sample_annotation"][row["annotation"]]
        center = frame.pose[:3, :3].T @ (np.array(annotation["translation"]) - frame.pose[:3, 3])
        np.testing.assert_allclose(center, row["center"], atol=1e-8)
        for one in frame.labels[np.flatnonzero(np.abs(frame.labels.center - row["center"]).max(1) < 1e-6)]:
            labelled += 1
            np.testing.assert_allclose(one.center, row["center"], atol=1e-8)
            np.testing.assert_allclose(one.size, np.array(row["size_wlh"])[[1, 2, 0]])
            assert abs(wrap_angle(one.yaw - row["yaw"])) < 1e-9
            velocity = row["velocity_camera"] or [np.nan] * 3
            np.testing.assert_allclose(one.velocity, velocity, atol=1e-8)  # own ones of some differ from differences
            levels.setdefault(row["visibility"], set()).add(int(one.occlusion))
            assert one.attribute in ("", *row["attributes"])
            names.add((row["category"], one.name))
    assert len(frames) == 7
    assert labelled == 38
    assert ignored > 10
    assert levels == {"full": {0}, "most": {1}, "partial": {2}, "none": {3}}
    assert {("pedestrian.child", "pedestrian"), ("car", "car"), ("movable_object.barrier", "barrier")} <= names
    truth = nuscenes.read_truth(root, ("db_invented_0",), dialect=T4)
    assert len(truth.tokens) == 4
    assert len(truth.boxes) == 89  # all but animals


def test_of_several_attributes_that_of_the_class_is_taken(relatives, tmp_path):
    root = straight(relatives / "t4/invented", tmp_path / "t4")
    path = root / "annotation/sample_annotation.json"
    token = {row["name"]: row["token"] for row in json.loads((root / "annotation/attribute.json").read_text())}
    several = ["occlusion_state.none", "vehicle_state.parked"]
    rows = json.loads(path.read_text())
    path.write_text(json.dumps([{**row, "attribute_tokens": [token[name] for name in several]} for row in rows]))
    truth = nuscenes.read_truth(root, ("all",), dialect=T4)
    states = {(name, state) for name, state in zip(truth.boxes.name, truth.boxes.attribute, strict=True)}
    assert ("car", "vehicle_state.parked") in states
    assert ("pedestrian", "") in states  # else its attribute would be wrong whatever is detected
    boxes, _ = read_annotations(root / "annotation", read_samples(root / "annotation", ("all",), T4), T4)
    assert ("pedestrian", "occlusion_state.none") in {*zip(boxes.name, boxes.attribute, strict=True)}
    with pytest.raises(UserError, match="has 2 attributes, expected at most one"):
        nuscenes.read_truth(root, ("all",), "annotation")


def test_the_newest_numbered_tables_of_a_t4_set_are_read(relatives, tmp_path):
    for number in (2, 10):
        straight(relatives / "t4/invented", tmp_path / str(number))
    for version, number in (("", "10"), ("2", "2"), ("2/annotation", "2")):
        frames = nuscenes.read_frames(tmp_path, ("all",), version, dialect=T4)
        assert frames[0].image.is_relative_to(tmp_path / number / "data")
    with pytest.raises(UserError, match=r"there is no version '3', only 10/annotation, 2/annotation"):
        nuscenes.read_frames(tmp_path, ("all",), "3", dialect=T4)


def test_distorted_pictures_are_refused_and_undistorted_as_the_page_shows(relatives, tmp_path, monkeypatch):
    root = relatives / "t4/invented"
    with pytest.raises(UserError, match=r"CAM_BACK_LEFT of sample \w+: its camera_distortion is \[-0.31, .*formats.md"):
        nuscenes.read_frames(root, ("all",), dialect=T4)
    (tmp_path / "mine.json").write_text('{"base": "t4", "rectified": true}')
    assert len(nuscenes.read_frames(root, ("all",), dialect=nuscenes.find_dialect(str(tmp_path / "mine.json")))) == 7
    if importlib.util.find_spec("cv2") is None:
        pytest.skip("opencv-python-headless, which the page names, is not installed")
    [code] = re.findall(r"```python\n(import json.*?)```", (ROOT / "docs/formats.md").read_text(), re.DOTALL)
    shutil.copytree(root, tmp_path / "data/t4")
    [mount] = [row for row in json.loads((root / "annotation/calibrated_sensor.json").read_text())
               if row["camera_intrinsic"] and row["camera_intrinsic"][0][0] > 290]  # fmt: skip
    (fx, _, cx), (_, fy, cy), _ = mount["camera_intrinsic"]
    k1, k2, p1, p2, k3 = mount["camera_distortion"]
    x, y = (60 - cx) / fx, (70 - cy) / fy  # a point whose pixel is (60, 70) without distortion
    square = x * x + y * y
    radial = 1 + k1 * square + k2 * square**2 + k3 * square**3
    u = cx + fx * (x * radial + 2 * p1 * x * y + p2 * (square + 2 * x * x))
    v = cy + fy * (y * radial + p1 * (square + 2 * y * y) + 2 * p2 * x * y)
    column, row = np.meshgrid(np.arange(360), np.arange(280))
    spot = np.exp(-((column - u) ** 2 + (row - v) ** 2) / 8)  # as the lens shows it
    Image.fromarray((250 * spot).astype(np.uint8)).convert("RGB").save(tmp_path / "data/t4/data/CAM_FRONT/00000.jpg")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert len(nuscenes.read_frames(tmp_path / "data/t4_undistorted", ("all",), dialect=T4)) == 7
    light = np.asarray(Image.open(tmp_path / "data/t4_undistorted/data/CAM_FRONT/00000.jpg"), float).sum(2)
    light[light < 60] = 0
    assert np.hypot(u - 60, v - 70) > 5
    assert np.hypot((light * column).sum() / light.sum() - 60, (light * row).sum() / light.sum() - 70) < 0.3


# ---- what one angle cannot hold


def corner_shifts(root, dialect):
    """Of each labelled box of a set the largest shift of a corner, m, that making it upright in the camera costs."""
    [folder] = [path for pattern in dialect.tables for path in root.glob(pattern)]
    samples = read_samples(folder, ("all",), dialect)
    boxes, _ = read_annotations(folder, samples, dialect)
    index, shifts = {sample.token: i for i, sample in enumerate(samples)}, []
    for frame in nuscenes.read_frames(
        root, ("all",), images=False, dialect=dataclasses.replace(dialect, rectified=True)
    ):
        own, turn = boxes[boxes.sample == index[frame.group]], frame.pose[:3, :3]
        center = (own.center - frame.pose[:3, 3]) @ turn
        for one in frame.labels[frame.labels.is_3d]:
            forward, left, up = own.rotation[np.abs(center - one.center).sum(1).argmin()].T @ turn
            tilted = CORNER_SIGNS * one.size @ np.stack([forward, -up, left])
            shifts.append(np.linalg.norm(one.corners() - one.center - tilted, axis=1).max())
    return shifts


def test_the_page_says_what_is_lost_by_one_angle(invented, relatives):
    page = (ROOT / "docs/formats.md").read_text()
    sets = {
        "nuScenes, invented": (invented, nuscenes.NUSCENES),
        "TruckScenes, invented": (relatives / "truckscenes", TRUCKS),
        "T4, invented": (relatives / "t4/invented", T4),
    }
    for name, (root, dialect) in sets.items():
        shifts = corner_shifts(root, dialect)
        [(count, *quantiles)] = re.findall(rf"\| {name}.* \| (\d+) \| (\.\d+) m \| (\.\d+) m", page)
        assert int(count) == len(shifts)
        np.testing.assert_allclose(np.quantile(shifts, (0.5, 0.95)), [*map(float, quantiles)], atol=6e-4)


def test_the_page_says_what_is_lost_in_real_pictures():
    """Boxes of mini_val, upright in the global frame, in cameras that look a little up or down."""
    file = SHARED / "nuscenes_sample/mini_val_mono3d.coco.json.gz"
    if not file.is_file():
        pytest.skip(f"the real boxes are not here: {file}")
    content, shifts = json.loads(gzip.decompress(file.read_bytes())), []
    mounts = {row["id"]: rotations([row["ego2global_rotation"]])[0] @ rotations([row["cam2ego_rotation"]])[0]
              for row in content["images"]}  # fmt: skip
    for row in content["annotations"]:
        up, (size, yaw) = mounts[row["image_id"]][2], (np.array(row["bbox_cam3d"][3:6]), row["bbox_cam3d"][6])
        level = np.array([np.cos(yaw), 0, -np.sin(yaw)])
        ahead = level - [0, level @ up / up[1], 0]  # the level direction of the global frame that is seen there
        ahead /= np.linalg.norm(ahead)
        plain = np.stack([level, [0, 1, 0], np.cross([0, -1, 0], level)])
        shift = CORNER_SIGNS * size @ (np.stack([ahead, -up, np.cross(up, ahead)]) - plain)
        shifts.append(np.linalg.norm(shift, axis=1).max())
    assert len(shifts) == 5441
    np.testing.assert_allclose(np.quantile(shifts, (0.5, 0.95)), [0.043, 0.125], atol=6e-4)


# ---- dialects and splits of one's own


def test_a_dialect_of_ones_own(invented, tmp_path):
    content = {"ranges": {"car": 20, "bike": 30.5}, "classes": {"vehicle.bicycle": "bike"}, "reference": ["CAM_FRONT"],
               "attributes": {"car": ["vehicle.moving", "vehicle.parked"]}}  # fmt: skip
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(content))
    dialect = nuscenes.find_dialect(str(path))
    truth = nuscenes.read_truth(invented, ("mini_val",), dialect=dialect)
    assert {*truth.boxes.name} == {"bike"}  # vehicle.car is no class of it
    assert dialect.attributes["car"] == ("vehicle.moving", "vehicle.parked")
    assert dialect.splits == nuscenes.NUSCENES.splits
    frames = nuscenes.read_frames(invented, ("mini_val",), cameras=("CAM_FRONT",), images=False)
    assert truth.vehicle.shape == (40, 4, 4)
    assert truth.sensor[0].tolist() == frames[0].pose.tolist()
    for text, sentence in (
        ('{"range": {}}', "mine.json: unknown key 'range', expected some of base, tables, splits"),
        ('{"ranges": ["car"]}', r"ranges is \"\['car'\]\", expected an object"),
        ('{"ranges": {"car": "20"}}', "ranges.car is '20', expected a float"),
        ('{"reference": "LIDAR"}', "reference is 'LIDAR', expected a list"),
        ('{"velocities": 1}', "velocities is '1', expected a bool"),
        ('{"base": 5}', r"dialect is '5', expected 'nuscenes', "),
        ('{"base": "lyft"}', r"dialect is 'lyft', expected 'nuscenes', 't4', 'truckscenes' or a .json file"),
        ("[1]", "expected a JSON object with keys of a dialect"),
        ("{", "expected a JSON object with keys of a dialect"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=sentence):
            nuscenes.find_dialect(str(path))
    with pytest.raises(UserError, match=r"nowhere.json: no such dialect"):
        nuscenes.find_dialect(str(tmp_path / "nowhere.json"))
    (tmp_path / "based.json").write_text('{"base": "mine.json", "reference": ["TOP"]}')  # which lies beside it
    path.write_text('{"ranges": {"car": 20}}')
    based = nuscenes.find_dialect(str(tmp_path / "based.json"))
    assert (based.ranges, based.reference) == ({"car": 20.0}, ("TOP",))
    path.write_text('{"base": "based.json"}')
    with pytest.raises(UserError, match=r"mine.json: it is a base of itself"):
        nuscenes.find_dialect(str(path))


def test_objects_inside_of_rows(tmp_path):
    rows = [{"token": "a", "name": "x", "info": {"by": {"name": "me"}}}, {"token": "b", "name": "y", "info": {}}]
    (tmp_path / "scene.json").write_text(json.dumps(rows))
    assert read_table(tmp_path, "scene", ("token", "name")) == [["a", "b"], ["x", "y"]]
    (tmp_path / "scene.json").write_text(json.dumps([*rows, {"token": "c", "info": {}}]))
    with pytest.raises(UserError, match=r"scene.json: a row lacks 'name', expected token, name"):
        read_table(tmp_path, "scene", ("token", "name"))


def test_splits_of_ones_own(invented, tmp_path):
    root = changed(invented, tmp_path, "scene", lambda rows: None)
    listed = {"mine": ["scene-0103", "scene-0061", "scene-9999"], "empty": ["scene-9999"], "mini_val": ["scene-0061"]}
    (root / "v1.0-mini/splits.json").write_text(json.dumps(listed))

    def scenes(*splits, version="", dialect=nuscenes.NUSCENES):
        frames = nuscenes.read_frames(root, splits, version, ("CAM_FRONT",), images=False, dialect=dialect)
        return {frame.id.split("/")[0] for frame in frames}

    every = {row["name"] for row in table(root, "scene")}
    assert scenes("mine") == {"scene-0103", "scene-0061"}
    assert scenes("all") == every
    assert scenes("scene-0103", "scene-0061") == {"scene-0103", "scene-0061"}
    assert scenes("mini_val") == {"scene-0103", "scene-0916"}  # the version's own come first, as in the devkit
    (root / "v1.0-mini").rename(root / "my tables")
    assert scenes("mini_val", version="my tables") == {"scene-0061"}
    assert scenes("mini_train", version="my tables") == every - {"scene-0103", "scene-0916"}
    with pytest.raises(
        UserError, match=r"expected a folder with nuScenes' tables in v1.0-\*; version= names any other"
    ):
        scenes("all")
    with pytest.raises(UserError, match="it holds no scene of split 'empty'; its scenes are scene-0061"):
        scenes("empty", version="my tables")
    with pytest.raises(
        UserError, match=r"there is no split 'half', expected mini_train, mini_val, .*mine, empty, all, or"
    ):
        scenes("half", version="my tables")
    for text in ("[]", '{"a": "scene-0103"}', '{"a": [1]}', "{"):
        (root / "my tables/splits.json").write_text(text)
        if text != '{"a": "scene-0103"}':
            with pytest.raises(UserError, match=r"splits.json: expected an object \{split: \[name of a scene"):
                scenes("all", version="my tables")


# ---- what goes wrong in tables of one's own


def every(**values):
    return lambda rows: [row.update(values) for row in rows]


def every_camera(**values):
    return lambda rows: [row.update(values) for row in rows if row["filename"].startswith("samples/CAM")]


def in_seconds(rows):
    for row in rows:
        row["timestamp"] *= 1e-6


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        (
            "sample_data",
            every_camera(width=0, height=0),
            "its width and height are 0 and 0, expected those of the pict",
        ),
        (
            "sample_data",
            every_camera(width=None),
            "its width and height are None and 900, expected those of the picture",
        ),
        ("sample_data", every_camera(timestamp="1"), "its timestamp is '1', expected microseconds"),
        ("sample", in_seconds, r"samples of a scene are 0.\d+ apart in the median, expected microseconds, not seconds"),
        ("sample", every(timestamp="12"), r"sample.json: timestamp of \w+ is 12, expected a number"),
        ("calibrated_sensor", every(camera_intrinsic=[]), "its camera_intrinsic is not 3x3 numbers"),
        (
            "calibrated_sensor",
            every(camera_distortion=[0.1, 0, 0]),
            r"its camera_distortion is \[0.1, 0, 0\], expected",
        ),
        ("sample_annotation", every(num_lidar_pts=None), r"points of \w+ is None, expected a number"),
    ],
)
def test_tables_that_would_be_wrong_in_silence_are_refused(invented, tmp_path, name, change, sentence):
    root = changed(invented, tmp_path, name, change)
    with pytest.raises(UserError, match=sentence):
        nuscenes.read_frames(root, ("mini_val",), images=False)


def test_unknown_numbers_of_points_count_and_are_told(invented, tmp_path, caplog):
    root = changed(invented, tmp_path, "sample_annotation", every(num_lidar_pts=-1, num_radar_pts=0))
    frames = nuscenes.read_frames(root, ("mini_val",), cameras=("CAM_FRONT",), images=False)
    assert sum(len(frame.labels) for frame in frames) > 100
    assert all(one.center[2] > -900 for frame in frames for one in frame.labels if one.size[0] > 0)
    regions = sum((frame.labels.name == "DontCare").sum() for frame in frames)
    assert regions < 0.1 * sum(len(frame.labels) for frame in frames)  # behind the camera alone
    assert len(nuscenes.read_truth(root, ("mini_val",)).boxes) == len(
        nuscenes.read_truth(invented, ("mini_val",)).boxes
    )
    assert "annotations have less than 0 points, which counts as seen, as officially" in caplog.text
    problems = []
    path = root / "v1.0-mini/sample_annotation.json"
    path.write_text(json.dumps([{**row, "num_lidar_pts": 0} for row in json.loads(path.read_text())]))
    nuscenes.read_frames(root, ("mini_val",), cameras=("CAM_FRONT",), images=False, problems=problems)
    assert [re.sub(r".*json: none of \d+", "none of N", one) for one in problems] == [
        "none of N annotations has a lidar or radar point, so that none counts; -1 says unknown"
    ]


def test_a_picture_of_another_size_than_its_table_says_is_refused(trucks, tmp_path):
    for path in trucks.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "samples").unlink()
    shutil.copytree(trucks / "samples", tmp_path / "samples")
    for path in (tmp_path / "samples/CAMERA_LEFT_BACK").iterdir():
        Image.new("RGB", (990, 472)).save(path)
    sentence = r"CAMERA_LEFT_BACK of sample .*jpg is 990x472, and sample_data.json says 1980x943: write its size there"
    with pytest.raises(UserError, match=sentence):
        nuscenes.read_frames(tmp_path, ("mini_val",), dialect=TRUCKS)
    problems = []
    frames = nuscenes.read_frames(tmp_path, ("mini_val",), dialect=TRUCKS, problems=problems)
    assert len(frames) == 4 * 16 - 1
    assert len(problems) == 1


@pytest.mark.parametrize("index", ["", "elsewhere", "none"])
def test_part_of_the_pictures(trucks, tmp_path, caplog, index):
    for path in trucks.iterdir():
        if path.name != "samples":
            (tmp_path / path.name).symlink_to(path)
    shutil.copytree(trucks / "samples/CAMERA_LEFT_BACK", tmp_path / "samples/CAMERA_LEFT_BACK")
    some = sorted((tmp_path / "samples/CAMERA_LEFT_BACK").iterdir())
    some[0].unlink()
    source = Source(kind="nuscenes", dialect="truckscenes", split=("mini_train", "mini_val"))
    config = DataConfig(root=str(tmp_path), index=str(tmp_path / index) if index == "elsewhere" else index)
    with pytest.raises(UserError, match=r"no such image .*; data.skip_bad=true leaves such frames out"):
        nuscenes.frames(source, config)
    for start in (1, 2):  # also where the index is there already
        frames = nuscenes.frames(source, dataclasses.replace(config, skip_bad=True))
        assert {Path(str(frame.image)) for frame in frames} == {*some[1:]}
        assert [one.getMessage()[:29] for one in caplog.records] == ["61 of 80 frames are left out,"] * start
    shutil.copy(some[1], some[0])  # what comes later is read then
    assert len(nuscenes.frames(source, dataclasses.replace(config, skip_bad=True))) == 20


def test_what_an_evaluation_needs_is_opened_before_the_first_step(invented, tmp_path):
    def remove(rows):
        rows.remove(next(row for row in rows if row["filename"].startswith("samples/LIDAR_TOP/")))

    model = ModelConfig(classes=("car",))
    source = Source(kind="nuscenes", split=("mini_train", "mini_val"))
    root = changed(invented, tmp_path, "sample_data", remove)
    frames = nuscenes.read_frames(root, source.split, cameras=("CAM_FRONT",), images=False)
    config = Config(data=DataConfig(root=str(root), val=(source,)), model=model)
    dataset = Detection3D(frames, model, config.data, metrics="nuscenes")
    dataset.sources = (source,)
    with pytest.raises(UserError, match=r"v1.0-mini: LIDAR_TOP of sample \w{32}: sample_data.json holds no key frame"):
        evaluate.compute_metrics(dataset, {}, config)
    (tmp_path / "renamed").mkdir()
    root = changed(
        invented,
        tmp_path / "renamed",
        "sensor",
        lambda rows: [row.update(channel=row["channel"] + "_X") for row in rows],
    )
    with pytest.raises(
        UserError, match=r"sensor.json: there are CAM_BACK_LEFT_X, .* expected LIDAR_TOP, which ranges are"
    ):
        nuscenes.read_truth(root, ("mini_val",))


@pytest.mark.parametrize("frame", ["the vehicle's", "LIDAR_LEFT's", "nowhere"])
def test_boxes_in_another_frame_are_told_beside_the_number(relatives, tmp_path, capsys, frame):
    root = relatives / "truckscenes"
    truth = nuscenes.read_truth(root, ("mini_val",), dialect=TRUCKS)
    content = json.loads((root / "cases/noisy.json").read_text())
    pose = truth.vehicle if frame == "the vehicle's" else truth.sensor
    for token, boxes in content["results"].items():
        back = np.linalg.inv(pose[truth.tokens.index(token)])
        for box in boxes:
            place = (back @ [*box["translation"], 1])[:3]
            box["translation"] = (place * [3, -40, 1] if frame == "nowhere" else place).tolist()
    (tmp_path / "results.json").write_text(json.dumps(content))
    options = ("--dialect", "truckscenes", "--split", "mini_val")
    assert command("--nuscenes", root, "--results", tmp_path / "results.json", *options) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    if frame == "nowhere":
        assert re.match(r"0% of the boxes lie within 4 m of an object: they lie about \[.*\], objects about \[69", last)
    else:
        assert re.match(
            rf"0% of the boxes lie within 4 m of an object, \d\d% would in {frame} frame: results must", last
        )
    assert command("--nuscenes", root, "--results", root / "cases/noisy.json", *options) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("mAP 0.4860")
