#!/usr/bin/env bash
# onnx2coreml 1.1.0 (ONNX to Core ML) with coremltools 9.0, onnx2coreml.convert: the operator Clip, both file formats.
#
# Guess: a bound that is computed while the model runs (the picture's width from an input) is clipped to, or refused by name
# when the model is converted; Reshape, Slice, Pad and TopK of this converter raise where they need a constant and get none.
# What it does: a bound that is no constant is taken for one that was left out, and the largest float stands in its place. The
# file's Clip reads 0 and 3.4e38; the input with the picture's size stays among the inputs, but no output depends on it.
# analyze() calls the model convertible, no warning is given, and shapes are right.
# What it means here: boxes cut at a border that comes in with the picture (several sizes of pictures, padded to one) are not
# cut at all on the telephone: a car at the right edge ends at column 1300 of 1242. Export Max and Min, which it converts, or
# put the size into the file.
#
# No misuse: ONNX's Clip (11 and later) has min and max as inputs, tensors without axes, constant or not, and torch exports
# clamp_max with such a tensor as this operator; onnx.checker passes with strict shapes, onnxruntime cuts at the input's width.
# The package lists Clip among its operators, promises an error for operators that it cannot convert, and its limitations name
# fixed shapes, scalars and one mode of Resize, nothing of Clip. Its own check of numbers against onnxruntime needs a Mac, and
# sees this only where something lies beyond its bound.
# Prediction needs a Mac too: what the file holds is read from its protobuf here, and computed by hand: min(max(x, low), high).
# Seen (Python 3.11, numpy 2.4.6, onnx 1.23.2, onnxruntime 1.32.0), columns -10, 500, 1300, width 1242:
#   onnxruntime, width as input: [0.0, 500.0, 1242.0]; analyze: convertible True, unsupported {}
#   mlmodel   width as input:  clip from 0 to 3.4e+38, the width reaches the output: False; so [0.0, 500.0, 1300.0]
#   mlmodel   width in file:   clip from 0 to 1242
#   mlmodel   Max, then Min:   no clip: True, the width reaches the output: True
#   mlpackage width as input:  clip from 0 to 3.4e+38, the width reaches the output: False; so [0.0, 500.0, 1300.0]
#   mlpackage width in file:   clip from 0 to 1242
#   mlpackage Max, then Min:   no clip: True, the width reaches the output: True
set -euo pipefail
export OMP_NUM_THREADS=1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnx2coreml==1.1.0 coremltools==9.0 onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6
cd "$folder"
# coremltools and its progress bars write to the error stream: it says there that its Mac parts are absent on Linux.
venv/bin/python 2>log - <<'PY' || { cat log >&2; exit 1; }
import numpy as np
import onnx
import onnx2coreml
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

COLUMNS, SIZE = np.array([-10, 500, 1300], np.float32), np.array([1242, 375], np.float32)
FLOAT_MAX = float(np.finfo(np.float32).max)


def model(kind):
    """Columns of boxes, brought inside a picture whose width is an input, or (constant) stands in the file."""
    held = {"first": np.array(0), "zero": np.float32(0)}
    nodes = [helper.make_node("Gather", ["size", "first"], ["width"])]
    if kind == "min and max":
        nodes.append(helper.make_node("Max", ["columns", "zero"], ["right"]))
        nodes.append(helper.make_node("Min", ["right", "width"], ["inside"]))
    else:
        limit = "width"
        if kind == "constant":
            held["limit"], limit = np.float32(1242), "limit"
        nodes.append(helper.make_node("Clip", ["columns", "zero", limit], ["inside"]))
    lengths = {"columns": 3, "size": 2, "inside": 3}
    values = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [n]) for name, n in lengths.items()}
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in held.items()]
    graph = helper.make_graph(nodes, "g", [values["columns"], values["size"]], [values["inside"]], tensors)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(made, full_check=True)
    return made


def of_network(made):
    """Bounds of the clip layer of a .mlmodel, and which layers lie between the input size and the output inside."""
    layers = onnx2coreml.convert(made, format="mlmodel", compute_precision="fp32").get_spec().neuralNetwork.layers
    bounds = [(layer.clip.minVal, layer.clip.maxVal) for layer in layers if layer.WhichOneof("layer") == "clip"]
    return bounds, reaches([(layer.input, layer.output) for layer in layers])


def of_program(made):
    """The same of a .mlpackage."""
    (function,) = onnx2coreml.convert(made, compute_precision="fp32").get_spec().mlProgram.functions.values()
    (block,) = function.block_specializations.values()
    constants = {
        operation.outputs[0].name: list(operation.attributes["val"].immediateValue.tensor.floats.values)
        for operation in block.operations
        if operation.type == "const"
    }
    bounds, links = [], []
    for operation in block.operations:
        read = {key: [argument.name for argument in value.arguments] for key, value in operation.inputs.items()}
        links.append((sum(read.values(), []), [output.name for output in operation.outputs]))
        if operation.type == "clip":
            bounds.append(tuple(constants[read[key][0]][0] for key in ("alpha", "beta")))
    return bounds, reaches(links)


def reaches(links):
    """Whether anything of the input size arrives at the output inside; links are in the order of computation."""
    tainted = {"size"}
    for inputs, outputs in links:
        if tainted & set(inputs):
            tainted |= set(outputs)
    return "inside" in tainted


def run(made):
    return onnxruntime.InferenceSession(made.SerializeToString()).run(None, {"columns": COLUMNS, "size": SIZE})[0].tolist()


wanted = [0.0, 500.0, 1242.0]
clip = model("clip")
report = onnx2coreml.analyze(clip)
print(f"onnxruntime, width as input: {run(clip)}; analyze: convertible {report.convertible}, unsupported {report.unsupported}")
assert run(clip) == run(model("constant")) == run(model("min and max")) == wanted
assert report.convertible and not report.unsupported
for name, look in (("mlmodel", of_network), ("mlpackage", of_program)):
    (low, high), depends = look(clip)[0][0], look(clip)[1]
    got = np.clip(COLUMNS, low, high).tolist()
    print(f"{name:9s} width as input:  clip from {low:g} to {high:.3g}, the width reaches the output: {depends}; so {got}")
    assert (low, high) == (0, FLOAT_MAX) and not depends and got == [0.0, 500.0, 1300.0], "changed"
    (low, high), depends = look(model("constant"))[0][0], look(model("constant"))[1]
    print(f"{name:9s} width in file:   clip from {low:g} to {high:g}")
    assert (low, high) == (0, 1242)
    bounds, depends = look(model("min and max"))
    print(f"{name:9s} Max, then Min:   no clip: {not bounds}, the width reaches the output: {depends}")
    assert not bounds and depends
PY
echo "as stated"
