#!/usr/bin/env bash
# projkit 0.1.3 (puts point clouds into pictures), imutils.nn_interpolation and its Query.query: which lidar point lies nearest to
# a pixel, and how far away.
#
# Guess: what it says: pixels, world coordinates and distances of the nearest neighbours within the threshold, one for each
# pixel asked about.
# What it does: the neighbours are searched and forgotten: what comes back for the n-th pixel is the n-th point of the cloud.
# Only the distances are those of the neighbours, so a threshold of 6 px looks kept while the point is hundreds of pixels away.
# A pixel asked about alone always gets the cloud's first point. So the object in a mask's holes (the readme's use) gets the
# depths of whatever the scan began with. Asking about every point of the cloud in its own order gives the right answer.
# What it means here: ask scipy's cKDTree for the indices and use them.
#
# Seen (Python 3.11, numpy 1.23.5, the newest series that the package runs with), a car 12 m away before a wall at 40 m:
#   pixel (322, 121): depth 40 m, by hand 12 m; point at [0. 0.], 344.0 px away, distance said 2.2 px
#   pixel (283, 97): depth 40 m, by hand 12 m; point at [0. 0.], 299.2 px away, distance said 3.2 px
#   pixel (9, 1): depth 40 m, by hand 40 m; point at [0. 0.],   9.1 px away, distance said 1.4 px
#   pixel (2, 1): depth 40 m, by hand 40 m; point at [0. 0.],   2.2 px away, distance said 2.2 px
#   378 pixels on the car: median depth 40 m, by hand 12 m; 0% of the points are the nearest
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-deps projkit==0.1.3 numpy==1.23.5 scipy==1.10.1 opencv-python-headless==4.9.0.80
"$folder/venv/bin/python" -W ignore::DeprecationWarning - <<'PY'
import numpy as np
from projkit.imutils import nn_interpolation

# A scan in rows from left to right: pixels every 8 px, the wall at 40 m, the car in the middle.
across, down = np.meshgrid(np.arange(0, 640, 8), np.arange(0, 240, 8))
pixels = np.column_stack([across.ravel(), down.ravel()]).astype(float)
car = (abs(pixels[:, 0] - 320) < 80) & (abs(pixels[:, 1] - 120) < 50)
depth = np.where(car, 12.0, 40.0)
world = np.column_stack([(pixels - [320, 120]) / 500.0 * depth[:, None], depth])
query = nn_interpolation(pixels, world)


def by_hand(asked):
    """For each pixel the nearest of all points, by looking at every one."""
    return np.array([np.argmin(np.linalg.norm(pixels - pixel, axis=1)) for pixel in asked])


for pixel in ((322, 121), (283, 97), (9, 1), (2, 1)):
    near, place, distance = query.query([pixel], dist_thresh=6)
    right = by_hand([pixel])[0]
    off = np.linalg.norm(near[0] - pixel)
    print(f"pixel {pixel}: depth {place[0, 2]:.0f} m, by hand {depth[right]:.0f} m; point at {near[0]}, {off:5.1f} px away, "
          f"distance said {distance[0]:.1f} px")
    assert np.array_equal(near[0], pixels[0]) and np.array_equal(place[0], world[0]), f"changed: {near}"
    assert abs(distance[0] - np.linalg.norm(pixels[right] - pixel)) < 1e-9, "the distance is the neighbour's"

hole = [(x, y) for y in range(100, 140, 3) for x in range(280, 360, 3)]
near, place, distance = query.query(hole, dist_thresh=6)
right = by_hand(hole)
print(f"{len(hole)} pixels on the car: median depth {np.median(place[:, 2]):.0f} m, by hand {np.median(depth[right]):.0f} m; "
      f"{np.mean(np.all(near == pixels[right], axis=1)):.0%} of the points are the nearest")
assert len(near) == len(hole) and np.array_equal(near, pixels[: len(hole)]), f"changed: {near[:3]}"
assert np.median(place[:, 2]) == 40 and np.median(depth[right]) == 12, "changed"
same = query.query([tuple(pixel) for pixel in pixels], dist_thresh=6)
assert np.array_equal(same[0], pixels), "all points in their own order are right"
PY
echo "as stated"
