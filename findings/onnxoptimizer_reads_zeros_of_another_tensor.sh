#!/usr/bin/env bash
# onnxoptimizer 0.4.2, onnxoptimizer.optimize (its default passes; the pass is eliminate_consecutive_idempotent_ops): two
# Reshapes in a row.
#
# Guess: of two Reshapes the first can go only if the second does not refer to it; a 0 in a Reshape's shape means "as the input
# has it".
# What it does: the first is taken out whatever the second says, so that each 0 now copies a size of another tensor, and a -1
# takes up the rest: the result has the same numbers in another shape. Nothing is printed. The graph's stated output keeps the
# old shape. Without a 0 it is right.
# What it means here: heads write (batch, anchors * values, cells) as (batch * anchors, values, cells), then flatten with (0,
# -1): the optimised file has one row a picture in place of one an anchor, and what follows by axis (ArgMax, TopK, Softmax)
# answers for another set, silently. Leave the pass out (passes=[...] without it), or write the sizes as numbers.
#
# No misuse: ONNX's Reshape: with 0 "the actual dimension value is unchanged (i.e. taken from the input tensor)"; that is the
# node's own input. onnx.checker passes with strict shapes before; numpy and onnxruntime agree on the file as it was.
# Seen (Python 3.11, onnx 1.23.2, onnxruntime 1.32.0; [2, 6, 8] is reshaped to [6, 2, 8], then to the shape given; ArgMax over
# its axis 1):
#   [0, -1]: numpy (6, 16), best [6, 5, 15, 0, 15, 9]; optimised (2, 48), best [47, 31]
#   [6, -1]: numpy (6, 16), best [6, 5, 15, 0, 15, 9]; optimised (6, 16), best [6, 5, 15, 0, 15, 9]
#   [-1, 16]: numpy (6, 16), best [6, 5, 15, 0, 15, 9]; optimised (6, 16), best [6, 5, 15, 0, 15, 9]
#   all default passes but that one: right
set -euo pipefail
export OMP_NUM_THREADS=1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnxoptimizer==0.4.2 onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'PY'
import numpy as np
import onnx
import onnxoptimizer
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

NAME = "eliminate_consecutive_idempotent_ops"


def model(shapes):
    nodes = [
        helper.make_node("Reshape", ["x", "first"], ["h"]),
        helper.make_node("Reshape", ["h", "second"], ["y"]),
        helper.make_node("ArgMax", ["y"], ["best"], axis=1, keepdims=0),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 6, 8])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [6, 16])]
    outputs.append(helper.make_tensor_value_info("best", TensorProto.INT64, [6]))
    held = [numpy_helper.from_array(np.array(shape, np.int64), name) for name, shape in zip(("first", "second"), shapes)]
    graph = helper.make_graph(nodes, "g", inputs, outputs, held)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(made, full_check=True)
    return made


def run(made, x):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(made.SerializeToString(), options).run(None, {"x": x})


x = np.random.default_rng(0).standard_normal((2, 6, 8)).astype(np.float32)
truth = x.reshape(6, 16)
for second, right in (([0, -1], False), ([6, -1], True), ([-1, 16], True)):
    made = model([[6, 2, 8], second])
    before, after = run(made, x), run(onnxoptimizer.optimize(made), x)
    assert np.array_equal(before[0], truth) and np.array_equal(before[1], truth.argmax(1))
    print(f"{second}: numpy {truth.shape}, best {truth.argmax(1).tolist()}; optimised {after[0].shape}, best {after[1].tolist()}")
    assert (after[0].shape == truth.shape) == right and np.array_equal(after[0].ravel(), truth.ravel())
    if right:
        assert np.array_equal(after[1], before[1])
    else:
        assert after[0].shape == (2, 48) and after[1].tolist() == x.reshape(2, 48).argmax(1).tolist()
    others = [name for name in onnxoptimizer.get_fuse_and_elimination_passes() if name != NAME]
    assert np.array_equal(run(onnxoptimizer.optimize(made, others), x)[0], truth)
print("all default passes but that one: right")
PY
echo "as stated"
