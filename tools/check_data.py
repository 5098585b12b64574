"""Check a whole data set before training: every label, calibration and image of a config's sources, in parallel.

python -m tools.check_data CONFIG.py [key=value ...] [--workers N]
"""

import argparse
import dataclasses
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from tqdm import tqdm

from config import load_config
from data import Detection3D, UserError, build_dataset, read_source, usable_cores
from geometry import box_iou, project_boxes

FITS = 0.7  # median overlap of projected and labelled boxes below which a camera or a convention is probably wrong; KITTI's is 0.97


def check_frame(dataset, index):
    """Read one frame as training would: (sentence or '', overlaps of its projected with its labelled 2D boxes, wholly in view)."""
    frame = dataset.frames[index]
    try:
        sample = dataset[index]
    except UserError as error:
        return str(error), []
    broken = [name for name, value in sample.items() if value.is_floating_point() and not value.isfinite().all()]
    labels = frame.labels[frame.labels.is_3d & (frame.labels.truncation <= 0)]
    boxes, crosses = project_boxes(labels.center, labels.size, labels.yaw, frame.K)
    return f"{frame.image}: {', '.join(broken)} not finite" * bool(broken), box_iou(boxes, labels.box)[~crosses].tolist()


def check(config, workers):
    """Everything wrong with the sources of a config, as (sentences, notes). Shows progress on stderr."""
    problems, notes, model = [], [], config.model
    plain = dataclasses.replace(config.data, skip_bad=False, cache="")
    for title, sources in (("train", config.data.train), ("val", config.data.val)):
        before = len(problems)
        for source in sources:
            name = f"{title}: {source.kind} {source.root or config.data.root}"
            try:
                dataset = Detection3D(read_source(source, config.data, problems), model.classes, model.size, plain, training=False)
            except (ValueError, OSError) as error:
                problems.append(str(error))
                continue
            with ThreadPoolExecutor(workers) as pool:  # decoding leaves Python's lock alone
                found = pool.map(partial(check_frame, dataset), range(len(dataset)))
                found = list(tqdm(found, name, len(dataset), unit="frame", disable=None))
            problems += [sentence for sentence, _ in found if sentence]
            overlaps = [value for _, values in found for value in values]
            notes.append(f"{name}: {dataset.summary()}")
            if overlaps:
                median = float(np.median(overlaps))
                notes.append(f"{name}: projected and labelled 2D boxes overlap by {median:.2f} in the median of {len(overlaps)}")
                if median < FITS:
                    problems.append(f"{name}: the projected 3D boxes miss the labelled 2D boxes: is K, the unit or the box's centre wrong?")
            elif not any(len(frame.labels) for frame in dataset.frames):
                problems.append(f"{name}: no frame holds an object")
        if len(problems) == before:  # what only all sources together show: none of them, or a frame listed twice
            try:
                build_dataset(config.data, sources, model.classes, model.size, title == "train")
            except (ValueError, OSError) as error:
                problems.append(str(error))
    return problems, notes


def main(arguments=None):
    """Command line entry: exit code 0 for good data, 1 with a sentence for each thing that is wrong, 2 for a wrong config."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", help="a Python run file")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--workers", type=int, default=usable_cores(), help="threads (default: one per core)")
    options = parser.parse_intermixed_args(arguments)
    try:
        config = load_config(options.config, options.overrides)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    problems, notes = check(config, options.workers)
    print("\n".join([*notes, *problems, f"{len(problems)} problem{'s' * (len(problems) > 1)}" if problems else "no problem found"]))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
