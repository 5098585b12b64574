#!/usr/bin/env bash
# dscamera 0.0.4 (double sphere model of fisheye cameras), DSCamera(fov=...).world2cam: its second result, the mask of points
# that the camera sees.
#
# Guess: a point is seen if its angle to the axis is at most half of fov, wherever it lies on its ray; cam2world does so.
# What it does: the point's depth z in metres is compared with the cosine of half of fov, as if all points were 1 m away. For
# 180 degrees, the default, the cosine is 0 and nothing is wrong. A fisheye of 220 degrees sees what is 100 degrees aside at
# 1 m and not at 3 m: of all that lies behind its own plane it keeps a slab .34 m deep. A camera of 120 degrees sees everything
# that is more than .5 m ahead, up to 89 degrees aside, and nothing that is nearer. Pixels are right; nothing warns.
# What it means here: give world2cam points divided by their length.
#
# Seen (Python 3.11, numpy 2.4.6), points at 1, 3, 10 and 30 m; yes: said to be seen:
#   field 120,  50 degrees aside: yes yes yes yes, by hand yes yes yes yes
#   field 120,  70 degrees aside: no  yes yes yes, by hand no  no  no  no
#   field 120,  85 degrees aside: no  no  yes yes, by hand no  no  no  no
#   field 180,  50 degrees aside: yes yes yes yes, by hand yes yes yes yes
#   field 180,  85 degrees aside: yes yes yes yes, by hand yes yes yes yes
#   field 180,  95 degrees aside: no  no  no  no , by hand no  no  no  no
#   field 220,  50 degrees aside: yes yes yes yes, by hand yes yes yes yes
#   field 220, 100 degrees aside: yes no  no  no , by hand yes yes yes yes
#   field 220, 105 degrees aside: yes no  no  no , by hand yes yes yes yes
#   field 120, straight ahead at 0.4 m: no
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-deps dscamera==0.0.4 numpy==2.4.6 opencv-python-headless==4.14.0.94
"$folder/venv/bin/python" - <<'PY'
import numpy as np
from dscamera import DSCamera

LENS = {"fx": 340.0, "fy": 340.0, "cx": 640.0, "cy": 483.0, "xi": 0.2, "alpha": 0.6}
METRES = (1.0, 3.0, 10.0, 30.0)


def words(answers):
    """yes or no for each answer."""
    return " ".join("yes" if answer else "no " for answer in answers)


wrong = {}
for field, degrees in ((120, (50, 70, 85)), (180, (50, 85, 95)), (220, (50, 100, 105))):
    camera = DSCamera(img_size=(966, 1280), intrinsic=dict(LENS), fov=field)
    for angle in degrees:
        ray = np.array([np.sin(np.radians(angle)), 0.0, np.cos(np.radians(angle))])
        pixels, seen = camera.world2cam(np.outer(METRES, ray))
        assert np.allclose(pixels, pixels[0]), "one ray, one pixel"
        back, inside = camera.cam2world([pixels[:, 0], pixels[:, 1]])
        assert np.allclose(back, ray), "the pixel is right: it leads back to the ray"
        wanted = angle <= field / 2
        assert (inside == wanted).all(), "the package's way back judges the angle"
        print(f"field {field}, {angle:3d} degrees aside: {words(seen)}, by hand {words([wanted] * len(METRES))}")
        # What it does instead, where the model's own border (far beyond these angles) plays no part.
        assert np.array_equal(seen, np.array(METRES) * ray[2] >= np.cos(np.radians(field / 2))), f"changed: {seen}"
        wrong[field] = wrong.get(field, 0) + int((seen != wanted).sum())
assert wrong[180] == 0 and wrong[120] > 4 and wrong[220] > 4, f"changed: {wrong}"
near, seen = DSCamera(img_size=(966, 1280), intrinsic=dict(LENS), fov=120).world2cam(np.array([[0.0, 0.0, 0.4]]))
print(f"field 120, straight ahead at 0.4 m: {words(seen)}")
assert not seen[0], "changed: a point on the axis is seen"
PY
echo "as stated"
