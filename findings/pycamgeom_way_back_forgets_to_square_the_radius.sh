#!/usr/bin/env bash
# pycamgeom 0.0.5 (camera models), Camera and Frame: project and backproject, by which pixels of detections are put on a mesh.
#
# Guess: backproject(u, v, z) is the way back of project: a point goes to a pixel, and the pixel with its depth to the point.
# What it does: the way back takes the radius itself where the lens has its square: the coefficients act on r, r^2, r^3 instead
# of r^2, r^4, r^6. So an ordinary lens (k1 -.3, k2 .1) is undone several times over: a point 10 m away and 2 m aside comes back
# 10 cm off, one 4 m aside 29 cm. Nothing warns: the iteration settles, on another point. A camera without distortion is right.
# (p1 and p2 change places besides: there they are Agisoft's, on the way back OpenCV's.)
# What it means here: cv2.undistortPoints for the way back.
#
# Seen (Python 3.11, numpy 2.4.6), f 1000, cx 960, cy 540, points 10 m away:
#   k1  0.0 k2 0.0: 1.0 m aside, pixel 1060.0, back at 1.000 m, off by 0.000 m
#   k1  0.0 k2 0.0: 2.0 m aside, pixel 1160.0, back at 2.000 m, off by 0.000 m
#   k1  0.0 k2 0.0: 4.0 m aside, pixel 1360.0, back at 4.000 m, off by 0.000 m
#   k1  0.0 k2 0.0: 6.0 m aside, pixel 1560.0, back at 6.000 m, off by 0.000 m
#   k1 -0.2 k2 0.0: 1.0 m aside, pixel 1059.8, back at 1.019 m, off by 0.019 m
#   k1 -0.2 k2 0.0: 2.0 m aside, pixel 1158.4, back at 2.070 m, off by 0.070 m
#   k1 -0.2 k2 0.0: 4.0 m aside, pixel 1347.2, back at 4.230 m, off by 0.230 m
#   k1 -0.2 k2 0.0: 6.0 m aside, pixel 1516.8, back at 6.383 m, off by 0.383 m
#   k1 -0.3 k2 0.1: 1.0 m aside, pixel 1059.7, back at 1.028 m, off by 0.028 m
#   k1 -0.3 k2 0.1: 2.0 m aside, pixel 1157.6, back at 2.099 m, off by 0.099 m
#   k1 -0.3 k2 0.1: 4.0 m aside, pixel 1341.8, back at 4.292 m, off by 0.292 m
#   k1 -0.3 k2 0.1: 6.0 m aside, pixel 1503.0, back at 6.395 m, off by 0.395 m
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-deps pycamgeom==0.0.5 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import numpy as np
from pycamgeom.camera import Camera

F, CX, CY, DEPTH = 1000.0, 960.0, 540.0, 10.0


def camera(k1, k2):
    """A camera without tangential distortion, filled in by its own fields."""
    made = Camera()
    made.dim, made.fx, made.fy, made.cx, made.cy = [1920.0, 1080.0], F, F, CX, CY
    made.K = np.array([[F, 0.0, CX], [0.0, F, CY], [0.0, 0.0, 1.0]])
    made.k1, made.k2 = k1, k2
    return made


def inverse(radius, k1, k2):
    """The true radius whose distorted one is this, by halving an interval in which it grows."""
    low, high = 0.0, 1.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if middle * (1 + k1 * middle**2 + k2 * middle**4) < radius else (low, middle)
    return low


for k1, k2 in ((0.0, 0.0), (-0.2, 0.0), (-0.3, 0.1)):
    lens = camera(k1, k2)
    for aside in (1.0, 2.0, 4.0, 6.0):
        point = np.array([[aside], [0.0], [DEPTH], [1.0]])
        inside, pixel = lens.project(point)
        radius = aside / DEPTH
        grown = radius * (1 + k1 * radius**2 + k2 * radius**4)
        assert inside and np.allclose(pixel, [CX + F * grown, CY]), "the way there is right"
        assert abs(inverse(grown, k1, k2) * DEPTH - aside) < 1e-9, "the way back by hand leads home"
        back = lens.backproject(*pixel, DEPTH)
        off = np.linalg.norm(back - point[:3, 0])
        print(f"k1 {k1:4.1f} k2 {k2:.1f}: {aside:.1f} m aside, pixel {pixel[0]:.1f}, back at {back[0]:.3f} m, off by {off:.3f} m")
        # Its own equation: x (1 + k1 x + k2 x^2) is the distorted radius.
        found = back[0] / DEPTH
        assert abs(found * (1 + k1 * found + k2 * found**2) - grown) < 1e-3, f"changed: {back}"
        assert (off < 1e-9) if k1 == 0 else (off > 0.01), f"changed: {off}"
PY
echo "as stated"
