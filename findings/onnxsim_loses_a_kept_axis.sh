#!/usr/bin/env bash
# onnxsim 0.8.1, onnxsim.simplify (and the command of that name): two reductions in a row, the first with keepdims=1, the second
# with keepdims=0.
#
# Guess: two reductions are made one only where one node can say the same: both keep their axes, or neither does.
# What it does: ReduceSum, ReduceMean and ReduceMax are joined whatever they keep, with the second's keepdims for both axes: the
# axis that the first kept is gone (with 0, then 1, one too many comes). Nothing is printed, the check it returns is True, and
# the file's stated output keeps its shape.
# What it means here: where a later node broadcasts, equal sizes fit along another axis, and a number a row is taken off the
# columns: same shape, other values. Compare a run before and after simplifying on maps with unequal sides;
# skipped_optimizers=["fuse_consecutive_reduce"] is right.
#
# No misuse: by the operators' text keepdims keeps the axes reduced by that node; the file passes onnx.checker with strict
# shapes, and numpy and onnxruntime agree on the file as it was.
# Seen (Python 3.11, onnx 1.23.2, onnxruntime 1.32.0; [3, 4, 5], mean over axis 1 kept, then over axis 2 not kept, taken off a 3
# x 3 map of zeros):
#   mean: numpy and onnxruntime (3, 1)   simplified (3,)
#   row 0 of the map: numpy and onnxruntime [-1.0, -1.0, -1.0]   simplified [-1.0, -2.0, -3.0]
#   ReduceSum and ReduceMax: the same; keepdims 0, then 1: (3, 1) becomes (3, 1, 1)
set -euo pipefail
export OMP_NUM_THREADS=1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnxsim==0.8.1 onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'PY'
import numpy as np
import onnx
import onnxruntime
import onnxsim
from onnx import TensorProto, helper, numpy_helper

REDUCE = {"ReduceSum": np.sum, "ReduceMean": np.mean, "ReduceMax": np.max}


def model(operator, keep):
    """Two reductions of x, and z: a map less the result."""
    nodes = [
        helper.make_node(operator, ["x", "one"], ["h"], keepdims=keep[0]),
        helper.make_node(operator, ["h", "two"], ["y"], keepdims=keep[1]),
    ]
    values = {"x": [3, 4, 5], "y": [3, 1]}
    if keep != (0, 1):
        nodes.append(helper.make_node("Sub", ["map", "y"], ["z"]))
        values |= {"map": [3, 3], "z": [3, 3]}
    second = 2 if keep[0] else 1
    held = [numpy_helper.from_array(np.array([axis]), name) for name, axis in (("one", 1), ("two", second))]
    made = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in values.items()}
    inputs, outputs = [made[n] for n in made if n in ("x", "map")], [made[n] for n in made if n in ("y", "z")]
    graph = helper.make_graph(nodes, "g", inputs, outputs, held)
    file = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(file, full_check=True)
    return file


def run(file, x):
    feeds = {"x": x, "map": np.zeros((3, 3), np.float32)}
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file.SerializeToString(), options)
    return session.run(None, {value.name: feeds[value.name] for value in session.get_inputs()})


x = np.repeat(np.array([1, 2, 3], np.float32), 20).reshape(3, 4, 5)  # its mean over all but axis 0 is 1, 2, 3
for operator, reduce in REDUCE.items():
    truth = reduce(reduce(x, axis=1, keepdims=True), axis=2)
    file = model(operator, (1, 0))
    simple, checked = onnxsim.simplify(file)
    before, after = run(file, x), run(simple, x)
    assert checked and sum(node.op_type == operator for node in simple.graph.node) == 1
    assert before[0].shape == truth.shape == (3, 1) and np.allclose(before[0], truth)
    assert np.allclose(before[1], -truth * np.ones(3))
    assert after[0].shape == (3,) and np.allclose(after[1], before[1].T) and not np.allclose(after[1], before[1])
    unjoined = onnxsim.simplify(file, skipped_optimizers=["fuse_consecutive_reduce"])[0]
    assert all(np.allclose(one, other) for one, other in zip(run(unjoined, x), before))
    if operator == "ReduceMean":
        print(f"mean: numpy and onnxruntime {truth.shape}   simplified {after[0].shape}")
        print(f"row 0 of the map: numpy and onnxruntime {before[1][0].tolist()}   simplified {after[1][0].tolist()}")
    file = model(operator, (0, 1))  # keeps the second axis alone
    assert run(file, x)[0].shape == (3, 1) and run(onnxsim.simplify(file)[0], x)[0].shape == (3, 1, 1)
print("ReduceSum and ReduceMax: the same; keepdims 0, then 1: (3, 1) becomes (3, 1, 1)")
PY
echo "as stated"
