"""Evaluate a trained run, or any detector's result files, with KITTI's average precision or nuScenes' detection score.

    accelerate launch evaluate.py RUN [key=value ...]       the best checkpoint of a run folder, or a checkpoint folder
    python evaluate.py --labels DIR --results DIR [--split FILE] [--json OUT]      KITTI label and result files
    accelerate launch evaluate.py RUN --submission DIR [--split testing]           what KITTI's server takes; nothing is compared
    python evaluate.py --nuscenes ROOT --split NAME --results FILE [--version NAME] [--json OUT]      nuScenes tables and a result file

Files need neither timm nor a GPU: KITTI's are read in rectified camera 0, nuScenes' in the global frame, and compared as they are.
"""

from __future__ import (
    annotations,  # Accelerator and Detection3D are named in signatures only, so that files need neither
)

import argparse
import dataclasses
import json
import math
import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from data import Source, UserError, check_writable, disk_is_full, loading, make_loader, user_errors
from formats import jsonl, nuscenes
from formats.index import user_folder
from formats.kitti import read_labels, write_labels
from metrics.kitti import CLASSES, MIN_OVERLAP, format_table, kitti_ap, object_errors
from metrics.nuscenes import format_table as format_nuscenes
from metrics.nuscenes import nuscenes_metrics
from scene.draw import SHOWN_FRAMES, draw_curves, draw_frames
from scene.frames import Labels, make_labels
from scene.geometry import yaw_to_alpha
from world import cameras as nuscenes_world
from world import street as world

if TYPE_CHECKING:
    from accelerate import Accelerator

    from config import Config
    from data import DataConfig, Detection3D, Source
    from model import ModelConfig


# ---- a model on a data set


def predict_dataset(
    model: torch.nn.Module,
    dataset: Detection3D,
    accelerator: Accelerator,
    batch_size: int = 8,
    workers: int = 0,
    progress: bool = True,
    stop: Callable[[], bool] = lambda: False,
    timeout: float = 0.0,
    flip: bool = False,
) -> dict[str, Labels]:
    """Detections of every frame of a `Detection3D`, each exactly once, whatever the number of processes.

    Each process takes every so-manieth frame; one exchange at the end. Returns, on every process and in the order of dataset.ids,
    id -> Labels with sigma in the source's own frame and original pixels; with flip, of `forward_twice`. A frame whose image could not be
    read (data.skip_bad) has no detections, and is counted on stderr. Raises `Stopped` on every process, after the same batch, once
    `stop()` holds on one of them.
    """
    from accelerate.utils import gather_object  # the files mode needs neither

    from engine.guard import Stopped

    own = list(range(len(dataset)))[accelerator.process_index :: accelerator.num_processes]
    batches = [own[start : start + batch_size] for start in range(0, len(own), batch_size)]
    loader = make_loader(dataset, batches, workers, accelerator.device, timeout)
    detector = accelerator.unwrap_model(model)
    training = detector.training
    detector.eval()
    found, unread = [], []
    frames_each = -(-len(dataset) // accelerator.num_processes)
    rounds = -(-frames_each // batch_size)  # equal on all processes, of which some have a batch fewer
    with loading(loader) as loaded:
        for number in tqdm(
            range(rounds), "evaluating", disable=None if progress and accelerator.is_main_process else True
        ):
            if accelerator.reduce(torch.tensor(float(stop()), device=accelerator.device)) > 0:
                detector.train(training)
                raise Stopped
            if number == len(batches):
                continue
            indices, batch = batches[number], next(loaded)
            with accelerator.autocast():
                detections = detector.detect(
                    batch["image"].to(accelerator.device), batch["K"].to(accelerator.device), flip
                )
            for index, skipped, detection in zip(indices, batch["skipped"].tolist(), detections, strict=True):
                unread += [dataset.ids[index]] * bool(skipped)
                found.append(
                    (dataset.ids[index], to_source(detection, dataset, index, skipped, detector.config.attribute_names))
                )
    detector.train(training)
    gathered = gather_object(found)
    predictions = dict(gathered)
    assert sorted(id for id, _ in gathered) == sorted(dataset.ids), (
        f"gathered {len(gathered)} frames of a data set of {len(dataset)}"
    )
    if unread:
        print(
            f"{len(unread)} unreadable images count as frames without detections, the first is {unread[0]}",
            file=sys.stderr,
        )
    return {id: predictions[id] for id in dataset.ids}


def to_source(
    detection: dict[str, torch.Tensor],
    dataset: Detection3D,
    index: int,
    skipped: int = 0,
    attributes: Sequence[str] = (),
) -> Labels:
    """One dict of `Detector.detect` -> Labels in the source's own frame and original pixels. attributes: the names of its indices."""
    from model import to_labels

    if skipped:
        return make_labels([], [], [], [], [])
    found = to_labels(detection, dataset.view_of(index), dataset.classes, attributes=attributes)
    center = (
        found.center - dataset.frames[index].offset
    )  # before alpha is derived: KITTI's alpha belongs to its own file's x and z
    return dataclasses.replace(found, center=center, alpha=yaw_to_alpha(found.yaw, center))


def evaluate(
    model: torch.nn.Module,
    dataset: Detection3D,
    accelerator: Accelerator,
    config: Config,
    overlap: str = "strict",
    repeat: int | None = None,
    stop: Callable[[], bool] = lambda: False,
    flip: bool = False,
) -> tuple[dict, dict[str, Labels]]:
    """Metrics of a model on a data set, the same on every process, and its predictions. repeat: default train.eval_repeat.

    Returns the dict of `compute_metrics`, or of `compute_sample_metrics` where frames belong to samples, and that of `predict_dataset`.
    Raises its `Stopped`.
    """
    from accelerate.utils import broadcast_object_list

    predictions = predict_dataset(
        model,
        dataset,
        accelerator,
        config.train.batch_size,
        config.data.workers,
        stop=stop,
        timeout=config.train.timeout,
        flip=flip,
    )
    if has_samples(
        dataset
    ):  # by the main process alone: the tables of all of nuScenes fill gigabytes while they are read
        metrics = [compute_sample_metrics(dataset, predictions, config.data) if accelerator.is_main_process else None]
        return broadcast_object_list(metrics)[0], predictions
    truth = {id: dataset.truth(index) for index, id in enumerate(dataset.ids)}
    repeat = config.train.eval_repeat if repeat is None else repeat
    return compute_metrics(truth, predictions, dataset.classes, overlap, repeat, config.data.overlap), predictions


def compute_metrics(
    truth: dict[str, Labels],
    results: dict[str, Labels],
    classes: Sequence[str] = CLASSES,
    overlap: str = "strict",
    repeat: int = 1,
    own_overlap: Mapping[str, Sequence[float]] | None = None,
) -> dict:
    """Every number of an evaluation: the dict of `kitti_ap`, with `object_errors` under "errors". The place for a metric of one's own.

    A number added here under a name, metrics["mine"] = 1.5, is logged, and best=mine (or best=-mine, where lower is better) follows it.
    """
    metrics = kitti_ap(truth, results, classes, overlap, repeat, own_overlap=own_overlap)
    metrics["errors"] = object_errors(truth, results, classes)
    return metrics


def calibrate(model: ModelConfig, metrics: dict) -> ModelConfig:
    """The `ModelConfig` whose sigma holds .757 of the depth errors that the metrics of `evaluate` are of, as a Laplace law's does.

    A network that saw its training frames often trusts its depth too much elsewhere; one factor a class mends that, as a temperature
    mends probabilities (Guo et al., ICML 2017). The metrics are those of the learned sigma, and of those very frames the share is .757
    by construction. 1 for a class with fewer than `CALIBRATION_OBJECTS` matched objects; the model as it is where all have fewer, or
    where the metrics are nuScenes', which tell no errors.
    """
    scales = []
    for name in model.classes:
        errors = metrics.get("errors", {}).get(name, {}).get("all", {})
        ratio = errors.get("sigma_ratio") or 0.0
        fitted = errors.get("matched", 0) >= CALIBRATION_OBJECTS and 0 < ratio < math.inf
        scales.append(float(f"{ratio:.4g}") if fitted else 1.0)
    return dataclasses.replace(model, sigma_scale=tuple(scales)) if set(scales) != {1.0} else model


def has_samples(dataset: Detection3D) -> bool:
    """Whether each frame belongs to a sample, a moment seen by several cameras: then nuScenes' metrics are the data set's.

    Raises ValueError where only some do.
    """
    grouped = dataset.frames.grouped()
    if len(grouped) > 1:
        raise ValueError(
            "data.val lists nuScenes and other sources, expected one kind of them: they have different metrics"
        )
    return grouped == {True}


def compute_sample_metrics(dataset: Detection3D, predictions: dict[str, Labels], config: DataConfig) -> dict:
    """nuScenes' metrics of a data set of samples under their own names, NDS and mAP first, beside those of its metrics_summary.json.

    predictions: id -> Labels in the camera's frame, of every frame, in any order; the cameras of a sample are merged. The ground truth
    is read from the tables of data.val, what no camera sees included, and only samples of the data set count.
    """
    root, version = sample_tables(config.val[0], config)
    truth = nuscenes.read_truth(root, config.val[0].split, version).only(set(dataset.frames.groups()))
    merged = nuscenes.merge_cameras(dataset.frames, predictions)
    return name_sample_metrics(nuscenes_metrics(truth, nuscenes.parse_results(merged, truth.tokens)))


def check_samples(dataset: Detection3D, config: Config) -> None:
    """Refuse what nuScenes' metrics of a data set of samples would ignore, or count wrongly. Raises ValueError."""
    val = config.data.val
    if len(val) > 1 or (val[0].kind == "synthetic" and len(val[0].split) > 1):
        raise ValueError(
            "data.val lists several nuScenes sources or splits of the built-in world, expected one: it is evaluated as a whole"
        )
    if strange := [name for name in dataset.classes if name not in nuscenes.ATTRIBUTES]:
        raise ValueError(
            f"model.classes names {strange[0]!r}, and nuScenes' metrics know only {', '.join(nuscenes.ATTRIBUTES)}"
        )
    if val[0].limit and len(set(Counter(dataset.frames.groups()).values())) > 1:
        raise ValueError(f"data.val: limit={val[0].limit} parts the cameras of a sample, which are evaluated together")
    if config.data.overlap or config.train.eval_repeat > 1:
        raise ValueError(
            "data.overlap and train.eval_repeat belong to KITTI's metrics, and the frames of data.val are nuScenes'"
        )


def name_sample_metrics(metrics: dict) -> dict:
    """The dict of `nuscenes_metrics` with its means under the names that people know: NDS, mAP, mATE, mASE, mAOE, mAVE, mAAE.

    What is undefined is None: JSON has no NaN.
    """
    errors = zip(("mATE", "mASE", "mAOE", "mAVE", "mAAE"), metrics["tp_errors"].values(), strict=True)
    return _without_nan({"NDS": metrics["nd_score"], "mAP": metrics["mean_ap"], **dict(errors), **metrics})


def _without_nan(value):
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def sample_tables(source: Source, config: DataConfig) -> tuple[Path, str]:
    """Folder and version of the tables of a nuScenes source, or of the built-in world's split."""
    root = Path(source.root or config.root)
    if source.kind == "synthetic":  # it is there since its frames were read
        root = nuscenes_world.build_nuscenes_world(root, source.split[0], source.world_frames, source.world_seed)
    return root, source.version


def blank_metrics(dataset: Detection3D, config: Config) -> dict:
    """The metrics of a data set as they are without objects and detections: every name that there will be.

    Raises ValueError for a config that cannot be evaluated on it.
    """
    if not has_samples(dataset):
        return compute_metrics({}, {}, dataset.classes)
    check_samples(dataset, config)
    none, nowhere = nuscenes.parse_results({}, []), np.zeros((0, 2))
    return name_sample_metrics(
        nuscenes_metrics(nuscenes.Truth([], none, nowhere, np.zeros((0, 4, 3)), np.zeros(0, int)), none)
    )


def format_metrics(metrics: dict, metric: str = "R40", errors: dict | None = None) -> str:
    """The table of an evaluation, nuScenes' or KITTI's; metric and errors as `metrics.kitti.format_table` takes them."""
    return format_nuscenes(metrics) if "NDS" in metrics else format_table(metrics, metric, errors)


CALIBRATION_OBJECTS = 100  # of a class, that its sigma is fitted to: the factor is known to an eighth then
TESTING_FRAMES = 7518  # of KITTI's testing half
WORST = 1e9  # of a metric of which less is better, where nothing can be averaged: JSON has no infinity


def read_metric(metrics: dict, name: str) -> float:
    """The number under a path of keys, 'Car/3d/moderate/AP_R40' or 'NDS'; higher is better, and for '-errors/Car/all/depth_error' lower.

    'mean' in place of a class is the mean over the classes that have counted objects. What cannot be averaged counts as the worst
    value. Raises ValueError naming the keys that there are.
    """
    place, keys = metrics, name.removeprefix("-").split("/")
    if keys[0] == "mean" and "settings" in metrics:
        classes = metrics["settings"]["classes"]
        seen = [c for c in classes if any(metrics["counted"][c].values())]
        return sum(read_metric(metrics, "/".join([c, *keys[1:]])) for c in seen or classes) / len(seen or classes)
    for key in keys:
        if not isinstance(place, dict) or key not in place:
            means = ["mean"] if place is metrics and "settings" in metrics else []
            there = ", ".join([*place, *means]) if isinstance(place, dict) else "no keys below it"
            raise ValueError(f"best={name}: there is no {key!r} among the metrics, only {there}")
        place = place[key]
    if isinstance(place, dict | list | str):
        raise ValueError(f"best={name} is not one number, expected more keys: {', '.join(place)}")
    return (WORST if name.startswith("-") else 0.0) if place is None or np.isnan(place) else float(place)


def flat_metrics(metrics: dict) -> dict[str, float]:
    """Every number of an evaluation by its path, for logs; curves and settings apart."""
    numbers, rest = (
        {},
        [("", {key: value for key, value in metrics.items() if key not in ("curves", "settings", "cfg")})],
    )
    while rest:
        path, place = rest.pop()
        for key, value in place.items():
            if isinstance(value, dict):
                rest.append((f"{path}{key}/", value))
            elif isinstance(value, int | float) and not np.isnan(value):
                numbers[path + key] = value
    return numbers


# ---- what an evaluation leaves behind


def write_evaluation(folder: str | Path, dataset: Detection3D, metrics: dict, predictions: dict[str, Labels]) -> None:
    """results/<id>.txt (KITTI format, the source's own frame and pixels), predictions.jsonl, metrics.json and pictures, into a folder.

    Of a data set of samples results_nusc.json, their result file in the official format, stands for results/ and the curves.
    """
    folder, samples = Path(folder), has_samples(dataset)
    results = folder / "results"
    if folder.is_symlink() or results.is_symlink() or (results.exists() and not (folder / "metrics.json").exists()):
        raise UserError(f"{folder} holds results of something else; --out chooses another folder")
    shutil.rmtree(results, ignore_errors=True)
    (folder if samples else results).mkdir(parents=True, exist_ok=True)
    frames = []
    for frame, (id, labels) in zip(dataset.frames, predictions.items(), strict=True):
        if not samples:
            path = folder / "results" / f"{id}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_labels(path, labels, scores=True, digits=4)
        frames.append(
            dataclasses.replace(frame, id=id, image=frame.image.absolute(), labels=labels.moved(frame.offset))
        )
    if samples:
        nuscenes.write_results(folder / "results_nusc.json", nuscenes.merge_cameras(dataset.frames, predictions))
    else:
        draw_curves(metrics).save(folder / "curves.png")
    jsonl.write_jsonl(folder / "predictions.jsonl", frames)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1))
    draw_frames(dataset.frames, predictions, metrics, dataset.classes, best=0, worst=2 * SHOWN_FRAMES).save(
        folder / "worst.png"
    )


def write_submission(folder: str | Path, predictions: dict[str, Labels]) -> tuple[int, int]:
    """folder/data/<id>.txt per frame, as KITTI's server takes them: its classes only, the best score first, empty without detections.

    Boxes are clipped to the image already. Returns how many detections were written and how many are of other classes.
    """
    (Path(folder) / "data").mkdir(parents=True, exist_ok=True)
    written = total = 0
    for id, labels in predictions.items():
        known = labels[np.isin(labels.name.astype(str), CLASSES)]
        write_labels(
            Path(folder) / "data" / f"{id}.txt", known[np.argsort(-known.score, kind="stable")], scores=True, digits=4
        )
        written, total = written + len(known), total + len(labels)
    return written, total - written


# ---- files


def read_folder(
    labels: str | Path, results: str | Path, split: str | Path | None = None
) -> tuple[dict[str, Labels], dict[str, Labels], list[str], list[str]]:
    """Label and result files of the frames of a split file, or of all label files.

    Returns truth and results (id -> Labels in rectified camera 0), the ids without a result file, and the ids of result files that
    belong to no frame. Raises FileNotFoundError or ValueError in one sentence that names the file, and the line where there is one.
    """
    labels, results = (
        _text_folder(labels, "--labels", LABEL_FOLDERS),
        _text_folder(results, "--results", RESULT_FOLDERS, empty=True),
    )
    if split is None:
        ids = sorted(path.stem for path in labels.glob("*.txt"))
    else:
        if not Path(split).is_file():
            raise FileNotFoundError(f"{split}: no such split file, expected a text file with one frame id a line")
        try:
            ids = Path(split).read_text(encoding="utf-8-sig").split()
        except UnicodeDecodeError as error:
            raise ValueError(f"{split}: not a text file: {error}") from None
        if not ids:
            raise ValueError(f"{split}: the split is empty, expected one frame id a line")
        if len(set(ids)) < len(ids):
            twice = next(id for id in ids if ids.count(id) > 1)
            raise ValueError(f"{split}: frame {twice} is listed twice; --repeat counts every frame several times")
    there = {path.stem for path in results.glob("*.txt")}
    truth, found = {}, {}
    for id in tqdm(ids, "reading", unit=" frames", disable=None):
        if not (labels / f"{id}.txt").is_file():
            raise FileNotFoundError(f"{labels / id}.txt: no label file for frame {id} of {split}")
        truth[id] = read_labels(labels / f"{id}.txt")
        if id in there:
            found[id] = read_labels(results / f"{id}.txt", scores=True)
    return truth, found, [id for id in ids if id not in there], sorted(there - set(ids))


LABEL_FOLDERS, RESULT_FOLDERS = (
    ("label_2", "training/label_2"),
    ("data", "results"),
)  # where a parent folder usually holds the files


def _text_folder(path, option, usual, empty=False):
    """Folder with .txt files as a Path; `empty` allows none. Raises FileNotFoundError with advice: a usual folder inside that has some."""
    if not path:
        raise FileNotFoundError(f"{option} is empty, expected a folder")
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{option} {path}: no such folder")
    if not any(path.glob("*.txt")):
        inside = [name for name in usual if any((path / name).glob("*.txt"))]
        if inside or not empty:
            hint = f"did you mean {path / inside[0]}?" if inside else "expected one file per frame, such as 000000.txt"
            raise FileNotFoundError(f"{option} {path}: no .txt files here; {hint}")
    return path


def check_outputs(options: argparse.Namespace) -> None:
    """Raises UserError for an output that could not be written once the work is done."""
    own = options.out and Path(options.out).absolute()  # which will be there by then
    check_writable(*(path for path in (options.json, options.curves) if path and Path(path).absolute().parent != own))
    if options.curves and Image.registered_extensions().get(Path(options.curves).suffix.lower()) not in Image.SAVE:
        raise UserError(f"--curves {options.curves}: not a picture's suffix, expected a name such as curves.png")
    if options.out:
        folder = Path(options.out)
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise UserError(
                f"--out {folder}: {there} is {'not writable' if there.is_dir() else 'a file'}, expected a folder to write into"
            )


def evaluate_files(options: argparse.Namespace) -> None:
    """The files mode: prints the table, and what is missing or extra; writes what was asked for."""
    check_outputs(options)
    with user_errors():
        truth, results, missing, extra = read_folder(options.labels, options.results, options.split)
        there = {name for labels in (*truth.values(), *results.values()) for name in np.unique(labels.name.astype(str))}
        if unknown := [name for name in options.classes or () if name not in there and name not in CLASSES]:
            raise ValueError(
                f"--classes names {unknown[0]!r}, which no file does; there are {', '.join(sorted(there))}"
            )
    metrics = compute_metrics(
        truth, results, options.classes or CLASSES, options.overlap or "strict", options.repeat or 1
    )
    metrics["files"] = {"missing_results": len(missing), "extra_results": len(extra)}
    print(format_table(metrics, options.metric or "R40", metrics["errors"] if options.errors else None))
    if missing:
        print(
            f"{len(missing)} of {len(truth)} frames have no result file and count as empty, the first is {missing[0]}.txt"
        )
    if extra:
        print(f"{len(extra)} result files belong to no evaluated frame and are left out, the first is {extra[0]}.txt")
    if options.json:
        Path(options.json).write_text(json.dumps(metrics, indent=1))
    if options.curves:
        draw_curves(metrics).save(options.curves)


def evaluate_nuscenes(options: argparse.Namespace) -> None:
    """The nuScenes mode: prints the table; writes what the official metrics_summary.json holds where it was asked for."""
    check_outputs(options)
    with user_errors():
        truth = nuscenes.read_truth(options.nuscenes, (options.split,), options.version or "")
        if not len(truth.boxes):
            raise ValueError(
                f"{options.nuscenes}: split {options.split} holds no annotation, expected some to evaluate against"
            )
        results, meta = nuscenes.read_results(options.results, truth.tokens)
        start = time.perf_counter()
        metrics = nuscenes_metrics(truth, results)
    print(format_nuscenes(metrics))
    mixed = np.flatnonzero(results.sample != results.listed)
    if len(mixed):
        first = truth.tokens[results.listed[mixed[0]]]
        print(
            f"{len(mixed)} boxes name another sample than the one they are listed under, and count there; the first is under {first}"
        )
    if options.json:
        metrics |= {"meta": meta, "eval_time": time.perf_counter() - start}
        Path(options.json).write_text(json.dumps(metrics, indent=1))


# ---- runs


def evaluate_run(options: argparse.Namespace) -> None:
    """The run mode: prints the table on the main process and fills the folder `evaluation` beside the checkpoint."""
    from data import build_dataset
    from engine.checkpoint import find_checkpoint, load_run
    from engine.guard import start_accelerator

    with user_errors():
        folder = find_checkpoint(options.run)
        options.out = options.out or Path(options.run) / "evaluation"
        check_outputs(options)
        config, model = load_run(folder, options.overrides)
        config = stay_at_home(config, options.overrides)
        accelerator = start_accelerator(config.train.mixed_precision)
        with accelerator.main_process_first():  # the main process may have to render the built-in world
            dataset = build_dataset(
                config.data, config.data.val, config.model.classes, config.model.size, training=False
            )
        if has_samples(dataset):
            check_samples(dataset, config)
            if vain := [name for name in ("errors", "curves", "repeat", "overlap", "metric") if getattr(options, name)]:
                raise ValueError(f"--{vain[0]} belongs to KITTI's metrics, and the frames of data.val are nuScenes'")
    overlap, metric = options.overlap or "strict", options.metric or "R40"
    metrics, predictions = evaluate(
        model.to(accelerator.device), dataset, accelerator, config, overlap, options.repeat, flip=options.flip
    )
    if accelerator.is_main_process:
        out = Path(options.out)
        write_evaluation(out, dataset, metrics, predictions)
        print(format_metrics(metrics, metric, metrics["errors"] if options.errors else None))
        print(f"{folder}: {', '.join(sorted(path.name for path in out.glob('*')))} are in {out}")
        if options.json:
            Path(options.json).write_text(json.dumps(metrics, indent=1))
        if options.curves:
            draw_curves(metrics).save(options.curves)
    accelerator.end_training()


def submit_run(options: argparse.Namespace) -> None:
    """The submission mode: a run's detections on a split of KITTI's folder, by default its testing half, for the server."""
    from data import build_dataset
    from engine.checkpoint import find_checkpoint, load_run
    from engine.guard import start_accelerator

    with user_errors():
        folder, split = Path(options.submission), options.split or "testing"
        if folder.exists() and (not folder.is_dir() or not all(path.is_dir() for path in folder.rglob("*"))):
            raise ValueError(f"--submission {folder}: it holds something else already, expected a new or empty folder")
        config, model = load_run(find_checkpoint(options.run), options.overrides)
        if not set(config.model.classes) & set(CLASSES):
            raise ValueError(
                f"--submission: KITTI's server knows {', '.join(CLASSES)}, this run only {', '.join(config.model.classes)}"
            )
        asked = any(text.partition("=")[0].strip() == "data.root" for text in options.overrides)
        root = next((source.root for source in config.data.val if source.kind == "kitti" and not asked), "")
        data = dataclasses.replace(config.data, val=(Source(root=root, split=(split,)),))
        config = stay_at_home(dataclasses.replace(config, data=data), options.overrides)
        accelerator = start_accelerator(config.train.mixed_precision)
        with accelerator.main_process_first():
            dataset = build_dataset(
                config.data, config.data.val, config.model.classes, config.model.size, training=False
            )
        if odd := [id for id in dataset.ids if not re.fullmatch(r"\d{6}", id)]:
            raise ValueError(
                f"--submission: frame {odd[0]} of split {split}, expected a name of six digits, as the server's are"
            )
        if accelerator.is_main_process:
            (folder / "data").mkdir(parents=True, exist_ok=True)  # where it cannot be, that is told before the work
    model, batch_size, workers = model.to(accelerator.device), config.train.batch_size, config.data.workers
    predictions = predict_dataset(
        model, dataset, accelerator, batch_size, workers, timeout=config.train.timeout, flip=options.flip
    )
    if accelerator.is_main_process:
        with user_errors():
            written, others = write_submission(folder, predictions)
        empty = sum(not (folder / "data" / f"{id}.txt").stat().st_size for id in predictions)
        rest = f"; {others} of classes that the server does not know are left out" if others else ""
        print(f"{folder / 'data'}: {written} detections in {len(predictions)} files, {empty} of them empty{rest}")
        if split == "testing" and len(predictions) != TESTING_FRAMES:
            print(f"the server expects {TESTING_FRAMES} files, as many as KITTI's testing half has images")
    accelerator.end_training()


def stay_at_home(config: Config, overrides: Sequence[str]) -> Config:
    """The config of a run, which may be a stranger's, without the places outside this folder that it would have us write to.

    data.cache is left out unless asked for, and an index is written into the user's cache folder. Raises ValueError where the built-in
    world would be rendered elsewhere, or no source of data.val reads the data.root that was asked for.
    """
    from config import refuse_idle_root

    asked = {text.partition("=")[0].strip() for text in overrides}
    refuse_idle_root(overrides, *config.data.val)
    ours = {"cache": "", "index": str(user_folder())}
    data = dataclasses.replace(
        config.data, **{name: value for name, value in ours.items() if f"data.{name}" not in asked}
    )
    for source in config.data.val if "data.val" not in asked else ():
        root = Path(source.root or config.data.root)
        if (
            source.kind != "synthetic"
            or (not source.root and "data.root" in asked)
            or root.resolve().is_relative_to(Path.cwd())
        ):
            continue
        for split in source.split:
            find = nuscenes_world.world_folder if split in nuscenes_world.SPLITS else world.world_folder
            if not find(root, split, source.world_frames, source.world_seed).is_dir():
                raise ValueError(
                    f"the run's config would render the built-in world into {root}; data.root=FOLDER says where it may"
                )
    return dataclasses.replace(config, data=data)


JUDGING = ("metric", "overlap", "repeat", "errors", "json", "curves")
MODES = {  # by the option that asks for it, the first one that is given: what it is called, what it needs, and what else it takes
    "nuscenes": ("--nuscenes ROOT", ("split", "results"), ("version", "json")),
    "submission": ("--submission DIR", ("run",), ("overrides", "split", "flip")),
    "labels": ("an evaluation of files", ("labels", "results"), ("split", "classes", *JUDGING)),
    "run": ("a run folder", (), ("overrides", "flip", "out", *JUDGING)),
}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Namespace of the command line, and its `mode` in `MODES`. Exits with code 2 and one sentence when the options do not fit together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", help="run folder or checkpoint folder")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="changes to the run's config, such as data.root=/data/kitti"
    )
    parser.add_argument("--labels", metavar="DIR", help="KITTI label files, one per frame")
    parser.add_argument(
        "--results", metavar="DIR", help="KITTI result files (16 fields a line), one per frame; or nuScenes' one file"
    )
    parser.add_argument(
        "--split",
        metavar="FILE",
        help="frame ids to evaluate, one a line; default: every label file; or a split's name",
    )
    parser.add_argument(
        "--submission",
        metavar="DIR",
        help="write DIR/data for KITTI's server; here --split names a split (default: testing)",
    )
    parser.add_argument("--nuscenes", metavar="ROOT", help="nuScenes folder, whose tables are in ROOT/v1.0-*")
    parser.add_argument("--version", help="of its tables, such as v1.0-mini; default: the only one there is")
    parser.add_argument("--classes", nargs="+", help=f"class names of the files; default: {' '.join(CLASSES)}")
    parser.add_argument("--metric", choices=("R40", "R11"), help="recall positions of the table; default: R40")
    parser.add_argument("--overlap", choices=tuple(MIN_OVERLAP), help="overlap thresholds; default: strict")
    parser.add_argument(
        "--repeat", type=int, metavar="N", help="count every frame N times: lifts the cap on few objects"
    )
    parser.add_argument(
        "--flip", action="store_true", help="of a run: average what is said of an image and of its mirror image"
    )
    parser.add_argument("--errors", action="store_true", help="also print depth, heading and size errors by distance")
    parser.add_argument("--json", metavar="OUT", help="write every number here")
    parser.add_argument("--curves", metavar="OUT.png", help="draw the precision-recall curves here")
    parser.add_argument("--out", metavar="DIR", help="where a run's evaluation goes; default: RUN/evaluation")
    options = parser.parse_intermixed_args(arguments)  # key=value may follow an option
    given = {name for name, value in vars(options).items() if value not in (None, False, [])}
    flag = lambda name: {"run": "a run folder", "overrides": "key=value"}.get(name, f"--{name}")  # noqa: E731
    options.mode = next((mode for mode in MODES if mode in given), "labels" if "results" in given else None)
    if options.mode is None:
        parser.exit(
            2, "evaluate.py: expected either a run folder, or --labels DIR and --results DIR (--help shows both)\n"
        )
    title, needed, more = MODES[options.mode]
    if missing := [name for name in needed if name not in given]:
        parser.exit(2, f"evaluate.py: {title} needs {flag(missing[0])} as well (--help shows it)\n")
    if vain := [name for name in vars(options) if name in given - {options.mode, "mode", *needed, *more}]:
        takes = ", ".join(map(flag, (*needed, *more)))
        parser.exit(2, f"evaluate.py: {flag(vain[0])} does not go with {title}, which takes {takes}\n")
    if options.repeat is not None and options.repeat < 1:
        parser.exit(2, f"evaluate.py: --repeat is {options.repeat}, expected 1 or more\n")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; a user's mistake is one sentence on stderr and exit code 2."""
    options = parse_arguments(arguments)
    try:
        modes = {"run": evaluate_run, "labels": evaluate_files, "submission": submit_run, "nuscenes": evaluate_nuscenes}
        modes[options.mode](options)
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and not disk_is_full(error):
            raise
        print(f"evaluate.py: {error.sentence if isinstance(error, UserError) else error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
