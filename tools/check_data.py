"""Read every label, calibration and image of a config's sources, and what they most likely get wrong.

Prints a table per class and what the canvas does to the images; with --draw N, pictures of N frames of each source.

python -m tools.check_data CONFIG.py [key=value ...] [--draw N] [--out DIR]
"""

import argparse
import dataclasses
import io
import logging
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from config import load_config
from data import Detection3D, Frames, build_dataset, find_metrics, open_source
from evaluate import compute_metrics
from metrics import kitti_notes
from metrics.kitti import kitti_ap
from scene.draw import draw_frame, draw_sheet
from scene.frames import UserError, join, load_image, usable_cores, whole_view
from scene.geometry import clip_boxes
from tools.diagnosis import diagnose, doubt_alpha, doubt_angles, doubt_repeats

GIVEN = (255, 214, 64)  # colour of the 2D boxes in pictures
LEAST = 8  # objects of a class, none of which counts, that are no accident
SHOWN = 30  # sentences on single frames of a source
ON_A_SHEET, WIDTH = 4, 1200  # frames in one picture, and how wide each is, px, without its view from above
HEADINGS = {"away": -np.pi / 2, "right": 0.0, "toward": np.pi / 2, "left": np.pi}  # where a box faces, and its yaw
COLUMNS = ("class", "used as", "objects", "size l h w, m", "depth, m", "/".join(HEADINGS) + ", %", "height, canvas px")


def check(config, draw=0, out=None):
    """Everything wrong with the sources of a config, as (sentences, lines to print). Draws into a folder."""
    said, log = io.StringIO(), logging.getLogger("deep3d")
    handler = logging.StreamHandler(said)
    log.addHandler(handler)  # what a training would be told, such as of images that are left out
    try:
        problems, lines = check_sources(config, draw, out)
    finally:
        log.removeHandler(handler)
    told = [*problems, *lines]
    return problems, lines + [line for line in said.getvalue().splitlines() if not any(line in one for one in told)]


def check_sources(config, draw, out):
    """`check`, without what is logged meanwhile."""
    problems, lines = [], []
    for title in ("train", "val"):
        before, sheets = len(problems), []
        for number, source in enumerate(getattr(config.data, title), 1):
            root = source.root or config.data.root
            place = root if source.kind == "jsonl" else f"{root} ({', '.join(source.split)})"
            dataset, sentences = read(source, config, title == "train")
            problems += sentences[:SHOWN]
            if len(sentences) > SHOWN:
                problems.append(f"and {len(sentences) - SHOWN} more such sentences")
            doubts = doubt_angles(sentences)
            if dataset:
                sizes, unread = check_images(dataset, f"{title}: {place}")
                problems += unread
                mistakes, notes = diagnose(dataset.frames, sizes, dataset.metrics == "kitti" and source.kind != "jsonl")
                doubts += mistakes + doubt_repeats(dataset.frames.parts[0].frames)
                notes += describe_rename(dataset)
                if dataset.metrics == "kitti":
                    doubts += doubt_alpha(dataset.frames)
                    uncounted, few = doubt_counts(dataset)
                    doubts += uncounted
                    notes += few
                lines += [f"{title}: {source.kind} {place}: {dataset.summary()}", *describe_classes(dataset, sizes)]
                lines += [*describe_canvas(sizes, config.model.size), *(f"{place}: {note}" for note in notes)]
                drawn = draw_source(dataset, draw, out, f"{title}{number}")
                lines += drawn
                sheets += [out / f"{title}{number}_1.png"] if drawn else []
            elif not sentences:
                doubts.append("it holds no frame")
            problems += [f"{place}: {sentence}" for sentence in doubts]
        if len(sheets) > 1:
            lines.append(draw_beside(sheets, out / f"{title}.png"))
        if len(problems) == before:  # what only all sources together show: a class in none, or a frame listed twice
            try:
                whole = build_dataset(config, title == "train")
                if title == "val":
                    compute_metrics(whole, {}, config)  # what an evaluation needs beside the frames, such as lidar rows
            except UserError as error:
                problems.append(str(error))
    return problems, lines


def read(source, config, training):
    """(data set of one source as training or evaluation reads it, None without frames; sentences on those left out)."""
    problems = []
    try:
        frames = Frames([open_source(source, config.data, problems)])
        plain = dataclasses.replace(config.data, skip_bad=False, cache="")
        dataset = Detection3D(frames, config.model, plain, training, metrics=find_metrics(source))
    except UserError as error:
        return None, [*problems, str(error)]
    return dataset if frames else None, problems


def check_images(dataset, title):
    """Read every frame as training would: (width, height) of the images (frames, 2), NaN unread, and sentences."""
    sizes = np.full((len(dataset), 2), np.nan)

    def check_frame(index):
        try:
            dataset[index]
            sizes[index] = dataset.view_of(index).image_size
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(usable_cores()) as pool:  # decoding leaves Python's lock alone
        checks = pool.map(check_frame, range(len(dataset)))
        sentences = [sentence for sentence in tqdm(checks, title, len(dataset), unit="frame", disable=None) if sentence]
    return sizes, [*sentences, *dataset.told.values()]


def doubt_counts(dataset):
    """Sentences on classes none of whose objects would count in evaluation; notes on those of few objects."""
    truth = {number: frame.labels for number, frame in enumerate(dataset.frames)}
    sentences = kitti_notes.describe_classes(truth, {}, kitti_ap(truth, {}, dataset.classes))
    counts = Counter(name.lower() for labels in truth.values() for name in labels.name)
    few = [f"{name}: " for name in dataset.classes if counts[name.lower()] < LEAST]
    return [s for s in sentences if not s.startswith(tuple(few))], [s for s in sentences if s.startswith(tuple(few))]


def describe_rename(dataset):
    """A note for each name that the rename of a source never meets."""
    [part] = dataset.frames.parts
    names = {name for frame in part.frames for name in frame.labels.name} if part.rename else ()
    return [f"rename names {name!r}, and no object is called so" for name in part.rename if name not in names]


def describe_classes(dataset, sizes):
    """A table with a row for every class in a source, the most frequent first."""
    labels = join([frame.labels for frame in dataset.frames])
    size = np.repeat(sizes, [len(frame.labels) for frame in dataset.frames], axis=0)
    box = clip_boxes(labels.box, *size.T) if len(labels) else labels.box
    height = (box[:, 3] - box[:, 1]) * (np.array(dataset.size) / size[:, ::-1]).min(1)
    uses = {name: "trained" for name in dataset.classes}
    uses |= {name: "ignored" for name in ("DontCare", *dataset.config.neighbours) if name not in uses}
    rows = [COLUMNS]
    for name, count in Counter(labels.name.tolist()).most_common():
        own = labels[labels.name == name]
        boxes, cells = own[own.is_3d], ("-", "-", "-")
        if len(boxes):
            facing = np.abs(np.exp(1j * boxes.yaw[:, None]) - np.exp(1j * np.array(list(HEADINGS.values())))).argmin(1)
            headings = "/".join(f"{100 * (facing == i).mean():.0f}" for i in range(len(HEADINGS)))
            size = " ".join(f"{value:.2f}" for value in np.median(boxes.size, 0))
            cells = (size, spread(boxes.center[:, 2], 1), headings)
        heights = spread(height[labels.name == name], 0)
        rows.append((name, uses.get(name, "background"), str(count), *cells, heights))
    width = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [f"{{:{side}{size}}}" for side, size in zip("<<>>>>>", width, strict=True)]
    lines = ["    " + "  ".join(cells).format(*row).rstrip() for row in rows]
    legend = "sizes are medians, three numbers 5 / 50 / 95 %"
    return [*lines, f"    ({legend})"]


def spread(values, digits):
    """'5 / 50 / 95 %' quantiles of values, those that are not numbers apart."""
    values = values[np.isfinite(values)]
    return " / ".join(f"{value:.{digits}f}" for value in np.quantile(values, (0.05, 0.5, 0.95))) if len(values) else "-"


def describe_canvas(sizes, canvas):
    """What the canvas (height, width) does to images like most of sizes (frames, 2)."""
    sizes = sizes[np.isfinite(sizes).all(1)].astype(int)
    if not len(sizes):
        return []
    kinds, count = np.unique(sizes, axis=0, return_counts=True)
    width, height = kinds[count.argmax()].tolist()
    view = whole_view(width, height, canvas)
    scale, fill = view.width / width, 100 * view.width * view.height / (canvas[0] * canvas[1])
    shown = f"which the canvas of {canvas[1]}x{canvas[0]} shows scaled by {scale:.2f}; it fills {fill:.0f} % of it"
    return [f"    image sizes: {len(kinds)}, most often {width}x{height}, {shown}"]


def draw_source(dataset, count, folder, name):
    """Pictures of so many frames, spread over those that hold a box, a few on a sheet. Returns lines naming them."""
    places = [i for i, frame in enumerate(dataset.frames) if frame.labels.is_3d.any()] or range(len(dataset))
    pictures, lines = [], []
    for place in np.unique(np.linspace(0, len(places) - 1, min(count, len(places))).astype(int)):
        frame = dataset.frames[places[place]]
        try:
            image = load_image(frame.image)
        except OSError:
            continue  # told above
        draw = ImageDraw.Draw(image)
        for box in frame.labels.box[frame.labels.is_3d]:
            draw.rectangle(tuple(box), outline=GIVEN, width=max(1, round(image.width / 600)))
        camera = f"fx {frame.K[0, 0]:.0f} fy {frame.K[1, 1]:.0f} cx {frame.K[0, 2]:.0f} cy {frame.K[1, 2]:.0f}"
        caption = f"{frame.id}   {image.width}x{image.height}   {camera}   blue: 3D, yellow: 2D, grey: not trained"
        pictures.append((draw_frame(image, frame.K, None, frame.labels, dataset.classes, width=WIDTH), caption))
    for start in range(0, len(pictures), ON_A_SHEET):
        path = folder / f"{name}_{start // ON_A_SHEET + 1}.png"
        draw_sheet(pictures[start : start + ON_A_SHEET]).save(path)
        lines.append(f"    drawn in {path}")
    return lines


def draw_beside(sheets, path):
    """The first sheets of several sources side by side, each as wide. Returns a line that names the picture."""
    pictures = [load_image(sheet) for sheet in sheets]
    pictures = [picture.resize((WIDTH, round(picture.height * WIDTH / picture.width))) for picture in pictures]
    whole = Image.new("RGB", (WIDTH * len(pictures), max(picture.height for picture in pictures)))
    for number, picture in enumerate(pictures):
        whole.paste(picture, (WIDTH * number, 0))
    whole.save(path)
    return f"    all sources side by side: {path}"


def main(arguments=None):
    """Command line entry: exit code 0 for good data, 1 with a sentence for each mistake, 2 for a wrong command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", help="a Python run file")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--draw", type=int, default=0, metavar="N", help="draw N frames of each source with boxes")
    parser.add_argument("--out", type=Path, default=Path("check_data"), help="folder of the pictures")
    options = parser.parse_intermixed_args(arguments)
    try:
        if options.draw < 0:
            raise UserError(f"--draw {options.draw}: expected at least 0")
        config = load_config(options.config, options.overrides)
        if options.draw:
            options.out.mkdir(parents=True, exist_ok=True)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    problems, lines = check(config, options.draw, options.out)
    end = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}" if problems else "no problem found"
    print("\n".join([*lines, *problems, end]))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
