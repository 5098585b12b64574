"""One table of a run's accuracy and speed, runtime by precision, each row by one and the same file.

    OMP_WAIT_POLICY=PASSIVE python -m tools.deploy RUN [--frames N] [--turns N] [--out DIR] [--json FILE] [key=value]

Exports the run in fp32, fp16 and int8, judges the detections of each file on data.val with KITTI's metrics (loose
overlaps), and times it on canvases of data.val, turn by turn, until duplicates are suppressed. What is not installed is
left out by name. Without the environment variable torch's idle threads slow the other runtimes.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from engine.runtime import FileDetector, native_bf16
from evaluate import evaluate, open_run, read_metric
from export import NEEDED, begin, export
from scene.frames import UserError, check_writable, sentence_of, to_canvas
from tools.quantize import calibration_inputs, write

FILES = (  # name of a file, its precision, what runs it, and in what precision OpenVINO is told to compute floats
    ("model.onnx", "fp32", "onnx", None),
    ("half/model.onnx", "fp16", "onnx", None),
    ("model.int8.onnx", "int8", "onnx", None),
    ("model.onnx", "fp32", "openvino", "fp32"),
    ("model.onnx", "bf16", "openvino", "bf16"),
    ("model.int8.xml", "int8", "openvino", None),
)
PACKAGES = ("torch", "onnxruntime", "openvino", "nncf")
FLAGS = ("avx2", "avx512_f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "dot", "i8mm", "bf16")
SIZES = (1, 4)  # images of a batch
CALLS = 10  # of one row in a turn, after one that warms up


@dataclasses.dataclass
class Row:
    """A line of the table. AP: per cent, moderate, R40, loose overlaps, mean over the classes."""

    runtime: str
    precision: str
    megabytes: float  # of the file; of torch, that of the graph in fp32
    ap_2d: float = 0.0
    ap_3d: float = 0.0
    ap_2d_lost: float = 0.0  # against torch in fp32
    ap_3d_lost: float = 0.0
    depth_error: float = 0.0  # m, mean over matched objects
    depth_error_gained: float = 0.0
    matched: int = 0  # objects of data.val that a detection of their class overlaps
    speed_ratio: float = 0.0  # of images a second, batch 1, to torch in fp32
    ms_1: float = 0.0  # median milliseconds of a batch of 1
    ms_1_p90: float = 0.0  # 90th percentile
    ms_4: float = 0.0
    ms_4_p90: float = 0.0
    ms_after: float = 0.0  # part of ms_1 that suppresses duplicates, the same code for all rows
    classes: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)  # class -> ap_2d, ap_3d


@dataclasses.dataclass
class Runner:
    """A detector, what finds its candidates, and what autocasts it."""

    detector: torch.nn.Module
    rank: Callable
    autocast: Callable = contextlib.nullcontext

    @torch.no_grad()
    def time(self, image, K) -> tuple[float, float]:
        """Seconds up to the candidates, and of the suppression of duplicates."""
        began = time.perf_counter()
        with self.autocast():
            candidates = self.rank(image, K)
        ranked = time.perf_counter()
        self.detector.suppress(candidates, K)
        return ranked - began, time.perf_counter() - ranked


def find_runners(detector, folder: Path):
    """[(Row without numbers, Runner)] of what can run here, torch in fp32 first, and sentences on what cannot."""

    def rank(image, K):
        logits, raw = detector(image, K)
        return detector.rank(logits.float(), raw, K)

    size, runners, left_out = megabytes(folder / "model.onnx"), [], []
    runners.append((Row("torch", "fp32", size), Runner(detector, rank)))
    if native_bf16():
        in_bf16 = Runner(detector, rank, lambda: torch.autocast("cpu", torch.bfloat16))
        runners.append((Row("torch", "bf16", size), in_bf16))
    else:
        left_out.append("torch bf16, which this processor has no instructions for")
    for name, precision, runtime, told in FILES:
        path, needed = folder / name, "onnxruntime" if runtime == "onnx" else "openvino"
        if told == "bf16" and not native_bf16():
            left_out.append(f"{needed} bf16, which this processor has no instructions for")
        elif path.is_file() and importlib.util.find_spec(needed):
            file = FileDetector(path, runtime, told)
            runners.append((Row(needed, precision, megabytes(path)), Runner(file, file.rank)))
        else:
            left_out.append(f"{needed} {precision}, as a package is not installed")
    return runners, left_out


def megabytes(path: Path) -> float:
    """Size of a file, and of that which holds the weights of an OpenVINO one, MB."""
    weights = [path.with_suffix(".bin")] if path.suffix == ".xml" else []
    return sum(file.stat().st_size for file in (path, *weights)) / 1e6


def judge(row: Row, runner: Runner, dataset, accelerator, config) -> None:
    """Fill in what the metrics say of a runner's detections on data.val."""
    with runner.autocast():
        metrics, _ = evaluate(runner.detector, dataset, accelerator, config, overlap="loose")
    level = "moderate/AP_R40"
    for name in config.model.classes:
        ap = {
            f"ap_{short}": read_metric(metrics, f"{name}/{key}/{level}")
            for short, key in (("2d", "bbox"), ("3d", "3d"))
        }
        row.classes[name] = ap
    row.ap_2d, row.ap_3d = read_metric(metrics, f"mean/bbox/{level}"), read_metric(metrics, f"mean/3d/{level}")
    errors = [metrics["errors"][name]["all"] for name in config.model.classes]
    row.matched = sum(error["matched"] for error in errors)
    total = sum(error["matched"] * (error["depth_error"] or 0) for error in errors)
    row.depth_error = total / max(row.matched, 1)


def measure(runners, dataset, turns: int) -> None:
    """Fill in the milliseconds: each row in its turn, so that a busy machine slows all alike."""
    samples = [dataset[number % len(dataset)] for number in range(max(SIZES))]
    image, K = (torch.stack([sample[name] for sample in samples]) for name in ("image", "K"))
    seconds = {(size, number): [] for size in SIZES for number in range(len(runners))}
    for _ in range(turns):
        for (size, number), times in seconds.items():
            calls = [runners[number][1].time(image[:size], K[:size]) for _ in range(CALLS + 1)]
            times += calls[1:]
    for number, (row, _) in enumerate(runners):
        for size in SIZES:
            whole = 1e3 * np.sum(seconds[size, number], 1)
            setattr(row, f"ms_{size}", float(np.median(whole)))
            setattr(row, f"ms_{size}_p90", float(np.quantile(whole, 0.9)))
        row.ms_after = float(1e3 * np.median(seconds[1, number], 0)[1])


def compare(rows: list[Row]) -> None:
    """Fill in what is told against the first row."""
    first = rows[0]
    for row in rows:
        row.ap_2d_lost, row.ap_3d_lost = first.ap_2d - row.ap_2d, first.ap_3d - row.ap_3d
        row.depth_error_gained = row.depth_error - first.depth_error
        row.speed_ratio = first.ms_1 / row.ms_1 if row.ms_1 else 0.0


def describe(config, dataset, options) -> dict[str, str | float]:
    """What the numbers depend on, and the milliseconds that it takes to read an image."""
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    frame, seconds = dataset.frames[0], []
    for _ in range(CALLS):
        began = time.perf_counter()
        to_canvas(frame.image, frame.K, config.model.size)
        seconds.append(time.perf_counter() - began)
    installed = [name for name in PACKAGES if importlib.util.find_spec(name)]
    return {
        "processor": str(has.get("cpu_name", "unknown")),
        "flags": " ".join(name for name in FLAGS if has.get(name)),
        "threads": torch.get_num_threads(),
        "versions": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in installed),
        "model": f"{config.model.backbone}, {config.model.size[0]}x{config.model.size[1]}",
        "frames": f"{len(dataset)} of data.val, {options.frames} of data.train to calibrate",
        "ms_before": float(1e3 * np.median(seconds)),  # decodes, resizes and pads an image: the same for all rows
    }


def show(about, rows: list[Row]) -> str:
    """The table as Markdown, behind what it depends on."""
    lines = [
        f"{name}: {value:.3g}" if isinstance(value, float) else f"{name}: {value}" for name, value in about.items()
    ]
    lines += ["", "| runtime | precision | speed | ms, batch 1 (p90) | after | ms, batch 4 (p90) | MB | AP 2D, lost "
              "| AP 3D, lost | depth error, m | matched |", "| --- " * 11 + "|"]  # fmt: skip
    for row in rows:
        cells = (row.runtime, row.precision, f"{row.speed_ratio:.2f}", f"{row.ms_1:.1f} ({row.ms_1_p90:.1f})",
                 f"{row.ms_after:.1f}", f"{row.ms_4:.1f} ({row.ms_4_p90:.1f})", f"{row.megabytes:.1f}",
                 f"{row.ap_2d:.2f}, {row.ap_2d_lost:+.2f}", f"{row.ap_3d:.2f}, {row.ap_3d_lost:+.2f}",
                 f"{row.depth_error:.2f}, {row.depth_error_gained:+.3f}", str(row.matched))  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def deploy(options) -> None:
    """Everything that the command does. Raises UserError."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise UserError(f"{' and '.join(missing)}: not installed; pip install {' '.join(NEEDED)}")
    check_writable(options.json)
    os.environ["ACCELERATE_USE_CPU"] = "true"  # which the files run on, and what they are compared with
    _, config, detector, dataset, accelerator = open_run(options.run, [*options.overrides, "train.mixed_precision=no"])
    if dataset.metrics != "kitti":
        raise UserError(f"the frames of data.val are {dataset.metrics}'s, expected such that KITTI's metrics judge")
    detector = detector.eval()
    inputs = calibration_inputs(config, options)
    begin(options.out, config)
    path = export(detector, options.out)
    export(detector, options.out / "half", half=True)
    write(path, inputs, importlib.util.find_spec("openvino") and importlib.util.find_spec("nncf"))
    runners, left_out = find_runners(detector, options.out)
    about = describe(config, dataset, options)
    for row, runner in runners:
        judge(row, runner, dataset, accelerator, config)
    measure(runners, dataset, options.turns)
    rows = [row for row, _ in runners]
    compare(rows)
    print("\n".join([show(about, rows), *(f"left out: {sentence}" for sentence in left_out)]))
    if options.json:
        content = {**about, "left_out": left_out, "rows": [dataclasses.asdict(row) for row in rows]}
        Path(options.json).write_text(json.dumps(content, indent=1))


def main(arguments: list[str] | None = None) -> int:
    """Command line entry. Returns 0, or 2 after one sentence on stderr for what the user got wrong."""
    parser = argparse.ArgumentParser(
        "tools.deploy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: parser.exit(2, f"tools.deploy: {message} (--help shows all)\n")
    add = parser.add_argument
    add("run", metavar="RUN")
    add("overrides", nargs="*", metavar="key=value", help="changes to its config: data.root=/kitti")
    add("--frames", metavar="N", type=int, default=320, help="of data.train, that int8 is calibrated on; default: 320")
    add("--turns", metavar="N", type=int, default=10, help="of ten calls, that are timed; default: 10")
    add("--out", metavar="DIR", type=Path, default=Path("deployed"), help="where the files go; default: deployed")
    add("--json", metavar="FILE", help="write every number here too")
    options = parser.parse_intermixed_args(arguments)
    if min(options.frames, options.turns) < 1:
        parser.error("--frames and --turns: expected at least 1")
    try:
        deploy(options)
    except (UserError, OSError) as error:
        print(f"tools.deploy: {sentence_of(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
