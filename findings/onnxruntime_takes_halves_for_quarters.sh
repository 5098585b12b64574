#!/usr/bin/env bash
# onnxruntime 1.32.0, graph optimisation as it comes (and ORT_ENABLE_BASIC): Split, twice of one tensor, opsets 11 to 17.
#
# Guess: two nodes are one where operator, attributes and inputs are equal, if these decide the result. In Split they do not:
# without sizes, the tensor is cut into as many equal parts as the node has outputs.
# What it does: Split into 4 and Split into 2 of the same map are taken for the same as far as both have outputs, and so is all
# that follows equally: the ArgMax of the first quarter (2 channels) is answered with that of the first half (4 channels), 2
# among 0 and 1. Which of the two wins does not depend on their order here. No warning, no error; shapes are right.
# What it means here: a head that is cut twice, into coarse and fine bins, gives numbers of the other cut. Write the sizes, as
# torch's exporters do for split and chunk (tf2onnx writes none for equal parts), or use opset 18, whose num_outputs is an
# attribute, or disabled_optimizers=["CommonSubexpressionElimination"]; compare a new model once with ORT_DISABLE_ALL.
#
# No misuse: ONNX's Split, up to opset 17: sizes are optional, equal parts without. onnx.checker passes with strict shapes;
# onnx's evaluator, the same runtime without optimisation and numpy agree. The documentation calls its basic optimisations
# semantics-preserving. No report of this one was found; onnx-ir's pass of the same purpose compares the number of outputs.
# Seen (Python 3.11, numpy 2.4.6, onnx 1.23.2), a row of 8 channels, largest at 1 in its first quarter, at 2 in its first half:
#   by hand: quarters [1, 0, 1, 1], halves [2, 1]
#   opset 11, 4 before 2: not optimised and onnx's evaluator by hand's; as it comes: quarters [2, 1, 1, 1], halves [2, 1]
#   opset 11, 2 before 4: not optimised and onnx's evaluator by hand's; as it comes: quarters [2, 1, 1, 1], halves [2, 1]
#   opset 13, 4 before 2: not optimised and onnx's evaluator by hand's; as it comes: quarters [2, 1, 1, 1], halves [2, 1]
#   opset 13, 2 before 4: not optimised and onnx's evaluator by hand's; as it comes: quarters [2, 1, 1, 1], halves [2, 1]
#   opset 17, 4 before 2: not optimised and onnx's evaluator by hand's; as it comes: quarters [2, 1, 1, 1], halves [2, 1]
#   opset 17, 2 before 4: not optimised and onnx's evaluator by hand's; as it comes: quarters [2, 1, 1, 1], halves [2, 1]
#   opset 18, num_outputs: as it comes [1, 0, 1, 1, 2, 1]
#   opset 17, sizes written: as it comes [1, 0, 1, 1, 2, 1]
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

ROW = np.array([[0.1, 0.2, 0.9, 0.3, 0.4, 0.8, 0.5, 0.7]], np.float32)
PARTS = [f"quarter {k}" for k in range(4)] + [f"half {k}" for k in range(2)]
LEVELS = onnxruntime.GraphOptimizationLevel


def model(opset, order=(4, 2), sizes=False):
    """The place of the largest channel in each quarter, and in each half."""
    held, splits = [], {}
    for number, outputs in ((4, PARTS[:4]), (2, PARTS[4:])):
        inputs = ["row"]
        if sizes:
            held.append(numpy_helper.from_array(np.full(number, 8 // number), f"sizes {number}"))
            inputs.append(f"sizes {number}")
        attributes = {"num_outputs": number} if opset >= 18 and not sizes else {}
        splits[number] = helper.make_node("Split", inputs, outputs, axis=1, **attributes)
    nodes = [splits[number] for number in order]
    nodes += [helper.make_node("ArgMax", [part], ["place " + part], axis=1, keepdims=0) for part in PARTS]
    row = helper.make_tensor_value_info("row", TensorProto.FLOAT, [1, 8])
    places = [helper.make_tensor_value_info("place " + part, TensorProto.INT64, [1]) for part in PARTS]
    graph = helper.make_graph(nodes, "g", [row], places, held)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(made, full_check=True)
    return made


def run(made, level=None):
    options = onnxruntime.SessionOptions()
    if level is not None:
        options.graph_optimization_level = level
    return [int(v[0]) for v in onnxruntime.InferenceSession(made.SerializeToString(), options).run(None, {"row": ROW})]


quarters, halves = ROW.reshape(4, 2).argmax(1).tolist(), ROW.reshape(2, 4).argmax(1).tolist()
wanted = quarters + halves
print(f"by hand: quarters {quarters}, halves {halves}")
for opset in (11, 13, 17):
    for order in ((4, 2), (2, 4)):
        made = model(opset, order)
        off, basic, usual = run(made, LEVELS.ORT_DISABLE_ALL), run(made, LEVELS.ORT_ENABLE_BASIC), run(made)
        evaluator = [int(v[0]) for v in ReferenceEvaluator(made).run(None, {"row": ROW})]
        agree = "by hand's" if off == evaluator == wanted else f"{off} {evaluator}"
        words = f"not optimised and onnx's evaluator {agree}; as it comes: quarters {usual[:4]}, halves {usual[4:]}"
        print(f"opset {opset}, {order[0]} before {order[1]}: {words}")
        assert off == evaluator == wanted, "changed: without optimisation"
        assert usual == basic == halves + quarters[2:] + halves, "changed: as it comes"
for words, made in (("opset 18, num_outputs", model(18)), ("opset 17, sizes written", model(17, sizes=True))):
    print(f"{words}: as it comes {run(made)}")
    assert run(made) == wanted
PY
echo "as stated"
