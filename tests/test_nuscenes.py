"""nuScenes: the reader of its tables, the evaluator and the merge of six cameras, against what the official devkit
says.

data/nuscenes_invented.tar.xz holds invented tables and result files (free of nuScenes content) and the output of
nuscenes-devkit 1.2.0.
"""

import dataclasses
import gzip
import json
import re

import numpy as np
import nuscenes_cases
import pytest
from conftest import SHARED
from PIL import Image
from test_index import assert_same

import evaluate
from data import DataConfig, Source
from formats import nuscenes
from formats.tables import read_annotations, read_samples
from metrics import nuscenes_files
from metrics.nuscenes import main, nuscenes_metrics
from scene.frames import UserError, join, make_labels
from scene.geometry import box_iou, wrap_angle

SAMPLE = SHARED / "nuscenes_sample"


@pytest.fixture(scope="session")
def frames(invented):
    return nuscenes.read_frames(invented, ("mini_train", "mini_val"), images=False)


def table(root, name):
    return json.loads((root / "v1.0-mini" / f"{name}.json").read_text())


def changed(root, folder, name, change):
    """A folder with the same tables, but what `change` makes of the rows of one; None removes it."""
    (folder / "v1.0-mini").mkdir()
    for path in (root / "v1.0-mini").iterdir():
        (folder / "v1.0-mini" / path.name).symlink_to(path)
    (folder / "v1.0-mini" / f"{name}.json").unlink()
    if change is not None:
        rows = table(root, name)
        change(rows)
        (folder / "v1.0-mini" / f"{name}.json").write_text(json.dumps(rows))
    return folder


# ---- reader


def test_every_row_of_the_official_transforms_agrees(invented, frames):
    annotations = {row["token"]: row for row in table(invented, "sample_annotation")}
    frame_of = {str(frame.image.relative_to(invented)): frame for frame in frames}
    rows, labelled = json.loads((invented / "cameras.json").read_text())["rows"], 0
    for row in rows:
        annotation, frame = annotations[row["annotation"]], frame_of[row["filename"]]
        assert frame.group == annotation["sample_token"]
        assert row["channel"] in frame.id
        center = frame.pose[:3, :3].T @ (np.array(annotation["translation"]) - frame.pose[:3, 3])
        np.testing.assert_allclose(center, row["center"], atol=1e-6)
        np.testing.assert_allclose((frame.K @ center)[:2] / center[2], row["uv"], atol=1e-4)
        at = np.flatnonzero(np.abs(frame.labels.center - row["center"]).max(1) < 1e-6)
        points = annotation["num_lidar_pts"] + annotation["num_radar_pts"]
        assert len(at) == 1 or not row["center_inside"] or not points, (
            row
        )  # the reader also labels some that box_in_image leaves out
        if len(at):
            labelled, one = labelled + 1, frame.labels[int(at[0])]
            assert one.name == nuscenes.CLASS_OF.get(row["category"], row["category"])
            np.testing.assert_allclose(one.size, np.array(row["size_wlh"])[[1, 2, 0]], atol=1e-6)
            np.testing.assert_allclose(wrap_angle(one.yaw - row["yaw"]), 0, atol=1e-6)
            velocity = np.nan if row["velocity"] is None else row["velocity"]
            np.testing.assert_allclose(one.velocity, velocity, atol=1e-6)
            assert row["in_front"]
    assert len(rows) == 215
    assert labelled > 120


def test_every_velocity_is_the_official_one(invented):
    samples = read_samples(invented / "v1.0-mini", ("mini_train", "mini_val"), nuscenes.NUSCENES)
    boxes, _ = read_annotations(invented / "v1.0-mini", samples, nuscenes.NUSCENES)
    expected = json.loads((invented / "velocities.json").read_text())
    tokens = [
        row["token"] for s in samples for row in table(invented, "sample_annotation") if row["sample_token"] == s.token
    ]
    assert len(tokens) == len(expected) == len(boxes) == 1497
    velocity = np.array([[np.nan] * 3 if expected[token] is None else expected[token] for token in tokens])
    np.testing.assert_allclose(boxes.velocity, velocity, atol=1e-6)
    assert np.isnan(velocity[:, 0]).sum() == 98


def test_frames_come_by_scene_time_and_camera_whatever_the_order_of_the_tables(invented, frames, tmp_path):
    names = [frame.id.split("/") for frame in frames]
    assert len(frames) == 48 * 6
    assert len({frame.id for frame in frames}) == len(frames)
    assert [scene for scene, _, _ in names] == sorted(scene for scene, _, _ in names)
    assert [camera for _, camera, _ in names[:6]] == sorted({camera for _, camera, _ in names})
    assert [len({frame.group for frame in frames[i : i + 6]}) for i in range(0, len(frames), 6)] == [1] * 48
    again = nuscenes.read_frames(
        changed(invented, tmp_path, "sample_data", list.reverse), ("mini_val", "mini_train"), images=False
    )
    assert [frame.id for frame in again] == [frame.id for frame in frames]


def test_objects_without_points_and_behind_the_camera_are_ignore_regions(frames):
    labels = [frame.labels for frame in frames]
    assert min(one.center[one.is_3d, 2].min(initial=1) for one in labels) > 0
    regions = sum((one.name == "DontCare").sum() for one in labels)
    assert regions > 150
    assert all((one.is_3d == (one.name != "DontCare")).all() for one in labels)
    for one in labels:
        assert ((one.box[:, 2:] - one.box[:, :2]) >= 1).all()
        assert (one.box >= 0).all()
        assert (one.box <= [1599, 899, 1599, 899]).all()
        assert np.isin(one.occlusion[one.is_3d], range(4)).all()
        assert ((one.truncation[one.is_3d] >= 0) & (one.truncation[one.is_3d] <= 1)).all()


def test_visibility_becomes_the_occlusion_level(invented, frames):
    levels = {row["token"]: row["level"] for row in table(invented, "visibility")}
    expected = {"v80-100": 0, "v60-80": 1, "v40-60": 2, "v0-40": 3}
    checked = 0
    for row in table(invented, "sample_annotation"):
        for frame in (f for f in frames if f.group == row["sample_token"]):
            center = frame.pose[:3, :3].T @ (np.array(row["translation"]) - frame.pose[:3, 3])
            at = np.flatnonzero(np.abs(frame.labels.center - center).max(1) < 1e-6)
            checked += len(at)
            assert all(frame.labels.occlusion[i] == expected[levels[row["visibility_token"]]] for i in at)
    assert checked > 1500


def test_the_splits_are_the_official_ones():
    numbers = {split: set(nuscenes.scenes_of(split)) for split in nuscenes.SPLITS}
    assert {split: len(scenes) for split, scenes in numbers.items()} == {
        "mini_train": 8, "mini_val": 2, "train": 700, "val": 150, "test": 150
    }  # fmt: skip
    assert len(numbers["train"] | numbers["val"] | numbers["test"]) == 1000
    assert numbers["mini_val"] <= numbers["val"]
    assert numbers["mini_train"] <= numbers["train"] | numbers["val"]
    assert {"scene-0001", "scene-0061", "scene-1110"} <= numbers["train"]
    assert {"scene-0003", "scene-0103", "scene-1073"} <= numbers["val"]


def remove_last_camera(rows):
    rows.remove(next(row for row in rows if row["filename"].startswith("samples/CAM_BACK/")))


def without(key):
    return lambda rows: rows[3].pop(key)


def put(key, value):
    return lambda rows: rows[3].update({key: value})


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("ego_pose", None, r"v1.0-mini/ego_pose.json: no such table"),
        (
            "sample_annotation",
            without("size"),
            r"sample_annotation.json: a row lacks 'size', expected token, sample_token, ",
        ),
        ("sample", lambda rows: rows.append(7), r"sample.json: not a JSON list of rows"),
        (
            "sample_annotation",
            put("translation", [1.0, float("nan"), 0.0]),
            r"translation of \w+ is \[1.0, nan, 0.0\], expected 3 finite",
        ),
        (
            "sample_annotation",
            put("size", [1.0, 0.0, 2.0]),
            r"size of \w+ is \[1.0, 0.0, 2.0\], expected 3 positive",
        ),
        ("sample_annotation", put("rotation", [0, 0, 0, 0]), r"rotation of \w+ is \[0, 0, 0, 0\], expected 4 finite"),
        (
            "sample_annotation",
            lambda rows: [row.update(attribute_tokens=2 * row["attribute_tokens"]) for row in rows],
            r"annotation \w+ has 2 attributes, expected at most one",
        ),
        ("sample_annotation", put("instance_token", "x"), r"an annotation refers to 'x', which no table of .* holds"),
        ("sample_data", remove_last_camera, r"CAM_BACK of sample \w{32}: sample_data.json holds no key frame of it"),
        (
            "ego_pose",
            lambda rows: rows.clear(),
            r"ego_pose.json: there is no pose '\w+', which sample_data.json refers to",
        ),
        (
            "scene",
            lambda rows: [row.update(name="scene-0001") for row in rows],
            r"scene.json: it holds no scene of split 'mini_val'",
        ),
    ],
)
def test_mistakes_in_the_tables_are_one_sentence(invented, tmp_path, name, change, sentence):
    root = changed(invented, tmp_path, name, change)
    with pytest.raises(UserError, match=sentence):
        nuscenes.read_frames(root, ("mini_val",), images=False)


def test_a_version_split_or_camera_that_is_not_there_is_named(invented, tmp_path):
    with pytest.raises(UserError, match=r"there is no version 'v1.0-trainval', only v1.0-mini"):
        nuscenes.read_frames(invented, ("train",), "v1.0-trainval")
    with pytest.raises(UserError, match=r"expected a folder with nuScenes' tables in v1.0-\*; version= names any"):
        nuscenes.read_frames(tmp_path, ("train",))
    for split in ("val", "nonsense"):
        with pytest.raises(ValueError, match=rf"v1.0-mini: there is no split '{split}', expected mini_train, mini_val"):
            nuscenes.read_frames(invented, (split,))
    with pytest.raises(ValueError, match=r"there is no camera 'CAM_FRNT', only CAM_BACK, CAM_BACK_LEFT"):
        nuscenes.read_frames(invented, ("mini_val",), cameras=("CAM_FRNT",))
    for name in ("v1.0-mini", "v1.0-trainval"):
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=r"there are v1.0-mini, v1.0-trainval, expected version to name one of them"):
        nuscenes.read_frames(tmp_path, ("val",))


def test_a_missing_picture_is_named_or_listed_among_the_problems(invented):
    with pytest.raises(
        UserError, match=r"v1.0-mini: CAM_BACK of sample \w{32}: no such image .*samples/CAM_BACK/invented"
    ):
        nuscenes.read_frames(invented, ("mini_val",))
    problems = []
    assert nuscenes.read_frames(invented, ("mini_val",), cameras=("CAM_FRONT", "CAM_BACK"), problems=problems) == []
    assert len(problems) == 80


@pytest.fixture(scope="session")
def pictured(invented, frames, tmp_path_factory):
    """The invented tables of mini_train with grey pictures."""
    root = tmp_path_factory.mktemp("pictured")
    (root / "v1.0-mini").symlink_to(invented / "v1.0-mini")
    Image.new("RGB", (1600, 900), (120, 130, 140)).save(root / "grey.jpg")
    for frame in (f for f in frames if f.id.startswith("scene-0061")):
        path = root / frame.image.relative_to(invented)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.hardlink_to(root / "grey.jpg")
    return root


@pytest.mark.parametrize("folder", ["", "none"])
def test_a_source_reads_any_cameras(pictured, folder):
    cameras, config = ("CAM_FRONT", "CAM_BACK"), DataConfig(root=str(pictured), index=folder)
    source = Source(kind="nuscenes", split=("mini_train",), cameras=cameras)
    frames = nuscenes.frames(source, config)
    assert isinstance(frames, list) == (folder == "none")
    assert [frame.id.split("/")[1] for frame in frames[:2]] == ["CAM_FRONT", "CAM_BACK"]
    assert len(frames) == 16
    assert {frame.size for frame in frames} == {(1600, 900)}
    expected = nuscenes.read_frames(pictured, source.split, cameras=cameras)
    for one, two in zip(expected, frames, strict=True):
        assert_same(one, two)
    source = dataclasses.replace(source, limit=3)
    assert [frame.id for frame in nuscenes.frames(source, config)] == [frame.id for frame in expected[:3]]


# ---- one real sample


def quaternion(matrix):
    """w, x, y, z of a rotation matrix (3, 3): the eigenvector of its largest eigenvalue (Bar-Itzhack 2000)."""
    (a, b, c), (d, e, f), (g, h, i) = matrix
    symmetric = np.array(
        [[a - e - i, 0, 0, 0], [d + b, e - a - i, 0, 0], [g + c, h + f, i - a - e, 0], [h - f, c - g, d - b, a + e + i]]
    )
    return np.linalg.eigh(symmetric / 3)[1][[3, 0, 1, 2], -1].tolist()


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """(root, info): a folder in nuScenes' layout made from the real sample, and what mmdet3d's file says of it."""
    if not (SAMPLE / "sample.json").is_file():
        pytest.skip(f"the real sample is not here: {SAMPLE}")
    content = json.loads((SAMPLE / "sample.json").read_text())
    info, names = content["data_list"][0], {i: name for name, i in content["metainfo"]["categories"].items()}
    root = tmp_path_factory.mktemp("real")
    (root / "samples").symlink_to(SAMPLE / "images")
    category = {name: key for key, name in nuscenes.CLASS_OF.items()}
    to_global = np.array(info["ego2global"]) @ np.array(info["lidar_points"]["lidar2ego"])
    rows = {
        name: [] for name in ("sensor", "calibrated_sensor", "ego_pose", "sample_data", "sample_annotation", "instance")
    }
    for channel, camera in info["images"].items():
        mount = np.array(camera["cam2ego"])
        pose = to_global @ np.linalg.inv(camera["lidar2cam"]) @ np.linalg.inv(mount)
        rows["sensor"].append({"token": channel, "channel": channel, "modality": "camera"})
        calibrated = {"sensor_token": channel, "camera_intrinsic": camera["cam2img"], "token": channel}
        for name, matrix, more in (("calibrated_sensor", mount, calibrated), ("ego_pose", pose, {"token": channel})):
            rows[name].append({**more, "translation": matrix[:3, 3].tolist(), "rotation": quaternion(matrix[:3, :3])})
        rows["sample_data"].append(
            {"sample_token": "s", "calibrated_sensor_token": channel, "ego_pose_token": channel, "is_key_frame": True,
             "width": 1600, "height": 900, "timestamp": round(1e6 * camera["timestamp"]),
             "filename": f"samples/{camera['img_path']}"}
        )  # fmt: skip
    for number, box in enumerate(info["instances"]):
        x, y, z, l, w, h, yaw = box["bbox_3d"]
        ahead = to_global[:3, :3] @ [np.cos(yaw), np.sin(yaw), 0]
        half = np.arctan2(ahead[1], ahead[0]) / 2  # real boxes stand upright on the global ground
        center = (to_global @ [x, y, z, 1])[:3].tolist()
        rows["instance"].append({"token": str(number), "category_token": names.get(box["bbox_label_3d"], "animal")})
        rows["sample_annotation"].append(
            {"token": str(number), "sample_token": "s", "instance_token": str(number), "visibility_token": "4",
             "attribute_tokens": [], "translation": center, "size": [w, l, h], "prev": "", "next": "",
             "rotation": [np.cos(half), 0, 0, np.sin(half)], "num_lidar_pts": box["num_lidar_pts"],
             "num_radar_pts": box["num_radar_pts"]}
        )  # fmt: skip
    rows["category"] = [{"token": name, "name": category[name]} for name in names.values()] + [
        {"token": "animal", "name": "animal"}
    ]
    rows |= {
        "scene": [{"token": "a", "name": "scene-0061"}],
        "attribute": [],
        "visibility": [{"token": "4", "level": "v80-100"}],
    }
    rows["sample"] = [{"token": "s", "scene_token": "a", "timestamp": round(1e6 * info["timestamp"])}]
    (root / "v1.0-mini").mkdir()
    for name, content in rows.items():
        (root / "v1.0-mini" / f"{name}.json").write_text(json.dumps(content))
    return root, info


def test_the_boxes_of_a_real_sample_meet_their_pixels(real):
    root, info = real
    bare = [box["bbox_3d"][3:6] for box in info["instances"] if box["num_lidar_pts"] + box["num_radar_pts"] == 0]
    found = nuscenes.read_frames(root, ("mini_train",))
    assert len(found) == 6
    matched, fits = 0, []
    for frame in found:
        labels = frame.labels
        pixels = (labels.center @ frame.K.T)[:, :2] / labels.center[:, 2:]
        for box in info["cam_instances"][frame.id.split("/")[1]]:
            l, h, w = box["bbox_3d"][3:6]
            if any(np.allclose([l, w, h], size) for size in bare):
                continue
            row = int(np.argmin(np.abs(pixels - box["center_2d"]).max(1)))
            assert np.abs(pixels[row] - box["center_2d"]).max() < 0.02
            assert abs(labels.center[row, 2] - box["depth"]) < 1e-3
            np.testing.assert_allclose(labels.size[row], [l, h, w], atol=1e-6)
            np.testing.assert_allclose(wrap_angle(labels.yaw[row] - box["bbox_3d"][6]), 0, atol=5e-3)
            fits.append(box_iou(labels.box[row], np.array(box["bbox"])))
            matched += 1
    assert matched == 81
    assert np.median(fits) > 0.99
    assert sum((frame.labels.name == "DontCare").sum() for frame in found) == 3


# ---- evaluator


@pytest.fixture(scope="session")
def truths(invented):
    return {split: nuscenes.read_truth(invented, (split,)) for split in ("mini_train", "mini_val")}


def numbers_of(metrics, path=""):
    """Path -> every number of a metrics_summary.json but the time and the settings."""
    found = {}
    for key, value in metrics.items():
        if isinstance(value, dict) and key not in ("cfg", "meta"):
            found |= numbers_of(value, f"{path}{key}/")
        elif isinstance(value, float) and key != "eval_time":
            found[path + key] = value
    return found


JOBS = ["results_perfect", "results_noisy", "results_nasty", "results_scale", "results_train"] + [
    f"cases/{case}" for case in (
        "perfect_score_one", "perfect_with_zero_points", "ties_all_equal", "ties_rounded", "duplicates", "borders",
        "range", "racks", "yaw", "attributes", "missing_class", "score_zero", "low_recall", "nan_first", "boxes_500",
        "one_box", "only_false", "high_scores", "recall_plateaus", "recall_end_on_grid",
    )
]  # fmt: skip


@pytest.mark.parametrize("job", JOBS)
def test_every_number_is_the_official_one(invented, truths, tmp_path, job):
    expected = json.loads((invented / "expected.json").read_text())[job]
    path = invented / f"{job}.json"
    if job == "results_scale":  # too large to be kept here
        packed = SHARED / "nuscenes_eval/invented/results_scale.json.gz"
        if not packed.is_file():
            pytest.skip(f"the large result file is not here: {packed}")
        path = tmp_path / "scale.json"
        path.write_bytes(gzip.decompress(packed.read_bytes()))
    truth = truths[expected["eval_set"]]
    metrics = nuscenes_metrics(truth, nuscenes_files.read_results(path, truth.tokens)[0])
    found, official = numbers_of(metrics), numbers_of(expected)
    assert found.keys() == official.keys()
    assert len(found) == 10 * (4 + 1 + 5) + 12
    for key, number in official.items():
        assert found[key] == pytest.approx(number, abs=1e-9, nan_ok=True), key
    assert {**metrics["cfg"], "dist_ths": list(metrics["cfg"]["dist_ths"])} == expected["cfg"]


def test_a_truth_of_some_samples(invented, truths):
    whole = truths["mini_val"]
    results = json.loads((invented / "results_noisy.json").read_text())["results"]
    tokens = whole.tokens[5:30]
    part = whole.of(tokens)
    assert part.tokens == tokens
    assert 0 < len(part.boxes) < len(whole.boxes)
    some = {token: results[token] for token in tokens}
    metrics = nuscenes_metrics(part, nuscenes_files.parse_results(some, tokens))
    padded = {token: some.get(token, []) for token in results}
    expected = nuscenes_metrics(whole, nuscenes_files.parse_results(padded, whole.tokens))
    for name in nuscenes.NUSCENES.ranges:  # the same hits and misses, of fewer objects
        assert metrics["mean_dist_aps"][name] >= expected["mean_dist_aps"][name]
    assert metrics["mean_ap"] > expected["mean_ap"]


def test_readers_and_metrics_know_the_same_classes():
    dialect = nuscenes.NUSCENES
    assert list(dialect.ranges) == list(dialect.attributes) == list(dialect.usual)
    assert set(dialect.classes.values()) == set(dialect.ranges)


def patched(content, ops):
    """A result file changed as errors.json says."""
    for op in ops:
        kind, results = op["op"], content["results"]
        if kind in ("set", "del", "repeat"):
            *path, last = op["path"]
            place = content
            for key in path:
                place = place[key]
            if kind == "del":
                del place[last]
            else:
                place[last] = op["value"] if kind == "set" else [op["box"]] * op["count"]
        elif kind == "clear":
            content["results"] = {token: [] for token in results}
        else:
            own = [
                (token, box) for token, boxes in results.items() for box in boxes if box["detection_name"] == op["cls"]
            ]
            for number, (token, box) in enumerate(own):
                if kind == "size":
                    box["size"] = op["value"]
                elif number % 2:
                    box["detection_score"] *= -1
                else:
                    results[token].remove(box)
    return content


SENTENCES = {  # name in errors.json: what is said here
    "boxes_501": r"sample 54854a83\w+ holds 501 boxes, expected at most 500",
    "sample_missing": r"1 of 40 samples are missing, the first is 54854a83\w+",
    "sample_of_another_split": r"1 samples are none of the split's, the first is 16936b12",
    "sample_unknown": r"1 samples are none of the split's, the first is ffffffff",
    "class_unknown": r"sample 54854a83\w+, box 0: detection_name is 'tram', expected one of car, truck",
    "attribute_unknown": r"sample 54854a83\w+, box 0: attribute_name is 'vehicle.flying', expected one of cycle",
    "attribute_missing": r"sample 54854a83\w+, box 0: attribute_name is 'missing'",
    "velocity_missing": r"sample 54854a83\w+, box 0: velocity is 'missing', expected 2 numbers",
    "velocity_three_numbers": r"sample 54854a83\w+, box 0: velocity is '\[0.0, 0.0, 0.0\]', expected 2 numbers",
    "translation_two_numbers": r"sample 54854a83\w+, box 0: translation is '\[0.0, 0.0\]', expected 3 numbers",
    "translation_nan": r"sample 54854a83\w+, box 0: translation is '\[nan, 0.0, 0.0\]', expected 3 numbers",
    "size_nan": r"sample 54854a83\w+, box 0: size is '\[1.0, nan, 1.0\]', expected 3 numbers",
    "score_nan": r"sample 54854a83\w+, box 0: detection_score is 'nan', expected a number",
    "velocity_nan": None,
    "size_zero_matched": r"sample \w{32}, a car: its l, h, w are \[4.0, 1.5, .*\] m, expected all > 0",
    "size_negative_matched": r"sample \w{32}, a car: its l, h, w are \[4.0, 1.5, .*\] m, expected all > 0",
    "all_lists_empty": r"it holds no box at all, which the official evaluator refuses",
    "no_meta": r"expected an object .* found no 'meta'",
    "no_results": r"expected an object .* found no 'results'",
    "negative_scores_low_recall": r"the scores of car reach from -0.\d+ to -0.\d+, expected finite ones not below 0",
}


@pytest.mark.parametrize("name", SENTENCES)
def test_what_the_official_evaluator_refuses_is_refused(invented, truths, tmp_path, name):
    cases = {case["name"]: case for case in json.loads((invented / "errors.json").read_text())}
    assert cases.keys() == SENTENCES.keys()
    case, truth, path = cases[name], truths["mini_val"], tmp_path / "results.json"
    path.write_text(json.dumps(patched(json.loads((invented / case["base"]).read_text()), case["ops"])))
    if SENTENCES[name] is None:
        metrics = nuscenes_metrics(truth, nuscenes_files.read_results(path, truth.tokens)[0])
        assert metrics["nd_score"] == pytest.approx(case["nd_score"], abs=1e-9)
        assert metrics["tp_errors"] == pytest.approx(case["tp_errors"], abs=1e-9)
    else:
        assert case["exception"]
        with pytest.raises(ValueError, match=SENTENCES[name]):
            nuscenes_metrics(truth, nuscenes_files.read_results(path, truth.tokens)[0])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"sample_token": "nowhere"}, "sample_token is 'nowhere', expected one of the samples"),
        ({"sample_token": None}, "sample_token is 'None', expected one of the samples"),
        ({"rotation": [0, 0, 1]}, r"rotation is '\[0, 0, 1\]', expected 4 numbers"),
        ({"translation": ["1", 2, 3]}, r"translation is .* expected 3 numbers"),
        ({"detection_name": ["car"]}, r"detection_name is .* expected one of car"),
        ({"num_pts": float("nan")}, "num_pts is 'nan', expected a number"),
        ({"detection_score": "high"}, "detection_score is 'high', expected a number"),
    ],
)
def test_a_malformed_box_is_named(invented, truths, change, sentence):
    results = json.loads((invented / "results_perfect.json").read_text())["results"]
    token = list(results)[3]
    results[token][2] |= change
    with pytest.raises(ValueError, match=f"sample {token}, box 2: {sentence}"):
        nuscenes_files.parse_results(results, truths["mini_val"].tokens)
    results[token] = "none"
    with pytest.raises(ValueError, match=f"sample {token} holds none, expected a list of boxes"):
        nuscenes_files.parse_results(results, truths["mini_val"].tokens)
    results[token] = [7]
    with pytest.raises(ValueError, match=rf"sample {token} holds \[7\], expected a list of boxes"):
        nuscenes_files.parse_results(results, truths["mini_val"].tokens)


def test_results_without_a_box_score_nothing(truths):
    truth = truths["mini_val"]
    metrics = nuscenes_metrics(truth, nuscenes_files.parse_results({token: [] for token in truth.tokens}, truth.tokens))
    assert metrics["mean_ap"] == metrics["nd_score"] == 0
    assert set(metrics["tp_errors"].values()) == {1.0}


def test_the_command_prints_a_table_and_writes_the_official_keys(invented, tmp_path, capsys):
    out = tmp_path / "out.json"
    arguments = [invented, invented / "results_noisy.json", "--version", "v1.0-mini", "--split", "mini_val"]
    assert main([str(argument) for argument in (*arguments, "--json", out)]) == 0
    printed = capsys.readouterr().out.splitlines()
    official = json.loads((invented / "expected.json").read_text())["results_noisy"]
    assert printed[0].split() == re.findall(r"\S+", "class AP @0.5 m @1 m @2 m @4 m ATE m ASE AOE rad AVE m/s AAE")
    rows = {line.split()[0]: line.split()[1:] for line in printed[1:12]}
    assert list(rows) == [*nuscenes.NUSCENES.ranges, "mean"]
    aps = official["mean_dist_aps"]["car"], *official["label_aps"]["car"].values()
    assert rows["car"] == [f"{number:.4f}" for number in (*aps,
                                                          *official["label_tp_errors"]["car"].values())]  # fmt: skip
    assert rows["traffic_cone"][-3:] == ["-"] * 3
    assert printed[12:] == [f"mAP {official['mean_ap']:.4f}   NDS {official['nd_score']:.4f}"]
    written = json.loads(out.read_text())
    assert written.keys() == official.keys() - {"file", "eval_set"}
    assert written["meta"] == official["meta"]
    through = ["--nuscenes", invented, "--results", invented / "results_noisy.json", "--split", "mini_val"]
    assert evaluate.main([str(argument) for argument in through]) == 0  # as it was called before
    assert capsys.readouterr().out.splitlines() == printed


def test_boxes_that_name_another_sample_count_there_and_are_told(invented, tmp_path, capsys):
    content = json.loads((invented / "results_perfect.json").read_text())
    first, second = [token for token, boxes in content["results"].items() if boxes][:2]
    content["results"][first][0].update(sample_token=second, detection_score="0.5")  # text, as officially
    (tmp_path / "mixed.json").write_text(json.dumps(content))
    assert main([str(invented), str(tmp_path / "mixed.json"), "--split", "mini_val"]) == 0
    sentence = "1 boxes name another sample than the one they are listed under, and count there; the first is under"
    assert f"{sentence} {first}" in capsys.readouterr().out


def test_mistakes_on_the_command_line_are_one_sentence(invented, tmp_path, capsys):
    files = ["--nuscenes", invented, "--split", "mini_val"]
    for arguments, sentence in (
        (files, "an evaluation of files needs --labels, --nuscenes or --argoverse, and --results"),
        ([*files, "--results", "x", "--labels", "y"], "needs --labels, --nuscenes or --argoverse"),
        ([*files, "--results", "x", "--errors"], "unrecognized arguments: --errors"),
        (["--nuscenes", "x", "--results", "y"], "the following arguments are required: --split"),
        (["--nuscenes", tmp_path, "--split", "val", "--results", "b"], "expected a folder with nuScenes' tables"),
        ([*files, "--results", tmp_path / "b"], f"{tmp_path / 'b'}: no such result file"),
        ([*files, "--results", invented / "expected.json"], "found no 'results'"),
    ):
        try:
            code = evaluate.main([str(argument) for argument in arguments])
        except SystemExit as stopped:
            code = stopped.code
        words = capsys.readouterr().err
        assert code == 2
        assert sentence in words
        assert words.count("\n") == 1


# ---- six cameras


def found_in(frames, **columns):
    """The objects of the ten classes as detections: frame id -> Labels; columns: name -> function of the Labels."""
    found = {}
    for frame in frames:
        labels = frame.labels[np.isin(frame.labels.name.astype(str), list(nuscenes.NUSCENES.ranges))]
        found[frame.id] = dataclasses.replace(labels, **{name: column(labels) for name, column in columns.items()})
    return found


def test_ground_truth_through_cameras_merge_and_file_is_perfect(frames, truths, tmp_path):
    truth = truths["mini_val"]
    own = [frame for frame in frames if frame.group in truth.tokens]
    found = found_in(own)
    merged = nuscenes_files.merge_cameras(own, found)
    views, objects = sum(map(len, found.values())), sum(map(len, merged.values()))
    assert (views, objects) == (1264, 1012)  # an object seen by two cameras counts once, and none is lost
    nuscenes_files.write_results(tmp_path / "results.json", merged)
    results, meta = nuscenes_files.read_results(tmp_path / "results.json", truth.tokens)
    metrics = nuscenes_metrics(truth, results)
    present = [name for name in nuscenes.NUSCENES.ranges if name != "construction_vehicle"]  # mini_val has none
    assert meta == {"use_camera": True, "use_lidar": False, "use_radar": False, "use_map": False, "use_external": False}
    assert all(ap == pytest.approx(1, abs=1e-9) for name in present for ap in metrics["label_aps"][name].values())
    for name in present:
        errors = metrics["label_tp_errors"][name]
        assert max(errors["trans_err"], errors["scale_err"]) < 1e-9
        assert not errors["orient_err"] > 1e-3  # boxes that are pitched and rolled lose that
        assert not errors["vel_err"] > 1e-3  # and moving ones their vertical speed
        assert not errors["attr_err"] > 0
    double = nuscenes_metrics(
        truth, nuscenes_files.parse_results(nuscenes_files.merge_cameras(own, found, distance=0), truth.tokens)
    )
    assert double["mean_ap"] < 0.75


def test_the_order_of_frames_does_not_matter(frames):
    rng = np.random.default_rng(0)
    own = frames[:60]
    found = found_in(
        own, score=lambda labels: rng.choice([0.25, 0.5], len(labels)), center=lambda labels: labels.center * 1.02
    )
    merged = nuscenes_files.merge_cameras(own, found)
    assert merged == nuscenes_files.merge_cameras([own[i] for i in rng.permutation(60)], dict(reversed(found.items())))
    assert len(merged) == 10


def test_of_two_views_the_better_score_wins_and_then_the_smaller_sigma(frames):
    front, right = (frame for frame in frames[:6] if frame.id.split("/")[1] in ("CAM_FRONT", "CAM_FRONT_RIGHT"))
    place = front.pose @ [2.0, 1.0, 12.0, 1.0]

    def seen(frame, score, sigma, height):
        center = (np.linalg.inv(frame.pose) @ place)[:3]
        return make_labels(
            ["car"], [[0, 0, 9, 9]], [[4, height, 2]], [center], [0.3], score=[score], sigma=np.array([sigma])
        )

    def heights(a, b, **options):
        merged = nuscenes_files.merge_cameras([front, right], {front.id: a, right.id: b}, **options)
        return [box["size"][2] for box in merged[front.group]]

    assert heights(seen(front, 0.5, 9, 1.5), seen(right, 0.6, 9, 1.6)) == [1.6]
    assert heights(seen(front, 0.6, 9, 1.5), seen(right, 0.6, 8, 1.6)) == [1.6]
    assert heights(seen(front, 0.6, 8, 1.5), seen(right, 0.6, np.nan, 1.6)) == [1.5]
    assert heights(seen(front, 0.5, 9, 1.5), seen(right, 0.6, 9, 1.6), distance=0.0) == [1.6, 1.5]
    both = join(
        [seen(front, 0.5, 9, 1.5), seen(front, 0.6, 9, 1.6)]
    )  # neighbours in one image are its own suppression's business
    assert heights(both, make_labels([], [], [], [], [])) == [1.6, 1.5]


def test_what_a_detector_does_not_tell_is_filled_and_500_boxes_are_kept(frames):
    frame = frames[0]
    n = 700
    center = np.stack([np.linspace(-300, 300, n), np.zeros(n), np.full(n, 20.0)], -1)
    names = ["car", "pedestrian", "barrier", "Van"] * (n // 4)
    labels = make_labels(names, np.zeros((n, 4)), np.ones((n, 3)), center, np.zeros(n), score=np.linspace(0, 1, n))
    boxes = nuscenes_files.merge_cameras([frame], {frame.id: labels})[frame.group]
    assert len(boxes) == 500
    assert [box["detection_score"] for box in boxes] == sorted((box["detection_score"] for box in boxes), reverse=True)
    assert {box["detection_name"]: box["attribute_name"] for box in boxes} == {
        "car": "vehicle.parked", "pedestrian": "pedestrian.moving", "barrier": ""
    }  # fmt: skip
    assert {tuple(box["velocity"]) for box in boxes} == {(0.0, 0.0)}
    told = dataclasses.replace(
        labels, attribute=np.full(n, "vehicle.moving", object), velocity=np.tile([1.0, np.nan, 0.0], (n, 1))
    )
    boxes = nuscenes_files.merge_cameras([frame], {frame.id: told})[frame.group]
    assert {box["attribute_name"] for box in boxes} == {"vehicle.moving", "pedestrian.moving", ""}
    ahead = frame.pose[:2, 0]
    np.testing.assert_allclose(boxes[0]["velocity"], ahead, atol=1e-3)
    with pytest.raises(ValueError, match=f"frame {frame.id} has no group or no pose"):
        nuscenes_files.merge_cameras([dataclasses.replace(frame, pose=None)], {frame.id: labels})


# ---- the devkit itself


def test_random_cases_agree_with_the_official_devkit(tmp_path):
    devkit = nuscenes_cases.load_devkit()
    if devkit is None:
        pytest.skip("the official devkit is not installed: pip install --no-deps nuscenes-devkit pyquaternion")
    assert {split: sorted(devkit.splits.create_splits_scenes()[split]) for split in nuscenes.SPLITS} == {
        split: sorted(nuscenes.scenes_of(split)) for split in nuscenes.SPLITS
    }
    assert max(nuscenes_cases.compare(devkit, seed, tmp_path) for seed in range(20)) < 1e-9


def test_random_cases_hold_what_they_are_meant_to():
    tables, content = zip(*(nuscenes_cases.make_case(np.random.default_rng(seed)) for seed in range(20)), strict=True)
    rows = [row for case in tables for row in case["sample_annotation"]]
    boxes = [box for case in content for own in case["results"].values() for box in own]
    assert sum(row["category_name"] == nuscenes.RACK for row in rows) > 50
    assert sum(row["prev"] != "" for row in rows) > 50
    assert sum(box["detection_score"] == 0.5 for box in boxes) > 100
    assert sum(np.isnan(box["velocity"]).any() for box in boxes) > 50
