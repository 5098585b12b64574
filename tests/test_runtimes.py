"""The exported graph in runtimes other than onnxruntime: each row of docs/export.md, where the runtime is installed."""

import numpy as np
import pytest
import torch
from test_export import make_detector

import export

onnx = pytest.importorskip("onnx", reason="export needs onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="the reference is onnxruntime")
pytest.importorskip("onnxscript", reason="export needs onnxscript")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A detector with every optional output, its model.onnx, two inputs, and what onnxruntime makes of them."""
    detector = make_detector()
    path = export.export(detector, tmp_path_factory.mktemp("runtimes"))
    height, width = detector.config.size
    pixels = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), np.uint8)
    cameras = [[[185.0, 0, 159.5], [0, 185, 47.5], [0, 0, 1]], [[250.0, 0, 150], [0, 240, 40], [0, 0, 1]]]
    inputs = {"image": pixels, "K": np.array(cameras, np.float32)}
    return detector, path, inputs, of_onnxruntime(path, inputs)


def of_onnxruntime(path, inputs):
    session = onnxruntime.InferenceSession(path)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def first(values):
    """Of a batch in a dict of arrays, the first image alone."""
    return {name: value[:1] for name, value in values.items()}


def check(rows, expected, relative=1e-4):
    """The same rows in the same order; a row may differ, where the last bit chose between two."""
    assert rows.keys() == expected.keys()
    for name, value in expected.items():
        assert rows[name].shape == value.shape, name
        error = np.abs(rows[name].astype(float) - value) / np.maximum(1.0, np.abs(value))
        apart = (error > relative).reshape(*value.shape[:2], -1).any(-1)
        assert apart.mean() < 0.01, (name, error.max())


def test_the_graph_has_nothing_that_runtimes_stop_at(exported):
    detector, path, inputs, expected = exported
    model = onnx.shape_inference.infer_shapes(onnx.load(path), data_prop=True)
    graph, boolean = model.graph, onnx.TensorProto.BOOL
    assert [tensor.name for tensor in graph.initializer if tensor.data_type == boolean] == []
    booleans = {value.name for value in graph.value_info if value.type.tensor_type.elem_type == boolean}
    uses = {(node.op_type, name) for node in graph.node for name in node.input if name in booleans}
    assert {operator for operator, _ in uses} <= {"Where", "Not", "Cast"}
    assert not {"ReduceLogSumExp", "ReduceMax"} & {node.op_type for node in graph.node}
    with torch.no_grad():
        images, K = (torch.from_numpy(inputs[name]) for name in ("image", "K"))
        rows = detector.rank(*detector(images, K), K)
    check(expected, {name: value.numpy() for name, value in rows.items()}, 1e-5)


def test_onnxruntime_prepares_the_file_for_quantisation(exported, tmp_path):
    pytest.importorskip("sympy", reason="quant_pre_process needs sympy")
    from onnxruntime.quantization.shape_inference import quant_pre_process

    _, path, inputs, expected = exported
    quant_pre_process(str(path), str(tmp_path / "prepared.onnx"))
    check(of_onnxruntime(tmp_path / "prepared.onnx", inputs), expected, 1e-5)


def test_opencv_runs_it_at_any_batch(exported):
    cv2 = pytest.importorskip("cv2", minversion="5", reason="opencv-python-headless >= 5 is not installed")
    _, path, inputs, expected = exported
    for each in (lambda values: values, first):
        net = cv2.dnn.readNetFromONNX(str(path), cv2.dnn.ENGINE_NEW)
        for name, value in each(inputs).items():
            net.setInput(value, name)
        check(dict(zip(expected, net.forward([*expected]), strict=True)), each(expected))
