#!/usr/bin/env bash
# vcd 6.0.3 (Vicomtech's library of OpenLABEL), scl.CameraCylindrical, the camera of intrinsics_cylindrical: width, height, two
# fields of view.
#
# Guess: straight ahead is the picture's middle column, and the edges are half the field of view to either side; rows do so,
# from + half of fov_vert_rad to - half.
# What it does: longitude is counted from the axis to the right, where straight ahead is 90 degrees, and the right edge is put
# at 0 whatever the field of view. That is right for 180 degrees alone. A camera of 120 degrees has its axis at a quarter of the
# width and shows from 30 degrees left to 90 degrees right; what stands in the left quarter of its field has negative columns,
# and nothing warns of it. There and back (reproject_points2d) agrees with itself, so a test of the round trip does not tell.
# What it means here: with other fields than 180 degrees add width x (90 / field - 1 / 2) to every column.
#
# Seen (Python 3.11, numpy 2.4.6), 1920 columns, points 10 m away:
#   field 180,  -88.2 degrees aside: column    19.2, by hand    19.2
#   field 180,  -45.0 degrees aside: column   480.0, by hand   480.0
#   field 180,    0.0 degrees aside: column   960.0, by hand   960.0
#   field 180,   45.0 degrees aside: column  1440.0, by hand  1440.0
#   field 180,   88.2 degrees aside: column  1900.8, by hand  1900.8
#   field 120,  -58.8 degrees aside: column  -460.8, by hand    19.2
#   field 120,  -30.0 degrees aside: column     0.0, by hand   480.0
#   field 120,    0.0 degrees aside: column   480.0, by hand   960.0
#   field 120,   30.0 degrees aside: column   960.0, by hand  1440.0
#   field 120,   58.8 degrees aside: column  1420.8, by hand  1900.8
#   field  90,  -44.1 degrees aside: column  -940.8, by hand    19.2
#   field  90,  -22.5 degrees aside: column  -480.0, by hand   480.0
#   field  90,    0.0 degrees aside: column     0.0, by hand   960.0
#   field  90,   22.5 degrees aside: column   480.0, by hand  1440.0
#   field  90,   44.1 degrees aside: column   940.8, by hand  1900.8
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-deps vcd==6.0.3 numpy==2.4.6 opencv-python-headless==4.13.0.92 \
  jsonschema==4.26.0 attrs==26.1.0 jsonschema-specifications==2025.9.1 referencing==0.37.0 rpds-py==2026.9.1 \
  typing-extensions==4.16.0
"$folder/venv/bin/python" - <<'PY'
import math

import numpy as np
from vcd.scl import CameraCylindrical

WIDTH, HEIGHT = 1920, 960

for field in (180, 120, 90):
    radians = math.radians(field)
    data = {"width_px": WIDTH, "height_px": HEIGHT, "fov_horz_rad": radians, "fov_vert_rad": math.radians(60)}
    camera = CameraCylindrical(data, "front", "", "")
    for aside in (-0.49 * field, -0.25 * field, 0.0, 0.25 * field, 0.49 * field):
        angle = math.radians(aside)
        # The camera's frame: x to the right, y down, z ahead.
        point = np.array([[10 * math.sin(angle)], [0.0], [10 * math.cos(angle)], [1.0]])
        points, valid = camera.project_points3d(point)
        column, row = points[:2, 0]
        wanted = WIDTH * (0.5 + aside / field)
        print(f"field {field:3}, {aside:6.1f} degrees aside: column {column:7.1f}, by hand {wanted:7.1f}")
        assert valid == [True] and abs(row - HEIGHT / 2) < 1e-6, "rows are right"
        # By hand: the right edge stands for 90 degrees to the right.
        assert abs(column - WIDTH * (1 - (90 - aside) / field)) < 1e-6, f"changed: {column}"
        assert (abs(column - wanted) < 1e-6) == (field == 180), f"changed: {column}"
PY
echo "as stated"
