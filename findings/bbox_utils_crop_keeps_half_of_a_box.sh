#!/usr/bin/env bash
# bbox-utils 0.1.1 with open3d 0.19.0, bbox_utils.point_cloud.PointCloud.crop: the points of a cloud within a 3D box.
#
# Guess: what it says, "a new point cloud with just the points within the bounding box".
# What it does: the eight corners, in the order bottom ring, top ring, are handed to open3d as one polygon in the x-z plane.
# Seen from there that line crosses itself like an hourglass, so of a box along the axes two triangles at the sides are missing:
# half of the points. A box turned about z is taken by its extent in y besides, so points beside it come along; turned by 90
# degrees, the line runs forth and back on itself, encloses nothing, and no point is left.
# What it means here: count or cut points by rotating them into the box's frame and comparing with half its sizes.
#
# Seen (Python 3.11, numpy 1.26.4), box of 4 x 2 x 1.6 m, points 0.1 m apart in it and around it:
#   yaw  0: 12800 points inside, 0.50 of them kept, and 0.00 times as many from outside
#   yaw 30: 12768 points inside, 0.47 of them kept, and 0.35 times as many from outside
#   yaw 90: 12800 points inside, 0.00 of them kept, and 0.00 times as many from outside
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-deps bbox-utils==0.1.1 open3d-cpu==0.19.0 numpy==1.26.4 pyquaternion==0.9.9 \
  opencv-python-headless==4.11.0.86 pillow==12.0.0
"$folder/venv/bin/python" - <<'PY'
import importlib.machinery
import math
import sys
from unittest.mock import MagicMock

import numpy as np


class StandIns:
    """Empty modules for the plots and the learning that open3d imports and this does not use."""

    names = "plotly dash werkzeug configargparse sklearn pandas addict matplotlib tqdm yaml scipy joblib nbformat".split()
    names += "ipywidgets IPython flask".split()
    exec_module = staticmethod(lambda module: None)
    create_module = staticmethod(lambda spec: MagicMock(__path__=[], __spec__=spec))

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        known = name.split(".")[0] in cls.names
        return importlib.machinery.ModuleSpec(name, cls, is_package=True) if known else None


sys.meta_path.append(StandIns)
import open3d
from bbox_utils import BoundingBox3D
from bbox_utils.point_cloud import PointCloud

CENTRE, SIZE = np.array([10.0, 5.0, 1.0]), np.array([4.0, 2.0, 1.6])
axes = [np.arange(-30, 30) * 0.1 + 0.05] * 3
world = np.stack(np.meshgrid(*axes), -1).reshape(-1, 3) + CENTRE
cloud = open3d.geometry.PointCloud(open3d.utility.Vector3dVector(world))

for degrees, kept_share, beside_share in ((0, 0.5, 0.0), (30, None, None), (90, 0.0, 0.0)):
    yaw = math.radians(degrees)
    box = BoundingBox3D(*CENTRE, *SIZE, euler_angles=[0.0, 0.0, yaw])
    turn = np.array([[math.cos(yaw), -math.sin(yaw), 0], [math.sin(yaw), math.cos(yaw), 0], [0, 0, 1]])
    corners = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]) * SIZE / 2 @ turn.T + CENTRE
    own, wanted = (sorted(map(tuple, np.round(rows, 6))) for rows in (box.p, corners))
    assert np.allclose(own, wanted), "the box itself is right"
    inside = (np.abs((world - CENTRE) @ turn) < SIZE / 2 + 1e-9).all(1)
    taken = {tuple(point) for point in np.round(PointCloud(cloud).crop(box).points, 3)}
    seen = np.array([tuple(point) in taken for point in np.round(world, 3)])
    kept, beside = (seen & inside).sum() / inside.sum(), (seen & ~inside).sum() / inside.sum()
    print(f"yaw {degrees:2}: {inside.sum()} points inside, {kept:.2f} of them kept, and {beside:.2f} times as many from outside")
    if kept_share is not None:
        assert abs(kept - kept_share) < 0.05 and abs(beside - beside_share) < 0.05, f"changed: {kept} {beside}"
    else:
        assert 0.3 < kept < 0.7 and beside > 0.1, f"changed: {kept} {beside}"
PY
echo "as stated"
