#!/usr/bin/env bash
# tract 0.23.9 and opencv-python-headless 5.0.0.93 (cv2.dnn, both engines): the operators Softplus and ReduceLogSumExp.
#
# Guess: Softplus(x) of a large x is x, as in torch, onnxruntime and OpenVINO; the formula's exponential is not taken literally in a runtime.
# What they do: as if ln(exp(x) + 1) were computed as it is written, whose exp overflows in float32 from 88.73 on:
# Softplus(89) is inf, without a word.
# ReduceLogSumExp is written out in the same way: that of (100, 100) is inf.
# What it means: softplus is a usual last step of a depth head, where 89 is a distance in metres that cars have: everything beyond 88.7 m is
# infinitely far. Tests on near objects pass to the last digit. An export that has to run there
# writes it as max(x, 0) + ln(1 + exp(-|x|)) of plain operators, which is shown to be right in both, or lets the head give ln(depth).
#
# No misuse: the results fit float32, the operator's text gives a function and no range, onnx.checker passes, numpy.logaddexp and onnxruntime agree.
# Seen (Python 3.11, onnx 1.23.2, onnxruntime 1.32.0):
#                          Softplus of 10, 80, 88, 89, 120          ReduceLogSumExp of (100, 100)
#   numpy, onnxruntime     [10.00005, 80, 88, 89, 120]              [100.6931]
#   tract, opencv, opencv classic
#                          [10.00005, 80, 88, inf, inf]             [inf]
#   written out            [10.00005, 80, 88, 89, 120] in tract and in opencv
set -euo pipefail
export OMP_NUM_THREADS=1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tract==0.23.9 opencv-python-headless==5.0.0.93 onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'PY'
import cv2
import numpy as np
import onnx
import onnxruntime
import tract
from onnx import TensorProto, helper


def save(nodes, shape, to):
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, size) for name, size in (("x", shape), ("y", to))]
    axes = helper.make_tensor("axes", TensorProto.INT64, [1], [1])
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], [axes] if "axes" in nodes[0].input else [])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, "m.onnx")


def by_tract(x):
    model = tract.onnx().load("m.onnx")
    model.set_input_fact(0, ",".join(map(str, x.shape)) + ",f32")
    return model.into_model().into_runnable().run([x])[0].to_numpy()


def by_opencv(x, engine=cv2.dnn.ENGINE_AUTO):
    net = cv2.dnn.readNetFromONNX("m.onnx", engine)
    net.setInput(x)
    return net.forward()


def text(values):
    return "[" + ", ".join(f"{value:.7g}" for value in np.ravel(values)) + "]"


x, pairs = np.array([[10, 80, 88, 89, 120]], np.float32), np.array([[100, 100]], np.float32)
truth = np.logaddexp(x, 0), np.logaddexp(*pairs.T.astype(float))
print(f"{'numpy':22s} {text(truth[0]):40s} {text(truth[1])}")
runtimes = {"onnxruntime": lambda x: onnxruntime.InferenceSession("m.onnx").run(None, {"x": x})[0], "tract": by_tract,
            "opencv": by_opencv, "opencv classic": lambda x: by_opencv(x, cv2.dnn.ENGINE_CLASSIC)}
for name, runtime in runtimes.items():
    save([helper.make_node("Softplus", ["x"], ["y"])], [1, 5], [1, 5])
    plus = np.ravel(runtime(x))
    save([helper.make_node("ReduceLogSumExp", ["x", "axes"], ["y"], keepdims=0)], [1, 2], [1])
    total = np.ravel(runtime(pairs))
    print(f"{name:22s} {text(plus):40s} {text(total)}")
    assert np.allclose(plus[:3], truth[0][0, :3])
    if name == "onnxruntime":
        assert np.allclose(plus, truth[0]) and np.allclose(total, truth[1])
    else:
        assert np.isposinf(plus[3:]).all() and np.isposinf(total[0])
out = [("Abs", "x", "a"), ("Neg", "a", "n"), ("Exp", "n", "e"), ("Exp", "z", "o"), ("Add", "o e", "s"), ("Log", "s", "l"), ("Relu", "x", "r")]
nodes = [helper.make_node("Sub", ["x", "x"], ["z"])] + [helper.make_node(op, i.split(), [o]) for op, i, o in out]
save([*nodes, helper.make_node("Add", ["r", "l"], ["y"])], [1, 5], [1, 5])
assert np.allclose(by_tract(x), truth[0]) and np.allclose(by_opencv(x), truth[0])
print(f"{'written out':22s} {text(by_tract(x))} in tract and in opencv")
PY
echo "as stated"
