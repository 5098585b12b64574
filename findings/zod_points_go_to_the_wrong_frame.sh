#!/usr/bin/env bash
# zod 0.8.0 (Zenseact Open Dataset), Calibration.transform_points: moves points between the frames of lidar, camera and vehicle.
#
# Guess: extrinsics are poses in the vehicle's frame, as the class says; so from lidar to camera is inverse(camera) @ lidar, which is
# what Box3D.convert_to and the package's own picture of lidar points do with the same calibration.
# What it does: it computes camera @ lidar, without the inverse. Right only where the target is the vehicle's frame (its pose is
# the identity). A point 18.8 m in front of the camera gets a depth of 4.3 m and 21 m of height; lidar to vehicle
# and back is another point. Numbers stay finite and of a plausible size, nothing warns.
# Box2D.get_3d_frustum(..., frame=...) goes through it and is wrong in the same way.
# What it means here: boxes moved by Box3D are right and points moved by Calibration are not, in one program with one calibration.
#
# Seen (Python 3.11, numpy 2.4.6), a camera 2 m ahead of the vehicle's origin and 1.3 m up, a lidar 0.8 m ahead and 2 m up:
#   lidar to vehicle: points  20.80  -3.00   1.00 | Box3D  20.80  -3.00   1.00 | by hand  20.80  -3.00   1.00
#   lidar to camera : points   3.00 -20.80   4.30 | Box3D   3.00   0.30  18.80 | by hand   3.00   0.30  18.80
#   lidar to vehicle to lidar: -2.20 -20.80 3.00, was 3.00 20.00 -1.00
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-deps zod==0.8.0 numpy==2.4.6 pyquaternion==0.9.9 scipy==1.17.0 h5py==3.16.0 tqdm==4.70.1 \
  numpy-quaternion==2024.0.13 pillow==12.0.0 dataclass-wizard==0.30.1
"$folder/venv/bin/python" - <<'PY'
import numpy as np
from pyquaternion import Quaternion
from zod.constants import EGO, Camera, Lidar
from zod.data_classes import Calibration
from zod.data_classes.box import Box3D


def pose(rotation, translation):
    """A 4 x 4 pose of a sensor in the vehicle's frame (x ahead, y left, z up)."""
    made = np.eye(4)
    made[:3, :3], made[:3, 3] = rotation, translation
    return made


LIDAR = pose(Quaternion(axis=[0, 0, 1], degrees=-90).rotation_matrix, [0.8, 0.0, 2.0])  # y ahead, x right
CAMERA = pose([[0, 0, 1], [-1, 0, 0], [0, -1, 0]], [2.0, 0.0, 1.3])  # z ahead, x right, y down
numbers = {"intrinsics": np.eye(3), "distortion": [0] * 4, "undistortion": [0] * 4, "image_dimensions": [3848, 2168]}
both = {"lidar_extrinsics": LIDAR, "extrinsics": CAMERA}
calibration = Calibration.from_dict({"FC": {**both, **numbers, "field_of_view": [120, 67]}})

point = np.array([[3.0, 20.0, -1.0]])  # in the lidar's frame
homogeneous = np.append(point, 1.0)
for name, target, own in (("vehicle", EGO, np.eye(4)), ("camera", Camera.FRONT, CAMERA)):
    wanted = (np.linalg.inv(own) @ LIDAR @ homogeneous)[:3]
    box = Box3D(center=point[0].copy(), size=np.array([4.0, 2.0, 1.5]), orientation=Quaternion(), frame=Lidar.VELODYNE)
    box.convert_to(target, calibration)
    moved = calibration.transform_points(point, Lidar.VELODYNE, target)[0]
    rows = [" ".join(f"{value:6.2f}" for value in np.round(row, 6) + 0.0) for row in (moved, box.center, wanted)]
    print(f"lidar to {name:7}: points {rows[0]} | Box3D {rows[1]} | by hand {rows[2]}")
    assert np.allclose(box.center, wanted), "changed: Box3D.convert_to"
    assert np.allclose(moved, wanted) == (target == EGO), f"changed: {moved}, by hand {wanted}"
assert np.allclose(moved, (CAMERA @ LIDAR @ homogeneous)[:3]), "changed: not the camera's pose without its inverse"
back = calibration.transform_points(calibration.transform_points(point, Lidar.VELODYNE, EGO), EGO, Lidar.VELODYNE)[0]
print("lidar to vehicle to lidar: " + " ".join(f"{value:.2f}" for value in back) + ", was 3.00 20.00 -1.00")
assert not np.allclose(back, point[0]), "changed: there and back again is the same point"
PY
echo "as stated"
