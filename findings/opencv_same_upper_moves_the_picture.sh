#!/usr/bin/env bash
# opencv-python-headless 5.0.0.93, cv2.dnn.readNetFromONNX: Conv, MaxPool, AveragePool with auto_pad=SAME_UPPER ("same" of TensorFlow and Keras).
#
# Guess: the odd pixel of padding goes to the end (bottom, right), as the operator's text has it for SAME_UPPER; SAME_LOWER is the mirror image.
# What it does: the new engine, the one taken unless told otherwise, pads (kernel - 1) / 2 pixels at the beginning whatever mode, stride and size
# are. For kernels 3, 5, 7 at stride 2 over an even size, which is every downsampling of a backbone, that is SAME_LOWER: each such layer
# sees its input moved by one pixel. Shapes are right, nothing is printed. Five of them would move the last map by 1 + 2 + 4 + 8 + 16 = 31 pixels
# of the picture. (Kernel 2 at stride 1 is the other way round: SAME_LOWER is wrong.) ENGINE_CLASSIC ignores SAME_LOWER, and has SAME_UPPER right.
# What it means: a detector that came through tf2onnx finds boxes up to a cell aside; write the same padding as `pads` (right in both engines), or
# pass ENGINE_CLASSIC. Files exported from torch hold pads as numbers.
#
# No misuse: onnx.checker passes with strict shapes, the same file's pads as numbers are right, onnxruntime, OpenVINO and numpy agree.
# Seen (Python 3.11, onnx 1.23.2, onnxruntime 1.32.0; sums of 3 x 3 pixels of a ramp of 8 x 8 at stride 2, first row of the output):
#   Conv         numpy [81, 99, 117, 87]     onnxruntime same   opencv [18, 36, 48, 60]     classic same   pads as numbers same
#   MaxPool      numpy [18, 20, 22, 23]      onnxruntime same   opencv [9, 11, 13, 15]      classic same   pads as numbers same
#   AveragePool  numpy [9, 11, 13, 14.5]     onnxruntime same   opencv [4.5, 6, 8, 10]      classic same   pads as numbers same
#   kernel 5: opencv same as SAME_LOWER; kernel 3 over 7 x 7, where both sides get one pixel: opencv same
set -euo pipefail
export OMP_NUM_THREADS=1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet opencv-python-headless==5.0.0.93 onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'PY'
import cv2
import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper


def run(operator, picture, kernel=3, engine=cv2.dnn.ENGINE_AUTO, runtime="opencv", **padding):
    size = picture.shape[-1]
    weight = numpy_helper.from_array(np.ones((1, 1, kernel, kernel), np.float32), "w")
    names = ["x", "w"] if operator == "Conv" else ["x"]
    node = helper.make_node(operator, names, ["y"], kernel_shape=[kernel] * 2, strides=[2, 2], **padding)
    sizes = [[1, 1, n, n] for n in (size, (size + 1) // 2)]
    values = [helper.make_tensor_value_info(name, 1, shape) for name, shape in zip("xy", sizes)]
    graph = helper.make_graph([node], "g", values[:1], values[1:], [weight] if operator == "Conv" else [])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, "m.onnx")
    if runtime == "onnxruntime":
        return onnxruntime.InferenceSession("m.onnx").run(None, {"x": picture})[0][0, 0]
    net = cv2.dnn.readNetFromONNX("m.onnx", engine)
    net.setInput(picture)
    return net.forward()[0, 0]


def reference(picture, reduce):  # kernel 3, stride 2, even size: one pixel in all, at the end
    padded = np.pad(picture[0, 0], ((0, 1), (0, 1)), constant_values=np.nan)
    return np.array([[reduce(padded[i:i + 3, j:j + 3]) for j in range(0, 8, 2)] for i in range(0, 8, 2)])


def text(values):
    return "[" + ", ".join(f"{value:g}" for value in values[0]) + "]"


ramp = np.arange(64, dtype=np.float32).reshape(1, 1, 8, 8)
for operator, reduce in (("Conv", np.nansum), ("MaxPool", np.nanmax), ("AveragePool", np.nanmean)):
    truth = reference(ramp, reduce)
    same = {
        "onnxruntime": run(operator, ramp, runtime="onnxruntime", auto_pad="SAME_UPPER"),
        "classic": run(operator, ramp, engine=cv2.dnn.ENGINE_CLASSIC, auto_pad="SAME_UPPER"),
        "numbers": run(operator, ramp, pads=[0, 0, 1, 1]),
    }
    found = run(operator, ramp, auto_pad="SAME_UPPER")
    assert all(np.array_equal(truth, values) for values in same.values())
    assert not np.isclose(found[0], truth[0]).any()
    assert np.array_equal(found, run(operator, ramp, runtime="onnxruntime", auto_pad="SAME_LOWER"))
    print(f"{operator:12s} numpy {text(truth):24s} onnxruntime same   opencv {text(found):24s} classic same   pads as numbers same")
lower = run("Conv", ramp, 5, runtime="onnxruntime", auto_pad="SAME_LOWER")
assert np.array_equal(run("Conv", ramp, 5, auto_pad="SAME_UPPER"), lower)
odd = np.ascontiguousarray(ramp[..., :7, :7])
assert np.array_equal(run("Conv", odd, auto_pad="SAME_UPPER"), run("Conv", odd, runtime="onnxruntime", auto_pad="SAME_UPPER"))
print("kernel 5: opencv same as SAME_LOWER; kernel 3 over 7 x 7, where both sides get one pixel: opencv same")
PY
echo "as stated"
