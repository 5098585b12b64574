#!/usr/bin/env bash
# onnx 1.23.2, onnx.reference.ReferenceEvaluator: ConvTranspose with group > 1 and a bias.
#
# Guess: the evaluator that comes with the standard, and is slow for the sake of being plain, is what runtimes may be measured against.
# What it does: groups are computed one after another, each with the whole bias, from which it takes the first places: in a depthwise layer
# every channel gets the bias of channel 0. Without a bias, or with group = 1, it is right. Nothing is printed; the shape is right.
# What it means: depthwise transposed convolutions are how CenterNet, SMOKE, MonoDLE and other DLA-34 detectors enlarge their maps, and the bias is
# there as soon as an exporter or optimiser has folded a BatchNorm into them. Someone who checks such an export against the evaluator
# looks for the fault in the export. It stands in the export's favour when all runtimes agree with one another.
#
# No misuse: by the operator's text B is one-dimensional, one number an output channel; onnx.checker passes; onnxruntime and the sum by hand agree.
# Seen (Python 3.11, onnxruntime 1.32.0; kernel of zeros, bias 1, 2, 3, 4: the output of a channel is its bias):
#   by hand [1, 2, 3, 4]   onnxruntime [1, 2, 3, 4]   reference evaluator [1, 1, 1, 1]
#   bilinear kernel 4 at stride 2, 4 channels: largest difference with the bias 3, without it 0, and 0 with the bias in a separate Add
set -euo pipefail
export OMP_NUM_THREADS=1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'PY'
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator


def compare(weight, bias, x):
    """Outputs of onnxruntime and of the evaluator. bias: "inside" the layer, "apart" in an Add, or None."""
    names = ["x", "w", "b"] if bias == "inside" else ["x", "w"]
    nodes = [helper.make_node("ConvTranspose", names, ["h"], group=4, kernel_shape=[4, 4], strides=[2, 2], pads=[1, 1, 1, 1])]
    nodes.append(helper.make_node("Add", ["h", "column"], ["y"]) if bias == "apart" else helper.make_node("Identity", ["h"], ["y"]))
    numbers = np.arange(1, 5, dtype=np.float32)
    tensors = {"w": weight, "b": numbers, "column": numbers[:, None, None]}
    used = {name for node in nodes for name in node.input}
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4, n, n]) for name, n in (("x", 5), ("y", 10))]
    held = [numpy_helper.from_array(tensor, name) for name, tensor in tensors.items() if name in used]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0], ReferenceEvaluator(model).run(None, {"x": x})[0]


def text(values):
    return "[" + ", ".join(f"{value:g}" for value in values) + "]"


x = np.random.default_rng(0).standard_normal((1, 4, 5, 5)).astype(np.float32)
runtime, reference = compare(np.zeros((4, 1, 4, 4), np.float32), "inside", x)
print(f"by hand [1, 2, 3, 4]   onnxruntime {text(runtime[0, :, 0, 0])}   reference evaluator {text(reference[0, :, 0, 0])}")
assert (runtime == np.arange(1, 5).reshape(1, 4, 1, 1)).all() and (reference == 1).all()
line = np.array([.25, .75, .75, .25], np.float32)
bilinear = np.broadcast_to(np.outer(line, line), (4, 1, 4, 4)).copy()
inside, without, apart = [np.abs(np.subtract(*compare(bilinear, bias, x))).max() for bias in ("inside", None, "apart")]
print("bilinear kernel 4 at stride 2, 4 channels: largest difference "
      f"with the bias {inside:.0f}, without it {without:.0f}, and {apart:.0f} with the bias in a separate Add")
assert abs(inside - 3) < 1e-4 and without < 1e-5 and apart < 1e-5
PY
echo "as stated"
