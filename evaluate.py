"""Evaluate a trained run with the metrics of its data: KITTI's average precision, or nuScenes' detection score.

    accelerate launch evaluate.py RUN [key=value ...]        the best checkpoint of a run folder, or a checkpoint folder
    python evaluate.py FILE --runtime onnx [key=value ...]   a file of export.py, with config.json beside it
    accelerate launch evaluate.py RUN --submission DIR       what KITTI's server takes: the command tools.submit
    python evaluate.py --labels DIR --results DIR [...]      KITTI files of any detector: the command metrics.kitti
    python evaluate.py --nuscenes ROOT --results FILE [...]  a nuScenes file; --argoverse ROOT: one of Argoverse 2

Files need neither timm nor a GPU. --report writes a page that shows what is wrong in which frames: docs/report.md.
"""

import argparse
import contextlib
import dataclasses
import importlib
import json
import math
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import Detection3D, build_dataset, loading
from scene.draw import SHOWN_FRAMES, draw_frames
from scene.frames import Labels, UserError, check_writable, make_folder, make_labels, sentence_of
from scene.geometry import yaw_to_alpha

CALIBRATION_OBJECTS = 100  # of a class, that its sigma is fitted to: the factor is known to an eighth then
WORST = 1e9  # of a metric of which less is better, where nothing can be averaged: JSON has no infinity


def detect_frames(detector, dataset, order, workers, device, autocast=contextlib.nullcontext, minutes=10.0):
    """Yield (frame, its detections as `to_source` gives them) for batches of indices, one frame after another.

    order: a sequence of indices for each batch; minutes: how long one may take to load. None stands for an image that
    could not be read (data.skip_bad).
    """
    with loading(dataset, order, workers, device, minutes) as batches:
        for indices, batch in zip(order, batches, strict=True):
            with autocast():
                detections = detector.detect(batch["image"].to(device), batch["K"].to(device))
            for index, shown, detection in zip(indices, batch["index"].tolist(), detections, strict=True):
                labels = None
                if shown == index:
                    labels = to_source(detection, dataset, index, detector.config.attribute_names)
                yield dataset.frames[index], labels


def to_source(detection, dataset: Detection3D, index: int, attributes) -> Labels:
    """One dict of `Detector.detect` -> Labels in the source's own frame and pixels; attributes: names of indices."""
    from model import to_labels

    labels = to_labels(detection, dataset.view_of(index), dataset.classes, attributes=attributes)
    center = labels.center - dataset.frames[index].offset  # before alpha, which belongs to the source's own x and z
    return dataclasses.replace(labels, center=center, alpha=yaw_to_alpha(labels.yaw, center))


def predict_dataset(
    detector, dataset, accelerator, batch_size=8, workers=0, flip=False, minutes=10.0
) -> dict[str, Labels]:
    """Detections of every frame of a data set, each exactly once, whatever the number of processes.

    Returns, on every process and in the frames' order, id -> Labels in the source's own frame and pixels, empty where
    the image could not be read. flip: the mean of what is said of an image and of its mirror image; minutes: how long a
    batch may take to load.
    """
    from accelerate.utils import gather_object

    own = range(accelerator.process_index, len(dataset), accelerator.num_processes)
    order = [own[start : start + batch_size] for start in range(0, len(own), batch_size)]
    training = detector.training
    detector.eval()
    looking = importlib.import_module("engine.mirror").Mirrored(detector) if flip else detector
    frames = detect_frames(looking, dataset, order, workers, accelerator.device, accelerator.autocast, minutes)
    frames = tqdm(frames, "evaluating", len(own), disable=None if accelerator.is_main_process else True)
    nothing = make_labels([], [], [], [], [])
    detections = []
    for index, (frame, labels) in zip(own, frames, strict=True):
        detections.append((index, frame.id, nothing if labels is None else labels))
    detector.train(training)
    gathered = sorted(gather_object(detections), key=lambda detection: detection[0])
    assert [index for index, _, _ in gathered] == list(range(len(dataset))), f"gathered {len(gathered)} frames"
    return {id: labels for _, id, labels in gathered}


def evaluate(detector, dataset, accelerator, config, flip=False, folder=None, overlap=""):
    """(metrics, predictions) of a detector on a data set, the same on every process.

    folder: where the metric's own files go, such as results for the official evaluator; overlap: of KITTI's metrics.
    """
    from accelerate.utils import broadcast_object_list

    options, workers = config.train, config.data.workers
    predictions = predict_dataset(detector, dataset, accelerator, options.batch_size, workers, flip, options.timeout)
    metrics = [None]  # by the main process alone: all of nuScenes' tables fill gigabytes while they are read
    if accelerator.is_main_process:
        metrics = [compute_metrics(dataset, predictions, config, folder, overlap)]
    return broadcast_object_list(metrics)[0], predictions


def compute_metrics(dataset, predictions, config, folder=None, overlap="") -> dict:
    """Every number of an evaluation; without predictions, before training, every name that there will be.

    The place for a metric of one's own: a number added under a name is logged, and best=mine, or best=-mine where lower
    is better, follows it. Raises UserError for what cannot be evaluated.
    """
    module = importlib.import_module(f"metrics.{dataset.metrics}")
    if predictions:
        metrics = module.evaluate(dataset, predictions, config, folder, overlap)
    else:
        metrics = module.blank(dataset, config)
    return metrics


def format_metrics(dataset, metrics, *options) -> str:
    """The table of an evaluation; options: of the metric's own `table`."""
    return importlib.import_module(f"metrics.{dataset.metrics}").table(metrics, *options)


def calibrate(model, metrics):
    """The `ModelConfig` whose sigma holds .757 of the depth errors of some metrics, as that of a Laplace law does.

    One factor a class, as a temperature mends probabilities (Guo et al., ICML 2017), of metrics of the learned sigma. 1
    for a class with few matched objects; the model as it is where all have few, or the metrics are nuScenes'.
    """
    scales = []
    for name in model.classes:
        errors = metrics.get("errors", {}).get(name, {}).get("all", {})
        ratio = errors.get("sigma_ratio") or 0.0
        fitted = errors.get("matched", 0) >= CALIBRATION_OBJECTS and 0 < ratio < math.inf
        scales.append(float(f"{ratio:.4g}") if fitted else 1.0)
    return dataclasses.replace(model, sigma_scale=tuple(scales)) if set(scales) != {1.0} else model


def read_metric(metrics: dict, name: str) -> float:
    """The number under a path of keys, 'Car/3d/moderate/AP_R40' or 'NDS', or '-NAME' of one of which less is better.

    'mean' in place of a class is the mean over the classes that have counted objects. What cannot be averaged counts as
    the worst value. Raises UserError naming the keys that there are.
    """
    place, sign, keys = metrics, "-" * name.startswith("-"), name.removeprefix("-").split("/")
    if keys[0] == "mean" and "settings" in metrics:
        classes = metrics["settings"]["classes"]
        classes = [one for one in classes if any(metrics["counted"][one].values())] or classes
        return sum(read_metric(metrics, sign + "/".join([one, *keys[1:]])) for one in classes) / len(classes)
    for key in keys:
        if not isinstance(place, dict) or key not in place:
            means = ["mean"] if place is metrics and "settings" in metrics else []
            names = ", ".join([*place, *means]) if isinstance(place, dict) else "no keys below it"
            raise UserError(f"best={name}: there is no {key!r} among the metrics, only {names}")
        place = place[key]
    if isinstance(place, dict | list | str):
        raise UserError(f"best={name} is not one number, expected more keys: {', '.join(place)}")
    return (WORST if sign else 0.0) if place is None or np.isnan(place) else float(place)


def flat_metrics(metrics: dict, path="") -> dict[str, float]:
    """Every number of an evaluation by its path, for logs; curves and settings apart."""
    numbers = {}
    for key, value in metrics.items():
        if isinstance(value, dict) and key not in ("curves", "settings", "cfg"):
            numbers |= flat_metrics(value, f"{path}{key}/")
        elif isinstance(value, int | float) and not np.isnan(value):
            numbers[path + key] = value
    return numbers


def write_evaluation(folder: Path, dataset, metrics, predictions) -> None:
    """predictions.jsonl, metrics.json and worst.png into a folder, beside what `evaluate` has written there."""
    from scene.records import write_jsonl

    moved = {frame.id: predictions[frame.id].moved(frame.offset) for frame in dataset.frames}
    frames = [dataclasses.replace(frame, labels=moved[frame.id]) for frame in dataset.frames]
    write_jsonl(folder / "predictions.jsonl", frames)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1))
    sheet = draw_frames(dataset.frames, predictions, metrics, dataset.classes, best=0, worst=2 * SHOWN_FRAMES)
    sheet.save(folder / "worst.png")


def open_run(run, overrides, runtime=None, precision=None):
    """The folder of a run's weights, or a file for a runtime; its config, detector and data set; and an Accelerator."""
    from engine.guard import start_accelerator
    from engine.weights import find_checkpoint, load_run, stay_at_home

    folder = Path(run) if runtime else find_checkpoint(run)
    files = importlib.import_module("engine.runtime") if runtime or precision else None
    if runtime:
        config, detector, accelerator = files.open_file(folder, overrides, runtime, precision)
    else:
        chosen = [f"train.mixed_precision={'bf16' if precision == 'bf16' else 'no'}"] * bool(precision)
        config, detector = load_run(folder, [*overrides, *chosen])
        accelerator = start_accelerator(config.train)
        if precision:
            files.refuse_emulation(precision, accelerator.device)
    config = stay_at_home(config, overrides)
    dataset = build_dataset(config, training=False)
    return folder, config, detector.to(accelerator.device), dataset, accelerator


def evaluate_run(options: argparse.Namespace) -> None:
    """Evaluate a run: prints the table on the main process and fills the folder `evaluation` beside the checkpoint."""
    overrides = [*options.overrides, *[f"train.eval_repeat={options.repeat}"] * bool(options.repeat)]
    opened = open_run(options.run, overrides, options.runtime, options.precision)
    folder, config, detector, dataset, accelerator = opened
    shown = (options.metric, options.errors) if dataset.metrics == "kitti" else ()
    if unused := [name for name in ("metric", "overlap", "errors") if getattr(options, name) and not shown]:
        raise UserError(f"--{unused[0]} belongs to KITTI's metrics, and the frames of data.val are {dataset.metrics}'s")
    compute_metrics(dataset, {}, config)  # what cannot be evaluated is told before the work
    report = importlib.import_module("tools.report") if options.report or options.report_frames else None
    if report:
        report.refuse_unknown(dataset)
    out = Path(options.out or (f"{folder}.evaluation" if options.runtime else Path(options.run) / "evaluation"))
    results = out / "results"
    if accelerator.is_main_process:
        if out.is_symlink() or results.is_symlink() or (results.exists() and not (out / "metrics.json").exists()):
            raise UserError(f"{out} holds results of something else; --out chooses another folder")
        make_folder(out, "--out")
        check_writable(out / "metrics.json", options.json)
    metrics, predictions = evaluate(detector, dataset, accelerator, config, options.flip, out, options.overlap)
    if accelerator.is_main_process:
        write_evaluation(out, dataset, metrics, predictions)
        if options.json:
            Path(options.json).write_text(json.dumps(metrics, indent=1))
        if report:
            report.write_run(out / "report.html", dataset, metrics, predictions, config, options.report_frames)
        print(format_metrics(dataset, metrics, *shown))
        print(f"{folder}: {', '.join(sorted(path.name for path in out.glob('*')))} are in {out}")
    accelerator.end_training()


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line of a run. Exits with code 2 and one sentence when it is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"evaluate.py: {message} (--help shows all)\n")
    add = parser.add_argument
    add("run", metavar="RUN", help="run folder or checkpoint folder; with --runtime a file of export.py")
    add("overrides", nargs="*", metavar="key=value", help="changes to its config: data.root=/kitti")
    add("--flip", action="store_true", help="average what is said of an image and of its mirror image")
    add("--runtime", choices=("onnx", "openvino"), help="what runs a file that export.py wrote, in place of torch")
    add("--precision", choices=("fp32", "bf16"), help="of torch or OpenVINO; default: the run's, OpenVINO's own choice")
    add("--out", metavar="DIR", help="where the evaluation goes; default: RUN/evaluation, FILE.evaluation")
    add("--json", metavar="OUT", help="write every number here too")
    add("--metric", choices=("R40", "R11"), help="KITTI: recall positions of the table; default: R40")
    add("--overlap", choices=("strict", "loose"), help="KITTI: overlap thresholds; default: strict")
    add("--repeat", type=int, metavar="N", help="KITTI: count frames N times, if objects are few")
    add("--errors", action="store_true", help="KITTI: also print depth, heading and size errors")
    add("--report", action="store_true", help="also write report.html, to look at frames by what is wrong in them")
    add("--report-frames", type=int, metavar="N", help="the report, with so many frames; default: 150")
    options = parser.parse_intermixed_args(arguments)  # key=value may follow an option
    for name in ("repeat", "report_frames"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}, expected 1 or more")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Command line entry. Returns 0, or 2 after one sentence on stderr for what the user got wrong, or a full disk."""
    kinds = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--labels", "--nuscenes", "--argoverse", "--results", "--submission"):
        kinds.add_argument(name)
    given, rest = kinds.parse_known_args(arguments)
    if given.submission is not None:
        return importlib.import_module("tools.submit").main([*rest, given.submission])
    truth = {"kitti": given.labels, "nuscenes": given.nuscenes, "argoverse": given.argoverse}
    truth = [(name, folder) for name, folder in truth.items() if folder is not None]
    if len(truth) == 1 and given.results is not None:
        [(name, folder)] = truth
        return importlib.import_module(f"metrics.{name}").main([folder, given.results, *rest])
    try:
        if truth or given.results is not None:
            raise UserError("an evaluation of files needs --labels, --nuscenes or --argoverse, and --results")
        evaluate_run(parse_arguments(rest))
    except (UserError, OSError) as error:
        print(f"evaluate.py: {sentence_of(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
