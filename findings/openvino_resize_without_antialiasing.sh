#!/usr/bin/env bash
# openvino 2026.4.1, ONNX reader: Resize with antialias=1 (opset 18 and later), what torch.nn.functional.interpolate(antialias=True) is exported to.
#
# Guess: an attribute that a reader cannot honour is an error when the file is read, as other unsupported things are.
# What it does: the attribute is not read. Enlarging is the same either way; a picture made smaller comes out as plain bilinear or bicubic, which
# looks at 2 or 4 pixels in a row however many one output pixel covers: what lies between is lost and edges flicker. Both modes; an open issue
# (openvino number 35893) has the cubic one.
# What it means: a detector whose file begins with the resizing of the camera's picture sees another picture than it was trained on (Pillow and
# torchvision filter): thin and far objects break up or vanish. Resize outside the graph with a filter, or put the filter before it as a convolution.
#
# No misuse: the operator's text says that the filter is stretched by 1 / scale when downscaling; onnx.checker passes; onnxruntime and onnx's
# evaluator agree with each other and, for a factor of 4, with the triangle of 8 pixels computed by hand; the precision is set to f32.
# Seen (Python 3.11, onnx 1.23.2, onnxruntime 1.32.0; white lines one pixel wide, every 16 pixels, made 4 times smaller; brightest, mean):
#   linear  onnxruntime  39.8, 15.9   openvino   0.0,  0.0
#   cubic   onnxruntime  47.8, 15.9   openvino   0.0, -6.0
set -euo pipefail
export OMP_NUM_THREADS=1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet openvino==2026.4.1 onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'PY'
import numpy as np
import onnx
import onnxruntime
import openvino
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

core = openvino.Core()


def run(mode, antialias, x, width):
    shapes = {"x": [*x.shape], "y": [1, 1, 8, width]}
    node = helper.make_node("Resize", ["x", "", "", "sizes"], ["y"], mode=mode, antialias=antialias)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    sizes = numpy_helper.from_array(np.array(shapes["y"], np.int64), "sizes")
    graph = helper.make_graph([node], "g", values[:1], values[1:], [sizes])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, "m.onnx")
    compiled = core.compile_model(core.read_model("m.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    runtime = onnxruntime.InferenceSession("m.onnx").run(None, {"x": x})[0][0, 0]
    return runtime, ReferenceEvaluator(model).run(None, {"x": x})[0][0, 0], compiled(x)[0][0, 0]


lines = np.zeros((1, 1, 8, 256), np.float32)
lines[..., 8::16] = 255
for mode in ("linear", "cubic"):
    truth, reference, found = run(mode, 1, lines, 64)
    plain = run(mode, 0, lines, 64)
    print(f"{mode:7s} onnxruntime {truth.max():5.1f}, {truth.mean():4.1f}   openvino {found.max():5.1f}, {found.mean():4.1f}")
    assert np.allclose(truth, reference, atol=1e-2) and np.allclose(found, plain[2]) and np.allclose(plain[0], plain[2], atol=1e-2)
    assert np.abs(found - truth).max() > 20 and abs(truth.mean() - lines.mean()) < 1 < abs(found.mean() - lines.mean())
    if mode == "linear":  # the output at place k looks at 8 pixels around 4 k + 1.5
        triangle = np.array([.5, 1.5, 2.5, 3.5, 3.5, 2.5, 1.5, .5]) / 16
        assert np.allclose(truth[0, 1:-1], [triangle @ lines[0, 0, 0, 4 * k - 2:4 * k + 6] for k in range(1, 63)], atol=1e-3)
PY
echo "as stated"
