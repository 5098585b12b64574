"""Detect on the images of KITTI's testing half, and write what its server takes: DIR/data/<id>.txt for each image.

    accelerate launch -m tools.submit RUN DIR [--split NAME] [--flip] [key=value ...]

RUN is a run folder or a checkpoint folder, data.root=... KITTI's folder.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np

from evaluate import open_run, predict_dataset
from formats.kitti import write_labels
from scene.frames import UserError, make_folder, sentence_of

CLASSES = ("Car", "Pedestrian", "Cyclist")  # that KITTI's server knows
TESTING_FRAMES = 7518  # of KITTI's testing half


def submit(options: argparse.Namespace) -> None:
    """Everything that the command does. Raises UserError, before anything is written."""
    out = options.out
    if out.exists() and (not out.is_dir() or not all(path.is_dir() for path in out.rglob("*"))):
        raise UserError(f"{out}: it holds something else already, expected a new or empty folder")
    source = f"data.val={json.dumps([{'split': [options.split]}])}"
    _, config, detector, dataset, accelerator = open_run(options.run, [*options.overrides, source])
    if not set(dataset.classes) & set(CLASSES):
        raise UserError(f"KITTI's server knows {', '.join(CLASSES)}, this run only {', '.join(dataset.classes)}")
    if odd := [frame.id for frame in dataset.frames if not re.fullmatch(r"\d{6}", frame.id)]:
        raise UserError(f"frame {odd[0]} of split {options.split}, expected a name of six digits, as the server's")
    if accelerator.is_main_process:
        make_folder(out / "data", "DIR")
    batch_size, minutes, workers = config.train.batch_size, config.train.timeout, config.data.workers
    predictions = predict_dataset(detector, dataset, accelerator, batch_size, workers, options.flip, minutes)
    if accelerator.is_main_process:
        print(write_submission(out, predictions))
        if options.split == "testing" and len(predictions) != TESTING_FRAMES:
            print(f"the server expects {TESTING_FRAMES} files, as many as KITTI's testing half has images")
    accelerator.end_training()


def write_submission(folder, predictions) -> str:
    """folder/data/<id>.txt of id -> Labels in rectified camera 0, best score first. Returns a sentence on them."""
    counts = []
    for id, labels in predictions.items():
        known = labels[np.isin(labels.name.astype(str), CLASSES)]
        known = known[np.argsort(-known.score, kind="stable")]
        write_labels(folder / "data" / f"{id}.txt", known, scores=True, digits=4)
        counts.append(len(known))
    others = sum(map(len, predictions.values())) - sum(counts)
    rest = f"; {others} of classes that the server does not know are left out" if others else ""
    files = f"{len(counts)} files, {counts.count(0)} of them empty"
    return f"{folder / 'data'}: {sum(counts)} detections in {files}{rest}"


def main(arguments: list[str] | None = None) -> int:
    """Command line entry. Returns 0, or 2 after one sentence on stderr for what the user got wrong, or a full disk."""
    parser = argparse.ArgumentParser("tools.submit", description=__doc__.splitlines()[0])
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message} (--help shows all)\n")
    parser.add_argument("words", nargs="*", metavar="RUN DIR", help="and key=value of the run's config")
    parser.add_argument("--split", metavar="NAME", default="testing", help="default: testing")
    parser.add_argument("--flip", action="store_true", help="average what is said of an image and of its mirror image")
    options = parser.parse_intermixed_args(arguments)
    options.overrides = [word for word in options.words if "=" in word and not Path(word).is_dir()]
    places = [word for word in options.words if word not in options.overrides]
    if options.split == "test":  # as KITTI's list of its testing half is called
        options.split = "testing"
    if len(places) != 2:
        parser.error(f"expected a run and a folder, got {' and '.join(places) or 'neither'}")
    options.run, options.out = places[0], Path(places[1])
    try:
        submit(options)
    except (UserError, OSError) as error:
        print(f"tools.submit: {sentence_of(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
