#!/usr/bin/env bash
# mean-average-precision 2024.1.5.0 (not mapcalc, of which another script tells), metric "map_2d": average precision from boxes,
# with the columns difficult and crowd in the truth.
#
# Guess: the flag difficult belongs to its object: a detection of that object is ignored, detections of other objects are not;
# and the order of rows says nothing, since detections are sorted by their scores.
# What it does: the table that is to give each detection the flags of all objects repeats each flag in place and then cuts the
# list into rows, where the whole list had to be repeated. So each detection sees a row of flags of other objects, by the order
# in which objects and detections were handed over and by how many there are. Two easy cars, both found exactly, and a far one
# marked difficult that nobody found: AP is .67, .33 or 0, by the order of the same rows. One difficult object makes detections
# of others vanish as if they had never been. The column crowd goes through the same lines (read, not run). With one detection
# an image, or no flag set, nothing is wrong, which is why the README's example (all flags 0) shows nothing.
# What it means here: objects beyond a level of difficulty cannot be marked as such; leave the columns 0, or count elsewhere.
#
# No misuse: rows are [xmin, ymin, xmax, ymax, class, difficult, crowd] and [..., class, confidence], as the README has them; the
# author's word (its issue 16): difficult objects do not contribute to the metric. By that AP is 1 here, whatever the order; that
# the difficult object is still counted among those to be found (.67 at best) is a second departure.
# Seen (Python 3.11, numpy 2.4.6, pandas 3.0.6; A and B the easy cars, D the difficult one; A has score .9, B .8):
#   truth in the order A B  , detections A B: AP 1.00, by hand 1.00
#   truth in the order A D B, detections A B: AP 0.67, by hand 1.00
#   truth in the order A B D, detections A B: AP 0.33, by hand 1.00
#   truth in the order D A B, detections A B: AP 0.33, by hand 1.00
#   truth in the order B D A, detections A B: AP 0.00, by hand 1.00
#   truth in the order A B D, detections B A: AP 0.67, by hand 1.00
#   truth in the order A D B, detections B A: AP 0.00, by hand 1.00
set -euo pipefail
export OMP_NUM_THREADS=1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet mean-average-precision==2024.1.5.0 numpy==2.4.6 pandas==3.0.6
cd "$folder"
venv/bin/python - <<'PY'
import numpy as np
from mean_average_precision import MetricBuilder

TRUTH = {"A": [100, 100, 200, 200, 0, 0, 0], "B": [300, 100, 400, 200, 0, 0, 0], "D": [500, 100, 530, 120, 0, 1, 0]}
FOUND = {"A": [100, 100, 200, 200, 0, 0.9], "B": [300, 100, 400, 200, 0, 0.8]}


def precision(truth, found, policy):
    metric = MetricBuilder.build_evaluation_metric("map_2d", async_mode=False, num_classes=1)
    metric.add(np.array([FOUND[name] for name in found], float), np.array([TRUTH[name] for name in truth], float))
    return float(metric.value(iou_thresholds=0.5, mpolicy=policy)["mAP"])


def by_hand(truth, found):
    """VOC: exact boxes, so a detection is its object; difficult ones are neither counted nor missed."""
    wanted = [name for name in truth if not TRUTH[name][5]]
    hits = [name in wanted for name in sorted(found, key=lambda name: -FOUND[name][5]) if not TRUTH[name][5]]
    return sum(sum(hits[: k + 1]) / (k + 1) for k in range(len(hits)) if hits[k]) / len(wanted)


seen = []
for truth, found in (("AB", "AB"), ("ADB", "AB"), ("ABD", "AB"), ("DAB", "AB"), ("BDA", "AB"), ("ABD", "BA"), ("ADB", "BA")):
    both = {policy: precision(truth, found, policy) for policy in ("greedy", "soft")}
    assert both["greedy"] == both["soft"] and by_hand(truth, found) == 1, f"changed: {both}"
    seen.append(round(both["greedy"], 2))
    words = f"truth in the order {' '.join(truth):5}, detections {' '.join(found)}"
    print(f"{words}: AP {seen[-1]:.2f}, by hand {by_hand(truth, found):.2f}")
assert seen == [1.0, 0.67, 0.33, 0.33, 0.0, 0.67, 0.0], f"changed: {seen}"
PY
echo "as stated"
