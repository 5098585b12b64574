"""Export a detector to ONNX, with the camera matrix as an input.

python export.py RUN [--half] [--nms] [--int8 [--frames N]] [--openvino] [--out DIR] [key=value ...]

RUN is a run folder, a folder with config.json and model.safetensors, or a Hugging Face hub id. Written to DIR:
model.onnx, its config.json, and onnx_detector.py, which runs it on images of any size with numpy, Pillow and
onnxruntime alone, without torch and this project; with --int8 also model.int8.onnx, calibrated on N frames of the run's
data.train; with --openvino model.xml, or model.int8.xml. key=value changes the run's config: data.root=/kitti, or
model.size=192,640 for another canvas.

Inputs: image (B, H, W, 3) uint8 RGB of the canvas, K (B, 3, 3) of the canvas; B is free. Outputs, in pixels of the
canvas and metres of each camera, S = model.candidates rows an image, as `Detector.rank` gives them before duplicates
are suppressed: label (B, S), score (B, S), box (B, S, 4), pixel (B, S, 2), depth (B, S), size (B, S, 3), alpha (B, S),
sigma (B, S), and velocity (B, S, 3) and attribute (B, S) of a model that has them. With --nms the graph does what
`Detector.select` does: S = model.max_detections, best score first, center (B, S, 3) and yaw (B, S) in place of pixel,
depth and alpha; rows with score 0 hold nothing. The metadata entry `deep3d` is JSON: the version of this layout, nms,
half, and the config's section model.
"""

import argparse
import copy
import dataclasses
import importlib.util
import json
import logging
import shlex
import shutil
import sys
import warnings
from pathlib import Path

import torch
from torch import nn
from torchvision.ops import nms

from config import to_dict
from engine.checkpoint import META, MODEL
from engine.weights import fetch, find_checkpoint, load_run
from model import Detector
from scene.frames import UserError, make_folder, sentence_of
from scene.geometry import alpha_to_yaw, average_duplicates, unproject

VERSION = 1  # of inputs, outputs and metadata
OPSET = 18
WRITTEN = ("model.onnx", "model.int8.onnx", "model.xml", "model.bin", "model.int8.xml", "model.int8.bin")
NEEDED = ("onnx", "onnxscript", "onnxruntime")
RUNTIME = Path(__file__).parent / "examples" / "onnx_detector.py"


class Rows(nn.Module):
    """A detector whose outputs are tensors of fixed shape: the best candidates, or with suppression the detections."""

    def __init__(self, detector: Detector, suppress: bool, half: bool):
        super().__init__()
        self.detector, self.suppress, self.half = copy.deepcopy(detector), suppress, half
        if half:
            for part in self.detector.children():  # the detector's own buffers, of which `decode` reads, stay in fp32
                part.half()
        self.names: list[str] = []  # of the outputs, once it ran

    def forward(self, image, K):
        """image (B, H, W, 3) uint8, K (B, 3, 3) of the canvas -> the tensors that the header of this file lists."""
        with torch.autocast("cpu", torch.float16, enabled=self.half):
            logits, raw = self.detector(image, K)
        boxes = self.detector.rank(logits.float(), raw.float(), K)
        if self.suppress:
            boxes = select_rows(boxes, K, self.detector.config)
        self.names = [*boxes]
        return tuple(boxes.values())


def select_rows(boxes, K, config):
    """`Detector.select` in fixed shapes: (B, S, ...) candidates -> (B, max_detections, ...), empty rows of score 0."""
    images, candidates = boxes["score"].shape
    first = torch.arange(images)[:, None]
    flat = {name: value.flatten(0, 1) for name, value in boxes.items()}
    # Classes are moved apart along x and images along y: ONNX's operator takes fp32 alone, in which large coordinates
    # would round boxes by their place in the batch.
    apart = max(config.size) + 1  # px
    image = apart * first.expand(images, candidates).flatten()
    aside = torch.stack([apart * flat["label"], image], 1).repeat(1, 2)
    rows = nms(flat["box"] + aside, flat["score"], config.nms_iou)
    if config.nms_across_classes:
        parted = flat["box"] + torch.stack([0 * image, image], 1).repeat(1, 2)
        rows = rows[nms(parted[rows], flat["score"][rows], config.nms_across_classes)]
    flat["label"] = (boxes["label"] + len(config.classes) * first).flatten()  # of other images: other classes
    stays = torch.zeros_like(flat["score"]).scatter(0, rows, 1.0)
    score = flat["score"] * stays * (flat["score"] > config.score_threshold)
    best, rows = score.unflatten(0, (images, candidates)).topk(min(config.max_detections, candidates))
    rows = (rows + candidates * first).flatten()
    detections = {name: value[rows] for name, value in flat.items()}
    if config.fuse_duplicates:
        averages = average_duplicates(detections, flat, config.nms_iou)
        detections.update(zip(("box", "pixel", "depth"), averages, strict=True))
    detections = {name: value.unflatten(0, best.shape) for name, value in detections.items()}
    center = unproject(detections.pop("pixel"), detections.pop("depth"), K[:, None].float())
    yaw = alpha_to_yaw(detections.pop("alpha"), center)
    label = detections["label"] % len(config.classes)
    return {**detections, "label": label, "score": best, "center": center, "yaw": yaw}


def log_sum_exp(values, axes, keepdim=False):
    """aten.logsumexp of values near 0, such as `decode` has, without the operator that `quant_pre_process` dies of."""
    from onnxscript import opset18

    return opset18.Log(opset18.ReduceSum(opset18.Exp(values), axes, keepdims=keepdim))


def export(detector: Detector, folder: str | Path, suppress: bool = False, half: bool = False) -> Path:
    """Write model.onnx of a detector, and the runtime beside it, into a folder. Returns the path of model.onnx."""
    import onnx

    folder = Path(folder)
    make_folder(folder, "--out")
    config, rows = detector.config, Rows(detector, suppress, half).eval().requires_grad_(False)
    height, width = config.size
    image = torch.zeros(2, height, width, 3, dtype=torch.uint8)
    K = torch.tensor([[width, 0.0, width / 2], [0.0, width, height / 2], [0.0, 0.0, 1.0]]).repeat(2, 1, 1)
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's exporter, about its own parts
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        rows(image, K)  # fills in the names
        names = {"input_names": ["image", "K"], "output_names": rows.names, "dynamic_shapes": ({0: batch}, {0: batch})}
        names["custom_translation_table"] = {torch.ops.aten.logsumexp.default: log_sum_exp}
        program = torch.onnx.export(rows, (image, K), opset_version=OPSET, dynamo=True, verbose=False, **names)
    model = program.model_proto
    for part in (*model.graph.node, *model.graph.value_info, model.graph):
        del part.metadata_props[:]  # the exporter's stack traces, with paths of this machine
    about = {"version": VERSION, "nms": suppress, "half": half, "model": dataclasses.asdict(config)}
    onnx.helper.set_model_props(model, {"deep3d": json.dumps(about)})
    onnx.save(model, folder / "model.onnx")
    shutil.copy(RUNTIME, folder)
    return folder / "model.onnx"


def begin(folder: Path, config) -> None:
    """Make a folder for the files of one detector, without those of another, and put config.json there.

    Raises UserError for the folder of a run, a checkpoint or weights, whose own config.json that would replace.
    """
    if any((folder / name).exists() for name in (META, MODEL, "log.jsonl")):
        raise UserError(f"--out {folder} is a run, a checkpoint or its weights, expected a folder of its own")
    make_folder(folder, "--out")
    for name in WRITTEN:
        (folder / name).unlink(missing_ok=True)
    (folder / "config.json").write_text(json.dumps(to_dict(config), indent=1))


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line. Exits with code 2 and one sentence when it is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    add = parser.add_argument
    add("run", metavar="RUN")
    add("overrides", nargs="*", metavar="key=value", help="changes to its config: data.root=/kitti, model.size=192,640")
    add("--half", action="store_true", help="fp16, where torch.autocast would compute in it: for GPUs, CPUs get slower")
    add("--int8", action="store_true", help="also model.int8.onnx: the network in 8 bits, what decodes in floats")
    add("--frames", metavar="N", type=int, help="of data.train, that --int8 measures ranges on; default: 320")
    add("--openvino", action="store_true", help="also OpenVINO's model.xml, or with --int8 NNCF's model.int8.xml")
    add("--nms", action="store_true", help="suppress and average duplicates in the graph")
    add("--out", metavar="DIR", type=Path, default=Path("exported"), help="default: exported")
    options = parser.parse_intermixed_args(arguments)
    needed = (*NEEDED, *["openvino"] * options.openvino, *["nncf"] * (options.openvino and options.int8))
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        parser.error(f"{' and '.join(missing)}: not installed; pip install {' '.join(needed)}")
    if options.half and options.int8:
        parser.error("--half and --int8 are two precisions, expected one of them")
    if options.frames is not None and (options.frames < 1 or not options.int8):
        parser.error(f"--frames is {options.frames}, expected at least 1, and --int8")
    options.frames = options.frames or 320
    return options


def main(arguments: list[str] | None = None) -> int:
    """Command line entry. Returns 0, or 2 after one sentence on stderr for what the user got wrong, or a full disk."""
    options = parse_arguments(arguments)
    try:
        config, detector = load_run(find_checkpoint(fetch(options.run)), options.overrides)
        config = dataclasses.replace(config, model=detector.config)
        inputs = []
        if options.int8:  # first, as it may fail, and what lies in the folder goes then
            inputs = importlib.import_module("tools.quantize").calibration_inputs(config, options)
        begin(options.out, config)
        paths = [export(detector, options.out, options.nms, options.half)]
        if options.int8 or options.openvino:
            paths += importlib.import_module("tools.quantize").write(paths[0], inputs, options.openvino)
    except (UserError, OSError) as error:
        print(f"error: {sentence_of(error)}", file=sys.stderr)
        return 2
    for path in paths:
        print(f"written to {path} ({path.stat().st_size / 1e6:.1f} MB)")
    runtime = shlex.quote(str(paths[0].with_name(RUNTIME.name)))
    print(f"it runs with\n  python {runtime} {shlex.quote(str(paths[0]))} IMAGE --intrinsics FX FY CX CY")
    return 0


if __name__ == "__main__":
    sys.exit(main())
