"""What result files most likely get wrong is named, and nothing is said of those that are as they should be."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from formats.kitti import read_labels
from metrics.kitti import compute_metrics
from metrics.kitti_notes import describe_files

INVENTED = Path(__file__).parent / "data/kitti_invented"


def invented_results(edit):
    """(labels, results) of the invented frames; results are the labels, rows (15 numbers) and names edited."""
    truth, results = {}, {}
    for path in sorted((INVENTED / "label_2").glob("*.txt"))[:40]:
        truth[path.stem] = labels = read_labels(path)
        labels = labels[np.isin(labels.name.astype(str), ("Car", "Pedestrian", "Cyclist"))]
        columns = {name: getattr(labels, name).copy() for name in ("name", "box", "size", "center", "yaw", "alpha")}
        columns["center"][:, 1] += columns["size"][:, 1] / 2  # as in the file
        columns = edit(columns)
        columns["center"][:, 1] -= columns["size"][:, 1] / 2
        results[path.stem] = dataclasses.replace(labels, **columns)
    return truth, results


def renamed(new):
    return lambda c: c | {"name": np.array([new(name) for name in c["name"]], dtype=object)}


RESULTS = {
    "no result is called Car, Pedestrian, Cyclist; others are called 'vehicle.Car'": renamed("vehicle.{}".format),
    "no result is called Car, Pedestrian, Cyclist; others are called 'VAN'": renamed(lambda name: "VAN"),
    "numbers of classes": renamed(lambda name: str(len(name))),
    "fields are separated by blanks alone": renamed("{},".format),
    "rotation_y looks like degrees": lambda c: c | {"yaw": np.degrees(c["yaw"])},
    "alpha looks like degrees": lambda c: c | {"alpha": np.degrees(c["alpha"])},
    "look like (l, h, w), where (h, w, l) is expected": lambda c: c | {"size": c["size"][:, [2, 0, 1]]},
    "look like (w, l, h), where (h, w, l) is expected": lambda c: c | {"size": c["size"][:, [1, 2, 0]]},
    "y of results looks like that of the geometric centre": lambda c: c | {
        "center": c["center"] - c["size"] * [0, 0.5, 0]
    },
    "y of results looks as if it pointed up": lambda c: c | {"center": c["center"] * [1, -1, 1]},
    "those of a lidar or vehicle": lambda c: c | {"center": c["center"][:, [2, 0, 1]] * [1, -1, -1]},
    "x, y, z of results look 1e+02 times": lambda c: c | {"center": 100 * c["center"]},
    "sizes of results (Car, Cyclist, Pedestrian) look 100.00 times": lambda c: c | {"size": 100 * c["size"]},
    "rotation_y of results is 90 degrees too large": lambda c: c | {"yaw": c["yaw"] + np.pi / 2},
    "rotation_y of results is turned by 180 degrees": lambda c: c | {"yaw": c["yaw"] + np.pi},
    "2D boxes of results look like x, y, width, height": lambda c: c | {
        "box": np.concatenate([c["box"][:, :2], c["box"][:, 2:] - c["box"][:, :2]], 1)
    },
    "all 2D boxes of results are lower than 25 px": lambda c: c | {"box": 0 * c["box"]},
    "no result has a 3D box": lambda c: c | {"size": 0 * c["size"] - 1},
}  # fmt: skip


@pytest.mark.parametrize("words", RESULTS)
def test_mistakes_in_results_are_named(words):
    truth, results = invented_results(RESULTS[words])
    sentences = describe_files(truth, results, ("Car", "Pedestrian", "Cyclist"))
    assert any(words in sentence for sentence in sentences), sentences


def test_nothing_is_said_of_good_results():
    truth, results = invented_results(lambda c: c)
    assert describe_files(truth, results, ("Car", "Pedestrian", "Cyclist")) == []
    answers = {id: read_labels(INVENTED / f"results/{id}.txt", scores=True) for id in truth}
    assert describe_files(truth, answers, ("Car", "Pedestrian", "Cyclist")) == []


def test_labels_that_are_called_otherwise():
    truth, results = invented_results(lambda c: c)
    metrics = compute_metrics(truth, results, ("bus",))
    assert metrics["notes"][0].startswith("no label is called bus; they are called 'Car' (")
