#!/usr/bin/env bash
# onnx 1.23.2, onnx.version_converter.convert_version: Upsample (opset 9) and Resize (opset 10) of mode linear, to opset 11 or later.
#
# Guess: the converter's one promise is that the converted model means the same; where a new opset has an attribute, it writes the old behaviour.
# What it does: opset 11 gave Resize the attribute coordinate_transformation_mode, whose default, half_pixel, is not what opset 10 did
# (asymmetric: x / scale). The adapter adds the new empty input and not the attribute, so that the default acts: every upsampled map moves
# by (1 - 1 / scale) / 2 of a coarse cell, a quarter of one for a factor of 2, and its last rows change. No warning, onnx.checker passes.
# What it means: the top-down path of an FPN in a file of the years of opset 9 or 10 gives other maps after "upgrade to opset 13": with two stages
# from stride 32 to 8 boxes move by up to 8 + 4 pixels. Compare numbers before and after, or write asymmetric into the converted nodes (shown).
#
# No misuse: opset 10 has no such attribute, and one meaning: onnxruntime, OpenVINO and (Resize-10) tract give the same numbers, x / scale, for the
# unconverted file. The converter has an adapter for this step and reports success. An open issue of onnx, number 8480, says the same.
# Seen (Python 3.11, onnxruntime 1.32.0; first row of the 2 x 2 picture, enlarged twice):
#   Upsample-9  as it is [1, 1.5, 2, 2]   converted to 13 [1, 1.25, 1.75, 2]   with asymmetric written in [1, 1.5, 2, 2]
#   Resize-10   as it is [1, 1.5, 2, 2]   converted to 13 [1, 1.25, 1.75, 2]   with asymmetric written in [1, 1.5, 2, 2]
#   centre of a blob, two stages of 2: as it is 14.50, converted 16.00 (in pixels of the enlarged map)
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
from onnx import TensorProto, helper, numpy_helper, version_converter

onnxruntime.set_default_logger_severity(3)


def make(operator, opset, size, stages):
    scales = numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales")
    names = ["x", *(f"h{k}" for k in range(1, stages)), "y"]
    nodes = [helper.make_node(operator, [a, "scales"], [b], mode="linear") for a, b in zip(names, names[1:])]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 1, s, s]) for n, s in (("x", size), ("y", size << stages))]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], [scales])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def run(model, x):
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0][0, 0]


def text(values):
    return "[" + ", ".join(f"{value:g}" for value in values) + "]"


x = np.array([[[[1, 2], [3, 4]]]], np.float32)
for operator, opset in (("Upsample", 9), ("Resize", 10)):
    old = make(operator, opset, 2, 1)
    new = version_converter.convert_version(old, 13)
    onnx.checker.check_model(new, full_check=True)
    (node,) = [node for node in new.graph.node if node.op_type == "Resize"]
    assert "coordinate_transformation_mode" not in [attribute.name for attribute in node.attribute]
    before, after = run(old, x)[0], run(new, x)[0]
    node.attribute.append(helper.make_attribute("coordinate_transformation_mode", "asymmetric"))
    mended = run(new, x)[0]
    print(f"{operator + '-' + str(opset):11s} as it is {text(before)}   converted to 13 {text(after)}   with asymmetric written in {text(mended)}")
    assert text(before) == text(mended) == "[1, 1.5, 2, 2]" and text(after) == "[1, 1.25, 1.75, 2]"
blob = np.zeros((1, 1, 8, 8), np.float32)
blob[..., 3:5, 3:5] = 1
old = make("Resize", 10, 8, 2)
centres = []
for model in (old, version_converter.convert_version(old, 13)):
    y = run(model, blob)
    centres.append(float((y.sum(0) * (np.arange(32) + .5)).sum() / y.sum()))
print("centre of a blob, two stages of 2: as it is {:.2f}, converted {:.2f} (in pixels of the enlarged map)".format(*centres))
assert centres[1] - centres[0] > 1.4
PY
echo "as stated"
