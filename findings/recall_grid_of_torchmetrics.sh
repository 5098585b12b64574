#!/usr/bin/env bash
# torchmetrics 1.9.0, MeanAveragePrecision with backend="pycocotools" (the default), against pycocotools 2.0.11 itself.
#
# Guess: a metric whose backend is pycocotools gives pycocotools' numbers.
# What it does: its default recall grid is torch.linspace(0, 1, 101) in float32, then cast up: .6 becomes .6000000238, .7 becomes .6999999881.
# A recall reached exactly (6 of 10 objects) then lies on the other side of its grid point, and AP moves by 1/101 in either direction. With
# 10 objects, 7 found, no false detection: 71 grid points instead of 70; with 6 found 60 instead of 61.
# What it means here: comparing 2D AP with COCO's, pass rec_thresholds=numpy.linspace(0, 1, 101).tolist(): then all digits agree.
#
# Seen (Python 3.11, torch 2.14.1):
#   found  pycocotools  torchmetrics  torchmetrics with a float64 grid     (AP at IoU .5, times 101)
#       6           61            60                                61
#       7           70            71                                70
#       8           81            80                                81
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 torchmetrics==1.9.0 pycocotools==2.0.11
"$folder/venv/bin/python" - <<'PY'
import contextlib
import io
import warnings

warnings.filterwarnings("ignore")
import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchmetrics.detection import MeanAveragePrecision

BOXES = [[20.0 * number, 0.0, 10.0, 10.0] for number in range(10)]  # x, y, width, height: ten objects of one class


def by_pycocotools(count):
    truth = COCO()
    rows = [dict(id=n + 1, image_id=1, category_id=1, bbox=box, area=100.0, iscrowd=0) for n, box in enumerate(BOXES)]
    truth.dataset = dict(images=[dict(id=1, width=300, height=20)], annotations=rows, categories=[dict(id=1, name="a")])
    truth.createIndex()
    found = [dict(image_id=1, category_id=1, bbox=box, score=0.9 - n / 100) for n, box in enumerate(BOXES[:count])]
    evaluation = COCOeval(truth, truth.loadRes(found), "bbox")
    evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
    return evaluation.stats[1]


def by_torchmetrics(count, **options):
    metric = MeanAveragePrecision(box_format="xywh", **options)
    boxes, labels = torch.tensor(BOXES), torch.ones(10, dtype=torch.long)
    scores = torch.tensor([0.9 - n / 100 for n in range(count)])
    metric.update([dict(boxes=boxes[:count], scores=scores, labels=labels[:count])], [dict(boxes=boxes, labels=labels)])
    return float(metric.compute()["map_50"])


grid = np.linspace(0, 1, 101).tolist()
for count, expected in ((6, (61, 60, 61)), (7, (70, 71, 70)), (8, (81, 80, 81))):
    with contextlib.redirect_stdout(io.StringIO()):
        points = by_pycocotools(count), by_torchmetrics(count), by_torchmetrics(count, rec_thresholds=grid)
    points = tuple(round(101 * value) for value in points)
    print(f"{count} found: pycocotools {points[0]}, torchmetrics {points[1]}, with a float64 grid {points[2]}")
    assert points == expected, f"changed: expected {expected}"
PY
echo "as stated"
