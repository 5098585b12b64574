#!/usr/bin/env bash
# rigid-body-motion 0.9.3 (frames, poses and their estimation on top of numpy-quaternion), qmean: the mean of quaternions.
#
# Guess: the mean of rotations of 100 and 120 degrees about the vertical is one of 110 degrees about the vertical.
# What it does: the mean is the eigenvector of the largest eigenvalue, and eigenvectors are columns; it takes the numbers of
# the first column, whichever eigenvalue that belongs to, and puts them in the order of the eigenvalues. That is right for
# headings within 90 degrees of 0. A heading beyond that comes back as half a turn about an axis in the x-z plane: the car's
# nose points into the ground. Of means of rotations about any axis half are wrong.
# What it means here: average the headings of a box over frames, flips or cameras, or a mount's rotation over recordings, with
# scipy's Rotation.mean or by sines and cosines.
#
# No misuse: unit quaternions as w, x, y, z, of one sign, along the first axis, as the docstring asks; the documentation has no
# limit on where they may lie. Its tests average rotations that lie around 0 only, where the answer is right.
# Seen (Python 3.11, numpy 2.4.6, scipy 1.17.1), degrees about the vertical:
#   -10 and  10: mean   0.0 by hand and scipy   0.0, qmean [ 1.000  0.000  0.000  0.000],   0.0 off
#    40 and  60: mean  50.0 by hand and scipy  50.0, qmean [ 0.906  0.000  0.000  0.423],   0.0 off
#    70 and  90: mean  80.0 by hand and scipy  80.0, qmean [ 0.766  0.000  0.000  0.643],   0.0 off
#   100 and 120: mean 110.0 by hand and scipy 110.0, qmean [ 0.000 -0.819  0.000  0.574], 124.0 off
#   150 and 170: mean 160.0 by hand and scipy 160.0, qmean [ 0.000 -0.985  0.000  0.174], 160.3 off
#   -40 and -20: mean -30.0 by hand and scipy -30.0, qmean [ 0.966  0.000  0.000 -0.259],   0.0 off
#   200 clusters of 5 rotations, each within a few degrees: 112 means lie more than 10 degrees outside
set -euo pipefail
export OMP_NUM_THREADS=1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-deps rigid-body-motion==0.9.3 numpy==2.4.6 scipy==1.17.1 \
  numpy-quaternion==2024.0.13 anytree==2.13.0
cd "$folder"
venv/bin/python - <<'PY'
import numpy as np
from rigid_body_motion import qmean
from scipy.spatial.transform import Rotation


def about_vertical(degrees):
    half = np.radians(degrees) / 2
    return [np.cos(half), 0.0, 0.0, np.sin(half)]


def apart(first, second):
    """The angle of the rotation from one to the other, whatever the signs."""
    return 2 * np.degrees(np.arccos(min(1.0, abs(np.dot(first, second)))))


for pair in ((-10, 10), (40, 60), (70, 90), (100, 120), (150, 170), (-40, -20)):
    quaternions = np.array([about_vertical(degrees) for degrees in pair])
    middle = sum(pair) / 2
    scipys = Rotation.from_quat(quaternions[:, [1, 2, 3, 0]]).mean().as_euler("ZYX", degrees=True)[0]
    mean = qmean(quaternions, axis=0) + 0.0
    off = apart(mean, about_vertical(middle))
    parts = " ".join(f"{value:6.3f}" for value in mean)
    print(f"{pair[0]:3d} and {pair[1]:3d}: mean {middle:5.1f} by hand and scipy {scipys:5.1f}, qmean [{parts}], {off:5.1f} off")
    assert abs(scipys - middle) < 1e-6 and abs(np.linalg.norm(mean) - 1) < 1e-9
    if abs(middle) < 90:
        assert off < 1e-3, f"changed: {off}"
    else:
        assert off > 100 and abs(mean[0]) < 1e-9, f"changed: {mean}"
        assert Rotation.from_quat(mean[[1, 2, 3, 0]]).apply([1.0, 0.0, 0.0])[2] < -0.3, "the nose points down"

random, outside = np.random.default_rng(0), 0
for _ in range(200):
    middle = random.normal(size=4)
    middle /= np.linalg.norm(middle)
    cluster = middle + random.normal(0, 0.02, (5, 4))
    cluster /= np.linalg.norm(cluster, axis=1, keepdims=True)
    reach = max(apart(middle, one) for one in cluster)
    outside += apart(qmean(cluster, axis=0), middle) > reach + 10
print(f"200 clusters of 5 rotations, each within a few degrees: {outside} means lie more than 10 degrees outside")
assert outside > 50, f"changed: {outside}"
PY
echo "as stated"
