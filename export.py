"""Export a detector to ONNX, with the camera matrix as an input.

python export.py RUN [--size H W] [--half] [--nms] [--out DIR]

RUN is a run folder, a folder with config.json and model.safetensors, or a Hugging Face hub id. Written to DIR: model.onnx, and
onnx_detector.py, which runs it on images of any size with numpy, Pillow and onnxruntime alone, without torch and this project.

Inputs: image (B, H, W, 3) uint8 RGB of the canvas, K (B, 3, 3) of the canvas; B is free. Outputs, in pixels of the canvas and metres of
each camera, S = model.candidates rows an image, as `Detector.rank` gives them before duplicates are suppressed: label (B, S), score
(B, S), box (B, S, 4), pixel (B, S, 2), depth (B, S), size (B, S, 3), alpha (B, S), sigma (B, S),
and velocity (B, S, 3) and attribute (B, S) of a model that has them. With --nms the graph does what
`Detector.select` does: S = model.max_detections, best score first, center (B, S, 3) and yaw (B, S) in place of pixel, depth and alpha;
rows with score 0 hold nothing. The metadata entry `deep3d` is JSON: the version of this layout, nms, half, and the config's section model.
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

from model import Detector, average_duplicates
from predict import load_detector
from scene.geometry import alpha_to_yaw, unproject

VERSION = 1  # of inputs, outputs and metadata
OPSET = 18
NEEDED = ("onnx", "onnxscript", "onnxruntime")
RUNTIME = Path(__file__).parent / "examples" / "onnx_detector.py"


class Rows(nn.Module):
    """A detector whose outputs are tensors of fixed shape: the best candidates, or with suppression the detections."""

    def __init__(self, detector: Detector, suppress: bool, half: bool):
        super().__init__()
        self.detector, self.suppress, self.half = copy.deepcopy(detector), suppress, half
        if half:
            for (
                part
            ) in self.detector.children():  # what `decode` knows are the detector's own buffers, which stay in fp32
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
    """`Detector.select` in fixed shapes: (B, S, ...) candidates -> (B, max_detections, ...), rows that hold nothing with score 0."""
    images, candidates = boxes["score"].shape
    flat = {name: value.flatten(0, 1) for name, value in boxes.items()}
    flat["label"] = (
        boxes["label"] + len(config.classes) * torch.arange(images)[:, None]
    ).flatten()  # of other images: other classes
    apart = flat["box"] + flat["label"][:, None] * (
        max(config.size) + 1
    )  # as torchvision's batched_nms keeps classes apart
    keep = nms(apart, flat["score"], config.nms_iou)
    if across := config.nms_across_classes:
        images_apart = flat["box"] + (flat["label"] // len(config.classes))[:, None] * (max(config.size) + 1)
        keep = keep[nms(images_apart[keep], flat["score"][keep], across)]
    kept = torch.zeros_like(flat["score"]).scatter(0, keep, 1.0)
    score = flat["score"] * kept * (flat["score"] > config.score_threshold)
    best, rows = score.unflatten(0, (images, candidates)).topk(min(config.max_detections, candidates))
    rows = (rows + candidates * torch.arange(images)[:, None]).flatten()
    own = {name: value[rows] for name, value in flat.items()}
    if config.fuse_duplicates:
        own["box"], own["pixel"], own["depth"] = average_duplicates(own, flat, config.nms_iou)
    own = {name: value.unflatten(0, best.shape) for name, value in own.items()}
    center = unproject(own.pop("pixel"), own.pop("depth"), K[:, None].float())
    yaw = alpha_to_yaw(own.pop("alpha"), center)
    return {**own, "label": own["label"] % len(config.classes), "score": best, "center": center, "yaw": yaw}


def export(detector: Detector, folder: str | Path, suppress: bool = False, half: bool = False) -> Path:
    """Write model.onnx of a detector, and the runtime beside it, into a folder. Returns the path of model.onnx."""
    import onnx

    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {folder}: no folder can be made there: {error.strerror}") from None
    config, rows = detector.config, Rows(detector, suppress, half).eval().requires_grad_(False)
    height, width = config.size
    image = torch.zeros(2, height, width, 3, dtype=torch.uint8)
    K = torch.tensor([[width, 0.0, width / 2], [0.0, width, height / 2], [0.0, 0.0, 1.0]]).repeat(2, 1, 1)
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's exporter, about its own parts
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        rows(image, K)  # fills in the names
        program = torch.onnx.export(
            rows,
            (image, K),
            input_names=["image", "K"],
            output_names=rows.names,
            dynamic_shapes=({0: batch}, {0: batch}),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    model = program.model_proto
    for part in (*model.graph.node, *model.graph.value_info, model.graph):
        del part.metadata_props[:]  # the exporter's stack traces, with paths of this machine
    about = {"version": VERSION, "nms": suppress, "half": half, "model": dataclasses.asdict(config)}
    onnx.helper.set_model_props(model, {"deep3d": json.dumps(about)})
    onnx.save(model, folder / "model.onnx")
    shutil.copy(RUNTIME, folder)
    return folder / "model.onnx"


def resize(detector: Detector, size: tuple[int, int]) -> Detector:
    """The same weights for another canvas (height, width). Raises ValueError where they do not fit another."""
    other = Detector(dataclasses.replace(detector.config, size=size, pretrained=False))
    try:
        other.load_state_dict(detector.state_dict())
    except RuntimeError:
        raise ValueError(
            f"--size {size[0]} {size[1]}: the weights of {detector.config.backbone} are made for {detector.config.size}"
        ) from None
    return other


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line. Exits with code 2 and one sentence when it is wrong."""
    parser = argparse.ArgumentParser(
        prog="export.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    parser.add_argument("run", metavar="RUN")
    parser.add_argument(
        "--size", metavar=("H", "W"), nargs=2, type=int, help="canvas in pixels (default: the run's model.size)"
    )
    parser.add_argument(
        "--half", action="store_true", help="fp16 weights, and fp16 where torch.autocast would compute in it"
    )
    parser.add_argument("--nms", action="store_true", help="suppress and average duplicates in the graph")
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("exported"), help="default: exported")
    options = parser.parse_args(arguments)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed: pip install {' '.join(NEEDED)}"
        )
    return options


def main(arguments: list[str] | None = None) -> int:
    """Command line entry. Returns 0, or 2 after one sentence on stderr for an error of the user's."""
    options = parse_arguments(arguments)
    try:
        detector = load_detector(options.run)
        if options.size:
            detector = resize(detector, tuple(options.size))
        path = export(detector, options.out, options.nms, options.half)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"written to {path} ({path.stat().st_size / 1e6:.1f} MB); it runs with")
    print(
        f"  python {shlex.quote(str(path.with_name(RUNTIME.name)))} {shlex.quote(str(path))} IMAGE --intrinsics FX FY CX CY"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
