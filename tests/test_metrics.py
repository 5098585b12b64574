"""Average precision against the official evaluator's outputs, a slow transcription of its rules, and cases by hand."""

import cmath
import dataclasses
import json
import math
import tarfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from formats.kitti import read_labels
from metrics import kitti
from metrics.kitti import DIFFICULTIES, MIN_OVERLAP, kitti_ap, object_errors, table
from scene.frames import make_labels
from scene.geometry import bev_and_box3d_iou, bev_intersection, box3d_iou, box_iou

INVENTED = Path(__file__).parent / "data" / "kitti_invented"
METRIC_NAMES = ("bbox", "bev", "3d")
VAL = Path(__file__).parents[2] / "shared/data/kitti_eval/val"


# ---- golden


def read_run(labels, results, ids):
    truth = {id: read_labels(labels / f"{id}.txt") for id in ids}
    return truth, {
        id: read_labels(results / f"{id}.txt", scores=True) for id in ids if (results / f"{id}.txt").is_file()
    }


def largest_deviation(metrics, expected):
    return max(
        abs(metrics[name][metric][difficulty][key] - value)
        for name, cells in expected.items()
        if not name.startswith("_")
        for metric, levels in cells.items()
        for difficulty, averages in levels.items()
        for key, value in averages.items()
    )


def test_invented_frames_equal_the_official_evaluator():
    ids = sorted(path.stem for path in (INVENTED / "label_2").glob("*.txt"))
    truth, results = read_run(INVENTED / "label_2", INVENTED / "results", ids)
    assert len(truth) == 120
    expected = json.loads((INVENTED / "expected.json").read_text())
    assert largest_deviation(kitti_ap(truth, results), expected) < 1e-6


@pytest.fixture(scope="module")
def validation(tmp_path_factory):
    if not VAL.is_dir():
        pytest.skip(f"{VAL} is absent: KITTI's labels are not part of this project")
    folder = tmp_path_factory.mktemp("val")
    for name in ("label_2_calib_splits", "results_synth"):
        with tarfile.open(VAL / f"{name}.tar.gz") as archive:
            members = [m for m in archive if "/calib/" not in m.name]
            archive.extractall(folder, members, filter="data")
    ids = (folder / "ImageSets" / "val.txt").read_text().split()
    return *read_run(folder / "training" / "label_2", folder / "synth_det", ids), json.loads(
        (VAL / "expected.json").read_text()
    )


@pytest.mark.parametrize(
    ("run", "overlap"), [("synth", "strict"), ("synth_loose", "loose"), ("synth_first300", "strict")]
)
def test_validation_set_equals_the_official_evaluator(validation, run, overlap):
    truth, results, expected = validation
    if run == "synth_first300":
        ids = (VAL / "val_first300.txt").read_text().split()
        truth, results = {id: truth[id] for id in ids}, {id: results[id] for id in ids}
    assert largest_deviation(kitti_ap(truth, results, overlap=overlap), expected[run]) < 1e-6


# ---- a slow transcription of the official rules, loop for loop


def slow_overlap(metric, a, b, by_own_area=False):
    """a is a detection, b a ground truth: rows of Labels with one element each."""
    if metric == "bbox":
        x1, y1 = np.maximum(a.box[0, :2], b.box[0, :2])
        x2, y2 = np.minimum(a.box[0, 2:], b.box[0, 2:])
        if x2 <= x1 or y2 <= y1:
            return 0.0
        area = lambda box: (box[2] - box[0]) * (box[3] - box[1])  # noqa: E731
        common = (x2 - x1) * (y2 - y1)
        return common / area(a.box[0]) if by_own_area else common / (area(a.box[0]) + area(b.box[0]) - common)
    if not (a.is_3d[0] and b.is_3d[0]):
        return 0.0
    p, q = (slow_corners(l.center[0, 0], l.center[0, 2], l.size[0, 0], l.size[0, 2], l.yaw[0]) for l in (a, b))
    ground = exact_common_area(p, q)
    if metric == "bev":
        return ground / (a.size[0, 0] * a.size[0, 2] + b.size[0, 0] * b.size[0, 2] - ground)
    low = min(l.center[0, 1] + l.size[0, 1] / 2 for l in (a, b))
    high = max(l.center[0, 1] - l.size[0, 1] / 2 for l in (a, b))
    common = ground * max(0.0, low - high)
    return common / (a.size[0].prod() + b.size[0].prod() - common)


def slow_grid(metric, gt, det, by_own_area=False):
    """(ground truths, detections) overlaps of a frame."""
    rows = [
        [slow_overlap(metric, det[j : j + 1], gt[i : i + 1], by_own_area) for j in range(len(det))]
        for i in range(len(gt))
    ]
    return np.array(rows).reshape(len(gt), len(det))


def slow_statistics(frame, metric, least, threshold=None):
    """computeStatistics: scores of true positives when threshold is None, else tp, fp, similarity."""
    gt, det, gt_role, det_role, overlaps, covers = frame
    assigned = [False] * len(det)
    low = [threshold is not None and det.score[j] < threshold for j in range(len(det))]
    scores, tp, similarity = [], 0, 0.0
    for i in range(len(gt)):
        if gt_role[i] == -1:
            continue
        best, found, largest, is_ignored = -1, -1e7, 0.0, False
        for j in range(len(det)):
            if det_role[j] == -1 or assigned[j] or low[j]:
                continue
            overlap = overlaps[metric][i, j]
            if threshold is None and overlap > least and det.score[j] > found:
                best, found = j, det.score[j]
            elif threshold is not None and overlap > least and (overlap > largest or is_ignored) and det_role[j] == 0:
                best, found, largest, is_ignored = j, 1, overlap, False
            elif threshold is not None and overlap > least and found == -1e7 and det_role[j] == 1:
                best, found, is_ignored = j, 1, True
        if found == -1e7:
            continue
        assigned[best] = True
        if gt_role[i] == 0 and det_role[best] == 0:
            tp += 1
            scores.append(det.score[best])
            similarity += (1 + np.cos(gt.alpha[i] - det.alpha[best])) / 2
    if threshold is None:
        return scores
    fp = sum(not (assigned[j] or det_role[j] != 0 or low[j]) for j in range(len(det)))
    for i in range(len(gt)):
        if gt.name[i].lower() == "dontcare":
            for j in range(len(det)):
                if not assigned[j] and det_role[j] == 0 and not low[j] and covers[metric][i, j] > least:
                    assigned[j] = True
                    fp -= 1
    return tp, fp, similarity


def slow_thresholds(scores, count):
    scores, kept, current = sorted(scores, reverse=True), [], 0.0
    for i, score in enumerate(scores):
        left = (i + 1) / count
        right = (i + 2) / count if i < len(scores) - 1 else left
        if right - current < current - left and i < len(scores) - 1:
            continue
        kept.append(score)
        current += 1 / 40
    return kept


def slow_ap(truth, results, classes, overlap):
    metrics = {name: {metric: {} for metric in ("bbox", "aos", "bev", "3d")} for name in classes}
    pairs = {}
    for id, gt in truth.items():
        det = results[id]
        overlaps = {metric: slow_grid(metric, gt, det) for metric in METRIC_NAMES}
        covers = {
            "bbox": slow_grid("bbox", gt, det, by_own_area=True),
            "bev": 0 * overlaps["bev"],
            "3d": 0 * overlaps["3d"],
        }
        pairs[id] = overlaps, covers
    for name in classes:
        for level, difficulty in enumerate(DIFFICULTIES):
            frames, count = [], 0
            for id, gt in truth.items():
                det, gt_role = results[id], []
                for i in range(len(gt)):
                    height = gt.box[i, 3] - gt.box[i, 1]
                    neighbour = {"car": "van", "pedestrian": "person_sitting"}.get(name.lower())
                    ignore = (
                        gt.occlusion[i] > level
                        or gt.truncation[i] > (0.15, 0.3, 0.5)[level]
                        or height <= (40, 25, 25)[level]
                    )
                    same = gt.name[i].lower() == name.lower()
                    gt_role.append(0 if same and not ignore else 1 if same or gt.name[i].lower() == neighbour else -1)
                det_role = [
                    1 if int(abs(y2 - y1)) < (40, 25, 25)[level] else 0 if det.name[j].lower() == name.lower() else -1
                    for j, (_, y1, _, y2) in enumerate(det.box)
                ]
                count += gt_role.count(0)
                frames.append((gt, det, gt_role, det_role, *pairs[id]))
            for number, metric in enumerate(METRIC_NAMES):
                least = MIN_OVERLAP[overlap].get(name.lower(), MIN_OVERLAP[overlap][""])[number]
                scores = [score for frame in frames for score in slow_statistics(frame, metric, least)]
                precision, aos = np.zeros(41), np.zeros(41)
                for t, threshold in enumerate(slow_thresholds(scores, count)):
                    tp, fp, similarity = np.sum(
                        [slow_statistics(frame, metric, least, threshold) for frame in frames], axis=0
                    )
                    precision[t], aos[t] = (tp / (tp + fp), similarity / (tp + fp)) if tp + fp else (0, 0)
                for t in range(41):
                    precision[t], aos[t] = precision[t:].max(), aos[t:].max()
                for key, values in ((metric, precision), *((("aos", aos),) if metric == "bbox" else ())):
                    metrics[name][key][difficulty] = {
                        "AP_R40": values[1:].mean() * 100,
                        "AP_R11": values[::4].mean() * 100,
                    }
    return metrics


def crowded_frame(rng, objects, detections):
    """Few places, near-limit heights, many ties: where the rules differ from simpler ones."""
    names = np.array(
        ["Car", "car", "Van", "Pedestrian", "Person_sitting", "Cyclist", "Truck", "DontCare"], dtype=object
    )

    def rows(n, names, score):
        place = rng.integers(0, 3, n)
        x1 = 100.0 + 60 * place + rng.integers(0, 8, n)
        y1 = 150.0 + rng.integers(0, 4, n)
        height = rng.choice([24.5, 25, 26, 39.5, 40, 40.5, 44, 48], n)
        box = np.stack([x1, y1, x1 + rng.choice([40, 44, 50], n), y1 + height], 1)
        center = np.stack(
            [4.0 * place + rng.normal(0, 0.3, n), 1 + rng.normal(0, 0.1, n), 15 + rng.normal(0, 0.3, n)], 1
        )
        size = np.array([4, 1.6, 1.8]) * rng.uniform(0.9, 1.1, (n, 3))
        name = rng.choice(names, n)
        fill = name == "DontCare"
        center[fill], size[fill] = -1000, -1
        yaw = np.where(fill, -10, rng.uniform(-0.3, 0.3, n) + np.pi * rng.integers(0, 2, n))
        occlusion, truncation = rng.integers(0, 3, n), rng.choice([0, 0.15, 0.2, 0.5], n)
        return make_labels(name, box, size, center, yaw, truncation=truncation, occlusion=occlusion, score=score)

    return rows(objects, names, None), rows(detections, names[[0, 0, 1, 3, 5, 6]], rng.integers(1, 6, detections) / 5)


@pytest.mark.parametrize("overlap", ["strict", "loose"])
def test_crowded_random_frames_equal_the_slow_transcription(overlap):
    rng = np.random.default_rng(1 if overlap == "strict" else 2)
    classes = ("Car", "Pedestrian", "Cyclist", "Truck")
    for _ in range(3):
        frames = [crowded_frame(rng, rng.integers(0, 8), rng.integers(0, 9)) for _ in range(12)]
        truth = {str(i): gt for i, (gt, _) in enumerate(frames)}
        results = {str(i): det for i, (_, det) in enumerate(frames)}
        expected = slow_ap(truth, results, classes, overlap)
        assert largest_deviation(kitti_ap(truth, results, classes, overlap), expected) < 1e-9


# ---- rules, one by one


def labels(*rows):
    """Labels from dicts: name, box, score, and optionally alpha, occlusion, truncation, center, size, yaw."""
    default = {"name": "Car", "box": (100, 100, 200, 150), "center": (0, 1, 20), "size": (4, 1.5, 1.6), "yaw": 0.0}
    default |= {"truncation": 0.0, "occlusion": 0, "score": 1.0}
    rows = [default | row for row in rows]
    made = make_labels(**{key: [row[key] for row in rows] for key in default})
    for i, row in enumerate(rows):
        made.alpha[i] = row.get("alpha", made.alpha[i])
    return made


def easy_curve(truth, results, metric="bbox", name="Car"):
    return kitti_ap({"0": truth}, {"0": results}, (name, "Other"))["curves"][name][metric]["easy"]


FAR = {"box": (500, 100, 600, 150), "center": (20, 1, 40)}  # away from the default row, in the image and in space


def test_ground_truth_of_exactly_the_limit_height_is_ignored():
    counted = lambda height: kitti_ap({"0": labels({"box": (0, 0, 50, height)})}, {})["counted"]["Car"]["easy"]  # noqa: E731
    assert (counted(40.0), counted(40.01)) == (0, 1)


def test_detection_height_is_cut_to_an_integer_before_the_limit():
    truth = labels({})
    tall = lambda height: labels({"score": 0.5}, {**FAR, "box": (500, 100, 600, 100 + height), "score": 0.9})  # noqa: E731
    precision = lambda height: easy_curve(truth, tall(height))["precision"]  # noqa: E731
    assert precision(39.99) == [1.0]
    assert precision(40.0) == [0.5]


def test_short_detection_of_any_class_takes_a_ground_truth():
    truth = labels({"box": (100, 100, 200, 140.5)})
    own = {"box": (100, 100, 200, 140.5), "score": 0.5}
    assert easy_curve(truth, labels(own, {"name": "Truck", "box": (100, 100, 200, 139.5), "score": 0.9}))["score"] == []
    assert easy_curve(truth, labels(own, {"name": "Truck", "box": (100, 100, 200, 140.2), "score": 0.9}))["score"] == [
        0.5
    ]


def test_overlap_must_exceed_the_threshold():
    truth = labels({"box": (0, 0, 100, 100)})
    assert easy_curve(truth, labels({"box": (0, 0, 70, 100)}))["score"] == []  # 0.7 exactly
    assert easy_curve(truth, labels({"box": (0, 0, 71, 100)}))["score"] == [1.0]


def test_score_pass_takes_the_first_of_equal_scores():
    truth = labels({"box": (100, 100, 200, 140.5)})
    short, tall = {"box": (100, 100, 200, 139.5), "score": 0.9}, {"box": (100, 100, 200, 140.5), "score": 0.9}
    assert easy_curve(truth, labels(short, tall))["score"] == []
    assert easy_curve(truth, labels(tall, short))["score"] == [0.9]


def test_counting_pass_takes_the_largest_overlap():
    truth = labels({}, FAR)
    near, exact = {"box": (100, 100, 185, 150), "score": 0.9, "alpha": np.pi}, {"score": 0.8, "alpha": 0.0}
    truth.alpha[:] = 0
    curve = easy_curve(truth, labels(near, exact, {**FAR, "score": 0.7, "alpha": 0.0}), "aos")
    assert curve["score"] == [0.9, 0.7]
    assert curve["precision"] == pytest.approx(
        [2 / 3, 2 / 3]
    )  # both right at .7, and the opposite one a false positive


def test_counting_pass_prefers_a_tall_detection_to_a_short_one_that_overlaps_more():
    truth = labels({"box": (100, 100, 200, 141)}, FAR)
    short, tall = {"box": (100, 100, 200, 139.9), "score": 0.8}, {"box": (100, 100, 190, 141), "score": 0.9}
    assert easy_curve(truth, labels(short, tall, {**FAR, "score": 0.7}))["precision"] == [1.0, 1.0]


@pytest.mark.parametrize(("name", "neighbour"), [("Car", "Van"), ("Pedestrian", "Person_sitting"), ("car", "VAN")])
def test_neighbour_class_is_neither_missed_nor_a_false_positive(name, neighbour):
    truth = labels({"name": name}, {**FAR, "name": neighbour})
    results = labels({"name": name, "score": 0.5}, {**FAR, "name": name, "score": 0.9})
    assert easy_curve(truth, results, name=name) == {"score": [0.5], "recall": [1.0], "precision": [1.0]}
    other = labels({"name": name}, {**FAR, "name": "Truck"})
    assert easy_curve(other, results, name=name)["precision"] == [0.5]


def test_dontcare_excuses_false_positives_in_2d_by_the_detections_own_area():
    region = {
        "name": "DontCare",
        "box": (400, 0, 571, 400),
        "size": (-1, -1, -1),
        "center": (-1000, -1000, -1000),
        "yaw": -10,
    }
    results = labels({"score": 0.5}, {**FAR, "score": 0.9})
    assert easy_curve(labels({}, region), results)["precision"] == [1.0]  # 71 of 100 columns inside
    assert easy_curve(labels({}, {**region, "box": (400, 0, 570, 400)}), results)["precision"] == [0.5]
    assert easy_curve(labels({}, region), results, "3d")["precision"] == [0.5]
    assert easy_curve(labels({}, region), results, "bev")["precision"] == [0.5]


def test_detections_without_a_3d_box_follow_the_official_arithmetic():
    """KITTI's fill values meet those of DontCare: excused in BEV, not in 3D, where the volume is negative."""
    fill = {"size": (-1, -1, -1), "center": (-1000, -1000, -1000), "yaw": -10}
    truth = labels({}, {"name": "DontCare", "box": (0, 0, 10, 10), **fill})
    results = labels({"score": 0.5}, {**FAR, **fill, "score": 0.9})
    assert [easy_curve(truth, results, metric)["precision"] for metric in METRIC_NAMES] == [[0.5], [1.0], [0.5]]


@pytest.mark.parametrize(
    ("limit", "counted"),
    [
        ({"occlusion": 1}, (0, 1, 1)),
        ({"occlusion": 3}, (0, 0, 0)),
        ({"truncation": 0.3}, (0, 1, 1)),
        ({"truncation": 0.31}, (0, 0, 1)),
        ({"occlusion": -1, "truncation": -1}, (1, 1, 1)),
    ],
)
def test_occlusion_and_truncation_limits(limit, counted):
    assert tuple(kitti_ap({"0": labels(limit)}, {})["counted"]["Car"].values()) == counted


def test_ignored_ground_truth_takes_a_detection_without_counting():
    truth = labels({}, {**FAR, "occlusion": 3})
    assert easy_curve(truth, labels({"score": 0.5}, {**FAR, "score": 0.9})) == {
        "score": [0.5],
        "recall": [1.0],
        "precision": [1.0],
    }


def test_aos_counts_false_positives_as_zero_and_uses_alpha():
    truth, results = labels({"alpha": 0.5}), labels({"alpha": 0.5 + np.pi / 2, "score": 0.5}, {**FAR, "score": 0.9})
    assert easy_curve(truth, results, "aos")["precision"] == pytest.approx([0.25])


def test_unknown_alpha_leaves_aos_out():
    metrics = kitti_ap({"0": labels({})}, {"0": labels({"alpha": -10})}, ("Car",))
    assert metrics["Car"]["aos"]["easy"] == {"AP_R40": None, "AP_R11": None}
    assert metrics["Car"]["bbox"]["easy"]["AP_R11"] > 0
    assert "-" in table(metrics)


def test_more_true_positives_than_the_curve_reaches_leave_zeros_behind():
    truth = {str(i): labels({}) for i in range(100)}
    metrics = kitti_ap(truth, {str(i): labels({}) for i in range(50)}, ("Car",))
    assert metrics["Car"]["3d"]["easy"]["AP_R40"] == pytest.approx(50.0)
    assert max(metrics["curves"]["Car"]["3d"]["easy"]["recall"]) == 0.5


@pytest.mark.parametrize(
    ("count", "repeat"), [(1, 1), (7, 1), (16, 1), (18, 1), (40, 1), (41, 1), (1000, 1), (1, 40), (7, 6)]
)
def test_perfect_detections_reach_the_cap_of_the_official_sampling(count, repeat):
    frames = {str(i): labels({"alpha": 0.1}) for i in range(count)}
    metrics = kitti_ap(frames, frames, ("Car",), repeat=repeat)
    for metric in ("bbox", "aos", "bev", "3d"):
        for key, value in metrics["Car"][metric]["hard"].items():
            reached = min(count * repeat, 41)
            cap = (reached - 1) / 40 if key == "AP_R40" else math.ceil(reached / 4) / 11
            assert value == pytest.approx(100 * cap)


def test_repeat_equals_listing_frames_again():
    rng = np.random.default_rng(5)
    frames = {str(i): crowded_frame(rng, 6, 6) for i in range(10)}
    again = {f"{copy}-{id}": frame for copy in range(3) for id, frame in frames.items()}
    part = lambda frames, column: {id: frame[column] for id, frame in frames.items()}  # noqa: E731
    once, thrice = kitti_ap(part(frames, 0), part(frames, 1), repeat=3), kitti_ap(part(again, 0), part(again, 1))
    assert largest_deviation(once, {name: thrice[name] for name in ("Car", "Pedestrian", "Cyclist")}) < 1e-9


def test_frames_do_not_interact_and_empty_ones_are_harmless():
    nothing = labels({})[:0]
    metrics = kitti_ap({"a": labels({}), "b": nothing, "c": labels({})}, {"b": labels({}), "c": nothing}, ("Car",))
    assert metrics["Car"]["bbox"]["easy"]["AP_R11"] == 0
    assert kitti_ap({"a": nothing}, {}, ("Car",))["Car"]["3d"]["hard"]["AP_R40"] == 0
    assert kitti_ap({}, {}, ("Car",))["counted"]["Car"]["hard"] == 0


def test_own_classes_take_half_overlap_and_no_neighbours():
    truth, results = (
        labels({"name": "Forklift", "box": (0, 0, 100, 100)}),
        labels({"name": "Forklift", "box": (0, 0, 51, 100)}),
    )
    metrics = kitti_ap({"0": truth}, {"0": results}, ("Forklift",))
    assert metrics["settings"]["min_overlap"] == {"Forklift": [0.5, 0.5, 0.5]}
    assert metrics["Forklift"]["bbox"]["easy"]["AP_R11"] == pytest.approx(100 / 11)


def test_a_result_without_a_frame_is_named():
    with pytest.raises(ValueError, match="1 result frames have no ground truth, the first is 'x'"):
        kitti_ap({}, {"x": labels({})})


# ---- which pairs are looked at


def crowd(rng, n):
    """Rows of any kind: cars in view, one that fills it, empty and inverted ones, ones without a 3D box, same edges."""
    x, z = rng.uniform(-8, 8, n), rng.uniform(5, 30, n)
    center = np.stack([x, np.ones(n), z], 1)
    size, yaw = rng.uniform(1, 5, (n, 3)), rng.uniform(-4, 4, n)
    low = rng.integers(0, [300, 60], (n, 2)).astype(float)
    box = np.concatenate([low, low + rng.integers(-3, 60, (n, 2))], 1)
    box[:1], size[:1] = (0, 0, 1242, 375), (40, 2, 40)
    size[1:2], center[1:2] = -1, -1000
    return make_labels(
        rng.choice(["Car", "Van", "Pedestrian", "DontCare"], n), box, size, center, yaw, score=rng.random(n)
    )


def test_no_pair_is_lost_and_few_are_measured(monkeypatch):
    rng = np.random.default_rng(0)
    truth, results = ({str(i): crowd(rng, int(rng.integers(0, most))) for i in range(5)} for most in (60, 200))
    for least in (0.0, 0.05, 0.3):
        pairs = kitti.Pairs(truth, results, ("Car", "Pedestrian"), least)
        gt, det = pairs.gt, pairs.det
        g, d = np.nonzero(pairs.gt_frame[:, None] == pairs.det_frame)
        name, other = gt.name[g], det.name[d]
        same = (name == other) | ((name == "Van") & (other == "Car"))
        fits = (name != "DontCare") & (same | (pairs.height[d] < 40))
        g, d = g[fits], d[fits]
        boxes = kitti._boxes(gt)[g], kitti._boxes(det)[d]
        for found, overlap in zip(
            pairs.pairs, (box_iou(gt.box[g], det.box[d]), *bev_and_box3d_iou(*boxes)), strict=True
        ):
            rows = np.flatnonzero(overlap > least)
            assert len(rows) > 3
            for ours, expected in zip(found, (g[rows], d[rows], overlap[rows]), strict=True):
                np.testing.assert_array_equal(ours, expected)

    measured = []
    count = lambda a, b: measured.append(len(a)) or bev_and_box3d_iou(a, b)  # noqa: E731
    monkeypatch.setattr(kitti, "bev_and_box3d_iou", count)
    kitti_ap({"0": crowd(rng, 400)}, {"0": crowd(rng, 4000)})
    assert 100 < sum(measured) < 0.04 * 400 * 4000


# ---- beside AP


def test_object_errors_by_band():
    truth = labels(
        {"center": (0, 1, 15)}, {**FAR, "center": (5, 1, 45)}, {"box": (800, 100, 900, 150), "center": (9, 1, 46)}
    )
    found = labels(
        {"center": (0, 1, 15.5), "yaw": np.pi - 0.1, "size": (4.3, 1.6, 1.4), "score": 0.4},
        {"center": (0, 1, 19), "score": 0.3},
        {**FAR, "center": (5, 1, 42)},
    )
    sure = dataclasses.replace(found, sigma=np.array([0.4, 1.0, 3.5]))
    errors = object_errors({"0": truth}, {"0": sure}, ("Car",))["Car"]
    near, far = errors["10-20"], errors["40-50"]
    assert (near["objects"], near["matched"], near["recall"], far["objects"], far["recall"]) == (1, 1, 1.0, 2, 0.5)
    expected = {
        "depth_error": 0.5,
        "depth_bias": 0.5,
        "depth_percent": 100 / 30,
        "heading_error": 180 - np.degrees(0.1),
    }
    expected |= {"heading_flipped": 1.0, "length_error": 0.3, "height_error": 0.1, "width_error": 0.2}
    expected |= {"within_1_sigma": 0.0, "within_2_sigma": 1.0, "sigma_ratio": 0.5 / 0.4}
    assert {key: near[key] for key in expected} == pytest.approx(expected)
    for degrees, flipped in ((80, 0.0), (100, 1.0)):
        turned = labels({"center": (0, 1, 15), "yaw": np.radians(degrees), "score": 0.4})
        assert object_errors({"0": truth}, {"0": turned}, ("Car",))["Car"]["10-20"]["heading_flipped"] == flipped
    assert far["depth_bias"] == pytest.approx(-3)
    assert far["within_1_sigma"] == 1.0
    assert errors["all"]["objects"] == 3
    assert errors["50_and_more"] == {"objects": 0, "matched": 0} | {
        key: None for key in errors["50_and_more"] if key not in ("objects", "matched")
    }
    without = object_errors({"0": truth}, {"0": found}, ("Car",))
    assert without["Car"]["all"]["within_1_sigma"] is without["Car"]["all"]["sigma_ratio"] is None
    assert "10-20" in table(kitti.compute_metrics({"0": truth}, {"0": found}, ("Car",)), errors=True)
    unknown = dataclasses.replace(found, sigma=np.full(3, np.nan))
    every = object_errors({"0": truth}, {"0": unknown}, ("Car",))["Car"]["all"]
    assert every["within_1_sigma"] is every["within_2_sigma"] is every["sigma_ratio"] is None


def test_sigma_times_its_ratio_holds_what_a_laplace_law_does():
    """Whatever the errors are; and a sigma that is true has a ratio near 1."""
    rng = np.random.default_rng(0)
    truth = {str(i): labels({"center": (0, 1, 20)}) for i in range(2000)}
    for spread, expected in ((1.0, 1.0), (2.5, 2.5)):
        depth = 20 + spread * rng.laplace(scale=1 / np.sqrt(2), size=2000)
        found = {
            str(i): dataclasses.replace(labels({"center": (0, 1, z)}), sigma=np.ones(1)) for i, z in enumerate(depth)
        }
        ratio = object_errors(truth, found, ("Car",))["Car"]["all"]["sigma_ratio"]
        assert ratio == pytest.approx(expected, rel=0.08)
        wider = {id: dataclasses.replace(one, sigma=one.sigma * ratio) for id, one in found.items()}
        assert object_errors(truth, wider, ("Car",))["Car"]["all"]["within_1_sigma"] == pytest.approx(0.757, abs=1e-3)


def test_table_marks_capped_cells_and_says_why():
    few, many = ({str(i): labels({}) for i in range(n)} for n in (18, 41))
    text = table(kitti_ap(few, few, ("Car",)))
    assert "42.50*" in text
    assert "--repeat 3" in text
    assert "54.55*" not in text
    assert "45.45*" in table(kitti_ap(few, few, ("Car",)), "R11")  # 5 of 11 positions
    assert "*" not in table(kitti_ap(many, many, ("Car",)))
    assert "*" not in table(kitti_ap(few, few, ("Car",), repeat=3))


# ---- rotated overlap against exact arithmetic


def slow_corners(x, z, length, width, yaw):
    """Corners of a rectangle seen from above, as (x, z) tuples: heading (cos yaw, -sin yaw)."""
    turn = cmath.exp(-1j * yaw)
    points = [
        complex(sx * length, sz * width) / 2 * turn + complex(x, z) for sx, sz in ((1, 1), (1, -1), (-1, -1), (-1, 1))
    ]
    return [(p.real, p.imag) for p in points]


def exact_common_area(p, q):
    """Area common to two convex quadrilaterals, in rational arithmetic: hull of vertices inside the other and of edge
    crossings.
    """
    cross = lambda o, a, b: (a[0] - o[0]) * (b[1] - o[1]) - (a[1] - o[1]) * (b[0] - o[0])  # noqa: E731
    grid = [[(int(Fraction(x) * 2**70), int(Fraction(y) * 2**70)) for x, y in polygon] for polygon in (p, q)]
    edges = [list(zip(polygon, polygon[1:] + polygon[:1], strict=True)) for polygon in grid]
    points = set()
    for mine, theirs in ((0, 1), (1, 0)):
        for v in grid[mine]:
            sides = [cross(a, b, v) for a, b in edges[theirs]]
            if min(sides) >= 0 or max(sides) <= 0:
                points.add(v)
    for a, b in edges[0]:
        for c, d in edges[1]:
            below, above = cross(c, d, a), cross(c, d, b)
            before, after = cross(a, b, c), cross(a, b, d)
            if below * above < 0 and before * after < 0:
                t = Fraction(below, below - above)
                points.add((a[0] + t * (b[0] - a[0]), a[1] + t * (b[1] - a[1])))
    hull = []
    for chain in (sorted(points), sorted(points, reverse=True)):
        start = len(hull)
        for v in chain:
            while len(hull) - start >= 2 and cross(hull[-2], hull[-1], v) <= 0:
                hull.pop()
            hull.append(v)
        hull.pop() if hull else None
    doubled = sum(a[0] * b[1] - a[1] * b[0] for a, b in zip(hull, hull[1:] + hull[:1], strict=True))
    return float(Fraction(doubled) / 2 / 2**140)


def rectangle_pairs(rng, n):
    """Pairs (n, 5) and (n, 5) that are apart, overlapping, nested, identical, turned by quarters, touching, thin or
    empty.
    """
    a = rng.uniform([-50, 0, 0.3, 0.3, -np.pi], [50, 80, 12, 4, np.pi], (n, 5))
    b = a.copy()
    kind = np.arange(n) % 10
    b[kind == 0] += rng.normal(0, 1, (np.sum(kind == 0), 5)) * [2, 2, 0, 0, 1]
    b[kind == 1] += rng.normal(0, 1, (np.sum(kind == 1), 5)) * [0.1, 0.1, 0, 0, 0.05]
    b[kind == 2, 2:4] *= rng.uniform(0.2, 0.9, (np.sum(kind == 2), 2))  # nested, same axes
    b[kind == 3, 2:4] *= 0.2
    b[kind == 3, 4] = rng.uniform(-np.pi, np.pi, np.sum(kind == 3))  # nested, turned
    b[kind == 5, 4] += rng.choice([np.pi / 2, np.pi, -np.pi], np.sum(kind == 5))
    touch = kind == 6  # side by side
    b[touch, 0] += np.cos(a[touch, 4]) * a[touch, 2]
    b[touch, 1] -= np.sin(a[touch, 4]) * a[touch, 2]
    half = kind == 7  # a shared edge line, half overlapping
    b[half, 0] += np.cos(a[half, 4]) * a[half, 2] / 2
    b[half, 1] -= np.sin(a[half, 4]) * a[half, 2] / 2
    thin = kind == 8
    b[thin, 3] = rng.choice([0.0, 1e-4], np.sum(thin))
    b[thin, 4] += rng.normal(0, 0.1, np.sum(thin))
    a[kind == 9, 4], b[kind == 9, 4] = 0.0, rng.choice([0.0, np.pi / 4], np.sum(kind == 9))
    b[kind == 9, :2] += rng.integers(-2, 3, (np.sum(kind == 9), 2)) / 2
    return a, b


def bev_iou(a, b):
    """Overlap of rectangles (n, 5) as x, z, l, w, yaw: of boxes as high as one another."""
    a, b = (np.insert(np.asarray(boxes, float), [1, 3], [0.0, 1.0], axis=1) for boxes in (a, b))
    return bev_and_box3d_iou(a, b)[0]


def largest_rotated_deviation(seed, n):
    a, b = rectangle_pairs(np.random.default_rng(seed), n)
    exact = np.array([exact_common_area(slow_corners(*p), slow_corners(*q)) for p, q in zip(a, b, strict=True)])
    union = a[:, 2] * a[:, 3] + b[:, 2] * b[:, 3] - exact
    return np.abs(bev_iou(a, b) - exact / union).max(), np.abs(bev_intersection(a, b) - exact).max()


def test_rotated_overlap_equals_exact_arithmetic():
    iou, area = largest_rotated_deviation(0, 3000)
    assert iou < 1e-9
    assert area < 1e-9


def test_rotated_overlap_is_symmetric_bounded_and_one_for_itself():
    a, b = rectangle_pairs(np.random.default_rng(3), 5000)
    overlap = bev_iou(a, b)
    assert np.abs(overlap - bev_iou(b, a)).max() < 1e-9
    assert overlap.min() >= 0
    assert overlap.max() <= 1
    np.testing.assert_allclose(bev_iou(a, a), 1.0, atol=1e-12)


def test_hand_worked_overlaps():
    """A square turned by 45 degrees on itself leaves a regular octagon: 2 (sqrt 2 - 1) of the square."""
    square, diamond = np.array([[5.0, 9, 2, 2, 0]]), np.array([[5.0, 9, 2, 2, np.pi / 4]])
    assert bev_intersection(square, diamond) == pytest.approx(8 * (np.sqrt(2) - 1))
    low = np.array([[5.0, 0, 9, 2, 2, 2, 0]])
    assert box3d_iou(low, low + np.array([0, 1.0, 0, 0, 0, 0, 0])) == pytest.approx(1 / 3)
    assert box3d_iou(low, low + np.array([0, 2.0, 0, 0, 0, 0, 0])) == 0
    length_first = np.array([[0.0, 0, 10, 4, 1, 2, np.pi / 2]])  # after a quarter turn the length lies along z
    assert box3d_iou(length_first, np.array([[0.0, 0, 10, 2, 1, 4, 0]])) == pytest.approx(1)
    assert bev_iou(np.zeros((1, 5)), np.zeros((1, 5))) == 0
    assert bev_iou(np.zeros((0, 5)), np.zeros((0, 5))).shape == (0,)
