#!/usr/bin/env bash
# py123d 0.7.0 (one interface to nuPlan, nuScenes, Waymo, KITTI-360 and others), PoseSE3.roll, .pitch, .yaw and
# Quaternion.euler_angles.
#
# Guess: the three angles are what the class documents, intrinsic z, y', x'' (yaw, pitch, roll): so a pose that was made from
# roll, pitch and yaw gives them back, and its yaw is the compass direction of its front.
# What it does: angles to quaternion, angles to matrix and matrix to angles all follow that order; quaternion to angles follows
# the opposite one (x, y', z''), and poses keep quaternions. A car that drives downhill by 6 degrees says so when it heads along
# x; heading along y it has pitch 0 and roll -6, heading along -x it climbs. Yaw is off by tenths of a degree on slopes; level
# boxes are right. The package's own matrix of the same pose gives the right angles. There and back again turns a box by up to
# 12 degrees. (The numbers are those of pyquaternion's yaw_pitch_roll, whose text gives the matrix of that other order.)
# What it means here: take angles from the pose's rotation_matrix (EulerAngles.from_rotation_matrix), never from the pose
# itself.
#
# Seen (Python 3.11, numpy 2.4.6), degrees, roll pitch yaw:
#   given    0.0    0.0   90.0 | the pose says    0.0    0.0   90.0 | a box made from that is turned by  0.0
#   given    0.0    6.0    0.0 | the pose says    0.0    6.0    0.0 | a box made from that is turned by  0.0
#   given    0.0    6.0   45.0 | the pose says   -4.3    4.2   45.2 | a box made from that is turned by  4.6
#   given    0.0    6.0   90.0 | the pose says   -6.0    0.0   90.0 | a box made from that is turned by  8.5
#   given    0.0    6.0  180.0 | the pose says    0.0   -6.0  180.0 | a box made from that is turned by 12.0
#   given    3.0    6.0  135.0 | the pose says   -6.4   -2.1  134.7 | a box made from that is turned by 12.4
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-deps py123d==0.7.0 numpy==2.4.6 scipy==1.17.0 shapely==2.2.0 pyquaternion==0.9.9 \
  typing-extensions==4.16.0
"$folder/venv/bin/python" - <<'PY'
import math

import numpy as np
from py123d.geometry import EulerAngles, PoseSE3
from pyquaternion import Quaternion


def turn(axis, angle):
    """A right-handed rotation about one axis of three."""
    a, b = [(1, 2), (2, 0), (0, 1)][axis]
    matrix = np.eye(3)
    matrix[a, a] = matrix[b, b] = math.cos(angle)
    matrix[a, b], matrix[b, a] = -math.sin(angle), math.sin(angle)
    return matrix


def words(angles):
    """Angles in degrees, -0 as 0."""
    return " ".join(f"{round(math.degrees(angle), 1) + 0.0:6.1f}" for angle in angles)


for degrees in ((0, 0, 90), (0, 6, 0), (0, 6, 45), (0, 6, 90), (0, 6, 180), (3, 6, 135)):
    given = np.radians(degrees)
    roll, pitch, yaw = given
    quaternion = EulerAngles(roll, pitch, yaw).quaternion
    pose = PoseSE3(0.0, 0.0, 0.0, quaternion.qw, quaternion.qx, quaternion.qy, quaternion.qz)
    # The documented order by hand: yaw first, then pitch and roll about axes that have turned along.
    wanted = turn(2, yaw) @ turn(1, pitch) @ turn(0, roll)
    assert np.allclose(pose.rotation_matrix, wanted), "the pose itself is right"
    front = wanted[:, 0]
    assert abs(math.atan2(front[1], front[0]) - yaw) < 1e-9 and abs(math.asin(-front[2]) - pitch) < 1e-9, "by hand"
    assert np.allclose(EulerAngles.from_rotation_matrix(pose.rotation_matrix).array, given), "the matrix's angles are right"
    seen = np.array([pose.roll, pose.pitch, pose.yaw])
    assert np.allclose(Quaternion(pose.quaternion.array).yaw_pitch_roll[::-1], seen), "changed: no longer pyquaternion's"
    again = EulerAngles(*seen).rotation_matrix
    off = math.degrees(math.acos(min(1.0, (np.trace(again.T @ wanted) - 1) / 2)))
    print(f"given {words(given)} | the pose says {words(seen)} | a box made from that is turned by {off:4.1f}")
    # The other order by hand: the angles that it gives are those of turn(0) @ turn(1) @ turn(2).
    assert np.allclose(turn(0, seen[0]) @ turn(1, seen[1]) @ turn(2, seen[2]), wanted), f"changed: {seen}"
    assert np.allclose(seen, given) == (degrees in ((0, 0, 90), (0, 6, 0))), f"changed: {seen}"
PY
echo "as stated"
