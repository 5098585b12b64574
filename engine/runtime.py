"""A detector that is a file: what export.py writes, run by ONNX Runtime or OpenVINO in torch's place. An extra that
`--runtime` asks for."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import torch
from torch import nn

from config import Config, build, override, read_config
from engine.checkpoint import CONFIG, near
from engine.guard import start_accelerator
from model import Detector, ModelConfig
from scene.frames import UserError

PACKAGES = {"onnx": "onnxruntime", "openvino": "openvino"}
SUFFIXES = {"onnx": (".onnx",), "openvino": (".onnx", ".xml")}
HINTS = {"fp32": "f32", "bf16": "bf16"}  # OpenVINO's words
VERSION = 1  # of the layout of files that are read here
AFTERWARDS = ("score_threshold", "nms_iou", "nms_across_classes", "max_detections", "fuse_duplicates")  # in `suppress`


def open_file(path: Path, overrides, runtime: str, precision: str | None):
    """Config, detector and Accelerator for a file that a runtime runs: the config beside it with the file's own model.

    Overrides of the model change what suppresses duplicates, which is not in the file. Raises UserError for others.
    """
    config = read_config(path.with_name(CONFIG)) if path.with_name(CONFIG).is_file() else Config()
    overrides = [*overrides, "train.mixed_precision=no"]  # of torch alone
    accelerator = start_accelerator(override(config, overrides).train)  # which sets the number of threads
    detector = FileDetector(path, runtime, precision)
    config = override(dataclasses.replace(config, model=detector.config), overrides)
    for name, value in vars(detector.config).items():
        if getattr(config.model, name) != value and name not in AFTERWARDS:
            raise UserError(f"model.{name} is part of {path}, expected of model {', '.join(AFTERWARDS)}")
    detector.config = config.model
    return config, detector, accelerator


def refuse_emulation(precision: str | None, device: torch.device) -> None:
    """Raises UserError for bf16 on a processor without instructions for it, where torch would only be slower."""
    if precision == "bf16" and device.type == "cpu" and not native_bf16():
        raise UserError("--precision bf16: this processor has no bf16 instructions, torch would emulate it, and slower")


def native_bf16() -> bool:
    """Whether torch computes bf16 on this processor with instructions for it: AMX, AVX512-BF16, or Arm's BF16."""
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return torch.backends.mkldnn.is_available() and any(has.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))


class FileDetector(nn.Module):
    """An exported file with the verbs of a `Detector`: `detect` for batches, `predict` for images of any size."""

    def __init__(self, path: str | Path, runtime: str, precision: str | None = None):
        """runtime: 'onnx' or 'openvino'; precision: of OpenVINO, a key of HINTS; empty: its own choice.

        Raises UserError for what cannot be run, naming the file or the package.
        """
        super().__init__()
        check(Path(path), runtime, precision)
        start = start_onnxruntime if runtime == "onnx" else start_openvino
        self.infer, about = start(Path(path), precision)
        if about.get("version") != VERSION or about["nms"]:
            wanted = "a file that export.py has written, without --nms: duplicates are suppressed here"
            raise UserError(f"{path}: expected {wanted}")
        self.config = build(about["model"], ModelConfig, str(path))
        self.place = nn.Parameter(torch.empty(0))  # that `predict` takes the device of
        self.eval()

    predict = Detector.predict
    suppress = Detector.suppress

    @torch.no_grad()
    def detect(self, image, K):
        """As `Detector.detect`, on the CPU."""
        return self.suppress(self.rank(image, K), K.cpu().float())

    def rank(self, image, K):
        """As `Detector.rank`, of images (B, H, W, 3) uint8 and K (B, 3, 3) of the canvas."""
        rows = self.infer({"image": image.cpu().numpy(), "K": K.cpu().float().numpy()})
        return {name: torch.from_numpy(value) for name, value in rows.items()}


def check(path: Path, runtime: str, precision: str | None) -> None:
    """Raises UserError for a missing package, for no file or one of another kind, and for an idle precision."""
    package, suffixes = PACKAGES[runtime], SUFFIXES[runtime]
    if importlib.util.find_spec(package) is None:
        raise UserError(f"--runtime {runtime} needs {package}: pip install {package}")
    if not path.is_file() or path.suffix not in suffixes:
        hint = "" if path.exists() else near(path)
        raise UserError(f"{path}: expected a file {' or '.join(suffixes)} that export.py has written{hint}")
    if runtime == "onnx" and precision:
        raise UserError(
            f"--precision {precision}: ONNX Runtime computes as its file says, see export.py --half, --int8"
        )


def start_onnxruntime(path: Path, precision: str | None):
    """A function {input: array} -> {output: array}, and the file's entry deep3d. Raises UserError."""
    import onnxruntime
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidGraph, InvalidProtobuf

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # what reads images needs the cores
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except (Fail, InvalidGraph, InvalidProtobuf) as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from error
    names = [output.name for output in session.get_outputs()]
    about = json.loads(session.get_modelmeta().custom_metadata_map.get("deep3d", "{}"))
    return lambda inputs: dict(zip(names, session.run(names, inputs), strict=True)), about


def start_openvino(path: Path, precision: str | None):
    """The same of OpenVINO, which computes floats in bf16 where the processor has it, unless told another precision."""
    import openvino

    options = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    if precision:
        options["INFERENCE_PRECISION_HINT"] = HINTS[precision]
    core = openvino.Core()
    try:
        model = core.read_model(path)
    except RuntimeError as error:
        raise UserError(f"{path}: {str(error).splitlines()[-1].strip()}") from error
    entry = ["framework", "deep3d"]
    about = json.loads(model.get_rt_info(entry).astype(str)) if model.has_rt_info(entry) else {}
    compiled = core.compile_model(model, "CPU", options)
    names = [output.get_any_name() for output in compiled.outputs]
    return lambda inputs: dict(zip(names, compiled(inputs).values(), strict=True)), about
