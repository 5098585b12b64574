#!/usr/bin/env bash
# bbox-utils 0.1.1, BoundingBox3D.from_xyzxyz: a 3D box from two opposite corners.
#
# Guess: the box reaches from one corner to the other, as BoundingBox3D(..., is_center=False) does for a corner and sizes.
# What it does: sizes are right, but each is halved by a division that drops the rest, so the centre is right only where a size
# is an even whole number. Whatever is smaller than 2 m in a direction has its centre at its lowest corner: a pedestrian of .8 x
# .6 x 1.7 m stands .4, .3 and .85 m too far back, right and low, and shares an eighth of its volume with itself. Corners (p)
# follow the centre.
# What it means here: give centre and sizes; boxes from this function are for pictures of whole pixels at most.
#
# Seen (Python 3.11, numpy 2.4.6):
#   pedestrian sizes [0.8 0.6 1.7]: centre [20.   3.  -1.7], by hand [20.4   3.3  -0.85], volume it has in common: 0.125
#   car        sizes [4.5 1.8 1.6]: centre [12.  -0.9 -1.6], by hand [12.25  0.   -0.8 ], volume it has in common: 0.236
#   even sizes sizes [4. 2. 2.]: centre [12.  0. -1.], by hand [12.  0. -1.], volume it has in common: 1.000
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-deps bbox-utils==0.1.1 numpy==2.4.6 pyquaternion==0.9.9
"$folder/venv/bin/python" - <<'PY'
import numpy as np
from bbox_utils import BoundingBox3D

SHAPES = {
    "pedestrian": ([20.0, 3.0, -1.7], [20.8, 3.6, 0.0], 0.125),
    "car": ([10.0, -0.9, -1.6], [14.5, 0.9, 0.0], None),
    "even sizes": ([10.0, -1.0, -2.0], [14.0, 1.0, 0.0], 1.0),
}

for name, (low, high, expected) in SHAPES.items():
    low, high = np.array(low), np.array(high)
    sizes, wanted = high - low, (low + high) / 2
    box = BoundingBox3D.from_xyzxyz(low, high)
    assert np.allclose([box.length, box.width, box.height], sizes), "sizes are right"
    other = BoundingBox3D(*low, *sizes, is_center=False)
    assert np.allclose(other.p.min(0), low) and np.allclose(other.p.max(0), high), "the constructor is right"
    seen = np.asarray(box.center, float)
    assert np.allclose(box.p.min(0), seen - sizes / 2), "its corners follow its centre"
    overlap = np.clip(sizes - np.abs(seen - wanted), 0, None).prod()
    shared = overlap / sizes.prod()
    places = f"centre {seen.round(2)}, by hand {wanted.round(2)}"
    print(f"{name:10} sizes {sizes.round(2)}: {places}, volume it has in common: {shared:.3f}")
    assert np.allclose(seen, low + sizes // 2), f"changed: {seen}"
    assert expected is None or abs(shared - expected) < 1e-6, f"changed: {shared}"
    assert np.allclose(seen, wanted) == (name == "even sizes"), f"changed: {seen}"
PY
echo "as stated"
