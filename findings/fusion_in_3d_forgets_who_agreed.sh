#!/usr/bin/env bash
# ensemble-boxes 1.0.9, weighted_boxes_fusion_3d beside weighted_boxes_fusion of the same package: weights of the models that sum to 1.
#
# Guess: weights say how much each model counts, so (.5, .5) is (1, 1); and a box that one of two models found scores half of one
# that both found, in 3D as in 2D.
# What it does: in 2D it does that. In 3D the count of models that agree is cut at the sum of the weights: with weights that sum
# to 1 a box that one model alone found scores as much as one that both found, and the latter half of what it should. The order
# of the detections, and with it AP, is another one; nothing is said.
# What it means here: for boxes in 3D give weights that sum to the number of models, such as (1.2, .8).
#
# Seen (Python 3.11), two models, score .9 each; found by both, found by one:
#   2D, weights (1.0, 1.0): 0.90, 0.45
#   2D, weights (0.5, 0.5): 0.90, 0.45
#   3D, weights (1.0, 1.0): 0.90, 0.45
#   3D, weights (0.5, 0.5): 0.45, 0.45
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-deps ensemble-boxes==1.0.9 numba==0.68.1 llvmlite==0.50.0 numpy==2.4.6 pandas==3.1.1 \
  python-dateutil==2.9.0.post0 six==1.17.0
"$folder/venv/bin/python" - <<'PY'
from ensemble_boxes import weighted_boxes_fusion, weighted_boxes_fusion_3d

FUSIONS = {
    "2D": (weighted_boxes_fusion, [0.1, 0.1, 0.2, 0.2], [0.6, 0.6, 0.8, 0.8]),
    "3D": (weighted_boxes_fusion_3d, [0.1, 0.1, 0.1, 0.2, 0.2, 0.2], [0.6, 0.6, 0.6, 0.8, 0.8, 0.8]),
}
seen = {}
for name, (fuse, shared, alone) in FUSIONS.items():
    for weights in ((1.0, 1.0), (0.5, 0.5)):
        boxes, scores, _ = fuse([[shared, alone], [shared]], [[0.9, 0.9], [0.9]], [[0, 0], [0]], weights=list(weights), iou_thr=0.5)
        by_place = {round(float(box[0]), 1): float(score) for box, score in zip(boxes, scores)}
        seen[name, weights] = [by_place[shared[0]], by_place[alone[0]]]
        print(f"{name}, weights {weights}: {by_place[shared[0]]:.2f}, {by_place[alone[0]]:.2f}")


def close(values, expected):
    return all(abs(value - one) < 1e-6 for value, one in zip(values, expected))


for key, scores in seen.items():
    assert close(scores, [0.45, 0.45] if key == ("3D", (0.5, 0.5)) else [0.9, 0.45]), f"changed: {key} {scores}"
PY
echo "as stated"
