#!/usr/bin/env bash
# ros2-numpy 0.0.5 (ROS 2 messages to numpy and back; the one that pip installs), numpify(Transform) and numpify(Pose).
#
# Guess: the 4 x 4 matrix of a Transform is its rotation and translation: a message as it is made, without rotation, is the
# identity.
# What it does: the rotation is handed over as x, y, z, w, in the order of the message, to the package "transformations" of
# PyPI, which reads w, x, y, z. No rotation (0, 0, 0, 1) becomes half a turn about the vertical; every other rotation becomes
# another one. The way back adds a disagreement: msgify(Transform) puts the four numbers at their places, msgify(Pose) does not,
# and msgify(Pose, numpify(pose)) gives the pose one began with, so that a round trip shows nothing.
# What it means here: camera and vehicle poses that are read from ROS with it project everything to the wrong place; build the
# matrix from x, y, z, w yourself (scipy's Rotation.from_quat has ROS's order).
#
# No misuse: the README calls the matrix the homogeneous transformation matrix of a Transform and of a Pose, and Quaternion's
# array [x, y, z, w]. Known upstream of the fork: Box-Robotics/ros2_numpy #2 (2021) went back to an older copy of
# transformations.py for that reason; the package of this name on PyPI imports the new one. The messages are ROS 2's own classes
# (Kilted), from wheels.
# Seen (Python 3.11, numpy 1.24.2, transformations 2026.1.18, scipy 1.10.1):
#   no rotation: by hand and scipy [1.0, 1.0, 1.0] on the diagonal   numpify(Transform) [-1.0, -1.0, 1.0]   numpify(Pose) the same
#   vehicle at 30 degrees, a point 10 m ahead of it: by hand [8.66, 5.0, 0.0]   numpify [-10.0, 0.0, 0.0]
#   vehicle at 90 degrees, a point 10 m ahead of it: by hand [0.0, 10.0, 0.0]   numpify [-10.0, 0.0, 0.0]
#   forward camera, a point 10 m ahead of the car: by hand [0.0, 0.0, 10.0]   numpify [0.0, 0.0, -10.0]
#   back from a turn by 90 degrees (x, y, z, w): Transform [0.0, 0.0, 0.707, 0.707]   Pose [0.707, 0.0, 0.0, 0.707]
#   round trip of that pose: the same numbers
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-deps ros2-numpy==0.0.5 numpy==1.24.2 transformations==2026.1.18 scipy==1.10.1 \
  ros-geometry-msgs==5.5.1 ros-sensor-msgs==5.5.1 ros-nav-msgs==5.5.1 ros-std-msgs==5.5.1 ros-builtin-interfaces==2.3.0 \
  ros-rosidl-parser==4.9.5
cd "$folder"
venv/bin/python - <<'PY'
import math

import numpy as np
from geometry_msgs.msg import Pose, Quaternion, Transform
from ros2_numpy import msgify, numpify
from scipy.spatial.transform import Rotation


def by_hand(x, y, z, w):
    """The rotation matrix of a unit quaternion."""
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def seen(numbers):
    return [float(number) + 0.0 for number in np.round(numbers, 3) + 0.0]


def matrices(quaternion):
    """By hand (checked with scipy) and as the package has it, for a Transform and for a Pose."""
    right = by_hand(*quaternion)
    assert np.allclose(right, Rotation.from_quat(quaternion).as_matrix())
    x, y, z, w = map(float, quaternion)
    rotation = Quaternion(x=x, y=y, z=z, w=w)
    read = numpify(Transform(rotation=rotation))[:3, :3]
    assert np.array_equal(read, numpify(Pose(orientation=rotation))[:3, :3])
    return right, read


right, read = matrices([0, 0, 0, 1])
assert np.array_equal(numpify(Transform())[:3, :3], read), "a message as it is made has no rotation"
print(f"no rotation: by hand and scipy {seen(np.diag(right))} on the diagonal   numpify(Transform) {seen(np.diag(read))}", end="")
print("   numpify(Pose) the same")
assert np.allclose(read, np.diag([-1, -1, 1])), "changed"

ahead = np.array([10.0, 0.0, 0.0])
for degrees in (30, 90):
    half = math.radians(degrees) / 2
    right, read = matrices([0, 0, math.sin(half), math.cos(half)])
    print(f"vehicle at {degrees} degrees, a point 10 m ahead of it: by hand {seen(right @ ahead)}   numpify {seen(read @ ahead)}")
    assert np.allclose(right @ ahead, [20 * math.cos(half) ** 2 - 10, 20 * math.sin(half) * math.cos(half), 0])
    assert np.allclose(read @ ahead, [-10, 0, 0]), "changed"
right, read = matrices([0.5, -0.5, 0.5, 0.5])  # from x forward, y left, z up to x right, y down, z forward
print(f"forward camera, a point 10 m ahead of the car: by hand {seen(right @ ahead)}   numpify {seen(read @ ahead)}")
assert np.allclose(right @ ahead, [0, 0, 10]) and np.allclose(read @ ahead, [0, 0, -10]), "changed"

turn = np.eye(4)
turn[:3, :3] = Rotation.from_euler("z", 90, degrees=True).as_matrix()
half = math.sqrt(0.5)
back = msgify(Transform, turn).rotation, msgify(Pose, turn).orientation
back = [np.array([q.x, q.y, q.z, q.w]) for q in back]
print(f"back from a turn by 90 degrees (x, y, z, w): Transform {seen(back[0])}   Pose {seen(back[1])}")
assert np.allclose(back[0], [0, 0, half, half]) and np.allclose(back[1], [half, 0, 0, half]), "changed"
pose = Pose(orientation=Quaternion(x=0.0, y=0.0, z=half, w=half))
q = msgify(Pose, numpify(pose)).orientation
assert np.allclose(np.abs([q.x, q.y, q.z, q.w]), [0, 0, half, half]) and np.isclose(q.z, q.w), "changed"
print("round trip of that pose: the same numbers")
PY
echo "as stated"
