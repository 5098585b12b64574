"""Two evaluated runs side by side: the differences of their numbers, and the frames where they differ most.

python -m tools.compare RUN_A[,RUN_A2 ...] RUN_B[,RUN_B2 ...] [key=value ...] [--report] [--every] [--json OUT]

Each run has been evaluated by evaluate.py on the same frames; those that a comma joins differ in their seeds. key=value
changes run A's config, such as data.root=/kitti. A difference counts beyond twice the spread, the standard deviation
over seeds.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np

from config import override, read_config
from data import build_dataset
from engine.checkpoint import CONFIG
from engine.weights import find_checkpoint, stay_at_home
from evaluate import flat_metrics
from formats.jsonl import read_frames
from scene.frames import UserError, check_writable, sentence_of
from tools.report import KNOWN, count_errors, describe, judge_run, write

USUAL = (  # in the names of what is printed
    *("AP_R40", "/all/"),  # KITTI
    *("NDS", "mAP", "mATE", "mASE", "mAOE", "mAVE", "mAAE"),  # nuScenes
    *("CDS", "mean/"),  # Argoverse
)
FRAMES = 10  # that are listed
MEANING = "The second minus the first; * where that is more than twice the spread, which is that of the wilder side."


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What evaluate.py left of a run."""

    name: str
    metrics: dict
    predictions: dict  # frame id -> Labels in the camera's frame


def read_evaluation(run):
    """The `Evaluation` of a run folder. Raises UserError where there is none."""
    folder = Path(run) / "evaluation"
    if not (folder / "metrics.json").is_file() or not (folder / "predictions.jsonl").is_file():
        raise UserError(
            f"{folder}: no metrics.json and predictions.jsonl there, expected a run after evaluate.py {run}"
        )
    metrics = json.loads((folder / "metrics.json").read_text())
    frames = read_frames(folder / "predictions.jsonl", images=False)
    return Evaluation(Path(run).resolve().name, metrics, {frame.id: frame.labels for frame in frames})


def open_frames(run, overrides):
    """The config of a run and the `Detection3D` of what it is evaluated on."""
    config = override(read_config(find_checkpoint(run) / CONFIG), overrides)
    config = stay_at_home(config, overrides)
    return config, build_dataset(config, training=False)


def judge(evaluation, config, dataset):
    """(`Judgement`, what `describe` says, rule) of a run on some frames. Raises UserError where it was on others."""
    ids = {frame.id for frame in dataset.frames}
    if ids != evaluation.predictions.keys():
        few, many = len(ids & evaluation.predictions.keys()), len(evaluation.predictions)
        raise UserError(f"{evaluation.name}: {few} of its {many} frames are among the {len(ids)} of the first run")
    predictions = {frame.id: evaluation.predictions[frame.id].moved(-frame.offset) for frame in dataset.frames}
    text, judgement, rule = judge_run(dataset, evaluation.metrics, predictions, config)
    return judgement, describe(evaluation.name, judgement, evaluation.metrics, text), rule


def refuse_other_rules(evaluations):
    """Raises UserError where one was counted by other rules than the first: overlaps, repeat, ranges, region."""
    first, *others = ((one.name, rules_of(one.metrics)) for one in evaluations)
    for name, rules in others:
        for rule in rules.keys() & first[1].keys():
            if rules[rule] != first[1][rule]:
                both = f"{json.dumps(first[1][rule])} for {first[0]}, {json.dumps(rules[rule])} for {name}"
                raise UserError(f"the runs were evaluated by different rules, {rule}: {both}")


def rules_of(metrics):
    """What the numbers of an evaluation depend on but frames and detections, by name."""
    settings = metrics.get("settings", {"min_overlap": {}})
    rules = {f"overlap of {name}": overlaps for name, overlaps in settings["min_overlap"].items()}
    return {**rules, "repeat": settings.get("repeat"), **metrics.get("cfg", {})}


def differences(sides):
    """Rows (number's path, mean of A, of B, B - A, spread, beyond) for every number that all runs of two sides have.

    sides: two lists of metrics; spread: the larger standard deviation over seeds, None without several.
    """
    numbers = [[flat_metrics(metrics) for metrics in side] for side in sides]
    everyone = [values for side in numbers for values in side]
    rows = []
    for path in everyone[0]:
        if not all(path in values for values in everyone):
            continue
        columns = [np.array([values[path] for values in side], float) for side in numbers]
        first, second = (column.mean() for column in columns)
        spreads = [column.std(ddof=1) for column in columns if len(column) > 1]
        spread = max(spreads, default=None)
        beyond = spread is not None and abs(second - first) > 2 * spread
        rows.append((path, first, second, second - first, spread, bool(beyond)))
    return rows


def table(rows, titles):
    """Rows of `differences` as text."""
    wide = max([len(path) for path, *_ in rows] + [6])
    lines = [f"{'number':{wide}}" + "".join(f"{title[-14:]:>15}" for title in (*titles, "difference", "spread"))]
    for path, *values, beyond in rows:
        cells = ["-" if value is None else f"{value:.4f}" for value in values]
        cells[2] = f"{values[2]:+.4f}"
        lines.append(f"{path:{wide}}" + "".join(f"{cell:>15}" for cell in cells) + (" *" if beyond else ""))
    return "\n".join(lines)


def frame_differences(sides, frames):
    """Lines of the frames in which two sides of `judge` make the most different numbers of errors, mean over seeds."""
    first, second = (
        np.mean([count_errors(judgement, run["level"]).sum(1) for judgement, run, _ in side], 0) for side in sides
    )
    order = np.argsort(-np.abs(second - first), kind="stable")[:FRAMES]
    return [f"{frames[n].id:24} {first[n]:7.1f} {second[n]:7.1f} {second[n] - first[n]:+7.1f}" for n in order]


def compare(options, groups, overrides):
    """Print both tables; write what was asked for."""
    check_writable(options.json, options.report and options.out)
    evaluations = [[read_evaluation(run) for run in group] for group in groups]
    refuse_other_rules([one for group in evaluations for one in group])
    titles = ["+".join(one.name for one in group) for group in evaluations]
    rows = differences([[one.metrics for one in group] for group in evaluations])
    shown = [row for row in rows if options.every or any(part in row[0] for part in USUAL)]
    print(table(shown, titles))
    print(f"{MEANING} {len(shown)} of {len(rows)} numbers{'' if options.every else '; --every shows all'}.")
    if options.json:
        keys = ("number", "first", "second", "difference", "spread", "beyond")
        Path(options.json).write_text(json.dumps([dict(zip(keys, row, strict=True)) for row in rows], indent=1))
    config, dataset = open_frames(groups[0][0], overrides)
    if dataset.metrics not in KNOWN and not options.report:
        return
    sides = [[judge(one, config, dataset) for one in group] for group in evaluations]
    level = "score of the best F1" if dataset.metrics == "kitti" else "score that as many pass as there are objects"
    print(f"\nErrors of a frame above the {level}, where they differ most: first, second, difference")
    print("\n".join(frame_differences(sides, dataset.frames)))
    if options.report:
        cells = [[path, *(round(v, 4) if v is not None else None for v in values)] for path, *values, _ in rows]
        words = {"differences": cells, "beyond": [row[-1] for row in rows], "sides": titles, "meaning": MEANING}
        judgements, runs, rules = zip(*(side[0] for side in sides), strict=True)
        write(options.out, judgements, runs, rules[0], options.frames, **words)
        print(f"\n{options.out}")


def main(arguments=None):
    """Command line entry. Returns 0, or 2 after one sentence on stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"tools.compare: {message} (--help shows all)\n")
    parser.add_argument("words", nargs="+", metavar="RUN", help="two runs, or runs joined by commas; then key=value")
    parser.add_argument("--report", action="store_true", help="also write a page of both, of the first seeds")
    parser.add_argument("--out", default="compare.html", metavar="FILE", help="where that goes; default: compare.html")
    parser.add_argument("--frames", type=int, metavar="N", help="show so many frames in it; default: 150")
    parser.add_argument("--every", action="store_true", help="print every number, not the usual ones alone")
    parser.add_argument("--json", metavar="OUT", help="write every number here")
    options = parser.parse_intermixed_args(arguments)
    overrides = [word for word in options.words if "=" in word and not Path(word.split(",")[0]).is_dir()]
    groups = [word.split(",") for word in options.words if word not in overrides]
    try:
        if len(groups) != 2:
            raise UserError(f"expected two runs, or two lists of runs, got {len(groups)}")
        if options.frames is not None and options.frames < 1:
            raise UserError(f"--frames is {options.frames}, expected 1 or more")
        compare(options, groups, overrides)
    except (UserError, OSError) as error:
        print(f"tools.compare: {sentence_of(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
