"""Random small tables and result files full of ties and borders, of nuScenes or TruckScenes, to compare with devkits.

python tests/nuscenes_cases.py FIRST LAST [truckscenes]   compares cases FIRST to LAST - 1, prints the largest deviation
"""

import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from formats.nuscenes import NUSCENES, RACK, find_dialect, read_truth
from formats.tables import rotations
from metrics.nuscenes import ERRORS, nuscenes_metrics
from metrics.nuscenes_files import read_results

MATPLOTLIB = "axes backends backends.backend_agg figure gridspec patches pyplot ticker transforms"
UNUSED = ("cv2", "matplotlib", *(f"matplotlib.{name}" for name in MATPLOTLIB.split()), "sklearn", "sklearn.metrics",
          "shapely", "shapely.geometry", "descartes", "cachetools", "scipy", "scipy.spatial", "scipy.spatial.distance",
          "pandas", "fire", "pypcd4")  # fmt: skip


def load_devkit(name="nuscenes"):
    """What is needed of a devkit, None where it is not installed; packages that are not used may be missing."""
    if any(importlib.util.find_spec(package) is None for package in (name, "pyquaternion")):
        return None
    missing = {name: mock.MagicMock() for name in UNUSED if importlib.util.find_spec(name.partition(".")[0]) is None}
    with mock.patch.dict(sys.modules, missing):
        if name == "truckscenes":
            from truckscenes import TruckScenes
            from truckscenes.eval.detection.config import config_factory
            from truckscenes.eval.detection.evaluate import DetectionEval
            from truckscenes.utils import splits

            return SimpleNamespace(
                config=config_factory("detection_cvpr_2024"), evaluate=DetectionEval, tables=TruckScenes, splits=splits
            )
        from nuscenes.eval.common.config import config_factory
        from nuscenes.eval.detection.evaluate import DetectionEval
        from nuscenes.nuscenes import NuScenes
        from nuscenes.utils import splits
    return SimpleNamespace(
        config=config_factory("detection_cvpr_2019"), evaluate=DetectionEval, tables=NuScenes, splits=splits
    )


def quaternion(rng):
    """Mostly upright, at times tilted, negated or not of length 1."""
    half = rng.choice([rng.uniform(-np.pi, np.pi), rng.choice([0, np.pi / 4, np.pi / 2])]) / 2
    q = np.array([np.cos(half), *(rng.normal(0, 0.05, 2) if rng.random() < 0.3 else (0, 0)), np.sin(half)])
    return (q * rng.choice([1, 1, -1, 2.5])).tolist()


def make_case(rng, dialect=NUSCENES):
    """(tables by name, result file) with the tables a reader needs for an evaluation."""
    categories = [*dialect.classes, "animal", RACK]
    used = [*rng.choice(categories[:-2], rng.integers(1, 9), replace=False), "animal", RACK]
    [channel], origin = dialect.reference, [0, 0] if dialect is NUSCENES else [691_000, 5_335_000]
    tables = {name: [] for name in ("scene", "sample", "sample_data", "ego_pose", "sample_annotation", "instance")}
    tables["category"] = [{"token": f"c-{name}", "name": name} for name in categories]
    tables["attribute"] = [{"token": f"a-{name}", "name": name} for name in dialect.states]
    tables["visibility"] = [{"token": "4", "level": "v80-100"}]
    tables["sensor"] = [{"token": "lidar", "channel": channel, "modality": "lidar"}]
    tables["calibrated_sensor"] = [
        {
            "token": "mount",
            "sensor_token": "lidar",
            "translation": [1, 0, 2],
            "rotation": [1, 0, 0, 0],
            "camera_intrinsic": [],
        }
    ]
    results = {}
    for scene in rng.permutation(dialect.splits["mini_val"]):
        tables["scene"].append({"token": scene, "name": str(scene), "description": ""})
        tracks, time = {}, int(rng.integers(1, 1000)) * 1_000_003
        for number in range(rng.integers(1, 5)):
            token, time = (
                f"{scene}-{number}",
                time + int(rng.choice([500_000, 499_983, 750_000, 1_500_000, 1_500_001, 3_000_001])),
            )
            ego = [*(origin + rng.integers(-200, 200, 2) / 4).tolist(), 0.5]
            tables["sample"].append({"token": token, "timestamp": time, "scene_token": str(scene)})
            tables["ego_pose"].append({"token": f"e-{token}", "translation": ego, "rotation": [1, 0, 0, 0]})
            tables["sample_data"].append(
                {"token": f"d-{token}", "sample_token": token, "calibrated_sensor_token": "mount",
                 "ego_pose_token": f"e-{token}", "is_key_frame": True, "timestamp": time, "filename": "lidar",
                 "width": 0, "height": 0}
            )  # fmt: skip
            annotations = [
                make_annotation(rng, tables, token, ego, used, tracks, dialect) for _ in range(rng.integers(0, 20))
            ]
            tables["sample_annotation"] += annotations
            results[token] = make_boxes(rng, token, annotations, ego, dialect)
    order = rng.permutation(len(tables["sample_annotation"]))
    tables["sample_annotation"] = [tables["sample_annotation"][i] for i in order]
    tokens = list(rng.permutation(list(results)))
    return tables, {"meta": {"use_camera": True}, "results": {str(token): results[token] for token in tokens}}


def make_annotation(rng, tables, token, ego, used, tracks, dialect):
    """An annotation, the next of a track or the first of its own; centres lie on a lattice, some where a range ends."""
    category = str(rng.choice(used))
    center = np.add(ego, [*(rng.integers(-160, 160, 2) / 4), rng.integers(-4, 8) / 4]).tolist()
    if rng.random() < 0.1:
        reach = rng.choice([*dialect.ranges.values()]) + rng.choice([0, 0, -1 / 64, 1 / 64])
        center[:2] = (np.array(ego[:2]) + rng.choice([[1, 0], [0, -1], [0.6, 0.8]]) * reach).tolist()
    family = dialect.attributes.get(dialect.classes.get(category, category), ())
    key = f"n-{len(tables['instance'])}-{token}"
    row = {
        "category_name": category, "token": key, "sample_token": token, "instance_token": key, "visibility_token": "4",
        "prev": "", "next": "", "translation": center, "size": (rng.integers(1, 30, 3) / 4).tolist(),
        "rotation": quaternion(rng),
        "num_radar_pts": int(rng.integers(0, 2)), "num_lidar_pts": int(rng.integers(0, 4)),
        "attribute_tokens": [f"a-{rng.choice(family)}"] if family and rng.random() < 0.8 else [],
    }  # fmt: skip
    before = tracks.get(category)
    if before and before["sample_token"] != token and rng.random() < 0.6:
        before["next"], row["prev"] = key, before["token"]
    tracks[category] = row
    tables["instance"].append({"token": key, "category_token": f"c-{category}"})
    return row


OFFSETS = [
    [0, 0],
    [0.25, 0],
    [0, 0.5],
    [-0.5, 0],
    [1, 0],
    [0, -2],
    [1.2, 1.6],
    [0.3, 0.4],
    [4, 0],
    [2.4, 3.2],
    [0.7, 0.1],
]  # m


def make_boxes(rng, token, annotations, ego, dialect):
    """Detections beside annotations at distances that tie and touch the borders, copies, false ones, some on racks."""
    boxes = []
    for row in annotations:
        for _ in range(rng.choice([0, 1, 1, 2])):
            name = dialect.classes.get(row["category_name"]) if rng.random() < 0.8 else None
            center = np.add(row["translation"], [*OFFSETS[rng.integers(len(OFFSETS))], 0])
            boxes.append(make_box(rng, token, center, name, dialect))
        if row["category_name"] == RACK:
            half = np.array(row["size"])[[1, 0, 2]] / 2 * rng.choice([-1, 0, 0.5, 1], 3)
            center = np.array(row["translation"]) + rotations([row["rotation"]])[0] @ half
            boxes.append(make_box(rng, token, center, str(rng.choice(["bicycle", "motorcycle", "car"])), dialect))
    for _ in range(rng.integers(0, 6)):
        boxes.append(make_box(rng, token, np.add(ego, [*(rng.integers(-200, 200, 2) / 4), 0]), None, dialect))
    return [boxes[i] for i in rng.permutation(len(boxes))]


def make_box(rng, token, center, name, dialect):
    """A detection there, of that class or, for None, of any."""
    box = {
        "sample_token": token, "translation": center.tolist(), "size": (rng.integers(1, 30, 3) / 4).tolist(),
        "rotation": quaternion(rng), "velocity": rng.choice([0, 0.5, np.nan, 3.25], 2, p=[0.4, 0.3, 0.1, 0.2]).tolist(),
        "detection_name": name or str(rng.choice(list(dialect.ranges))),
        "attribute_name": str(rng.choice(["", *dialect.states])),
        "detection_score": float(
            rng.choice([0.5, 0.5, 0.25, 0.0, 1.0, -0.5 if rng.random() < 0.01 else 0.75, rng.random()])
        ),
    }  # fmt: skip
    return box | {"num_pts": int(rng.integers(0, 2))} if rng.random() < 0.05 else box


def official(devkit, tables, path, folder, dialect):
    """The devkit's metrics, or the exception that it raised. Its tables are joined as its constructor joins them."""
    rows = {name: {row["token"]: dict(row) for row in table} for name, table in tables.items()}
    for sample in rows["sample"].values():
        sample |= {"anns": [], "data": {dialect.reference[0]: f"d-{sample['token']}"}}
    for row in rows["sample_annotation"].values():
        rows["sample"][row["sample_token"]]["anns"].append(row["token"])
    nusc = SimpleNamespace(get=lambda table, token: rows[table][token], version="v1.0-mini")
    nusc.sample, nusc.attribute = list(rows["sample"].values()), tables["attribute"]
    nusc.sample_annotation = list(rows["sample_annotation"].values())
    nusc.box_velocity = lambda token: devkit.tables.box_velocity(nusc, token)
    try:
        metrics, _ = devkit.evaluate(nusc, devkit.config, str(path), "mini_val", str(folder), verbose=False).evaluate()
    except Exception as error:  # assertions, and bare exceptions of its own
        return error
    return metrics.serialize() if dialect is NUSCENES else metrics["all"].serialize()


def compare(devkit, seed, folder, dialect=NUSCENES):
    """Largest difference of any number between the devkit and us on one case; 0 where both refuse it."""
    tables, content = make_case(np.random.default_rng(seed), dialect)
    path = folder / "results.json"
    path.write_text(json.dumps(content))
    (folder / "v1.0-mini").mkdir(exist_ok=True)
    for name, rows in tables.items():
        (folder / "v1.0-mini" / f"{name}.json").write_text(json.dumps(rows))
    expected = official(devkit, tables, path, folder / "out", dialect)
    try:
        truth = read_truth(folder, ("mini_val",), "v1.0-mini", dialect)
        found = nuscenes_metrics(truth, read_results(path, truth.tokens, dialect)[0]) if len(truth.boxes) else None
    except ValueError:
        found = None
    if found is None or isinstance(expected, Exception):
        assert found is None, f"case {seed}: only the devkit refuses: {expected!r}"
        assert isinstance(expected, Exception), f"case {seed}: only we refuse"
        return 0.0
    worst = abs(found["nd_score"] - expected["nd_score"])
    for name in dialect.ranges:
        pairs = [(found["label_aps"][name][str(distance)], ap) for distance, ap in expected["label_aps"][name].items()]
        pairs += [(found["label_tp_errors"][name][error], expected["label_tp_errors"][name][error]) for error in ERRORS]
        for ours, theirs in pairs:
            assert np.isnan(ours) == np.isnan(theirs), f"case {seed}: {name} {ours} {theirs}"
            worst = max(worst, 0.0 if np.isnan(ours) else abs(ours - theirs))
    return worst


if __name__ == "__main__":
    first, last = map(int, sys.argv[1:3])
    name = "".join(sys.argv[3:]) or "nuscenes"
    devkit, dialect = load_devkit(name), find_dialect(name)
    with tempfile.TemporaryDirectory() as folder:
        worst, where = max((compare(devkit, seed, Path(folder), dialect), seed) for seed in range(first, last))
    print(f"cases {first} to {last - 1}: largest deviation {worst:.1e}, in case {where}")
