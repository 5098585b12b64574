"""The exported graph in runtimes other than onnxruntime: each row of docs/export.md, where the runtime is installed."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_export import make_detector

import export

onnx = pytest.importorskip("onnx", reason="export needs onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="the reference is onnxruntime")
pytest.importorskip("onnxscript", reason="export needs onnxscript")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A detector with every optional output, its model.onnx, two inputs, and what onnxruntime makes of them."""
    detector = make_detector()
    path = export.export(detector, tmp_path_factory.mktemp("rows"))
    height, width = detector.config.size
    pixels = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), np.uint8)
    cameras = [[[185.0, 0, 159.5], [0, 185, 47.5], [0, 0, 1]], [[250.0, 0, 150], [0, 240, 40], [0, 0, 1]]]
    inputs = {"image": pixels, "K": np.array(cameras, np.float32)}
    return detector, path, inputs, of_onnxruntime(path, inputs)


@pytest.fixture(scope="module")
def suppressed(exported, tmp_path_factory):
    """The same of a file that suppresses duplicates, as export.py --nms writes it."""
    detector, _, inputs, _ = exported
    path = export.export(detector, tmp_path_factory.mktemp("nms"), suppress=True)
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
    _, path, inputs, expected = exported
    command = [sys.executable, "-m", "onnxruntime.quantization.preprocess"]  # imported here, it would hide metrics/
    command += ["--input", path, "--output", tmp_path / "prepared.onnx"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    check(of_onnxruntime(tmp_path / "prepared.onnx", inputs), expected, 1e-5)


def of_opencv(path, inputs, expected, folder):
    cv2 = pytest.importorskip("cv2", minversion="5", reason="opencv-python-headless >= 5 is not installed")
    net = cv2.dnn.readNetFromONNX(str(path), cv2.dnn.ENGINE_NEW)
    for name, value in inputs.items():
        net.setInput(value, name)
    return dict(zip(expected, net.forward([*expected]), strict=True))


def of_openvino(path, inputs, expected, folder, **options):
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    rows = openvino.Core().compile_model(str(path), "CPU", options)(inputs)
    return {name: rows[name] for name in expected}


def of_openvino_in_float32(*arguments):
    return of_openvino(*arguments, INFERENCE_PRECISION_HINT="f32")


NODE = """
const fs = require("fs");
const [library, folder] = process.argv.slice(1);
const ort = require(library);
const read = (name) => fs.readFileSync(`${folder}/${name}`);
(async () => {
  const session = await ort.InferenceSession.create(read("model.onnx"));
  const [batch, height, width] = JSON.parse(read("shape.json"));
  const image = new ort.Tensor("uint8", new Uint8Array(read("image")), [batch, height, width, 3]);
  const K = new ort.Tensor("float32", new Float32Array(new Uint8Array(read("K")).buffer), [batch, 3, 3]);
  for (const [name, { data }] of Object.entries(await session.run({ image, K })))
    fs.writeFileSync(`${folder}/${name}.out`, Buffer.from(data.buffer, data.byteOffset, data.byteLength));
})();
"""


def of_node(path, inputs, expected, folder):
    library = ROOT / "examples/web/node_modules/onnxruntime-web"
    if not shutil.which("node") or not library.is_dir():
        pytest.skip("needs node, and npm install --prefix examples/web onnxruntime-web")
    shutil.copy(path, folder / "model.onnx")
    for name, value in inputs.items():
        (folder / name).write_bytes(value.tobytes())
    (folder / "shape.json").write_text(str(list(inputs["image"].shape[:3])))
    done = subprocess.run(["node", "-e", NODE, library, folder], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return {
        name: np.fromfile(folder / f"{name}.out", value.dtype).reshape(value.shape) for name, value in expected.items()
    }


@pytest.mark.parametrize("file", ["exported", "suppressed"])
@pytest.mark.parametrize("run", [of_opencv, of_openvino_in_float32, of_node])
def test_it_runs_at_any_batch(run, file, exported, request, tmp_path):
    _, path, inputs, expected = exported
    if file == "suppressed":
        run(path, first(inputs), first(expected), tmp_path)  # skips before anything else is exported
        _, path, inputs, expected = request.getfixturevalue(file)
    for each in (lambda values: values, first):
        check(run(path, each(inputs), each(expected), tmp_path), each(expected))


def test_openvino_as_it_comes_moves_scores_little(exported, tmp_path):
    _, path, inputs, expected = exported
    score = of_openvino(path, inputs, expected, tmp_path)["score"]  # in bf16 where the processor has it
    assert np.abs(np.sort(score) - np.sort(expected["score"])).mean() < 0.02


@pytest.mark.parametrize("file", ["exported", "suppressed"])
@pytest.mark.parametrize(
    ("tool", "work"), [("onnxslim", "slim"), ("onnxsim", "simplify"), ("onnxoptimizer", "optimize")]
)
def test_simplifiers_keep_its_rows_and_what_it_says_of_itself(tool, work, file, exported, request, tmp_path):
    module = pytest.importorskip(tool, reason=f"{tool} is not installed")
    _, path, inputs, expected = request.getfixturevalue(file)
    model = onnx.load(path)
    simple = getattr(module, work)(onnx.load(path))
    simple = simple[0] if isinstance(simple, tuple) else simple
    onnx.save(simple, tmp_path / "simple.onnx")
    check(of_onnxruntime(tmp_path / "simple.onnx", inputs), expected, 1e-5)
    kept = {entry.key: entry.value for entry in simple.metadata_props}
    assert kept["deep3d"] == {entry.key: entry.value for entry in model.metadata_props}["deep3d"]


def of_one_image(detector, inputs):
    """What is converted without ONNX: the module with its rows, and tensors of one image, which fix the batch."""
    module = export.Rows(detector, False, False).eval().requires_grad_(False)
    return module, tuple(torch.from_numpy(first(inputs)[name]) for name in ("image", "K"))


def test_litert_runs_it_at_a_fixed_batch(exported, tmp_path):
    litert_torch = pytest.importorskip("litert_torch", reason="litert-torch is not installed")
    from ai_edge_litert.interpreter import Interpreter

    detector, _, inputs, expected = exported
    module, tensors = of_one_image(detector, inputs)
    litert_torch.convert(module, tensors).export(str(tmp_path / "model.tflite"))
    runner = Interpreter(str(tmp_path / "model.tflite")).get_signature_runner()
    rows = runner(args_0=tensors[0].numpy(), args_1=tensors[1].numpy())
    check({name: rows[f"output_{n}"] for n, name in enumerate(expected)}, first(expected))


def test_executorch_runs_it_at_a_fixed_batch(exported, tmp_path):
    pytest.importorskip("executorch.runtime", reason="executorch is not installed")
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    detector, _, inputs, expected = exported
    module, tensors = of_one_image(detector, inputs)
    program = to_edge_transform_and_lower(torch.export.export(module, tensors), partitioner=[XnnpackPartitioner()])
    (tmp_path / "model.pte").write_bytes(program.to_executorch().buffer)
    rows = Runtime.get().load_program(tmp_path / "model.pte").load_method("forward").execute(tensors)
    check({name: value.numpy() for name, value in zip(expected, rows, strict=True)}, first(expected))
