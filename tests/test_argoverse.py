"""Argoverse 2: the reader of its logs, the merge of seven cameras and the evaluator, against what av2 0.3.6 says.

data/argoverse_invented.tar.xz holds an invented log with small pictures and invented detections (CC0), and the output
of the official package. Real logs are read where they lie.
"""

import contextlib
import dataclasses
import gzip
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from conftest import ROOT, SHARED
from test_index import assert_same
from test_samples import detect_truth

import evaluate
import train
from config import Config, TrainConfig
from data import DataConfig, Detection3D, Source, collate
from formats import argoverse
from formats.argoverse import CLASSES, RING, Boxes, join_boxes, read_annotations, read_boxes, read_log, read_truth
from formats.tables import refuse_parted
from metrics.argoverse import argoverse_metrics, blank, find_maps, main, read_region, table
from model import ModelConfig
from scene.frames import UserError, make_labels
from scene.geometry import wrap_angle
from tools import check_data

arrow = pytest.importorskip("pyarrow", reason="Argoverse 2's tables need it: pip install pyarrow")
feather = pytest.importorskip("pyarrow.feather")

NAMES = ("AP", "ATE", "ASE", "AOE", "CDS")
GOLDEN = SHARED / "av2"
LOG = "00000000-aaaa-4000-8000-00000000000a"
PRESENT = [name for name in CLASSES if name not in ("BOLLARD", "SCHOOL_BUS", "WHEELCHAIR")]  # in the small pictures
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"the real logs are not here: {GOLDEN}")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("argoverse")
    with tarfile.open(Path(__file__).parent / "data/argoverse_invented.tar.xz") as file:
        file.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def log(root):
    return root / "sensor/val" / LOG


@pytest.fixture(scope="module")
def frames(log):
    return read_log(log)


def detections(boxes, **columns):
    """Boxes as those of a result file."""
    return dataclasses.replace(boxes, **{"points": np.ones(len(boxes)), **columns})


def deviation(metrics, expected):
    """Largest difference from what av2 says: class -> the five NAMES."""
    rows = [[metrics["classes"][name][key] for key in NAMES] for name in CLASSES]
    return np.abs(np.array(rows) - [expected[name] for name in CLASSES]).max()


def rewritten(path, folder, **columns):
    """A feather file with some columns replaced, or left out where they are None."""
    found = feather.read_table(path)
    for name, values in columns.items():
        place = found.column_names.index(name)
        found = found.remove_column(place)
        if values is not None:
            found = found.add_column(place, name, values if isinstance(values, arrow.Array) else arrow.array(values))
    feather.write_feather(found, folder / path.name)
    return folder / path.name


def changed_log(log, folder, name, **columns):
    """A root whose log is the given one, but for columns of a table."""
    own = folder / "sensor/val" / LOG
    own.mkdir(parents=True)
    (own / "calibration").mkdir()
    for path in [*log.iterdir(), *(log / "calibration").iterdir()]:
        place = own / path.relative_to(log)
        if path.name == "calibration" or path.relative_to(log) == Path(name):
            continue
        place.symlink_to(path)
    if columns:
        rewritten(log / name, (own / name).parent, **columns)
    return folder


# ---- evaluator


def test_every_number_agrees_with_the_official_package(root):
    truth, folders = read_truth(root, ("val",))
    cases = json.loads((root / "expected.json").read_text())
    assert {*cases} == {"all_points", "noisy", "tilted", "crowded", "ties_between_sweeps", "far"}
    for name, modes in cases.items():
        results = read_boxes(root / f"detections/{name}.feather")
        assert deviation(argoverse_metrics(truth, results), modes["all"]) < 1e-9, name
        assert deviation(argoverse_metrics(truth, results, folders), modes["region"]) < 1e-9, name


def test_the_command_says_the_same(root, tmp_path, capsys):
    expected = json.loads((root / "expected.json").read_text())["noisy"]
    sweeps = np.unique(read_annotations(root / "sensor/val" / LOG).time)[:3].tolist()
    (tmp_path / "sweeps.json").write_text(json.dumps({LOG: sweeps}))
    results, out = str(root / "detections/noisy.feather"), str(tmp_path / "out.json")
    some = ["--sweeps", str(tmp_path / "sweeps.json"), "--split", "val"]
    for mode, more in (("region", []), ("all", ["--no-region"]), ("three_sweeps", some)):
        assert main([str(root), results, "--json", out, *more]) == 0
        metrics = json.loads(Path(out).read_text())
        assert deviation(metrics, expected[mode]) < 1e-9
        means = np.mean([expected[mode][name] for name in CLASSES], 0)
        np.testing.assert_allclose([metrics[key] for key in NAMES], means, atol=1e-9)
        assert [metrics["mean"][key] for key in NAMES] == [metrics[key] for key in NAMES]
        assert f"CDS {metrics['CDS']:.4f}" in capsys.readouterr().out
    assert evaluate.main(["--argoverse", str(root), "--results", results, "--json", out]) == 0
    assert deviation(json.loads(Path(out).read_text()), expected["region"]) < 1e-9


@needs_golden
@pytest.mark.parametrize("mode", ["all", "region"])
def test_golden_cases_of_real_logs(mode):
    for name, case in json.loads((GOLDEN / "expected.json").read_text())["cases"].items():
        if mode == "region" and name not in ("noisy", "more_than_100", "tilted", "wrong_timestamps"):
            continue  # maps of 20 million cells
        truth, folders = read_truth(GOLDEN, ("val",), case["logs"])
        results, expected = read_boxes(GOLDEN / f"detections/{name}.feather"), case["modes"][mode]
        if "exception" in expected:
            with pytest.raises(UserError, match=r"there is no pose at 315970000058931099, and boxes of that sweep"):
                argoverse_metrics(truth, results, folders)
            continue
        metrics = argoverse_metrics(truth, results, folders if mode == "region" else None)
        for one, numbers in expected["classes"].items():
            own = metrics["classes"][one]
            assert max(abs(own[key] - value) for key, value in numbers.items() if key in own) < 1e-9, (name, one)
        assert max(abs(metrics["mean"][key] - value) for key, value in expected["mean"].items()) < 1e-9


def test_a_class_by_hand():
    """Four buses, five detections: a far one, a hit, a duplicate of it, a hit 1.5 m off, and one of nothing."""
    q = np.tile([1.0, 0, 0, 0], (5, 1))
    size, logs = np.tile([10.0, 3, 2.5], (5, 1)), np.full(5, "a", object)
    center = np.array([[10.0, 0, 0], [30, 0, 0], [50, 0, 0], [70, 0, 0], [90, 0, 0]])
    truth = Boxes(
        logs, np.full(5, 7), np.full(5, "BUS", object), center, size, q, np.ones(5), np.array([1, 2, 3, 4, 0])
    )
    places = center[[4, 0, 0, 1, 2]] + [[0, 0, 0], [0.1, 0, 0], [0, 0, 0], [0, 1.5, 0], [0, 0, 9]]
    results = detections(truth, center=places, size=size * [2, 1, 1], score=np.array([0.5, 0.4, 0.3, 0.2, 0.1]))
    metrics = argoverse_metrics(truth, results)
    bus = metrics["classes"]["BUS"]
    # Recall 1/4 has precision 1/2; where it is met exactly, that of the last detection there, 1/5 of five, counts.
    assert bus["AP_0.5"] == pytest.approx((25 / 2 + 1 / 5) / 101)
    assert bus["AP_2"] == pytest.approx((50 / 2 + 2 / 5) / 101)
    assert (bus["ATE"], bus["ASE"], bus["AOE"]) == pytest.approx((0.8, 0.5, 0))
    assert bus["CDS"] == pytest.approx(bus["AP"] * np.mean([0.6, 0.5, 1]))
    assert metrics["classes"]["DOG"] == {"AP": 0, "ATE": 2, "ASE": 1, "AOE": np.pi, "CDS": 0} | dict.fromkeys(
        ("AP_0.5", "AP_1", "AP_2", "AP_4"), 0
    )
    assert metrics["CDS"] == pytest.approx(bus["CDS"] / 26)
    assert table(metrics).splitlines()[6].split()[:2] == ["BUS", f"{bus['AP']:.4f}"]


def test_what_av2_gets_wrong_is_right(root, tmp_path):
    """Equal scores by place in the file, pandas categories by their text, +180 and -180 degrees as one heading."""
    truth, _ = read_truth(root, ("val",))
    truth = truth[truth.points > 0]
    first = truth[(truth.name == "REGULAR_VEHICLE") & (truth.time == truth.time[0])]
    assert len(first) > 2
    shift = np.array([[0.0, 0, 0], [3.0, 0, 0]])[:, None]  # two detections of each: equal scores, the first is right
    twice = dataclasses.replace(join_boxes([first, first]), center=(first.center + shift).reshape(-1, 3))
    good = argoverse_metrics(first, detections(twice))["classes"]["REGULAR_VEHICLE"]
    poor = argoverse_metrics(first, detections(twice[::-1]))["classes"]["REGULAR_VEHICLE"]
    assert good["ATE"] == 0
    assert good["AP_0.5"] > poor["AP_0.5"] == 0

    path = root / "detections/noisy.feather"
    names = feather.read_table(path)["category"].to_pylist()
    order = [*reversed(sorted({*names})), "NEVER"]
    mixed = arrow.DictionaryArray.from_arrays([order.index(name) for name in names], order)
    assert_same_boxes(read_boxes(rewritten(path, tmp_path, category=mixed)), read_boxes(path))

    turned = [np.tile([sign * 6e-17, 0, 0, 1], (len(truth), 1)) for sign in (1, -1)]  # pi, and -pi
    metrics = argoverse_metrics(*(detections(truth, rotation=rotation) for rotation in turned))
    assert max(metrics["classes"][name]["AOE"] for name in {*truth.name} & {*CLASSES}) == 0


def assert_same_boxes(one, two):
    for column, other in zip(vars(one).values(), vars(two).values(), strict=True):
        np.testing.assert_array_equal(column, other)


# ---- reader


@needs_golden
def test_official_transforms(monkeypatch):
    """ego(sweep) -> city -> ego(image) -> camera of 697 rows, real and invented, to 1e-9 m and radians."""
    rows = json.loads(gzip.decompress((GOLDEN / "transforms.json.gz").read_bytes()))["rows"]
    tables, seen = {}, 0
    for row in rows:
        log = GOLDEN / "sensor/val" / row["log"]
        if log not in tables:
            cameras = sorted({one["camera"] for one in rows if one["log"] == row["log"]})
            poses = argoverse.read_poses(log / argoverse.CITY, argoverse.TIME)
            tables[log] = read_annotations(log), poses, argoverse.read_cameras(log, cameras)
        boxes, city, cameras = tables[log]
        mounted, K, size = cameras[row["camera"]]
        pose = np.linalg.inv(city[row["sweep"]]) @ city[row["image"]] @ mounted
        box = detections(boxes[[row["row"]]])
        np.testing.assert_allclose((box.center[0] - pose[:3, 3]) @ pose[:3, :3], row["center"], atol=1e-9)
        for label in argoverse.labels_of(box, K, size, pose):
            if label.is_3d:
                seen += 1
                np.testing.assert_allclose(label.center, row["center"], atol=1e-9)
                np.testing.assert_allclose((K @ label.center)[:2] / label.center[2], row["uv"], atol=1e-6)
                np.testing.assert_allclose(label.size, np.array(row["size_lwh"])[[0, 2, 1]])
                assert abs(wrap_angle(label.yaw - row["yaw"])) < 1e-9
                assert label.name == row["category"]
    assert (len(rows), seen) == (697, 164)


@needs_golden
def test_the_images_are_those_of_the_official_loader(log):
    for sweep, images in json.loads((GOLDEN / "images.json").read_text())["nearest"].items():
        for camera in RING:
            times = argoverse.times_of(log / "sensors/cameras" / camera, "jpg")
            assert argoverse.nearest(times, int(sweep)) == images[camera]


def test_frames_of_a_log(log, frames):
    sizes = {frame.id.split("/")[1]: frame.size for frame in frames}
    assert sizes == {camera: (155, 204) if camera == "ring_front_center" else (204, 155) for camera in RING}
    assert len(frames) == 40  # 6 sweeps, 7 cameras, two images lost
    assert [frame.group for frame in frames] == sorted(frame.group for frame in frames)
    assert all(frame.image.is_file() for frame in frames)
    boxes, unseen = read_annotations(log), 0
    for frame in frames:
        own = boxes[boxes.time == int(frame.group.split("/")[1])]
        for label in frame.labels[frame.labels.is_3d]:
            distance = np.linalg.norm(own.center - (frame.pose[:3, :3] @ label.center + frame.pose[:3, 3]), axis=1)
            assert distance.min() < 1e-9
            assert own.points[distance.argmin()] > 0
            assert own.name[distance.argmin()] == label.name
        unseen += (~frame.labels.is_3d).sum()
    assert unseen > 20  # without lidar points, or their centre behind the camera: ignore regions
    stereo = ("ring_rear_left",)
    assert len(read_log(log, stereo)) == 6
    assert argoverse.frames(Source(kind="argoverse", root=str(log.parents[2]), split=("val",), limit=9),
                            DataConfig(index="none"))[8].id == frames[8].id  # fmt: skip


def test_the_nearest_image():
    times = [0, 40_000_000, 80_000_000]
    assert argoverse.nearest(times, 19_999_999) == argoverse.nearest(times, 20_000_000) == 0  # of two the earlier
    assert argoverse.nearest(times, 20_000_001) == 40_000_000
    assert argoverse.nearest(times, 105_000_000) == 80_000_000
    assert argoverse.nearest(times, 105_000_001) is argoverse.nearest([], 0) is None
    late = 315_966_254_059_809_000  # floats are 64 ns apart
    assert argoverse.nearest([late - 1, late + 2], late) == late - 1


def test_an_index_holds_what_the_reader_reads(root, frames, tmp_path):
    source = Source(kind="argoverse", root=str(root), split=("val",))
    for _ in range(2):
        indexed = argoverse.frames(source, DataConfig(index=str(tmp_path / "index")))
        assert len(indexed) == len(frames)
        for one, two in zip(indexed, frames, strict=True):
            assert_same(one, two)
    assert len([*(tmp_path / "index").glob("*.index")]) == 1
    some = dataclasses.replace(source, cameras=("ring_front_center",), limit=2)
    assert [frame.size for frame in argoverse.frames(some, DataConfig(index=str(tmp_path / "index")))] == [
        (155, 204)
    ] * 2


def test_a_test_log_has_no_annotations(log, tmp_path):
    own = tmp_path / "sensor/test" / LOG
    own.mkdir(parents=True)
    for path in log.iterdir():
        if path.name not in ("annotations.feather", "sensors"):
            (own / path.name).symlink_to(path)
    (own / "sensors/lidar").mkdir(parents=True)
    (own / "sensors/cameras").symlink_to(log / "sensors/cameras")
    (own / "sensors/lidar/315970000058931098.feather").touch()
    frames = read_log(own)
    assert len(frames) == 7
    assert not any(len(frame.labels) for frame in frames)


@pytest.mark.parametrize(
    ("name", "columns", "sentence"),
    [
        ("annotations.feather", {}, "annotations.feather: no such table"),
        ("annotations.feather", {"tx_m": None}, "expected a feather file with columns num_interior_pts,"),
        ("annotations.feather", {"tx_m": [np.nan] * 360}, "tx_m of row 0 is nan, expected a value"),
        ("annotations.feather", {"category": ["BUS"] * 359 + [None]}, "category of row 359 is None, expected a value"),
        ("annotations.feather", {"timestamp_ns": [3.1e17] * 360}, "timestamp_ns is no integer, and other numbers are"),
        ("annotations.feather", {"width_m": [1.0] * 359 + [-1]}, "row 359 has a size below 0 or a quaternion of zeros"),
        ("annotations.feather", {"timestamp_ns": [5] * 360}, "there is no pose at 5, of a sweep or its image of ring_"),
        ("calibration/intrinsics.feather", {"sensor_name": list("abcdefghi")}, "ring_front_center: it is not there"),
        ("calibration/intrinsics.feather", {"fx_px": [-1.0] * 9}, "ring_front_center: focal lengths -1, "),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_log_is_said(log, tmp_path, name, columns, sentence):
    root = changed_log(log, tmp_path, name, **columns)
    with pytest.raises(UserError) as error:
        read_log(root / "sensor/val" / LOG)
    assert sentence in str(error.value)
    assert str(root) in str(error.value)


def test_mistakes_of_a_command_are_one_sentence(root, log, tmp_path, capsys):
    noisy = root / "detections/noisy.feather"
    truth = read_truth(root, ("val",))[0]
    late, other = (tmp_path / f"{name}.feather" for name in ("late", "other"))
    argoverse.write_results(late, detections(truth[:3], time=truth.time[:3] + 1))
    argoverse.write_results(other, detections(truth[:3], log=np.full(3, "another", object)))
    (tmp_path / "bad.json").write_text('{"a": [1.5]}')
    (tmp_path / "unknown.json").write_text('{"a": [1]}')
    (tmp_path / "x.feather").write_text("text")
    mapless = changed_log(log, tmp_path, "map")
    for arguments, sentence in (
        ([root, late], "city_SE3_egovehicle.feather: there is no pose at 315970000058931099, and boxes of that sweep"),
        ([root, other], f"log another, sweep {truth.time[0]}: it has detections and no annotation; --no-region counts"),
        ([mapless, noisy], "expected one map/log_map_archive_*.json, found 0; --no-region needs none"),
        ([root, noisy, "--split", "train"], "expected logs in train/LOG/; the splits there are: val"),
        ([root, noisy, "--sweeps", tmp_path / "bad.json"], "expected JSON, {log: [timestamp_ns, ...]} with whole"),
        ([root, noisy, "--sweeps", tmp_path / "unknown.json"], "there is no log 'a' in val"),
        ([root, tmp_path / "none.feather"], "none.feather: no such table"),
        ([root, tmp_path / "x.feather"], "x.feather: expected a feather file with columns score, log_id, timestamp_ns"),
        ([root, rewritten(noisy, tmp_path, score=[np.inf] * 478)], "noisy.feather: score of row 0 is inf, expected a"),
        ([root], "the following arguments are required: RESULTS.feather"),
    ):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stopped:
            code = stopped.code
        words = capsys.readouterr().err
        assert (code, words.count("\n")) == (2, 1), words
        assert sentence in words
    for name, count in (("late", 0), ("other", 0)):  # officially false positives without the region
        assert main([str(root), str(tmp_path / f"{name}.feather"), "--no-region"]) == count


def test_pyarrow_is_asked_for_by_name(log, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"Argoverse 2 is read by pyarrow, which is not installed: pip install pyarrow"):
        read_log(log)


# ---- seven cameras, and a run


def test_ground_truth_through_cameras_merge_and_file_has_no_error(root, frames, tmp_path):
    found = {frame.id: frame.labels[frame.labels.is_3d] for frame in frames}
    merged = argoverse.merge_cameras(frames, found)
    argoverse.write_results(tmp_path / "results.feather", merged)
    results = read_boxes(tmp_path / "results.feather")
    assert_same_boxes(results, merged)
    views, objects = sum(map(len, found.values())), len(merged)
    truth = read_truth(root, ("val",))[0]
    rows = []
    for center, time, name in zip(merged.center, merged.time, merged.name, strict=True):
        other = (truth.time != time) | (truth.name != name)
        rows.append(int((np.linalg.norm(truth.center - center, axis=1) + 1e3 * other).argmin()))
    assert len({*rows}) == objects < views  # an object seen by two cameras counts once
    shown = truth[rows]
    clear = np.abs(np.linalg.norm(shown.center, axis=1) - 150) > 1e-6  # where rounding decides what is in range
    metrics = argoverse_metrics(shown[clear], results[clear])
    for name in {*shown.name} & {*CLASSES}:
        own = metrics["classes"][name]
        assert own["AP"] == pytest.approx(1, abs=1e-9)
        assert max(own["ATE"], own["ASE"], own["AOE"]) < 1e-9
    shuffled = [frames[i] for i in np.random.default_rng(0).permutation(len(frames))]
    assert_same_boxes(argoverse.merge_cameras(shuffled, found), merged)


def test_of_two_views_the_better_score_wins_and_then_the_smaller_sigma(frames):
    one, two = (next(f for f in frames if f"ring_front_{side}" in f.id) for side in ("left", "center"))
    place = one.pose @ [2.0, 0.0, 12.0, 1.0]

    def seen(frame, score, sigma, height):
        center = (np.linalg.inv(frame.pose) @ place)[:3]
        sizes, sigma = [[4, height, 2]], np.array([sigma])
        return make_labels(["BUS"], [[0, 0, 9, 9]], sizes, [center], [0.3], score=[score], sigma=sigma)

    def heights(a, b):
        return argoverse.merge_cameras([one, two], {one.id: a, two.id: b}).size[:, 1].tolist()

    assert heights(seen(one, 0.5, 9, 1.5), seen(two, 0.6, 9, 1.6)) == [1.6]
    assert heights(seen(one, 0.6, 9, 1.5), seen(two, 0.6, 8, 1.6)) == [1.6]
    assert heights(seen(one, 0.6, 8, 1.5), seen(two, 0.6, np.nan, 1.6)) == [1.5]


MODEL = ModelConfig(
    backbone="test_resnet",
    size=(576, 768),
    channels=32,
    classes=tuple(PRESENT),
    depth_mean=(30.0, 20.0, 10.0),
    depth_std=(15.0, 10.0, 8.0),
    nms_iou=1.0,  # objects that hide each other stay
    max_detections=300,
)


def test_ground_truth_through_the_whole_path_has_no_error(root, frames, tmp_path):
    """Encode, decode, merge, write, read, evaluate: portrait and landscape pictures, no error, nothing invented."""
    own, boxes = frames[:14], read_annotations(root / "sensor/val" / LOG)
    sizes = tuple(tuple(np.median(boxes.size[boxes.name == name], 0).tolist()) for name in PRESENT)
    found = detect_truth(own, dataclasses.replace(MODEL, size_prior=sizes))
    argoverse.write_results(tmp_path / "results.feather", argoverse.merge_cameras(own, found))
    results = read_boxes(tmp_path / "results.feather")
    truth = read_truth(root, ("val",), {LOG: [int(frame.group.split("/")[1]) for frame in own]})[0]
    metrics, seen = argoverse_metrics(truth, results), 0
    for name in PRESENT:
        one = metrics["classes"][name]
        if one["AP"]:
            seen += 1
            assert max(one["ATE"], one["ASE"], one["AOE"]) < 2e-3, name
    assert seen > 15


def test_a_run_follows_cds(log, tmp_path, monkeypatch, capsys):
    """Two steps of configs/argoverse.py on two invented sweeps, then their evaluation, by the run and by its file."""
    root, rows = (
        changed_log(log, tmp_path / "data", "annotations.feather"),
        feather.read_table(log / "annotations.feather"),
    )
    two = np.unique(rows["timestamp_ns"].to_numpy())[:2]
    rows = rows.filter(arrow.array(np.isin(rows["timestamp_ns"].to_numpy(), two)))
    feather.write_feather(rows, root / "sensor/val" / LOG / "annotations.feather")
    cameras = ["ring_front_center", "ring_front_left"]
    source = json.dumps([{"kind": "argoverse", "split": ["val"], "cameras": cameras}])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    given = [
        str(ROOT / "configs/argoverse.py"), f"data.root={root}", f"data.train={source}", f"data.val={source}",
        'model.classes=["BUS", "PEDESTRIAN"]', "data.workers=0", f"data.index={tmp_path / 'index'}",
        "model.backbone=test_resnet", "model.pretrained=false", "model.size=64,96", "model.channels=32",
    ]  # fmt: skip
    more = [
        "train.batch_size=4",
        "train.steps=2",
        "train.warmup=0",
        "train.log_every=1",
        "train.eval_every=0",
        "train.mixed_precision=no",
    ]
    train.main([*given, f"out={tmp_path / 'run'}", *more])
    metrics = json.loads((tmp_path / "run/best/metrics.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert lines[-1]["val/CDS"] == metrics["CDS"] >= 0
    assert all(line["loss"] > 0 for line in lines[:-1])
    said = capsys.readouterr().out
    assert f"CDS: {metrics['CDS']:.4f}, best: {metrics['CDS']:.4f}" in said
    AcceleratorState._reset_state(reset_partial_state=True)
    out = tmp_path / "evaluation"
    assert evaluate.main([str(tmp_path / "run"), f"data.root={root}", "--out", str(out)]) == 0
    assert main([str(root), str(out / "results_argoverse.feather"), "--json", str(tmp_path / "file.json")]) == 0
    of_run, of_file = (json.loads(path.read_text()) for path in (out / "metrics.json", tmp_path / "file.json"))
    assert of_run == of_file
    assert len(read_boxes(out / "results_argoverse.feather")) > 0
    AcceleratorState._reset_state(reset_partial_state=True)
    capsys.readouterr()
    words = [str(tmp_path / "run"), f"data.root={root}", "--out", str(tmp_path / "no"), "--report"]
    assert evaluate.main(words) == 2
    assert "a report knows the metrics of kitti and nuscenes, and the frames are argoverse's" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    assert check_data.main(given) == 0
    said = capsys.readouterr().out
    assert "no problem found" in said
    assert "image sizes: 2, most often " in said


def test_portrait_and_landscape_pictures_share_a_batch(frames):
    dataset = Detection3D(frames[:2], MODEL, DataConfig(), training=True)
    assert {dataset.view_of(i).image_size for i in range(2)} == {(155, 204), (204, 155)}
    batch = collate([dataset[0, i] for i in range(2)])
    assert batch["image"].shape == (2, 576, 768, 3)
    assert batch["valid"].any(1).all()


def test_the_region_needs_the_maps_of_all_logs_or_none(root, log, tmp_path):
    source, config = Source(kind="argoverse", root=str(root), split=("val",)), Config()
    assert find_maps(source, config) == {LOG: log}
    own = dataclasses.replace(source, root=str(changed_log(log, tmp_path, "map")))
    assert find_maps(own, config) is None
    (tmp_path / "sensor/val/another").symlink_to(log)
    with pytest.raises(UserError, match=r"expected map/log_map_archive_\*.json, as other logs have one"):
        find_maps(own, config)
    path = next((tmp_path / "sensor/val" / LOG).parent.glob("another/map/*.json"))
    (tmp_path / "damaged/map").mkdir(parents=True)
    (tmp_path / "damaged/map" / path.name).write_text('{"drivable_areas": {}}')
    with pytest.raises(UserError, match="expected a map with drivable_areas"):
        read_region(tmp_path / "damaged")


def test_what_these_metrics_would_ignore_is_refused(frames):
    def refused(model, sources, **train):
        dataset = Detection3D(frames, dataclasses.replace(MODEL, classes=model), DataConfig())
        dataset.sources = sources
        with pytest.raises(UserError) as error:
            blank(dataset, Config(model=MODEL, train=TrainConfig(**train)))
        return str(error.value)

    one = Source(kind="argoverse")
    assert "several Argoverse sources" in refused(("BUS",), (one, one))
    assert "model.classes names 'Car', and Argoverse's metrics know only ART" in refused(("Car",), (one,))
    assert "data.overlap and train.eval_repeat belong to KITTI" in refused(("BUS",), (one,), eval_repeat=2)


def test_a_limit_that_parts_the_cameras_of_a_sweep_is_refused(root):
    for limit, words in ((3, "limit=3 parts the cameras of a sample or sweep"), (len(RING), "")):
        source = Source(kind="argoverse", root=str(root), split=("val",), limit=limit)
        config = DataConfig(index="none")
        some = argoverse.frames(source, config)
        assert len(some) == limit
        with pytest.raises(UserError, match=words) if words else contextlib.nullcontext():
            refuse_parted(source, config, some)
