#!/usr/bin/env bash
# kitti2mcap 0.1.1 (KITTI raw drives to ROS 2's MCAP files, for Foxglove and others): camera_info beside /tf_static.
#
# Guess: a lidar point that /tf_static brings into a camera's frame, times the p of that camera's camera_info, is its pixel: p
# projects points of the frame that stands in the header.
# What it does: /tf_static has a frame for each camera at its own place, the baseline to camera 0 included; and p is KITTI's
# P_rect as it is, whose fourth column moves a point of camera 0 by the same baseline again. So all but camera 0 see everything
# aside: camera 2, the one that is converted unless told otherwise, by 4.6 pixels at 10 m, camera 3 by 35, camera 1 by 40, twice
# that at 5 m.
# What it means here: project with k from the camera's own frame, or with p from camera 0's; not with p from the frame in the
# header.
#
# No misuse: the package promises files for "visualization pipelines" with rectified intrinsics and extrinsics as a transform
# tree. ROS's text of CameraInfo: the header's frame has its origin in the camera's optical centre; p's fourth column is 0 for a
# single camera, and for the second of a stereo pair it tells of that one's place in the first one's frame. KITTI's readme:
# P_rect R_rect_00 (R|T) of a lidar point.
# Seen (Python 3.11, numpy 2.4.6, mcap-ros2-support 0.6.0; a lidar point 1 m to the left of straight ahead; column of the
# picture):
#   10 m, camera 0: by KITTI's formula  543.6   k and /tf_static  543.6   p and /tf_static  543.6
#   10 m, camera 1: by KITTI's formula  504.0   k and /tf_static  504.0   p and /tf_static  464.4
#   10 m, camera 2: by KITTI's formula  548.3   k and /tf_static  548.3   p and /tf_static  552.9
#   10 m, camera 3: by KITTI's formula  508.8   k and /tf_static  508.8   p and /tf_static  473.9
#   40 m, camera 0: by KITTI's formula  599.4   k and /tf_static  599.4   p and /tf_static  599.4
#   40 m, camera 1: by KITTI's formula  589.7   k and /tf_static  589.7   p and /tf_static  580.0
#   40 m, camera 2: by KITTI's formula  600.6   k and /tf_static  600.6   p and /tf_static  601.7
#   40 m, camera 3: by KITTI's formula  590.9   k and /tf_static  590.9   p and /tf_static  582.3
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-deps kitti2mcap==0.1.1 pykitti==0.3.1 mcap==1.6.0 mcap-ros2-support==0.6.0 \
  numpy==2.4.6 pillow==13.0.0 opencv-python-headless==5.0.0.93 pandas==3.1.1 matplotlib==3.11.2 contourpy==1.3.3 \
  cycler==0.12.1 fonttools==4.68.0 kiwisolver==1.5.1 packaging==26.4 pyparsing==3.3.3 \
  python-dateutil==4.0.0 tzdata==2026.6 lz4==4.4.5 zstandard==0.25.0
cd "$folder"
export MPLCONFIGDIR="$folder"
cat > drive.py <<'PY'
"""A drive of one frame in KITTI's layout: four rectified cameras that differ in P_rect's fourth column alone, as KITTI's do."""
import math
from pathlib import Path

import numpy as np
from PIL import Image

FOCAL, COLUMN, ROW = 720.0, 610.0, 173.0
OFFSETS = {0: 0.0, 1: -386.0, 2: 45.0, 3: -340.0}
PROJECTIONS = {n: np.array([[FOCAL, 0, COLUMN, offset], [0, FOCAL, ROW, 0], [0, 0, 1, 0]]) for n, offset in OFFSETS.items()}
half, whole = math.radians(0.5), math.radians(0.6)
down = np.array([[1, 0, 0], [0, math.cos(half), -math.sin(half)], [0, math.sin(half), math.cos(half)]])
LIDAR_TO_CAMERA = down @ np.array([[0.0, -1, 0], [0, 0, -1], [1, 0, 0]])
SHIFT = np.array([0.0, -0.08, -0.27])
RECTIFY = np.array([[math.cos(whole), 0, math.sin(whole)], [0, 1, 0], [-math.sin(whole), 0, math.cos(whole)]])


def words(numbers):
    return " ".join(f"{number:.12e}" for number in np.ravel(numbers))


def write(root):
    day = Path(root, "2011_09_26")
    drive = day / "2011_09_26_drive_0001_sync"
    for name in [f"image_0{n}" for n in OFFSETS] + ["oxts", "velodyne_points"]:
        (drive / name / "data").mkdir(parents=True)
        (drive / name / "timestamps.txt").write_text("2011-09-26 13:02:25.964389445\n")
    for n in OFFSETS:
        Image.new("L" if n < 2 else "RGB", (1242, 375)).save(drive / f"image_0{n}" / "data" / "0000000000.png")
    np.zeros((1, 4), np.float32).tofile(drive / "velodyne_points" / "data" / "0000000000.bin")
    rows = [f"R_rect_0{n}: {words(RECTIFY)}\nP_rect_0{n}: {words(PROJECTIONS[n])}\n" for n in OFFSETS]
    (day / "calib_cam_to_cam.txt").write_text("".join(rows))
    (day / "calib_velo_to_cam.txt").write_text(f"R: {words(LIDAR_TO_CAMERA)}\nT: {words(SHIFT)}\n")
    (day / "calib_imu_to_velo.txt").write_text(f"R: {words(np.eye(3))}\nT: {words([-0.8, 0.3, -0.8])}\n")


if __name__ == "__main__":
    write("kitti")
PY
venv/bin/python drive.py
venv/bin/kitti2mcap --date 2011_09_26 --drive 0001 --kitti-dir kitti --output drive.mcap --cameras 0,1,2,3 --no-imu > log.txt
venv/bin/python - <<'PY'
import numpy as np
from drive import LIDAR_TO_CAMERA, OFFSETS, PROJECTIONS, RECTIFY, SHIFT
from mcap_ros2.reader import read_ros2_messages

FRAMES = ("camera_gray_left", "camera_gray_right", "camera_color_left", "camera_color_right")


def matrix(transform):
    """The pose of the child in its parent."""
    q, t = transform.rotation, transform.translation
    x, y, z, w = q.x, q.y, q.z, q.w
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y), t.x],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x), t.y],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y), t.z],
        [0, 0, 0, 1],
    ]
    return np.array(rows)


poses, infos = {}, {}
for message in read_ros2_messages("drive.mcap"):
    if message.channel.topic == "/tf_static":
        for row in message.ros_msg.transforms:
            assert row.header.frame_id == "base_link"
            poses[row.child_frame_id] = matrix(row.transform)
    elif message.channel.topic.endswith("camera_info"):
        infos[message.ros_msg.header.frame_id] = message.ros_msg
assert set(infos) == set(FRAMES) and set(poses) == {*FRAMES, "velodyne"}

for distance in (10.0, 40.0):
    point = np.array([distance, 1.0, -0.5, 1.0])
    for n, frame in enumerate(FRAMES):
        rectified = RECTIFY @ (LIDAR_TO_CAMERA @ point[:3] + SHIFT)
        wanted = PROJECTIONS[n] @ [*rectified, 1]
        there = np.linalg.inv(poses[frame]) @ poses["velodyne"] @ point
        by_k = np.reshape(infos[frame].k, (3, 3)) @ there[:3]
        by_p = np.reshape(infos[frame].p, (3, 4)) @ there
        wanted, by_k, by_p = (pixel[:2] / pixel[2] for pixel in (wanted, by_k, by_p))
        print(f"{distance:.0f} m, camera {n}: by KITTI's formula {wanted[0]:6.1f}   k and /tf_static {by_k[0]:6.1f}   ", end="")
        print(f"p and /tf_static {by_p[0]:6.1f}")
        assert np.allclose(by_k, wanted, atol=1e-5)
        assert np.allclose(by_p - wanted, [OFFSETS[n] / rectified[2], 0], atol=1e-5), "changed"
PY
echo "as stated"
