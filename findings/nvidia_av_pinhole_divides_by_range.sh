#!/usr/bin/env bash
# physical-ai-av 0.2.3 (NVIDIA's kit for its Physical AI Autonomous Vehicles data),
# utils.camera_models.PinholeCameraModel.ray2pixel.
#
# Guess: a ray is divided by its depth z and the camera's matrix applied: f x / z + cx.
# What it does: the ray is divided by its length, the matrix applied, and nothing is divided any more: f x / r + cx z / r, with
# r the distance. Only the optical axis is right. At 27 degrees aside a point lands 154 px too far left, and since the principal
# point shrinks with it, rows are wrong too: a point at the camera's height leaves the horizon by 57 px. FThetaCameraModel,
# which the kit takes by default, is right. (The other direction, pixel2ray, takes no pixels at all: it stops with an error of
# shapes.)
# What it means here: of this kit use the f-theta model alone; a pinhole is four multiplications by hand.
#
# Seen (Python 3.11, numpy 2.4.6), 1920 x 1080, f 1000, cx 960, cy 540:
#   point [ 0.  0. 20.]: [960. 540.], by hand [960. 540.], off by 0 px
#   point [ 2.  0. 20.]: [1054.7  537.3], by hand [1060.  540.], off by 6 px
#   point [10.  0. 20.]: [1305.9  483. ], by hand [1460.  540.], off by 164 px
#   point [15.  0. 20.]: [1368.  432.], by hand [1710.  540.], off by 359 px
#   point [-10.    1.5  20. ]: [410.5 548.8], by hand [460. 615.], off by 83 px
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-deps physical-ai-av==0.2.3 numpy==2.4.6 pandas==3.0.6 \
  python-dateutil==2.9.0.post0 six==1.17.0
"$folder/venv/bin/python" - <<'PY'
import importlib.util
import sys
import types

import numpy as np
import pandas as pd

# The package's first file imports the client that downloads the data, which the camera models do not use: enter without it.
package = types.ModuleType("physical_ai_av")
package.__path__ = list(importlib.util.find_spec("physical_ai_av").submodule_search_locations)
sys.modules["physical_ai_av"] = package
from physical_ai_av.utils.camera_models import FThetaCameraModel, PinholeCameraModel

FOCAL, MIDDLE = 1000.0, np.array([960.0, 540.0])
row = {"width": 1920, "height": 1080, "cx": MIDDLE[0], "cy": MIDDLE[1], "fw_poly_0": 0.0, "fw_poly_1": FOCAL, "bw_poly_0": 0.0}
row |= {"bw_poly_1": 1 / FOCAL} | {f"{way}_poly_{power}": 0.0 for way in ("fw", "bw") for power in (2, 3, 4)}
pinhole, ftheta = (model.from_camera_row(pd.Series(row)) for model in (PinholeCameraModel, FThetaCameraModel))

for point in np.array([[0.0, 0.0, 20.0], [2.0, 0.0, 20.0], [10.0, 0.0, 20.0], [15.0, 0.0, 20.0], [-10.0, 1.5, 20.0]]):
    x, y, z = point
    seen, wanted = pinhole.ray2pixel(point), MIDDLE + FOCAL * point[:2] / z
    length = np.sqrt(x * x + y * y + z * z)
    print(f"point {point}: {seen.round(1)}, by hand {wanted.round(1)}, off by {np.hypot(*(seen - wanted)):.0f} px")
    assert np.allclose(pinhole.ray2pixel(3 * point), seen), "a ray has no length"
    assert np.allclose(seen, (FOCAL * point[:2] + MIDDLE * z) / length), f"changed: {seen}"
    assert np.allclose(seen, wanted) == (x == y == 0), f"changed: {seen}"
    if x or y:
        # Its neighbour, with r = f theta, by hand.
        aside = np.hypot(x, y)
        assert np.allclose(ftheta.ray2pixel(point), MIDDLE + FOCAL * np.arctan2(aside, z) * point[:2] / aside), "f-theta is right"
PY
echo "as stated"
