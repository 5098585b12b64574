#!/usr/bin/env bash
# onnion-rt 0.8.0 (onnion_runtime: run ONNX's operators with numpy alone; its compiler onnion writes Python that calls it), the
# operator Div.
#
# Guess: Div of whole numbers is whole: the quotient, cut off towards zero, of the type of the inputs.
# What it does: numpy's true division, for every type: 7 / 2 is 3.5, as float64. Nothing is printed, and what follows takes it: a
# grid's row flat / width becomes row .75 or 1.25, a Mul and Sub for the column (flat - row * width) then give 0 for every cell.
# What it means here: a detector's decoding of a flat TopK index (class = flat / cells, row = rest / width, column = rest - row *
# width) puts all boxes in column 0 and between rows; use the runtime for the network, and decode outside.
#
# No misuse: ONNX's Div: for integer inputs "the result is computed using truncating division", of type T as the inputs;
# onnx.checker passes with strict shapes; onnxruntime and whole-number arithmetic by hand agree. The package names Div among its
# supported operators without a limit on types.
# Seen (Python 3.11, numpy 1.26.4, onnx 1.23.2, onnxruntime 1.32.0; places 5, 9, 11 of a map 3 high and 4 wide; then -7 / 2):
#   row:    by hand and onnxruntime [1, 2, 2]   onnion [1.25, 2.25, 2.75] (float64)
#   column: by hand and onnxruntime [1, 1, 3]   onnion [0.0, 0.0, 0.0]
#   -7 / 2 of int32: by the text -3   onnion -3.5
set -euo pipefail
export OMP_NUM_THREADS=1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnion-rt==0.8.0 onnx==1.23.2 onnxruntime==1.32.0 numpy==1.26.4
cd "$folder"
venv/bin/python - <<'PY'
import numpy as np
import onnion_runtime
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

flat, width = np.array([5, 9, 11]), np.array(4)
nodes = [
    helper.make_node("Div", ["flat", "width"], ["row"]),
    helper.make_node("Mul", ["row", "width"], ["before"]),
    helper.make_node("Sub", ["flat", "before"], ["column"]),
]
values = {name: helper.make_tensor_value_info(name, TensorProto.INT64, [3]) for name in ("flat", "row", "column")}
held = [numpy_helper.from_array(width, "width")]
graph = helper.make_graph(nodes, "g", [values["flat"]], [values["row"], values["column"]], held)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
onnx.checker.check_model(model, full_check=True)
runtime = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"flat": flat})

tensors = {"flat": flat, "width": width}
for node in model.graph.node:
    operator = getattr(onnion_runtime, node.op_type)(13)
    tensors[node.output[0]] = operator.run(*(tensors[name] for name in node.input))[0]
row, column = tensors["row"], tensors["column"]
print(f"row:    by hand and onnxruntime {runtime[0].tolist()}   onnion {row.tolist()} ({row.dtype})")
print(f"column: by hand and onnxruntime {runtime[1].tolist()}   onnion {column.tolist()}")
assert runtime[0].tolist() == [k // 4 for k in (5, 9, 11)] and runtime[1].tolist() == [k % 4 for k in (5, 9, 11)]
assert row.dtype == np.float64 and np.array_equal(row, [1.25, 2.25, 2.75]) and not column.any()
negative = onnion_runtime.Div(13).run(np.array([-7], np.int32), np.array([2], np.int32))[0]
print(f"-7 / 2 of int32: by the text -3   onnion {negative[0]}")
assert negative[0] == -3.5
PY
echo "as stated"
