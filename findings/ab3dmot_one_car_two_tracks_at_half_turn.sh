#!/usr/bin/env bash
# pure-ab-3d-mot 2.2.0 (AB3DMOT without its evaluation), dist_metrics.m_distance: the metric EULER. MAHALANOBIS_DIST takes the
# same difference (read, not run).
#
# Guess: two boxes whose headings differ by 2 degrees are close, on either side of +-180 degrees: the correction's text says
# that the difference of angles is brought within 90 degrees.
# What it does: half a turn is taken off the raw difference once. 179 - (-179) is 358 degrees, less 180 leaves 178 degrees (3.11
# rad): equal boxes are 3.1 apart, as much as 3.1 m would make. The tracker keeps headings in -180 to 180 itself, so that is the
# border at which a car facing along the camera's -x axis (KITTI's rotation_y of +-pi) trembles: it gets a second track, and
# frames in which it is reported twice or not at all. Its other correction of headings, before the filter's update, does turn
# round; GIoU, the default, asks no heading.
# What it means here: with this metric wrap the difference before halving it, or track by GIoU or distance.
#
# Seen (Python 3.11, numpy 2.4.6):
#   headings    1 and   -1: distance   2.00 degrees, by hand 2.00
#   headings   91 and   89: distance   2.00 degrees, by hand 2.00
#   headings  179 and -179: distance 178.00 degrees, by hand 2.00
#   headings -179 and  179: distance 178.00 degrees, by hand 2.00
#   one car heading   0 +- 1, giou_3d: tracks in its 12 frames 1 1 1 1 1 1 1 1 1 1 1 1
#   one car heading   0 +- 1, euler  : tracks in its 12 frames 1 1 1 1 1 1 1 1 1 1 1 1
#   one car heading 180 +- 1, giou_3d: tracks in its 12 frames 1 1 1 1 1 1 1 1 1 1 1 1
#   one car heading 180 +- 1, euler  : tracks in its 12 frames 1 1+2 1+2 - 1 1+2 1+2 1+2 1+2 1+2 1+2 1+2
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-deps pure-ab-3d-mot==2.2.0 numpy==2.4.6 scipy==1.17.0 filterpy==1.4.5 \
  association-quality-clavia==0.3.2
"$folder/venv/bin/python" - <<'PY'
import math

import numpy as np
from pure_ab_3d_mot.box import Box3D
from pure_ab_3d_mot.dist_metrics import MetricKind, m_distance
from pure_ab_3d_mot.tracker import Ab3DMot

HEIGHT, WIDTH, LENGTH, DEPTH = 1.5, 1.8, 4.0, 20.0


def distance(one, other):
    """The package's distance of two boxes that differ by their heading alone."""
    return m_distance(*(Box3D(0.0, 1.5, DEPTH, HEIGHT, WIDTH, LENGTH, math.radians(angle)) for angle in (one, other)))


def track(middle, metric, threshold):
    """The numbers of tracks in each of 12 frames of one car whose heading trembles by 1 degree."""
    tracker, numbers = Ab3DMot(), []
    tracker.metric, tracker.threshold = metric, threshold
    for frame in range(12):
        angle = math.radians(middle + (1 if frame % 2 else -1))
        heading = (angle + math.pi) % (2 * math.pi) - math.pi
        box = [HEIGHT, WIDTH, LENGTH, 5.0 - 0.1 * frame, 1.5, DEPTH, heading]
        tracker.track({"dets": np.array([box]), "info": np.zeros((1, 7))})
        numbers.append(sorted(int(number) for number in tracker.id_now_output))
    return numbers


for one, other in ((1, -1), (91, 89), (179, -179), (-179, 179)):
    wrapped = (one - other + 90) % 180 - 90
    seen = math.degrees(distance(one, other))
    print(f"headings {one:4} and {other:4}: distance {seen:6.2f} degrees, by hand {abs(wrapped):.2f}")
    assert abs(seen - (178 if abs(one) == 179 else 2)) < 1e-6, f"changed: {seen}"
for middle in (0, 180):
    for metric, threshold in ((MetricKind.GIOU_3D, -0.2), (MetricKind.EULER, -2.0)):
        numbers = track(middle, metric, threshold)
        words = " ".join("+".join(map(str, row)) or "-" for row in numbers)
        print(f"one car heading {middle:3} +- 1, {metric.value:7}: tracks in its 12 frames {words}")
        single = all(row == [1] for row in numbers)
        assert single == (middle == 0 or metric == MetricKind.GIOU_3D), f"changed: {numbers}"
PY
echo "as stated"
