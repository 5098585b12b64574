#!/usr/bin/env bash
# scale-nucleus 0.22.3, nucleus.metrics: CuboidIOU, CuboidPrecision and CuboidRecall, the metrics of 3D boxes of Scale's client.
#
# Guess: the three judge the same boxes; a detection whose CuboidIOU is .38 is a true positive of CuboidPrecision(iou_threshold=.3).
# What it does: the two counting metrics turn every box by 90 degrees more than CuboidIOU does, truth and detections alike (a quarter
# turn is added to the yaw before the call of an overlap function that adds the same quarter turn by its own default). Equal boxes still
# overlap by 1 and all seems well, but the offset between two boxes is not turned: an error along the car counts as one across it.
# Cars of 4.5 x 1.9 m (x by y at yaw 0, as the class documents): one found 2 m ahead has IoU .385 and precision and recall 0;
# one found 2 m aside does not touch the true one, has IoU 0, and precision and recall 1 at a threshold of .3.
# A shapely footprint by the documented convention agrees with CuboidIOU at every yaw; and whatever the convention, the two contradict.
# What it means here: these counts reward boxes at the wrong lateral place and punish errors of depth along the car; no reference.
#
# Seen (Python 3.11, numpy 2.4.6, shapely 2.1.2, scipy 1.17.0; threshold .3):
#   yaw   0: 2 m ahead IoU .385 (exact .385) precision 0 recall 0; 2 m aside IoU .000 (exact .000) precision 1 recall 1
#   yaw  90: 2 m ahead IoU .385 (exact .385) precision 0 recall 0; 2 m aside IoU .000 (exact .000) precision 1 recall 1
#   yaw -30: 2 m ahead IoU .385 (exact .385) precision 0 recall 0; 2 m aside IoU .000 (exact .000) precision 1 recall 1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-deps scale-nucleus==0.22.3 numpy==2.4.6 shapely==2.1.2 scipy==1.17.0 pydantic==2.14.4 \
  pydantic_core==2.50.5 typing-inspection==0.4.5 typing_extensions==4.16.0 rich==15.0.0 aiohttp==3.14.5 aiohappyeyeballs==2.7.1 \
  aiosignal==1.4.0 attrs==26.1.0 frozenlist==1.8.0 multidict==7.2.1 propcache==0.5.4 yarl==1.25.1 nest-asyncio==1.6.0 python-dateutil==4.0.0 \
  boto3==1.44.8 botocore==1.44.8 s3transfer==0.19.3 jmespath==1.1.0 requests==2.34.2 urllib3==2.8.0 idna==3.20 certifi \
  charset-normalizer==3.5.3 tqdm==4.70.1 pillow==12.2.0
"$folder/venv/bin/python" - <<'PY'
import math

import numpy as np
from nucleus import CuboidAnnotation, CuboidPrediction, Point3D
from nucleus.annotation import AnnotationList
from nucleus.metrics import CuboidIOU, CuboidPrecision, CuboidRecall
from nucleus.prediction import PredictionList
from shapely.geometry import Polygon

LENGTH, WIDTH, HEIGHT = 4.5, 1.9, 1.6


def official(offset, yaw):
    """Overlap, precision and recall of one true car and one detection that stands beside it by the offset."""
    common = {"label": "car", "dimensions": Point3D(LENGTH, WIDTH, HEIGHT), "yaw": yaw, "reference_id": "frame"}
    truth = CuboidAnnotation(position=Point3D(20.0, 5.0, 0.8), **common)
    found = CuboidPrediction(position=Point3D(20.0 + offset[0], 5.0 + offset[1], 0.8), confidence=0.9, **common)
    lists = AnnotationList(cuboid_annotations=[truth]), PredictionList(cuboid_predictions=[found])
    metrics = CuboidIOU(), CuboidPrecision(iou_threshold=0.3), CuboidRecall(iou_threshold=0.3)
    return [float(metric(*lists).value) for metric in metrics]


def exact(offset, yaw):
    """Overlap by the documented box: length along x and width along y, turned counter-clockwise about z by the yaw."""
    corners = np.array([[1, 1], [1, -1], [-1, -1], [-1, 1]]) * [LENGTH / 2, WIDTH / 2]
    turn = np.array([[math.cos(yaw), -math.sin(yaw)], [math.sin(yaw), math.cos(yaw)]])
    first, second = Polygon(corners @ turn.T), Polygon(corners @ turn.T + offset)
    return first.intersection(second).area / first.union(second).area


for degrees in (0, 90, -30):
    yaw, parts = math.radians(degrees), []
    ahead, aside = np.array([math.cos(yaw), math.sin(yaw)]) * 2, np.array([-math.sin(yaw), math.cos(yaw)]) * 2
    for name, offset, wanted in (("ahead", ahead, (0.385, 0, 0)), ("aside", aside, (0, 1, 1))):
        seen, reference = official(offset, yaw), exact(offset, yaw)
        text = f"2 m {name} IoU {seen[0]:.3f} (exact {reference:.3f}) precision {seen[1]:.0f} recall {seen[2]:.0f}"
        parts.append(text.replace(" 0.", " ."))
        assert abs(seen[0] - reference) < 1e-5, f"CuboidIOU is not the documented box's: {seen[0]}, {reference}"
        assert all(abs(value - number) < 6e-4 for value, number in zip(seen, wanted)), f"changed: {seen}, expected {wanted}"
    print(f"yaw {degrees:3}: {parts[0]}; {parts[1]}")
    assert all(abs(value - 1) < 1e-6 for value in official((0.0, 0.0), yaw)), "a box is not itself"
PY
echo "as stated"
