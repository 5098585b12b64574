#!/usr/bin/env bash
# segments-ai 1.33.0 with open3d 0.19.0, segments.utils.cuboid_to_segmentation: which points of a cloud lie in which labelled cuboid.
#
# Guess: a cuboid labelled with yaw alone and the same one with its rotation (qx, qy, qz, qw) besides mask the same points.
# What it does: the rotation is handed over as x, y, z, w to a function of open3d that reads w, x, y, z: a car turned by 90 degrees about
# the vertical is laid along another axis and keeps a third of its points, at 30 degrees two thirds; only yaw 0 is right. Labels
# that have yaw alone are right. Points that are not in it are absent from the object's mask without a word.
# What it means here: leave the rotation out of labels that have a yaw, or test points against a box by hand.
#
# Seen (Python 3.11, numpy 1.26.4), share of 3375 points within a cuboid of 4 x 2 x 1.6 m that get its number:
#   yaw  0: yaw alone 1.00, with its rotation 1.00
#   yaw 30: yaw alone 1.00, with its rotation 0.64
#   yaw 90: yaw alone 1.00, with its rotation 0.33
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-deps segments-ai==1.33.0 open3d-cpu==0.19.0 numpy==1.26.4 pyquaternion==0.9.9 pydantic==2.11.7 \
  pydantic-core==2.33.2 typing-extensions==4.16.0 annotated-types==0.7.0 typing-inspection==0.4.5 requests==2.34.2 urllib3==2.8.0 \
  certifi idna==3.20 charset-normalizer==3.5.3 pillow==12.0.0
"$folder/venv/bin/python" - <<'PY'
import importlib.machinery
import math
import sys
from unittest.mock import MagicMock

import numpy as np


class StandIns:
    """Empty modules for the plots and the learning that open3d imports and this does not use."""

    names = "plotly dash werkzeug configargparse sklearn pandas addict matplotlib tqdm yaml scipy joblib nbformat ipywidgets IPython flask".split()
    exec_module = staticmethod(lambda module: None)
    create_module = staticmethod(lambda spec: MagicMock(__path__=[], __spec__=spec))

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        known = name.split(".")[0] in cls.names
        return importlib.machinery.ModuleSpec(name, cls, is_package=True) if known else None


sys.meta_path.append(StandIns)
from segments.typing import PointcloudCuboidLabelAttributes
from segments.utils import cuboid_to_segmentation

PLACE, SIZE = np.array([10.0, 5.0, 1.0]), np.array([4.0, 2.0, 1.6])
inside = np.stack(np.meshgrid(*[np.linspace(-0.49, 0.49, 15)] * 3), -1).reshape(-1, 3) * SIZE


def turn(angle):
    """A rotation about the vertical axis, counter-clockwise from above."""
    return np.array([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]])


def quaternion(angle):
    """The same rotation in the fields of a label."""
    return {"qx": 0.0, "qy": 0.0, "qz": math.sin(angle / 2), "qw": math.cos(angle / 2)}


def share(points, yaw, **rotation):
    """The share of the points that the package gives the cuboid's number."""
    place, size = (dict(zip("xyz", row.tolist())) for row in (PLACE, SIZE))
    cuboid = {"id": 7, "category_id": 1, "position": place, "dimensions": size, "yaw": yaw, "type": "cuboid", **rotation}
    label = PointcloudCuboidLabelAttributes.model_validate({"annotations": [cuboid], "format_version": "0.2"})
    return float((cuboid_to_segmentation(points, label) == 7).mean())


for degrees, expected in ((0, 1.0), (30, 0.64), (90, 0.333)):
    yaw = math.radians(degrees)
    world = inside @ turn(yaw).T + PLACE
    plain, full = share(world, yaw), share(world, yaw, rotation=quaternion(yaw))
    print(f"yaw {degrees:2}: yaw alone {plain:.2f}, with its rotation {full:.2f}")
    assert plain == 1 and abs(full - expected) < 0.03, f"changed: {plain} {full}"
PY
echo "as stated"
