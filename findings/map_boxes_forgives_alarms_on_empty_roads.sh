#!/usr/bin/env bash
# map-boxes 1.0.6, mean_average_precision_for_boxes with exclude_not_in_annotations left at False (and at True).
#
# Guess: exclude_not_in_annotations=True leaves detections out that lie in images without annotations; False, the default, keeps
# them, and all of them are false positives.
# What it does: it goes through the images of the annotations, whatever the flag says, so that detections in all other images
# are never looked at: two cars found with .8 and .9, and 100 alarms with .95 on 50 empty roads, make AP 1. Its own
# printed lines count those images and detections. For names of images that are words the flag changes what is printed, no more.
# What it means here: pictures without any object are where false alarms show; give each of them one line of annotation whose
# label is the word nan, which the function skips as a class (its source calls it negative) but visits as an image.
#
# No misuse: arrays of the documented columns; the README knows no line for a picture without objects and says nothing of them,
# the parameter's text says that the default excludes nothing. The same alarms in a picture that holds any object do count.
# Seen (Python 3.11, numpy 2.4.6, pandas 3.0.6):
#   as they come, False (default): AP of cars 1.000 (2 hits, 100 alarms with higher scores: by hand 0.020)
#   as they come, True           : AP of cars 1.000 (2 hits, 100 alarms with higher scores: by hand 0.020)
#   empty roads hold a tree      : AP of cars 0.020 (2 hits, 100 alarms with higher scores: by hand 0.020)
#   empty roads hold a "nan"     : AP of cars 0.020 (2 hits, 100 alarms with higher scores: by hand 0.020)
set -euo pipefail
export OMP_NUM_THREADS=1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet map-boxes==1.0.6 numpy==2.4.6 pandas==3.0.6
cd "$folder"
venv/bin/python - <<'PY'
import contextlib
import io

import numpy as np

with contextlib.redirect_stdout(io.StringIO()):  # it says here whether its faster overlap could be built
    from map_boxes import mean_average_precision_for_boxes

BOX = [100, 200, 100, 200]  # xmin, xmax, ymin, ymax
CARS = [("busy1", 0.9), ("busy2", 0.8)]
ALARMS = [(f"empty{k % 50}", 0.95) for k in range(100)]
truth = [[image, "Car", *BOX] for image, _ in CARS]
found = [[image, "Car", score, *BOX] for image, score in CARS + ALARMS]
nothing = [[image, "nan", *BOX] for image in sorted({image for image, _ in ALARMS})]
another = [[image, "Tree", *BOX] for image in sorted({image for image, _ in ALARMS})]


def precision(annotations, exclude):
    arrays = np.array(annotations, object), np.array(found, object)
    return float(mean_average_precision_for_boxes(*arrays, exclude_not_in_annotations=exclude, verbose=False)[1]["Car"][0])


ranked = sorted(CARS + ALARMS, key=lambda pair: -pair[1])
ranks = [rank for rank, pair in enumerate(ranked, start=1) if pair in CARS]
hand = max((hits + 1) / rank for hits, rank in enumerate(ranks))  # precision rises to the last hit, so its best holds for both
for words, annotations, exclude, wanted in (
    ("as they come, False (default)", truth, False, 1),
    ("as they come, True           ", truth, True, 1),
    ("empty roads hold a tree      ", truth + another, False, hand),
    ("empty roads hold a \"nan\"     ", truth + nothing, False, hand),
):
    value = precision(annotations, exclude)
    print(f"{words}: AP of cars {value:.3f} (2 hits, 100 alarms with higher scores: by hand {hand:.3f})")
    assert abs(value - wanted) < 1e-6, f"changed: {words} {value}"
PY
echo "as stated"
