#!/usr/bin/env bash
# t4-devkit 0.1.0 (TIER IV's T4 data sets, a relative of nuScenes's), t4_devkit.common.geometry.view_points with a lens distortion.
#
# Guess: coefficients of zero give the picture of no coefficients; and a point on the optical axis falls on the principal point at any depth.
# What it does: with coefficients the lens polynomial gets x and y in metres (it is defined on x / z and y / z), focal lengths and the
# principal point are applied, and then the whole is divided by depth. So the picture's middle (960, 540) moves to (96, 54) for a
# point 10 m ahead and to (24, 13.5) at 40 m, and the lens bends by the square of metres. Only at depth 1 is it right.
# Not for want of points divided beforehand: the same call without coefficients takes metres, the documented result for
# normalize=True is the division by depth, and the package's own projection of lidar points passes metres with the camera's coefficients.
# What it means here: project with OpenCV or by hand; with this function labels of distorted cameras land at the wrong pixels, in silence.
#
# Seen (Python 3.11, numpy 2.4.6), focal length 1200, principal point (960, 540), OpenCV's order k1 k2 p1 p2 k3:
#   point  0.0  0.0 10.0: no coefficients  960.0  540.0, zeros   96.0   54.0 | k1 -.3 k2 .1:   96.0   54.0, by hand  960.0  540.0
#   point  0.0  0.0 40.0: no coefficients  960.0  540.0, zeros   24.0   13.5 | k1 -.3 k2 .1:   24.0   13.5, by hand  960.0  540.0
#   point  2.0 -1.0 20.0: no coefficients 1080.0  480.0, zeros  168.0  -33.0 | k1 -.3 k2 .1:  288.0  -93.0, by hand 1079.6  480.2
#   point  0.1 -0.1  1.0: no coefficients 1080.0  420.0, zeros 1080.0  420.0 | k1 -.3 k2 .1: 1079.3  420.7, by hand 1079.3  420.7
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-deps t4-devkit==0.1.0 numpy==2.4.6 pyquaternion==0.9.9 typing_extensions==4.16.0
"$folder/venv/bin/python" - <<'PY'
import importlib.util
import sys
import types

import numpy as np

# The package's first file imports a viewer and nuscenes-devkit, which this function does not use: enter without it.
package = types.ModuleType("t4_devkit")
package.__path__ = list(importlib.util.find_spec("t4_devkit").submodule_search_locations)
sys.modules["t4_devkit"] = package
from t4_devkit.common.geometry import view_points

CAMERA = np.array([[1200.0, 0.0, 960.0], [0.0, 1200.0, 540.0], [0.0, 0.0, 1.0]])
LENS = np.array([-0.3, 0.1, 0.0, 0.0, 0.0])


def by_hand(point, lens):
    """The radial lens of OpenCV's documentation: divide by depth, bend, then apply the camera's matrix."""
    x, y = point[:2] / point[2]
    square = x * x + y * y
    bend = 1 + lens[0] * square + lens[1] * square**2
    return (CAMERA @ [x * bend, y * bend, 1.0])[:2]


for point in np.array([[0.0, 0.0, 10.0], [0.0, 0.0, 40.0], [2.0, -1.0, 20.0], [0.1, -0.1, 1.0]]):
    plain, zeros, bent = (view_points(point[:, None], CAMERA, lens)[:2, 0] for lens in (None, np.zeros(5), LENS))
    wanted = by_hand(point, LENS)
    words = [" ".join(f"{value:6.1f}" for value in row) for row in (plain, zeros, bent, wanted)]
    place = " ".join(f"{value:4.1f}" for value in point)
    print(f"point {place}: no coefficients {words[0]}, zeros {words[1]} | k1 -.3 k2 .1: {words[2]}, by hand {words[3]}")
    assert np.allclose(plain, by_hand(point, np.zeros(5))), "changed: without coefficients"
    assert np.allclose(zeros, plain) == np.allclose(bent, wanted) == (point[2] == 1), f"changed: {zeros} {bent}, wanted {wanted}"
PY
echo "as stated"
