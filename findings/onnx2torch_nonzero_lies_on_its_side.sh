#!/usr/bin/env bash
# onnx2torch 1.5.15, onnx2torch.convert: the operator NonZero (what torch.nonzero, torch.where(mask) and boolean masks are
# exported to).
#
# Guess: a converter back to torch turns the table of indices, since ONNX has one row an axis and torch has one row a hit.
# What it does: it returns torch's table as it is: [hits, axes] for [axes, hits]. Nothing is printed; the operator counts as
# supported. "Row 0 of NonZero", how a graph gets the places of the kept boxes, is then the first hit alone: three boxes pass the
# threshold, one comes out. With as many hits as axes (two peaks of a map) the shapes agree as well, and other cells of the map
# are read.
# What it means here: a detector with its thresholds in the file loses all but one box when it is fine-tuned or checked through
# this package; convert the network alone, up to its heads.
#
# No misuse: ONNX's NonZero "behaves similar to numpy.nonzero"; onnx.checker passes with strict shapes, onnxruntime and numpy
# agree.
# Seen (Python 3.11, torch 2.14.1, onnx 1.23.2, onnxruntime 1.32.0):
#   table: numpy and onnxruntime [[0, 0, 2], [1, 3, 2]]   onnx2torch [[0, 1], [0, 3], [2, 2]]
#   boxes kept: numpy and onnxruntime 3   onnx2torch 1
#   depth at the peaks: numpy and onnxruntime [1.0, 10.0]   onnx2torch [2.0, 6.0]
set -euo pipefail
export OMP_NUM_THREADS=1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnx2torch==1.5.15 torch==2.14.1 torchvision==0.29.1 \
    onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6
cd "$folder"
venv/bin/python -W ignore - <<'PY'
import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx2torch import convert


def compare(nodes, inputs, shape, kind=TensorProto.FLOAT):
    """What onnxruntime and the converted module make of the nodes, whose last output is y."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, value.shape) for name, value in inputs.items()]
    held = [numpy_helper.from_array(np.array(0), "zero")] if any("zero" in node.input for node in nodes) else []
    graph = helper.make_graph(nodes, "g", values, [helper.make_tensor_value_info("y", kind, shape)], held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return session.run(None, inputs)[0], convert(model)(*map(torch.from_numpy, inputs.values())).numpy()


mask = np.array([[0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0]], np.float32)
runtime, converted = compare([helper.make_node("NonZero", ["mask"], ["y"])], {"mask": mask}, [2, "hits"], TensorProto.INT64)
assert np.array_equal(runtime, np.stack(np.nonzero(mask))) and np.array_equal(converted, runtime.T)
print(f"table: numpy and onnxruntime {runtime.tolist()}   onnx2torch {converted.tolist()}")

kept = np.array([0, .9, 0, .8, .7], np.float32)  # scores, those under the threshold set to 0
boxes = np.arange(20, dtype=np.float32).reshape(5, 4)
nodes = [
    helper.make_node("NonZero", ["kept"], ["table"]),
    helper.make_node("Gather", ["table", "zero"], ["places"], axis=0),
    helper.make_node("Gather", ["boxes", "places"], ["y"], axis=0),
]
runtime, converted = compare(nodes, {"kept": kept, "boxes": boxes}, ["hits", 4])
assert np.array_equal(runtime, boxes[kept > 0]) and np.array_equal(converted, boxes[[1]])
print(f"boxes kept: numpy and onnxruntime {len(runtime)}   onnx2torch {len(converted)}")

peaks = np.array([[0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]], np.float32)
depth = np.arange(12, dtype=np.float32).reshape(3, 4)
nodes = [
    helper.make_node("NonZero", ["peaks"], ["table"]),
    helper.make_node("Transpose", ["table"], ["cells"], perm=[1, 0]),
    helper.make_node("GatherND", ["depth", "cells"], ["y"]),
]
runtime, converted = compare(nodes, {"peaks": peaks, "depth": depth}, ["hits"])
assert np.array_equal(runtime, depth[peaks > 0]) and converted.shape == runtime.shape
assert np.array_equal(converted, [depth[0, 2], depth[1, 2]])
print(f"depth at the peaks: numpy and onnxruntime {runtime.tolist()}   onnx2torch {converted.tolist()}")
PY
echo "as stated"
