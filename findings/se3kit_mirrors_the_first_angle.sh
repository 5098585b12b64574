#!/usr/bin/env bash
# se3kit 1.0.6 (rigid transforms of robots and cameras), Rotation.as_xyz, and with it as_rpy(extrinsic=False) and
# as_zyx(extrinsic=True), which call it.
#
# Guess: a rotation of 30 degrees about x has the angles 30, 0, 0; and angles that a rotation was made from come back.
# What it does: the angle about x is read from an element of the matrix whose sign was forgotten, so it has the wrong sign, and
# only it: 30, 0, 0 is answered by -30, 0, 0; 10, 20, 30 by -10, 20, 30. The same three methods with the other value of
# extrinsic are right, and so are all that make a rotation from angles.
# What it means here: the camera's axis x points right, so x is a camera's pitch: a camera that looks 10 degrees down looks up
# in whatever is told these angles. Use scipy's as_euler("XYZ"), or the matrix.
#
# No misuse: the docstring says that the angles are those of x, y' and z" (each about the axis as it was turned by those before),
# and that this is the default; the own rotate_x, from_rpy and from_zyx and scipy agree with each other; its tests do not call it.
# Seen (Python 3.11, numpy 2.4.6, scipy 1.17.1), degrees:
#   rotate_x(30):                  as_xyz [ -30.   0.   0.]   scipy [  30.   0.   0.]
#   rotate_x(10) rotate_z(40):     as_xyz [ -10.   0.  40.]   scipy [  10.   0.  40.]
#   from_rpy 10 20 30, intrinsic:  as_rpy [ -10.  20.  30.]   scipy [  10.  20.  30.]
#   from_zyx 30 20 10, extrinsic:  as_zyx [  30.  20. -10.]   scipy [  30.  20.  10.]
#   from_rpy 10 20 30, extrinsic:  as_rpy [  10.  20.  30.]   scipy [  10.  20.  30.]
#   from_zyx 30 20 10, intrinsic:  as_zyx [  30.  20.  10.]   scipy [  30.  20.  10.]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-deps se3kit==1.0.6 numpy==2.4.6 scipy==1.17.1 numpy-quaternion==2024.0.13
cd "$folder"
venv/bin/python - <<'PY'
import numpy as np
from scipy.spatial.transform import Rotation as Reference
from se3kit import Rotation

x, z = (lambda angle: Rotation.rotate_x(angle, degrees=True)), (lambda angle: Rotation.rotate_z(angle, degrees=True))
rpy, zyx = [10.0, 20.0, 30.0], [30.0, 20.0, 10.0]
# A name, the rotation, the method with its argument extrinsic, scipy's word for the same axes, and the angles that went in.
cases = (
    ("rotate_x(30):", x(30), "as_xyz", False, "XYZ", [30.0, 0.0, 0.0]),
    ("rotate_x(10) rotate_z(40):", x(10) * z(40), "as_xyz", False, "XYZ", [10.0, 0.0, 40.0]),
    ("from_rpy 10 20 30, intrinsic:", Rotation.from_rpy(rpy, extrinsic=False, degrees=True), "as_rpy", False, "XYZ", rpy),
    ("from_zyx 30 20 10, extrinsic:", Rotation.from_zyx(zyx, extrinsic=True, degrees=True), "as_zyx", True, "zyx", zyx),
    ("from_rpy 10 20 30, extrinsic:", Rotation.from_rpy(rpy, extrinsic=True, degrees=True), "as_rpy", True, "xyz", rpy),
    ("from_zyx 30 20 10, intrinsic:", Rotation.from_zyx(zyx, extrinsic=False, degrees=True), "as_zyx", False, "ZYX", zyx),
)
for row, (name, rotation, method, extrinsic, word, angles) in enumerate(cases):
    seen = getattr(rotation, method)(extrinsic=extrinsic, degrees=True)
    wanted = Reference.from_matrix(rotation.m).as_euler(word, degrees=True)
    words = ["[" + "".join(f"{value + 0.0:4.0f}." for value in np.round(some, 6)) + "]" for some in (seen, wanted)]
    print(f"{name:30s} {method} {words[0]}   scipy {words[1]}")
    assert np.allclose(wanted, angles, atol=1e-9), "scipy gives back what went in"
    mirrored = np.array(angles) * ([1, 1, -1] if method == "as_zyx" else [-1, 1, 1])
    assert np.allclose(seen, mirrored if row < 4 else angles, atol=1e-9), f"changed: {seen}"

# By hand: x points right, y down, z ahead; turned by +10 degrees about x the camera's axis z points up, to -y.
ahead = x(10).m @ [0.0, 0.0, 1.0]
assert np.allclose(ahead, [0.0, -np.sin(np.radians(10)), np.cos(np.radians(10))])
PY
echo "as stated"
