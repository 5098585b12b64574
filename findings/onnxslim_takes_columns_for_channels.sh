#!/usr/bin/env bash
# onnxslim 0.1.98, onnxslim.slim: a Conv (or ConvTranspose) that is followed by a Mul with a constant.
#
# Guess: a multiplication is folded into the weights where the constant has one number a channel, that is where it is shaped [C,
# 1, 1].
# What it does: only the count is looked at, after all axes of 1 are dropped. A constant of shape [W] or [1, W], one number a
# column, and one of shape [H, 1], one number a row, become factors of the channels as soon as W or H happens to equal C. The Mul
# is gone, shapes stay right, nothing is printed. With another number of columns the same graph is kept as it is, and is right.
# What it means here: a map weighted by column or row (a window, a prior by height in the picture, a metre-a-pixel table) is
# spoilt on maps as wide or as high as they are deep, e.g. 64 channels of 64 x 64; slim with
# skip_fusion_patterns=["FusionConvMul", "FusionConvTransposeMul"].
#
# No misuse: ONNX's broadcasting aligns shapes from the last axis; onnx.checker passes, onnxruntime runs the file before as numpy
# computes it.
# Seen (Python 3.11, onnx 1.23.2, onnxruntime 1.32.0; a 1 x 1 convolution that copies 4 channels of ones, times [1, 2, 3, 4] of
# the shape given):
#   [4]: row 0 of channel 1: numpy and onnxruntime [1, 2, 3, 4]   after slim [2, 2, 2, 2]
#   [4, 1]: column 0 of channel 1: numpy and onnxruntime [1, 2, 3, 4]   after slim [2, 2, 2, 2]
#   [4, 1, 1] and [1, 4, 1, 1]: right; ConvTranspose: the same
set -euo pipefail
export OMP_NUM_THREADS=1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnxslim==0.1.98 onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'PY'
import numpy as np
import onnx
import onnxruntime
import onnxslim
from onnx import TensorProto, helper, numpy_helper


def model(operator, shape, width):
    factors = np.arange(1, 5, dtype=np.float32).reshape(shape)
    kernel = np.eye(4, dtype=np.float32).reshape(4, 4, 1, 1)  # every channel copied
    nodes = [helper.make_node(operator, ["x", "w"], ["h"]), helper.make_node("Mul", ["h", "k"], ["y"])]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4, 4, width]) for name in "xy"]
    held = [numpy_helper.from_array(kernel, "w"), numpy_helper.from_array(factors, "k")]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], held)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(made, full_check=True)
    return made, factors


def run(made, x):
    return onnxruntime.InferenceSession(made.SerializeToString()).run(None, {"x": x})[0]


def text(values):
    return "[" + ", ".join(f"{value:g}" for value in values) + "]"


for operator in ("Conv", "ConvTranspose"):
    for shape, width, right in (([4], 4, False), ([4, 1], 5, False), ([4, 1, 1], 4, True), ([1, 4, 1, 1], 5, True)):
        x = np.ones((1, 4, 4, width), np.float32)
        made, factors = model(operator, shape, width)
        truth = x * factors
        slim = onnxslim.slim(made)
        found = run(slim, x)
        assert np.array_equal(run(made, x), truth) and found.shape == truth.shape
        assert [node.op_type for node in slim.graph.node] == [operator], "the Mul is folded into the weights"
        assert np.array_equal(found, truth) == right
        kept = onnxslim.slim(made, skip_fusion_patterns=["FusionConvMul", "FusionConvTransposeMul"])
        assert np.array_equal(run(kept, x), truth)
        by_channel = x * factors.reshape(4, 1, 1)
        assert np.array_equal(found, by_channel)
        if operator == "Conv" and not right:
            place = "row 0 of channel 1" if shape == [4] else "column 0 of channel 1"
            pick = (0, 1, 0) if shape == [4] else (0, 1, slice(None), 0)
            print(f"{shape}: {place}: numpy and onnxruntime {text(truth[pick])}   after slim {text(found[pick])}")
print("[4, 1, 1] and [1, 4, 1, 1]: right; ConvTranspose: the same")
made, factors = model("Conv", [1, 1, 4, 1], 6)
x = np.ones((1, 4, 4, 6), np.float32)
assert not np.array_equal(run(onnxslim.slim(made), x), x * factors)
PY
echo "as stated"
