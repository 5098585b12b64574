#!/usr/bin/env bash
# bbox 0.9.4, bbox.metrics.iou_3d (jaccard_index_3d) on its BBox3D, made by centre, sizes and quaternion.
#
# Guess: a box whose documented (x, y, z) is its centre reaches from z - h / 2 to z + h / 2; its own corners (p) say so too.
# What it does: the overlap takes each box to reach from z - h to z: the centre is read as the top, as if the box hung below it.
# That shifts a tall box by more than a low one. Boxes of equal heights, or with a common floor, show nothing; all others are wrong in
# either direction, and KITTI's .7 with them: a car 1.5 m tall that is found 1.9 m tall with the same top has .789 and gets .619.
# What it means here: iou_3d is right for boxes of one height or on one plane only.
#
# Seen (Python 3.11, numpy 1.26.4, the newest series that the package allows, pyquaternion 0.9.9):
#   z 0.75 h 1.5 / z 0.55 h 1.9: corners 0.00..1.50 / -0.40..1.50, iou_3d 0.619, exact 0.789
#   z 1.00 h 2.0 / z 1.50 h 1.0: corners 0.00..2.00 / 1.00..2.00, iou_3d 0.200, exact 0.500
#   z 0.75 h 1.5 / z 2.25 h 3.0: corners 0.00..1.50 / 0.75..3.75, iou_3d 0.500, exact 0.200
#   z 0.75 h 1.5 / z 1.50 h 3.0: corners 0.00..1.50 / 0.00..3.00, iou_3d 0.500, exact 0.500
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-deps bbox==0.9.4 numpy==1.26.4 pyquaternion==0.9.9
"$folder/venv/bin/python" - <<'PY'
from bbox import BBox3D
from bbox.metrics import iou_3d

LENGTH, WIDTH = 4.0, 1.8


def box(z, height):
    """A box at the origin of the ground plane, not turned, by its centre (is_center is true unless told)."""
    return BBox3D(0.0, 0.0, z, length=LENGTH, width=WIDTH, height=height)


def span(made, axis):
    """Where the box reaches along an axis, by its own corners."""
    return float(made.p[:, axis].min()), float(made.p[:, axis].max())


def exact(first, second):
    """Overlap of two boxes along the axes, from their corners alone."""
    volumes, common = [1.0, 1.0], 1.0
    for axis in range(3):
        (a, b), (c, d) = span(first, axis), span(second, axis)
        volumes = [volumes[0] * (b - a), volumes[1] * (d - c)]
        common *= max(0.0, min(b, d) - max(a, c))
    return common / (sum(volumes) - common)


for truth, found, expected in (
    ((0.75, 1.5), (0.55, 1.9), (0.619, 0.789)),
    ((1.0, 2.0), (1.5, 1.0), (0.2, 0.5)),
    ((0.75, 1.5), (2.25, 3.0), (0.5, 0.2)),
    ((0.75, 1.5), (1.5, 3.0), (0.5, 0.5)),
):
    a, b = box(*truth), box(*found)
    seen = float(iou_3d(a, b)), exact(a, b)
    text = "z {:.2f} h {:.1f} / z {:.2f} h {:.1f}: corners {:.2f}..{:.2f} / {:.2f}..{:.2f}, iou_3d {:.3f}, exact {:.3f}"
    print(text.format(*truth, *found, *span(a, 2), *span(b, 2), *seen))
    assert all(abs(value - number) < 6e-4 for value, number in zip(seen, expected)), f"changed: expected {expected}"
PY
echo "as stated"
