#!/usr/bin/env bash
# scale-sensor-fusion-io 0.5.4 (Scale's kit for scenes of cameras and lidars), utils.camera_helpers.project_distort with the
# distortion model "fisheye" (k1 to k4).
#
# Guess: the model of Kannala and Brandt, as in OpenCV's fisheye module: a point at the angle t from the axis lands at
# f t (1 + k1 t^2 + k2 t^4 + k3 t^6 + k4 t^8) pixels from the principal point; with four zeros that is f t.
# What it does: the polynomial is applied to the pinhole's radius, f tan(t): the factor that turns one into the other is
# computed and left out. With four zeros the fisheye is a pinhole. At 37 degrees aside a point is 108 px too far out, at 72
# degrees 1821 px, off the picture. Its sister "mod_equi_fish" has the factor and is right. The same call colours lidar points
# (compute_photocolors): they get the colours of other places.
# What it means here: multiply by t / tan(t) oneself, or project with OpenCV.
#
# Seen (Python 3.11, numpy 2.4.6), f 1000, cx 960, cy 540:
#   k1 0.00 at  1 degrees: [977.1 543.5], by hand [977.1 543.5], off by    0.0 px
#   k1 0.00 at 14 degrees: [1204.4  589.5], by hand [1199.5  588.5], off by    5.0 px
#   k1 0.00 at 37 degrees: [1698.5  689.7], by hand [1592.9  668.3], off by  107.8 px
#   k1 0.00 at 50 degrees: [2128.   776.8], by hand [1815.3  713.4], off by  319.1 px
#   k1 0.00 at 60 degrees: [2657.5  884.1], by hand [1986.3  748. ], off by  684.9 px
#   k1 0.00 at 72 degrees: [3976.3 1151.4], by hand [2191.6  789.7], off by 1821.0 px
#   k1 0.05 at  1 degrees: [977.1 543.5], by hand [977.1 543.5], off by    0.0 px
#   k1 0.05 at 14 degrees: [1205.1  589.7], by hand [1200.2  588.7], off by    5.0 px
#   k1 0.05 at 37 degrees: [1712.8  692.6], by hand [1605.1  670.8], off by  109.9 px
#   k1 0.05 at 50 degrees: [2166.7  784.6], by hand [1843.6  719.1], off by  329.7 px
#   k1 0.05 at 60 degrees: [2734.7  899.7], by hand [2033.   757.5], off by  716.0 px
#   k1 0.05 at 72 degrees: [4163.  1189.3], by hand [2267.8  805.1], off by 1933.8 px
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-deps scale-sensor-fusion-io==0.5.4 numpy==2.4.6 scipy==1.17.0 pandas==2.3.3 \
  python-dateutil==2.9.0.post0 pytz==2025.2 tzdata==2025.2 six==1.17.0 typing-extensions==4.16.0 scale-json-binary==0.0.7 \
  dacite2==2.0.0 ujson==6.0.0 tqdm==4.70.1 ffmpeg-python==0.2.0 future==1.0.0
"$folder/venv/bin/python" - <<'PY'
import math
import sys
import types

import numpy as np

# The package opens the C library TurboJPEG when it is imported, for videos; nothing here reads one.
sys.modules["turbojpeg"] = types.SimpleNamespace(TurboJPEG=object)
from scale_sensor_fusion_io.models.sensors.camera import CameraDistortion, CameraIntrinsics
from scale_sensor_fusion_io.utils.camera_helpers import project_distort

F, CX, CY = 1000.0, 960.0, 540.0
DEGREES = (1, 14, 37, 50, 60, 72)


def project(model, values):
    """The package's columns and rows of points 20 m away, at rising angles to the right and a little down."""
    camera = CameraIntrinsics(F, F, CX, CY, 1920, 1080, CameraDistortion.from_values(model, values))
    columns, rows, valid = project_distort(points.copy(), camera)
    assert valid.all()
    return np.column_stack([columns, rows])


angles = np.radians(DEGREES)
sides = np.array([math.cos(0.2), math.sin(0.2)])
points = 20.0 * np.column_stack([np.sin(angles)[:, None] * sides, np.cos(angles)])
for values in ([0.0, 0.0, 0.0, 0.0], [0.05, -0.01, 0.002, 0.0]):
    seen = project("fisheye", values)
    k1, k2, k3, k4 = values
    lens = 1 + k1 * angles**2 + k2 * angles**4 + k3 * angles**6 + k4 * angles**8
    wanted = np.array([CX, CY]) + F * (angles * lens)[:, None] * sides
    for degrees, pixel, right in zip(DEGREES, seen, wanted):
        off = np.linalg.norm(pixel - right)
        print(f"k1 {k1:.2f} at {degrees:2d} degrees: {pixel.round(1)}, by hand {right.round(1)}, off by {off:6.1f} px")
    # What is written down instead: the same polynomial on a pinhole's radius.
    pinhole = np.array([CX, CY]) + F * (np.tan(angles) * lens)[:, None] * sides
    assert np.abs(seen - pinhole).max() < 1e-6, f"changed: {seen}"
    assert np.linalg.norm(seen - wanted, axis=1)[2] > 100, f"changed: {seen}"
zeros = project("mod_equi_fish", [0.0, 0.0, 0.0, 0.0])
assert np.allclose(zeros, np.array([CX, CY]) + F * angles[:, None] * sides), "the sister model with zeros is right"
PY
echo "as stated"
