#!/usr/bin/env bash
# lyft-dataset-sdk 0.0.8, lyft_dataset_sdk.eval.detection.mAP_evaluation: the metric of Lyft's 3D detection challenge.
#
# Guess: the overlap of two boxes is computed from footprints that are turned by their own yaw.
# What it does: the sine is read from the wrong side of the diagonal of the rotation matrix (its [0, 1], which is -sin), so that every footprint
# is turned by **minus** its yaw. Truth and detections alike are mirrored, which hides it: equal boxes still have overlap 1. But an
# offset between them is not mirrored: for cars heading north-east, an error along the car counts as one across it. Two cars of 4.5 x 1.9 m, the
# second 2 m ahead of the first in the direction both head, overlap by .385; the evaluator says 0, and .385 to the pair 2 m aside (exact: 0).
# Headings of 0 and 90 degrees are right, so that boxes along the axes of the global frame show nothing.
# What it means here: numbers of that evaluator are no reference for a 3D overlap; metrics.nuscenes, which matches by distance, has none.
#
# Seen (numpy 2.4.6, shapely 2.1.2, pyquaternion 0.9.9):
#   yaw  0: 2 m ahead .385 (exact .385), 2 m aside .000 (exact .000)
#   yaw 45: 2 m ahead .000 (exact .385), 2 m aside .385 (exact .000)
#   yaw 20: 2 m ahead .119 (exact .385), 2 m aside .074 (exact .000)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-deps lyft-dataset-sdk==0.0.8 pyquaternion==0.9.9 shapely==2.1.2 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import math

import numpy as np
from lyft_dataset_sdk.eval.detection.mAP_evaluation import Box3D
from pyquaternion import Quaternion
from shapely.geometry import Polygon

WIDTH, LENGTH, HEIGHT = 1.9, 4.5, 1.6


def official(center, yaw):
    """The evaluator's box: size in its documented order (width, length, height), rotation about the vertical axis."""
    rotation = Quaternion(axis=[0, 0, 1], radians=yaw).elements.tolist()
    size = [WIDTH, LENGTH, HEIGHT]
    return Box3D(sample_token="s", translation=center, size=size, rotation=rotation, name="car")


def exact(center, yaw):
    """The footprint, by rotating its corners with the same quaternion."""
    corners = np.array([[1, 1], [1, -1], [-1, -1], [-1, 1]]) * [LENGTH / 2, WIDTH / 2]
    turn = Quaternion(axis=[0, 0, 1], radians=yaw).rotation_matrix[:2, :2]
    return Polygon(corners @ turn.T + center[:2])


for degrees, expected in {0: (0.385, 0.0), 45: (0.0, 0.385), 20: (0.119, 0.074)}.items():
    yaw = math.radians(degrees)
    ahead = [2 * math.cos(yaw), 2 * math.sin(yaw), 0.0]
    aside = [-2 * math.sin(yaw), 2 * math.cos(yaw), 0.0]
    first, row = [0.0, 0.0, 0.0], []
    for second in (ahead, aside):
        a, b = exact(first, yaw), exact(second, yaw)
        row.append((float(official(first, yaw).get_iou(official(second, yaw))), a.intersection(b).area / a.union(b).area))
    assert abs(float(official(first, yaw).get_iou(official(first, yaw))) - 1) < 1e-9
    print("yaw {:2}: 2 m ahead {:.3f} (exact {:.3f}), 2 m aside {:.3f} (exact {:.3f})".format(degrees, *row[0], *row[1]))
    assert all(abs(value - number) < 6e-4 for (value, _), number in zip(row, expected)), f"changed: expected {expected}"
PY
echo "as stated"
