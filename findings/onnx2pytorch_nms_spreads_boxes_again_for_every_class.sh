#!/usr/bin/env bash
# onnx2pytorch 0.6.0, ConvertModel: NonMaxSuppression with center_point_box=1 (boxes as centre and size, "mostly used for Pytorch
# models").
#
# Guess: boxes are turned into corners once, in a copy, and each class is thinned out by the overlaps of the same boxes.
# What it does: the turning stands inside the loop over classes and writes into the tensor of boxes itself: class 0 sees corners,
# class 1 sees those corners taken for centre and size and turned again, and so on. From class 1 on overlaps are of boxes that
# nobody predicted. Besides, whatever reads the boxes after the suppression (the Gather that returns them) gets the turned ones,
# and so does the caller, in his own tensor.
# What it means here: class 0 alone is right, so a test with one class passes (its boxes come out as corners though); convert
# boxes to corners before the node, in the graph: with center_point_box=0 and x1 < x2, y1 < y2 it is right and writes nothing.
#
# No misuse: the operator's text; onnx.checker passes with strict shapes; onnxruntime agrees with the overlaps by hand.
# Seen (Python 3.11, torch 2.14.1, onnx 1.23.2, onnxruntime 1.32.0; squares of 4 x 4 at x = 10, 11, 30, 33, IoU threshold .5, two
# classes):
#   [class, box] kept: by hand and onnxruntime [[0, 0], [0, 2], [0, 3], [1, 3], [1, 2], [1, 1]]
#                      onnx2pytorch            [[0, 0], [0, 2], [0, 3], [1, 3], [1, 1]]
#   box 0 after it: onnxruntime [10.0, 10.0, 4.0, 4.0]   onnx2pytorch [2.0, 2.0, 14.0, 14.0]
#                   in the caller's own tensor [2.0, 2.0, 14.0, 14.0]
#   the same boxes as corners: all the same, nothing written
set -euo pipefail
export OMP_NUM_THREADS=1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnx2pytorch==0.6.0 torch==2.14.1 torchvision==0.29.1 \
    onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6
cd "$folder"
venv/bin/python -W ignore - <<'PY'
import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx2pytorch import ConvertModel


def by_hand(boxes, scores, threshold):
    """[class, box] of each box kept, boxes given as corners."""
    kept = []
    for number, values in enumerate(scores):
        mine = []
        for i in np.argsort(-values):
            pairs = [boxes[[i, j]] for j in mine]
            inner = [np.clip(pair[:, 2:].min(0) - pair[:, :2].max(0), 0, None).prod() for pair in pairs]
            areas = [(pair[:, 2:] - pair[:, :2]).prod(1).sum() for pair in pairs]
            if all(part / (area - part) <= threshold for part, area in zip(inner, areas)):
                mine.append(int(i))
        kept += [[number, i] for i in mine]
    return kept


def turned(boxes):
    return np.concatenate([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)


def run(boxes, scores, center):
    nodes = [
        helper.make_node("NonMaxSuppression", ["boxes", "scores", "most", "overlap"], ["kept"], center_point_box=center),
        helper.make_node("Mul", ["boxes", "one"], ["after"]),
    ]
    shapes = {"boxes": [1, 4, 4], "scores": [1, 2, 4], "kept": ["n", 3], "after": [1, 4, 4]}
    kinds = {"kept": TensorProto.INT64}
    values = [helper.make_tensor_value_info(name, kinds.get(name, TensorProto.FLOAT), shapes[name]) for name in shapes]
    numbers = {"most": np.array([4]), "overlap": np.array([.5], np.float32), "one": np.array([1], np.float32)}
    held = [numpy_helper.from_array(value, name) for name, value in numbers.items()]
    graph = helper.make_graph(nodes, "g", values[:2], values[2:], held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    runtime = session.run(None, {"boxes": boxes, "scores": scores})
    mine = torch.from_numpy(boxes.copy())
    converted = ConvertModel(model).eval()(mine, torch.from_numpy(scores.copy()))
    return [runtime[0][:, 1:].tolist(), runtime[1]], [converted[0][:, 1:].tolist(), converted[1].numpy()], mine.numpy()


centres = np.array([[[10, 10, 4, 4], [11, 10, 4, 4], [30, 10, 4, 4], [33, 10, 4, 4]]], np.float32)
corners = turned(centres)
scores = np.array([[[.9, .8, .7, .6], [.5, .6, .7, .8]]], np.float32)
truth = by_hand(corners[0], scores[0], .5)
runtime, converted, given = run(centres, scores, 1)
print(f"[class, box] kept: by hand and onnxruntime {truth}")
print(f"                   onnx2pytorch            {converted[0]}")
print(f"box 0 after it: onnxruntime {runtime[1][0, 0].tolist()}   onnx2pytorch {converted[1][0, 0].tolist()}")
print(f"                in the caller's own tensor {given[0, 0].tolist()}")
assert runtime[0] == truth and np.array_equal(runtime[1], centres)
wide = turned(corners)
again = [[1, i] for _, i in by_hand(wide[0], scores[0, 1:], .5)]
assert converted[0] == by_hand(corners[0], scores[0, :1], .5) + again != truth
assert np.array_equal(converted[1], wide) and np.array_equal(given, wide)
runtime, converted, given = run(corners, scores, 0)
assert runtime[0] == converted[0] == truth and np.array_equal(given, corners) and np.array_equal(converted[1], corners)
print("the same boxes as corners: all the same, nothing written")
PY
echo "as stated"
