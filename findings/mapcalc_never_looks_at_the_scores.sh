#!/usr/bin/env bash
# mapcalc 0.2.2, calculate_map and calculate_map_range: mean average precision from boxes, labels and scores.
#
# Guess: average precision goes through the detections by falling score; the order of the lists that hold them says nothing.
# What it does: scores are demanded to be as many as the boxes, stored, and never read again: detections count in the order in which they
# stand. One car, found with .9, and a false alarm with .2: AP 1 with the hit first, .5 with the false alarm first. Giving the hit
# the score .2 and the false alarm .9 changes nothing at all. Even a wrong duplicate takes the truth from a better one if it stands first.
# Detectors that emit boxes by falling score hide it; lists of several images, joined results and KITTI's result files are not sorted.
# (Also, a box is counted one pixel wider and higher than x2 - x1 and y2 - y1, though its page says that x2 is u + w.)
# What it means here: sort by score before calling it, or better use pycocotools.
#
# Seen (Python 3.11, numpy 2.4.6):
#   hit .9 first, then false alarm .2: 1.0
#   false alarm .2 first, then hit .9: 0.5
#   hit .2 first, then false alarm .9: 1.0
#   false alarm .9 first, then hit .2: 0.5
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-deps mapcalc==0.2.2 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
from mapcalc import calculate_map

CAR, NOTHING = [100.0, 100.0, 200.0, 180.0], [400.0, 100.0, 500.0, 180.0]
TRUTH = {"boxes": [CAR], "labels": [1]}


def measured(*detections):
    """The package's mAP at IoU .5 of detections (box, score) in this order."""
    boxes, scores = [list(box) for box, _ in detections], [score for _, score in detections]
    return float(calculate_map(TRUTH, {"boxes": boxes, "labels": [1] * len(boxes), "scores": scores}, 0.5))


for high_hit, exact in ((True, 1.0), (False, 0.5)):
    hit, alarm = (CAR, 0.9 if high_hit else 0.2), (NOTHING, 0.2 if high_hit else 0.9)
    first, last = measured(hit, alarm), measured(alarm, hit)
    print(f"hit {str(hit[1])[1:]} first, then false alarm {str(alarm[1])[1:]}: {first}")
    print(f"false alarm {str(alarm[1])[1:]} first, then hit {str(hit[1])[1:]}: {last}")
    assert (first, last) == (1.0, 0.5), f"changed: {first}, {last}; by score both are {exact}"
PY
echo "as stated"
