#!/usr/bin/env bash
# onnx2fx 0.0.1 (ONNX to a torch.fx graph), onnx2fx.convert: DynamicQuantizeLinear, what dynamic quantisation puts before each
# layer.
#
# Guess: the range that is spread over 0 to 255 holds 0, as the operator has it, so that a zero point in that range exists.
# What it does: the range is that of the numbers alone. Where all are above 0 the zero point would be negative and is cut off at
# 0, the step stays the small one, and whatever lies above max - min is cut off at 255: with a smallest number of at least half
# the largest, all become max - min. Where all are below 0 it is the mirror image. Nothing is printed. Data that hold a 0, or
# numbers of both signs, are right.
# What it means here: after a ReLU nothing is seen; a bright picture (sky, snow, fog) at the first layer, or a sigmoid's output,
# comes in as one flat grey. A few test pictures may not show it; do not judge a dynamically quantised file through this package.
#
# No misuse: the operator's text: scale = (maximum(0, max(x)) - minimum(0, min(x))) / (qmax - qmin); onnx.checker passes with
# strict shapes; onnxruntime and numpy agree.
# Seen (Python 3.11, torch 2.14.1, onnx 1.23.2, onnxruntime 1.32.0; quantised, and back by DequantizeLinear):
#   bright: [0.5, 0.75, 0.875, 1]   by hand and onnxruntime [0.498, 0.749, 0.875, 1]   onnx2fx [0.5, 0.5, 0.5, 0.5]
#   above 0: [0.2, 0.5, 0.8, 1]   by hand and onnxruntime [0.2, 0.498, 0.8, 1]   onnx2fx [0.201, 0.499, 0.8, 0.8]
#   below 0: [-1, -2, -3, -4]   by hand and onnxruntime [-1, -1.99, -3, -4]   onnx2fx [-1, -2, -3, -3]
#   with 0: [0, 0.2, 0.6, 1]   by hand and onnxruntime [0, 0.2, 0.6, 1]   onnx2fx [0, 0.2, 0.6, 1]
#   both signs: [-1, -0.5, 0.5, 2]   by hand and onnxruntime [-1, -0.494, 0.494, 2]   onnx2fx [-1, -0.494, 0.494, 2]
set -euo pipefail
export OMP_NUM_THREADS=1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnx2fx==0.0.1 torch==2.14.1 onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6
cd "$folder"
venv/bin/python -W ignore - <<'PY'
import numpy as np
import onnx
import onnx2fx
import onnxruntime
import torch
from onnx import TensorProto, helper


def by_hand(x):
    low, high = min(0, x.min()), max(0, x.max())
    step = (high - low) / 255
    zero = np.clip(np.round(-low / step), 0, 255)
    return (np.clip(np.round(x / step) + zero, 0, 255) - zero) * step


def text(values):
    return "[" + ", ".join(f"{value:.3g}" for value in values) + "]"


nodes = [
    helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "step", "zero"]),
    helper.make_node("DequantizeLinear", ["q", "step", "zero"], ["y"]),
]
x, y = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy"]
graph = helper.make_graph(nodes, "g", [x], [y])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
onnx.checker.check_model(model, full_check=True)
session, converted = onnxruntime.InferenceSession(model.SerializeToString()), onnx2fx.convert(model)
cases = {
    "bright": ([.5, .75, .875, 1], [.5, .5, .5, .5]),
    "above 0": ([.2, .5, .8, 1], [.2, .5, .8, .8]),
    "below 0": ([-1, -2, -3, -4], [-1, -2, -3, -3]),
    "with 0": ([0, .2, .6, 1], None),
    "both signs": ([-1, -.5, .5, 2], None),
}
for name, (numbers, wrong) in cases.items():
    numbers = np.array(numbers, np.float32)
    truth, runtime = by_hand(numbers), session.run(None, {"x": numbers})[0]
    found = converted(torch.from_numpy(numbers)).numpy()
    print(f"{name}: {text(numbers)}   by hand and onnxruntime {text(runtime)}   onnx2fx {text(found)}")
    assert np.allclose(runtime, truth, atol=1e-5) and np.abs(runtime - numbers).max() < .01
    assert np.allclose(found, truth if wrong is None else wrong, atol=1e-5 if wrong is None else .01)
PY
echo "as stated"
