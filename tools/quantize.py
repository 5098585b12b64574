"""INT8 files of an exported model: an extra that `export.py --int8` asks for.

Weights have 8 bits with sign and a scale a channel, activations 8 bits without sign and a scale a tensor. The graph
tells what may be quantised: what lies between the image and that which the two predictors read. The predictors, scores,
decoding, the camera matrix and everything in metres lie behind or beside, in float, whatever a runtime calls them.
"""

import dataclasses
import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from data import Detection3D, build_dataset
from engine.weights import stay_at_home

PREDICTORS = {"detector.class_predictor.weight", "detector.box_predictor.weight"}  # names of constants in the graph
# of ONNX, to be quantised; without Clip, ReLU6, the range of what is cut off would be kept, and R would lose 13 points
KINDS = ("Conv", "Gemm", "MaxPool", "AveragePool", "Resize", "Concat", "Relu", "Clip", "Add")


def calibration_inputs(config, options) -> list[dict[str, np.ndarray]]:
    """Inputs {image, K} of options.frames frames of data.train, evenly spaced, each as validation would show it.

    As for an evaluation, a stranger's run writes nothing outside of here. Raises UserError.
    """
    data = dataclasses.replace(config.data, val=config.data.train)
    config = stay_at_home(dataclasses.replace(config, data=data), options.overrides)
    frames = build_dataset(config, training=True).frames
    dataset = Detection3D(frames, config.model, config.data)
    rows = np.unique(np.linspace(0, len(frames) - 1, options.frames).round().astype(int))
    samples = [dataset[int(row)] for row in rows]
    return [{name: sample[name][None].numpy() for name in ("image", "K")} for sample in samples]


def write(path: Path, inputs: list[dict[str, np.ndarray]], openvino: bool) -> list[Path]:
    """Write model.int8.onnx beside a model.onnx, where there are inputs, and OpenVINO's file. Returns their paths."""
    paths = [write_onnx(path, inputs)] if inputs else []
    return [*paths, write_openvino(path, inputs)] if openvino else paths


def network(reads: dict[str, list[str]], heads: Iterable[str]) -> set[str]:
    """Names of the operations on the ways from the image to some heads, these included; reads: what each one reads."""
    read_by = {}
    for name, sources in reads.items():
        for source in sources:
            read_by.setdefault(source, []).append(name)
    return reach(["image"], read_by) & reach(heads, reads)


def reach(names: Iterable[str], edges: dict[str, list[str]]) -> set[str]:
    """All names that some lead to."""
    reached, waiting = set(), [*names]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += edges.get(name, [])
    return reached


def find_nodes(graph) -> list[str]:
    """Names of the nodes of an onnx.GraphProto that are quantised; sums with constants, as in GroupNorm, are not."""
    makers = {output: node.name for node in graph.node for output in node.output}
    reads = {node.name: [makers.get(source, source) for source in node.input] for node in graph.node}
    heads = [reads[node.name][0] for node in graph.node if PREDICTORS & {*node.input}]
    inside = network(reads, heads)
    assert heads, "the graph has no predictors"
    nodes = [node for node in graph.node if node.name in inside and node.op_type in KINDS]
    return [n.name for n in nodes if n.op_type != "Add" or all(source in makers for source in n.input)]


def write_onnx(path: Path, inputs: list[dict[str, np.ndarray]]) -> Path:
    """model.int8.onnx beside a model.onnx, with pairs of QuantizeLinear and DequantizeLinear. Returns its path."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_static

    model, out = onnx.load(path), path.with_suffix(".int8.onnx")
    options = {"per_channel": True, "activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    chosen = {"nodes_to_quantize": find_nodes(model.graph), "op_types_to_quantize": [*KINDS]}
    logging.disable(logging.WARNING)  # its advice to fuse norms first, which the exporter has done
    try:
        quantize_static(model, out, Reader(inputs), **chosen, **options)
    finally:
        logging.disable(logging.NOTSET)
    return out


class Reader:
    """Inputs as ONNX Runtime's calibration asks for them."""

    def __init__(self, inputs):
        self.inputs = iter(inputs)

    def get_next(self):
        return next(self.inputs, None)


def write_openvino(path: Path, inputs: list[dict[str, np.ndarray]]) -> Path:
    """Write model.xml and .bin of a model.onnx, or with inputs model.int8.xml, by NNCF. Returns the path."""
    import openvino

    model, out = openvino.Core().read_model(path), path.with_suffix(".xml")
    if inputs:
        model, out = quantised(model, inputs), path.with_suffix(".int8.xml")
    openvino.save_model(model, out, compress_to_fp16=False)
    return out


def quantised(model, inputs):
    """OpenVINO's model, quantised by NNCF where `network` allows it."""
    import nncf

    logging.getLogger("nncf").setLevel(logging.ERROR)  # else a line for each operation that stays as it is
    operations = model.get_ordered_ops()  # a convolution with bias has another name here than in the file
    reads = {op.friendly_name: [value.get_node().friendly_name for value in op.input_values()] for op in operations}
    heads = [sources[0] for sources in reads.values() if PREDICTORS & {*sources}]
    assert heads, "the graph has no predictors"
    names = {op.friendly_name for op in operations if op.get_type_name() not in ("Constant", "Parameter", "Result")}
    scope = nncf.IgnoredScope(names=sorted(names - network(reads, heads)))
    preset = nncf.QuantizationPreset.MIXED  # activations have zero points, as in the other file
    return nncf.quantize(model, nncf.Dataset(inputs), preset=preset, subset_size=len(inputs), ignored_scope=scope)
