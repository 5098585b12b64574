#!/usr/bin/env bash
# scalabel 0.3.1 (labelling tool of BDD100K), scalabel.label.from_kitti: the labels of the lidar frames (Dataset.groups).
#
# Guess: orientation[1] of a lidar label is the car's yaw in the lidar's frame, as the package's own converter of nuScenes
# stores it there.
# What it does: rotation_y, an angle about the camera's vertical axis, is applied about the camera's optical axis; then the
# result's angle is measured in the lidar's plane of x and z, that is, seen from the side. What is left of the angle is its
# sign: every car with a negative rotation_y faces 90 degrees one way and every other one 90 degrees the other way, but for the
# degree that the lidar is mounted askew. Places, sizes and the camera frames' labels do not suffer from that. Its end stands in
# the converter of Waymo too (read, not run).
# What it means here: compute the heading yourself, from rotation_y and the calibration's rotation.
#
# Seen (Python 3.11, numpy 2.4.6), degrees; lidar mounted half a degree askew:
#   rotation_y -150.0: orientation[1]  -89.1, yaw in the lidar's frame by hand   59.5
#   rotation_y  -90.0: orientation[1]  -90.0, yaw in the lidar's frame by hand   -0.5
#   rotation_y  -57.0: orientation[1]  -90.3, yaw in the lidar's frame by hand  -33.5
#   rotation_y  -20.0: orientation[1]  -91.3, yaw in the lidar's frame by hand  -70.5
#   rotation_y   20.0: orientation[1]   91.4, yaw in the lidar's frame by hand -110.5
#   rotation_y   57.0: orientation[1]   90.3, yaw in the lidar's frame by hand -147.5
#   rotation_y   90.0: orientation[1]   90.0, yaw in the lidar's frame by hand  179.5
#   rotation_y  150.0: orientation[1]   89.1, yaw in the lidar's frame by hand  119.5
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-deps scalabel==0.3.1 numpy==2.4.6 scipy==1.17.0 pydantic==1.10.26 \
  typing-extensions==4.16.0 pillow==12.0.0 matplotlib==3.11.0 contourpy==1.3.3 cycler==0.12.1 \
  fonttools==4.68.0 kiwisolver==1.5.1 pyparsing==3.3.3 packaging==26.4 python-dateutil==2.9.0.post0 six==1.17.0 \
  pycocotools==2.0.11 nanoid==2.0.0 toml==0.10.2 tqdm==4.70.1 pyyaml==6.0.4
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import importlib.util
import math
import os
import sys
import types

import numpy as np
from PIL import Image

# The first files of package and folder import the labelling server's tools: enter without them.
root = importlib.util.find_spec("scalabel").submodule_search_locations[0]
for name, folder in (("scalabel", ""), ("scalabel.label", "label")):
    package = types.ModuleType(name)
    package.__path__ = [os.path.join(root, folder)]
    sys.modules[name] = package
from scalabel.label.from_kitti import from_kitti

ROOT = "detection/training"
ANGLES = np.radians([-150.0, -90.0, -57.0, -20.0, 20.0, 57.0, 90.0, 150.0])
askew = math.radians(0.5)
about_x = np.array([[1, 0, 0], [0, math.cos(askew), -math.sin(askew)], [0, math.sin(askew), math.cos(askew)]])
about_z = np.array([[math.cos(askew), -math.sin(askew), 0], [math.sin(askew), math.cos(askew), 0], [0, 0, 1]])
lidar_to_camera = np.array([[0, -1, 0], [0, 0, -1], [1, 0, 0]]) @ about_z @ about_x
offsets = {"P0": 0, "P1": -380, "P2": 40, "P3": -340}
rows = {name: np.array([[720, 0, 620, offset], [0, 720, 190, 0], [0, 0, 1, 0]]) for name, offset in offsets.items()}
rows |= {"R0_rect": np.eye(3), "Tr_velo_to_cam": np.c_[lidar_to_camera, [0, -0.1, -0.3]], "Tr_imu_to_velo": np.eye(4)[:3]}

for name in ("velodyne", "calib", "label_2", "image_2", "image_3"):
    os.makedirs(f"{ROOT}/{name}")
np.zeros((1, 4), np.float32).tofile(f"{ROOT}/velodyne/000000.bin")
for name in ("image_2", "image_3"):
    Image.new("RGB", (1240, 376)).save(f"{ROOT}/{name}/000000.png")
with open(f"{ROOT}/calib/000000.txt", "w") as file:
    file.writelines(f"{name}: {' '.join(map(str, matrix.ravel()))}\n" for name, matrix in rows.items())
with open(f"{ROOT}/label_2/000000.txt", "w") as file:
    file.writelines(f"Car 0 0 0 600 170 640 200 1.5 1.8 4.0 0 1.7 {20 + 6 * row} {angle}\n" for row, angle in enumerate(ANGLES))

labels = from_kitti(ROOT, "detection").groups[0].labels
assert len(labels) == len(ANGLES)
for angle, label in zip(ANGLES, labels):
    # KITTI's readme: at rotation_y a car faces (cos, 0, -sin) in the camera's frame.
    front = lidar_to_camera.T @ [math.cos(angle), 0, -math.sin(angle)]
    wanted, seen = math.degrees(math.atan2(front[1], front[0])), math.degrees(label.box3d.orientation[1])
    print(f"rotation_y {math.degrees(angle):6.1f}: orientation[1] {seen:6.1f}, yaw in the lidar's frame by hand {wanted:6.1f}")
    assert abs(seen - math.copysign(90, angle)) < 3, f"changed: {seen}"
    place = lidar_to_camera @ label.box3d.location + [0, -0.1, -0.3]
    assert abs(place[0]) < 1e-3 and abs(place[1] - 0.95) < 1e-3, f"the place is right: {place}"
PY
echo "as stated"
