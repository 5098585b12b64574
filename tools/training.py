"""The course of a run in one picture, training.png, from its log.jsonl: an extra that a run finds by its name.

python -m tools.training RUN      draws it anew; train.py does so at each evaluation
"""

import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from scene.draw import BACKGROUND, GRID, SUPERSAMPLE, TEXT, write
from scene.frames import UserError, sentence_of

COLOURS = ((128, 224, 192), (192, 32, 224), (255, 0, 0), (255, 224, 0), (96, 128, 160), (224, 96, 96))
SKIPPED = (255, 255, 255)
PANEL, STEP = (440, 200), (640, 270)  # pixels: plotting area, and from one to the next
LINE = 13  # px between names
SPREAD = 20  # of the largest to the least value, from where on a scale is logarithmic


def draw_log(out: Path) -> None:
    """Write training.png into a run folder, unless its log holds no line of training yet."""
    train, evaluations = read_log(out / "log.jsonl")
    if not train:
        return
    sheet = Image.new("RGB", tuple(SUPERSAMPLE * side for side in (2 * STEP[0], 3 * STEP[1])), BACKGROUND)
    skipped = read_skipped(out / "train.log")
    losses = [name for name in train[-1] if name.startswith("loss_")]
    metric = [name for name in (evaluations[-1] if evaluations else ()) if name not in ("mode", "epoch", "step")]
    panels = (
        ("loss, weighted sum", lines_of(train, ["loss"])),
        ("each loss", lines_of(train, losses)),
        ("learning rate", lines_of(train, ["lr"])),
        (f"gradient norm before clipping; steps skipped: {len(skipped)}", lines_of(train, ["grad_norm"])),
        (f"evaluations: {', '.join(metric)}", lines_of(evaluations, metric)),
        ("seconds a step, and of them waiting for data", lines_of(train, ["time", "data_time"])),
    )
    last = max(record["step"] for record in (*train, *evaluations))
    for number, (title, lines) in enumerate(panels):
        row, column = divmod(number, 2)
        marks = skipped if "skipped" in title else ()
        draw_panel(ImageDraw.Draw(sheet), (column * STEP[0] + 62, row * STEP[1] + 34), title, lines, last, marks)
    sheet.reduce(SUPERSAMPLE).save(out / "training.png")


def read_log(path):
    """Records of training and of evaluations, by step; of what was logged twice, as a run went on, the later ones."""
    records = {"train": [], "val": []}
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # the end of a run that was killed while it wrote
            continue
        if not isinstance(record, dict) or record.get("mode") not in records or "step" not in record:  # not the run's
            continue
        same = records[record["mode"]]
        while same and same[-1]["step"] >= record["step"]:
            same.pop()
        same.append(record)
    return records["train"], records["val"]


def read_skipped(path):
    """Steps that the log names as left out, as their gradients were not finite."""
    text = path.read_text() if path.is_file() else ""
    return sorted({int(step) for step in re.findall(r"- WARNING - step (\d+) skipped", text)})


def lines_of(records, names):
    """Name -> (steps, values), (n,) each, of the finite numbers of a key."""
    lines = {}
    for name in names:
        pairs = [(record["step"], record[name]) for record in records if np.isfinite(record.get(name, np.nan))]
        lines[name] = np.array(pairs, float).reshape(-1, 2).T
    return {name: line for name, line in lines.items() if line.size}


def draw_panel(draw, corner, title, lines, last, marks):
    """One set of axes with its lines, named at their ends, and marks at some steps along the top."""
    x0, y0 = (SUPERSAMPLE * side for side in corner)
    width, height = (SUPERSAMPLE * side for side in PANEL)
    values = np.concatenate([line[1] for line in lines.values()]) if lines else np.zeros(1)
    logarithmic = values.min() > 0 and values.max() > SPREAD * values.min()
    scale = np.log10 if logarithmic else np.asarray
    low, high = float(scale(values.min())), float(scale(values.max()))
    low = low if logarithmic or low < 0 else 0.0
    high = high if high > low else low + 1
    write(draw, (x0, y0 - 2 * 12), title + (", logarithmic" if logarithmic else ""), 24, TEXT, "ls")
    for share in np.linspace(0, 1, 5):
        y, x = y0 + height * (1 - share), x0 + width * share
        value = low + (high - low) * share
        draw.line([(x0, y), (x0 + width, y)], fill=GRID, width=SUPERSAMPLE)
        write(draw, (x0 - 10, y), f"{10**value if logarithmic else value:.3g}", 20, TEXT, "rm")
        write(draw, (x, y0 + height + 8), f"{last * share:.0f}", 20, TEXT, "ma")
    ends = []
    for number, (name, (steps, numbers)) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        points = np.stack([x0 + width * steps / last, y0 + height * (high - scale(numbers)) / (high - low)], 1)
        draw.line(points.ravel().tolist(), fill=colour, width=3 + 2 * (len(points) == 1))
        for x, y in points if len(points) < 40 else ():
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour)
        ends.append((points[-1, 1], f"{name if len(lines) > 1 else ''} {numbers[-1]:.4g}", colour))
    name_ends(draw, x0 + width + 10, y0, sorted(ends))
    for step in marks:
        x = x0 + width * step / last
        draw.polygon([(x - 8, y0), (x + 8, y0), (x, y0 + 18)], fill=SKIPPED)


def name_ends(draw, x, top, ends):
    """Names (y, text, colour) by rising y at the ends of lines, moved down where they would touch, then up again."""
    step, lowest = SUPERSAMPLE * LINE, top + SUPERSAMPLE * PANEL[1]
    places, least = [], top
    for y, _, _ in ends:
        places.append(max(y, least))
        least = places[-1] + step
    for row in range(len(places) - 1, -1, -1):
        places[row] = min(places[row], lowest)
        lowest = places[row] - step
    for y, (_, text, colour) in zip(places, ends, strict=True):
        write(draw, (x, y), text, 20, colour, "lm")


def main(arguments=None):
    """Command line entry. Returns 0, or 2 after one sentence on stderr."""
    parser = argparse.ArgumentParser("tools.training", description=__doc__.splitlines()[0])
    parser.error = lambda message: parser.exit(2, f"tools.training: {message} (--help shows all)\n")
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder")
    run = parser.parse_args(arguments).run
    try:
        if not read_log(run / "log.jsonl")[0]:
            raise UserError(f"{run}/log.jsonl: no line of training, expected a run that has logged some steps")
        draw_log(run)
    except (UserError, OSError) as error:
        print(f"tools.training: {sentence_of(error)}", file=sys.stderr)
        return 2
    print(run / "training.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
