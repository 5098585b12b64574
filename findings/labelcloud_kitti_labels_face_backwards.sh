#!/usr/bin/env bash
# labelCloud 1.1.1, label format "kitti" (KittiFormat, with calibration), a labelling tool of point clouds.
#
# Guess: a KITTI label is read as a box whose arrow (the tool draws "the object's orientation") points where the object faces, and a box
# that is drawn along its object is written with that rotation_y. KITTI's readme, which the format names as its source: an object
# that faces along the camera's x axis has rotation_y 0.
# What it does: every heading is reversed, both ways. A car ahead that drives away (rotation_y -pi/2) gets an arrow towards the sensor, and
# a box drawn with its arrow ahead is written as rotation_y +pi/2, an oncoming car. (Yaw is taken as pi/2 - rotation_y; right is
# -pi/2 - rotation_y.) Corners are right, since half a turn leaves a box as it is, and reading and writing undo one another: nothing shows
# until such labels meet others. Also, rotation_y is written from -pi/2 to 3 pi/2, where KITTI's range is -pi to pi.
# Not a matter of the sense of rotation: cars that drive straight away are reversed whichever way yaw is counted.
# What it means here: labels made with it need rotation_y + pi before training; heading loss and orientation similarity (AOS) punish
# every one of them, and a box's corners, IoU and AP in 3D cannot tell.
#
# Seen (Python 3.11, numpy 1.26.4; the window and drawing libraries are stand-ins that record what would be drawn), lidar x ahead, y left:
#   rotation_y -1.57: faces  1.0  0.0  0.0, arrow -1.0  0.0  0.0; drawn along the car: rotation_y 1.57
#   rotation_y  0.00: faces  0.0 -1.0  0.0, arrow  0.0  1.0  0.0; drawn along the car: rotation_y 3.14
#   rotation_y  1.57: faces -1.0  0.0  0.0, arrow  1.0  0.0  0.0; drawn along the car: rotation_y -1.57
#   rotation_y -2.50: faces  0.6  0.8  0.0, arrow -0.6 -0.8  0.0; drawn along the car: rotation_y 0.64
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-deps labelCloud==1.1.1 numpy==1.26.4 setuptools==65.5.0
mkdir -p "$folder/work/labels" "$folder/work/calib"
cd "$folder/work"
"$folder/venv/bin/python" -W ignore - <<'PY'
import logging
import math
import sys
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np

logging.disable(logging.CRITICAL)
graphics = MagicMock()
for name in ("PyQt5", "PyQt5.QtCore", "PyQt5.QtGui", "PyQt5.QtWidgets", "open3d", "OpenGL", "OpenGL.GL"):
    sys.modules[name] = graphics
graphics.GL = graphics
from labelCloud.io.labels.kitti import KittiFormat
from labelCloud.model import BBox

TO_CAMERA = np.array([[0, -1, 0, 0.0], [0, 0, -1, -0.08], [1, 0, 0, -0.27]])  # x right, y down, z ahead, from the lidar's
cloud = Path("clouds/000000.bin")
rows = " ".join(str(value) for value in TO_CAMERA.ravel())
Path("calib/000000.txt").write_text(f"R0_rect: 1 0 0 0 1 0 0 0 1\nTr_velo_to_cam: {rows}\n")


def arrow(box):
    """The direction of the drawn arrow in the lidar's frame: its tip, turned as the drawing is turned."""
    graphics.reset_mock()
    box.draw_orientation()
    degrees = next(call.args[0] for call in graphics.glRotate.call_args_list if call.args[1:] == (0.0, 0.0, 1.0))
    tip, turn = graphics.glVertex3fv.call_args_list[1].args[0], math.radians(degrees)
    assert tip[0] > 0 and tip[1:] == [0, 0], "changed: the arrow lies along the box's x axis"
    return np.array([math.cos(turn), math.sin(turn), 0.0])


def text(row):
    """A direction in words of numbers."""
    return " ".join(f"{value:4.1f}" for value in np.round(row, 6) + 0.0)


for rotation_y in (-math.pi / 2, 0.0, math.pi / 2, -2.5):
    Path("labels/000000.txt").write_text(f"Car 0 0 0 0 0 0 0 1.5 1.8 4.2 2.0 1.6 20.0 {rotation_y:.6f}\n")
    tool = KittiFormat(Path("labels"), export_precision=4)
    (box,) = tool.import_labels(cloud)
    cosine, sine = math.cos(rotation_y), math.sin(rotation_y)
    faces = TO_CAMERA[:, :3].T @ [cosine, 0, -sine]  # KITTI's rotation of the camera's x axis
    corners = np.array([[x, y, z] for x in (-2.1, 2.1) for y in (0.0, -1.5) for z in (-0.9, 0.9)])  # KITTI's, from the middle of the floor
    corners = corners @ np.array([[cosine, 0, sine], [0, 1, 0], [-sine, 0, cosine]]).T + [2.0, 1.6, 20.0]
    own = box.get_vertices() @ TO_CAMERA[:, :3].T + TO_CAMERA[:, 3]
    assert all(np.abs(own - corner).max(axis=1).min() < 1e-4 for corner in corners), "changed: the corners of a KITTI label"
    drawn = BBox(*box.get_center(), *box.get_dimensions())  # a new box, its arrow along the car
    drawn.set_classname("Car")
    drawn.set_rotations(0, 0, math.degrees(math.atan2(faces[1], faces[0])) % 360)
    assert np.allclose(arrow(drawn), faces)
    tool.export_labels([drawn], cloud)
    written = float(Path("labels/000000.txt").read_text().split()[14])
    print(f"rotation_y {rotation_y:5.2f}: faces {text(faces)}, arrow {text(arrow(box))}; drawn along the car: rotation_y {written:.2f}")
    assert np.allclose(arrow(box), -faces, atol=1e-5), "changed: the arrow of a KITTI label"
    assert abs(math.remainder(written - rotation_y - math.pi, 2 * math.pi)) < 1e-3, f"changed: {written}"
PY
echo "as stated"
