"""Evaluate a trained run, or any detector's result files, with KITTI's average precision.

    accelerate launch evaluate.py RUN [key=value ...]       the best checkpoint of a run folder, or a checkpoint folder
    python evaluate.py --labels DIR --results DIR [--split FILE] [--json OUT]      KITTI label and result files

The second needs neither timm nor a GPU: files are read in rectified camera 0 and compared as they are.
"""

from __future__ import annotations  # Accelerator and Detection3D are named in signatures only, so that files need neither

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader

from data_kitti import Labels, make_labels, read_labels, write_labels
from geometry import box3d_iou
from metrics import CLASSES, DIFFICULTIES, MIN_OVERLAP, format_table, kitti_ap, object_errors

if TYPE_CHECKING:
    from accelerate import Accelerator

    from config import Config
    from data import Detection3D
    from model import Detector

SHOWN_FRAMES = 3  # best, and as many worst, on the picture


# ---- a model on a data set


class Stopped(Exception):
    """An evaluation was asked to stop, on all processes alike."""


def predict_dataset(
    model: torch.nn.Module,
    dataset: Detection3D,
    accelerator: Accelerator,
    batch_size: int = 8,
    workers: int = 0,
    progress: bool = True,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, tuple[Labels, np.ndarray]]:
    """Detections of every frame of a `Detection3D`, each exactly once, whatever the number of processes.

    Each process takes every so-manieth frame; one exchange at the end. Returns, on every process and in the order of dataset.ids,
    id -> (Labels in the source's own frame and original pixels, sigma (n,) metres of depth). A frame whose image could not be
    read (data.skip_bad) has no detections, and is counted on stderr. Raises `Stopped` on every process, after the same batch, once
    `stop()` holds on one of them.
    """
    from accelerate.utils import gather_object  # the files mode needs neither

    from data import collate, loading, start_worker

    if len(set(dataset.ids)) != len(dataset.ids):
        raise ValueError("data.val lists frames more than once, expected repeat=1; train.eval_repeat counts each frame several times")
    own = list(range(len(dataset)))[accelerator.process_index :: accelerator.num_processes]
    batches = [own[start : start + batch_size] for start in range(0, len(own), batch_size)]
    generator = torch.Generator()  # else the loader draws from the global one
    loader = DataLoader(
        dataset, batch_sampler=batches, collate_fn=collate, num_workers=workers, worker_init_fn=start_worker, generator=generator
    )
    detector = accelerator.unwrap_model(model)
    training = detector.training
    detector.eval()
    found, unread = [], []
    frames_each = -(-len(dataset) // accelerator.num_processes)
    rounds = -(-frames_each // batch_size)  # equal on all processes, of which some have a batch fewer
    with loading(loader) as loaded:
        for number in range(1, rounds + 1):
            if accelerator.reduce(torch.tensor(float(stop()), device=accelerator.device)) > 0:
                detector.train(training)
                raise Stopped
            if number > len(batches):
                continue
            indices, batch = batches[number - 1], next(loaded)
            with accelerator.autocast():
                detections = detector.detect(batch["image"].to(accelerator.device), batch["K"].to(accelerator.device))
            for index, skipped, detection in zip(indices, batch["skipped"].tolist(), detections, strict=True):
                if skipped:
                    unread.append(dataset.ids[index])
                    detection = {name: value[:0] for name, value in detection.items()}
                found.append((dataset.ids[index], to_source(detection, dataset, index, skipped)))
            if progress and accelerator.is_main_process:
                show_progress("evaluating batch", number, rounds)
    detector.train(training)
    gathered = gather_object(found)
    predictions = dict(gathered)
    assert sorted(id for id, _ in gathered) == sorted(dataset.ids), f"gathered {len(gathered)} frames of a data set of {len(dataset)}"
    if unread:
        print(f"{len(unread)} unreadable images count as frames without detections, the first is {unread[0]}", file=sys.stderr)
    return {id: predictions[id] for id in dataset.ids}


def to_source(detection: dict[str, torch.Tensor], dataset: Detection3D, index: int, skipped: int = 0) -> tuple[Labels, np.ndarray]:
    """One dict of `Detector.detect` -> (Labels in the source's own frame and original pixels, sigma (n,))."""
    from model import to_prediction

    if skipped:
        return make_labels([], [], [], [], []), np.zeros(0)
    found = to_prediction(detection, dataset.view_of(index), dataset.classes)
    center = found.center - dataset.frames[index].offset  # before alpha is derived: KITTI's alpha belongs to its own file's x and z
    return make_labels(found.name, found.box, found.size, center, found.yaw, score=found.score), found.sigma


def evaluate(
    model: torch.nn.Module,
    dataset: Detection3D,
    accelerator: Accelerator,
    batch_size: int = 8,
    workers: int = 0,
    repeat: int = 1,
    overlap: str = "strict",
    progress: bool = True,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[dict, dict[str, tuple[Labels, np.ndarray]]]:
    """Metrics of a model on a data set, the same on every process, and its predictions.

    Returns the dict of `kitti_ap` with `object_errors` under "errors", and the dict of `predict_dataset`. Raises its `Stopped`.
    """
    predictions = predict_dataset(model, dataset, accelerator, batch_size, workers, progress, stop)
    truth = {id: dataset.truth(index) for index, id in enumerate(dataset.ids)}
    results = {id: labels for id, (labels, _) in predictions.items()}
    metrics = kitti_ap(truth, results, dataset.classes, overlap, repeat)
    metrics["errors"] = object_errors(truth, results, dataset.classes, {id: sigma for id, (_, sigma) in predictions.items()})
    return metrics, predictions


def show_progress(what: str, done: int, total: int) -> None:
    """A line that counts on a terminal; nothing elsewhere."""
    if sys.stderr.isatty():
        print(f"\r{what} {done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)


# ---- what an evaluation leaves behind


def write_evaluation(folder: str | Path, dataset: Detection3D, metrics: dict, predictions: dict[str, tuple[Labels, np.ndarray]]) -> None:
    """results/<id>.txt (KITTI format, the source's own frame and pixels), predictions.jsonl, metrics.json and pictures, into a folder."""
    from data_json import Record, write_jsonl

    folder = Path(folder)
    (folder / "results").mkdir(parents=True, exist_ok=True)
    for old in (folder / "results").glob("*.txt"):
        old.unlink()
    records = []
    for index, (id, (labels, sigma)) in enumerate(predictions.items()):
        write_labels(folder / "results" / f"{id.replace('/', '_')}.txt", labels, scores=True, digits=4)
        frame = dataset.frames[index]
        records.append(Record(id, frame.image.absolute(), frame.K, labels.moved(frame.offset), depth_sigma=sigma))
    write_jsonl(folder / "predictions.jsonl", records)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1))
    draw_curves(metrics).save(folder / "curves.png")
    draw_frames(dataset, metrics, predictions).save(folder / "frames.png")


def best_score(metrics: dict) -> float:
    """The score threshold with the highest F1 on moderate objects in 2D, all classes counted together: a level for pictures."""
    curves, counted = ([metrics[key][name] for name in metrics["settings"]["classes"]] for key in ("curves", "counted"))
    curves = [{key: np.array(values) for key, values in curve["bbox"]["moderate"].items()} for curve in curves]
    levels = np.unique(np.concatenate([curve["score"] for curve in curves]))
    true, found = np.zeros(len(levels)), np.zeros(len(levels))
    for curve, objects in zip(curves, counted, strict=True):
        last = (curve["score"][None] >= levels[:, None]).sum(1) - 1  # scores fall along a curve
        hits = objects["moderate"] * np.append(curve["recall"], 0.0)[last]  # none above a class's best score
        true += hits
        found += hits / np.maximum(np.append(curve["precision"], 1.0)[last], 1e-9)
    f1 = 2 * true / np.maximum(found + sum(objects["moderate"] for objects in counted), 1e-9)
    return float(levels[f1.argmax()]) if f1.max(initial=0) > 0 else 0.3


def frame_quality(truth: Labels, found: Labels, classes: Sequence[str]) -> float:
    """Mean over the objects of a frame of the best 3D overlap with one of its k top-scored detections of the same class, k objects.

    Returns a share in [0, 1], or NaN for a frame without objects. Independent of the level of the scores.
    """
    truth = truth[np.isin(truth.name.astype(str), classes) & truth.is_3d]
    if not len(truth):
        return float("nan")
    found = found[np.argsort(-found.score, kind="stable")[: len(truth)]]
    if not len(found):
        return 0.0
    as_rows = lambda labels: np.concatenate([labels.center, labels.size, labels.yaw[:, None]], 1)  # noqa: E731
    i, j = np.indices((len(truth), len(found))).reshape(2, -1)
    overlap = box3d_iou(as_rows(truth)[i], as_rows(found)[j]) * (truth.name[i] == found.name[j])
    return float(overlap.reshape(len(truth), len(found)).max(1).mean())


def draw_frames(
    dataset: Detection3D, metrics: dict, predictions: dict[str, tuple[Labels, np.ndarray]], count: int = SHOWN_FRAMES
) -> Image.Image:
    """A sheet of the best frames, then the worst, by `frame_quality`; detections above `best_score`. Returns a PIL image."""
    from data import load_image
    from draw import draw_frame, draw_sheet

    quality = np.array([frame_quality(dataset.truth(i), labels, dataset.classes) for i, (labels, _) in enumerate(predictions.values())])
    order = np.argsort(-quality, kind="stable")  # NaN last
    ranked = [int(i) for i in order if np.isfinite(quality[i])] or list(range(len(quality)))
    chosen = list(dict.fromkeys([*ranked[:count], *ranked[-count:]]))
    least = best_score(metrics)
    pictures = []
    for place, index in enumerate(chosen):
        frame = dataset.frames[index]
        found = predictions[frame.id][0].moved(frame.offset)
        picture = draw_frame(load_image(frame.image), frame.K, found, frame.labels, dataset.classes, min_score=least)
        side = "best" if place < count else "worst"
        pictures.append(_captioned(picture, f"{side}: {frame.id}   mean 3D overlap {quality[index]:.2f}   scores from {least:.2f}"))
    return draw_sheet(pictures)


def _captioned(picture, text):
    """The picture under a line of text."""
    canvas = Image.new("RGB", (picture.width, picture.height + 26), (22, 24, 28))
    canvas.paste(picture, (0, 26))
    ImageDraw.Draw(canvas).text((8, 13), text, font=ImageFont.load_default(size=15), fill=(214, 217, 222), anchor="lm")
    return canvas


COLOURS = {"easy": (46, 139, 87), "moderate": (31, 95, 180), "hard": (200, 60, 50)}
PANEL, MARGIN = (300, 220), (52, 46)  # pixels: plotting area, and the room around it


def draw_curves(metrics: dict) -> Image.Image:
    """Precision over recall of the result of `kitti_ap`: a row per class, a panel per metric, a line per difficulty. Returns a PIL image.

    Drawn over the 41 recall positions that AP averages, so the area under a line is its AP.
    """
    classes = metrics["settings"]["classes"]
    titles = {"bbox": "2D", "aos": "AOS", "bev": "BEV", "3d": "3D"}
    step = (PANEL[0] + MARGIN[0] + 16, PANEL[1] + MARGIN[1] + 30)
    canvas = Image.new("RGB", (step[0] * len(titles) + 10, step[1] * len(classes) + 10), (255, 255, 255))
    draw = ImageDraw.Draw(canvas)
    for row, name in enumerate(classes):
        for column, (metric, title) in enumerate(titles.items()):
            corner = (MARGIN[0] + column * step[0], 34 + row * step[1])
            _draw_panel(draw, corner, f"{name} {title}", metrics["curves"][name][metric], metrics[name][metric])
    return canvas


def _draw_panel(draw, corner, title, curves, averages):
    """One panel of `draw_curves` with its left top corner at `corner`."""
    font, small = ImageFont.load_default(size=14), ImageFont.load_default(size=11)
    left, top = corner
    place = lambda recall, precision: (left + recall * PANEL[0], top + (1 - precision) * PANEL[1])  # noqa: E731
    for tick in (0, 0.25, 0.5, 0.75, 1):
        draw.line([place(tick, 0), place(tick, 1)], fill=(228, 228, 228))
        draw.line([place(0, tick), place(1, tick)], fill=(228, 228, 228))
        draw.text((place(tick, 0)[0], top + PANEL[1] + 4), f"{tick:g}", font=small, fill=(90, 90, 90), anchor="ma")
        draw.text((left - 5, place(0, tick)[1]), f"{tick:g}", font=small, fill=(90, 90, 90), anchor="rm")
    draw.rectangle((left, top, left + PANEL[0], top + PANEL[1]), outline=(120, 120, 120))
    draw.text((left, top - 22), title, font=font, fill=(20, 20, 20))
    draw.text((left + PANEL[0] / 2, top + PANEL[1] + 18), "recall", font=small, fill=(90, 90, 90), anchor="ma")
    for number, difficulty in enumerate(DIFFICULTIES):
        values = np.zeros(41)
        values[: len(curves[difficulty]["precision"])] = curves[difficulty]["precision"]
        draw.line([place(i / 40, value) for i, value in enumerate(values)], fill=COLOURS[difficulty], width=2)
        average = averages[difficulty]["AP_R40"]
        text = f"{difficulty} {'-' if average is None else f'{average:.1f}'}"
        draw.text((left + PANEL[0] - 6, top + 6 + 14 * number), text, font=small, fill=COLOURS[difficulty], anchor="ra")


# ---- files


def read_folder(
    labels: str | Path, results: str | Path, split: str | Path | None = None
) -> tuple[dict[str, Labels], dict[str, Labels], list[str], list[str]]:
    """Label and result files of the frames of a split file, or of all label files.

    Returns truth and results (id -> Labels in rectified camera 0), the ids without a result file, and the ids of result files that
    belong to no frame. Raises FileNotFoundError or ValueError in one sentence that names the file, and the line where there is one.
    """
    labels, results = _text_folder(labels, "--labels", LABEL_FOLDERS), _text_folder(results, "--results", RESULT_FOLDERS, empty=True)
    if split is None:
        ids = sorted(path.stem for path in labels.glob("*.txt"))
    else:
        if not Path(split).is_file():
            raise FileNotFoundError(f"{split}: no such split file, expected a text file with one frame id a line")
        ids = Path(split).read_text(encoding="utf-8").split()
        if not ids:
            raise ValueError(f"{split}: the split is empty, expected one frame id a line")
        if len(set(ids)) < len(ids):
            twice = next(id for id in ids if ids.count(id) > 1)
            raise ValueError(f"{split}: frame {twice} is listed twice; --repeat counts every frame several times")
    there = {path.stem for path in results.glob("*.txt")}
    truth, found = {}, {}
    for number, id in enumerate(ids, 1):
        if not (labels / f"{id}.txt").is_file():
            raise FileNotFoundError(f"{labels / id}.txt: no label file for frame {id} of {split}")
        truth[id] = read_labels(labels / f"{id}.txt")
        if id in there:
            found[id] = read_labels(results / f"{id}.txt", scores=True)
        if number % 200 == 0 or number == len(ids):
            show_progress("reading frame", number, len(ids))
    return truth, found, [id for id in ids if id not in there], sorted(there - set(ids))


LABEL_FOLDERS, RESULT_FOLDERS = ("label_2", "training/label_2"), ("data", "results")  # where a parent folder usually holds the files


def _text_folder(path, option, usual, empty=False):
    """Folder with .txt files as a Path; `empty` allows none. Raises FileNotFoundError with advice: a usual folder inside that has some."""
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{option} {path}: no such folder")
    if not any(path.glob("*.txt")):
        inside = [name for name in usual if any((path / name).glob("*.txt"))]
        if inside or not empty:
            hint = f"did you mean {path / inside[0]}?" if inside else "expected one file per frame, such as 000000.txt"
            raise FileNotFoundError(f"{option} {path}: no .txt files here; {hint}")
    return path


def evaluate_files(options: argparse.Namespace) -> None:
    """The files mode: prints the table, and what is missing or extra; writes what was asked for."""
    truth, results, missing, extra = read_folder(options.labels, options.results, options.split)
    metrics = kitti_ap(truth, results, tuple(options.classes), options.overlap, options.repeat)
    metrics["errors"] = object_errors(truth, results, tuple(options.classes))
    metrics["files"] = {"missing_results": len(missing), "extra_results": len(extra)}
    print(format_table(metrics, options.metric, metrics["errors"] if options.errors else None))
    if missing:
        print(f"{len(missing)} of {len(truth)} frames have no result file and count as empty, the first is {missing[0]}.txt")
    if extra:
        print(f"{len(extra)} result files belong to no evaluated frame and are left out, the first is {extra[0]}.txt")
    if options.json:
        Path(options.json).write_text(json.dumps(metrics, indent=1))
    if options.curves:
        draw_curves(metrics).save(options.curves)


# ---- runs


def find_checkpoint(run: str | Path) -> Path:
    """Folder with config.json and model.safetensors: a checkpoint folder itself, or of a run the best, else the newest.

    Raises FileNotFoundError saying what was looked for.
    """
    from checkpoint import CONFIG, find_weights

    if not Path(run).exists():
        raise FileNotFoundError(f"{run}: no such run or checkpoint folder")
    folder = find_weights(run).parent
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder / CONFIG}: missing beside the weights, expected a folder written by train.py")
    return folder


def load_run(folder: str | Path, overrides: Sequence[str] = ()) -> tuple[Config, Detector]:
    """Config, with overrides, and detector of a checkpoint folder. Raises ValueError naming the file that does not fit."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from checkpoint import CONFIG, MODEL
    from config import override, read_config
    from model import Detector

    folder = Path(folder)
    config = override(read_config(folder / CONFIG), overrides)
    model = Detector(dataclasses.replace(config.model, pretrained=False))  # the weights come from the checkpoint
    try:
        model.load_state_dict(load_file(folder / MODEL))
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder / MODEL}: damaged, or of another architecture than {CONFIG}: {str(error).splitlines()[0]}") from None
    return config, model


def evaluate_run(options: argparse.Namespace) -> None:
    """The run mode: prints the table on the main process and fills the folder `evaluation` beside the checkpoint."""
    from data import build_dataset
    from launch import start_accelerator

    folder = find_checkpoint(options.run)
    config, model = load_run(folder, options.overrides)
    accelerator = start_accelerator(config.train.mixed_precision)
    with accelerator.main_process_first():  # the main process may have to render the built-in world
        dataset = build_dataset(config.data, config.data.val, config.model.classes, config.model.size, training=False)
    metrics, predictions = evaluate(
        model.to(accelerator.device), dataset, accelerator, config.train.batch_size, config.data.workers, options.repeat, options.overlap
    )
    if accelerator.is_main_process:
        out = Path(options.out) if options.out else Path(options.run) / "evaluation"
        write_evaluation(out, dataset, metrics, predictions)
        print(format_table(metrics, options.metric, metrics["errors"] if options.errors else None))
        print(f"{folder}: results, metrics.json, predictions.jsonl, curves.png and frames.png are in {out}")
        if options.json:
            Path(options.json).write_text(json.dumps(metrics, indent=1))
        if options.curves:
            draw_curves(metrics).save(options.curves)
    accelerator.end_training()


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Namespace of the command line. Exits with code 2 and one sentence when neither a run nor both folders are given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", help="run folder or checkpoint folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the run's config, such as data.root=/data/kitti")
    parser.add_argument("--labels", metavar="DIR", help="KITTI label files, one per frame")
    parser.add_argument("--results", metavar="DIR", help="KITTI result files (16 fields a line), one per frame")
    parser.add_argument("--split", metavar="FILE", help="frame ids to evaluate, one a line; default: every label file")
    parser.add_argument("--classes", nargs="+", default=list(CLASSES), help="class names of the files; default: %(default)s")
    parser.add_argument("--metric", choices=("R40", "R11"), default="R40", help="recall positions of the table; default: %(default)s")
    parser.add_argument("--overlap", choices=tuple(MIN_OVERLAP), default="strict", help="overlap thresholds; default: %(default)s")
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="count every frame N times: lifts the cap on few objects")
    parser.add_argument("--errors", action="store_true", help="also print depth, heading and size errors by distance")
    parser.add_argument("--json", metavar="OUT", help="write every number here")
    parser.add_argument("--curves", metavar="OUT.png", help="draw the precision-recall curves here")
    parser.add_argument("--out", metavar="DIR", help="where a run's evaluation goes; default: RUN/evaluation")
    options = parser.parse_intermixed_args(arguments)  # key=value may follow an option
    files = options.labels is not None or options.results is not None
    if files == (options.run is not None):
        parser.exit(2, "evaluate.py: expected either a run folder, or --labels DIR and --results DIR (--help shows both)\n")
    if files and None in (options.labels, options.results):
        parser.exit(2, f"evaluate.py: {'--labels' if options.labels is None else '--results'} DIR is missing\n")
    if options.repeat < 1:
        parser.exit(2, f"evaluate.py: --repeat is {options.repeat}, expected 1 or more\n")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; a user's mistake is one sentence on stderr and exit code 2."""
    options = parse_arguments(arguments)
    try:
        evaluate_files(options) if options.run is None else evaluate_run(options)
    except (ValueError, OSError, KeyError) as error:
        lines = str(error.args[0] if isinstance(error, KeyError) else error).strip().splitlines()
        print(f"evaluate.py: {lines[-1]}", file=sys.stderr)  # a loader worker's error arrives with its traceback, the sentence last
        sys.exit(2)


if __name__ == "__main__":
    main()
