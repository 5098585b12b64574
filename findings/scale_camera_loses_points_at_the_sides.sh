#!/usr/bin/env bash
# scale-sensor-fusion-io 0.5.4 (Scale's kit for scenes of cameras and lidars), utils.camera_helpers.project_distort with the
# distortion model "brown_conrady": its third result, the mask of points that are seen.
#
# Guess: what it says: a point is valid if it lies in front and where the distorted radius still grows with the true one; for
# a lens whose radius grows everywhere that is every point in front.
# What it does: the border is sought among the roots of the radius's derivative, complex ones included. A lens that never folds
# over has complex roots alone (k1 -.3, k2 .1: .9 + 1.1i); one of them is taken, and the comparison looks at its real part. So
# such a camera is blind beyond 43.5 degrees: with a focal length of 750 px half of what it sees is lost, and lidar points that
# are in the picture stay without colour (compute_photocolors). The pixels themselves are right. A lens that does fold over
# (k1 -.3, k2 .03) gets the right border, and one without distortion none.
# What it means here: take the pixels, and make the mask oneself.
#
# Seen (Python 3.11, numpy 2.4.6), 1920 x 1080, points from all over the picture, each of which lands in it:
#   k1  0.00 k2 0.00: 100% kept; never folds, nothing cut off
#   k1 -0.30 k2 0.03: 100% kept; folds, nothing cut off
#   k1 -0.30 k2 0.10:  52% kept; never folds, cut off at 43.5 degrees
#   k1 -0.25 k2 0.08:  55% kept; never folds, cut off at 44.1 degrees
#   k1 -0.10 k2 0.03:  63% kept; never folds, cut off at 45.0 degrees
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-deps scale-sensor-fusion-io==0.5.4 numpy==2.4.6 scipy==1.17.0 pandas==2.3.3 \
  python-dateutil==2.9.0.post0 pytz==2025.2 tzdata==2025.2 six==1.17.0 typing-extensions==4.16.0 scale-json-binary==0.0.7 \
  dacite2==2.0.0 ujson==6.0.0 tqdm==4.70.1 ffmpeg-python==0.2.0 future==1.0.0
"$folder/venv/bin/python" - <<'PY'
import sys
import types

import numpy as np

# The package opens the C library TurboJPEG when it is imported, for videos; nothing here reads one.
sys.modules["turbojpeg"] = types.SimpleNamespace(TurboJPEG=object)
from scale_sensor_fusion_io.models.sensors.camera import CameraDistortion, CameraIntrinsics
from scale_sensor_fusion_io.utils.camera_helpers import project_distort

F, CX, CY, WIDTH, HEIGHT = 750.0, 960.0, 540.0, 1920, 1080
GRID = np.linspace(-2.5, 2.5, 401)


def look(k1, k2):
    """The share of visible points that the mask keeps, the border by the package and by hand (squared true radius)."""
    camera = CameraIntrinsics(F, F, CX, CY, WIDTH, HEIGHT, CameraDistortion.from_values("brown_conrady", [k1, k2, 0, 0, 0]))
    x, y = (side.ravel() for side in np.meshgrid(GRID, GRID))
    square = x**2 + y**2
    # By hand: the radius grows from the axis to here, on a fine grid, without roots.
    steps = np.linspace(0.0, np.sqrt(square.max()), 20001)
    falls = np.flatnonzero(np.diff(steps * (1 + k1 * steps**2 + k2 * steps**4)) <= 0)
    border = steps[falls[0]] ** 2 if falls.size else np.inf
    columns, rows, valid = project_distort(10.0 * np.column_stack([x, y, np.ones_like(x)]), camera)
    lens = 1 + k1 * square + k2 * square**2
    assert np.allclose(columns, CX + F * x * lens) and np.allclose(rows, CY + F * y * lens), "pixels are right"
    seen = (square < border) & (columns >= 0) & (columns < WIDTH) & (rows >= 0) & (rows < HEIGHT)
    return valid[seen].mean(), square[valid].max(), border


for k1, k2, kept in ((0.0, 0.0, 1.0), (-0.3, 0.03, 1.0), (-0.3, 0.1, None), (-0.25, 0.08, None), (-0.1, 0.03, None)):
    share, ends, border = look(k1, k2)
    angle = np.degrees(np.arctan(np.sqrt(ends))) if share < 1 else np.inf
    print(f"k1 {k1:5.2f} k2 {k2:.2f}: {share:4.0%} kept; {'folds' if np.isfinite(border) else 'never folds'}, "
          f"{f'cut off at {angle:.1f} degrees' if share < 1 else 'nothing cut off'}")
    if kept is None:
        # The real part of the complex roots of 1 + 3 k1 q + 5 k2 q^2, q the squared radius.
        assert (3 * k1) ** 2 < 20 * k2 and abs(ends + 3 * k1 / (10 * k2)) < 0.03, f"changed: {ends}"
        assert share < 0.95 and border == np.inf, f"changed: {share}"
    else:
        assert share > 0.999, f"changed: {share}"
PY
echo "as stated"
