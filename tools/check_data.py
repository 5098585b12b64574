"""Look at a data set before training: every label, calibration and image of a config's sources, and what they most likely get wrong.

Prints a table per class and what the canvas does to the images; with --draw N, pictures of N frames of each source with their boxes.

python -m tools.check_data CONFIG.py [key=value ...] [--draw N] [--out DIR] [--workers N]
"""

import argparse
import dataclasses
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import ImageDraw
from tqdm import tqdm

from config import load_config
from data import Detection3D, UserError, build_dataset, read_source, usable_cores
from formats import diagnosis, jsonl
from formats.index import Frames
from scene.draw import draw_frame, draw_sheet
from scene.frames import join, load_image, whole_view
from scene.geometry import clip_boxes

GIVEN = (255, 214, 64)  # colour of the 2D boxes in pictures
MOST_TOLD = 30  # sentences on single frames of a source
ON_A_SHEET, WIDTH = 4, 1200  # frames in one picture, and how wide each is, px, without its view from above
WORTH_TELLING = 1.03  # factor of size or pixels from which another canvas is better
HEADINGS = {"away": -np.pi / 2, "right": 0.0, "toward": np.pi / 2, "left": np.pi}  # where a box faces, and its yaw
COLUMNS = ("class", "used as", "objects", "size l h w, m", "depth, m", "/".join(HEADINGS) + ", %", "truncated", "occluded",
           "height, canvas px")  # fmt: skip


def check_frame(dataset, index):
    """Read one frame as training would: (sentence or '', (width, height) of its image, NaN where it cannot be read)."""
    frame = dataset.frames[index]
    try:
        sample, size = dataset[index], dataset.view_of(index).image_size
    except UserError as error:
        return str(error), (np.nan, np.nan)
    broken = [name for name, value in sample.items() if value.is_floating_point() and not value.isfinite().all()]
    return f"{frame.image}: {', '.join(broken)} not finite" * bool(broken), size


def check(config, workers, draw=0, out=None):
    """Everything wrong with the sources of a config, as (sentences, lines to print). Shows progress on stderr, draws into a folder."""
    problems, lines, classes = [], [], config.model.classes
    for title, sources in (("train", config.data.train), ("val", config.data.val)):
        before, found, readable = len(problems), Counter(), False
        for number, source in enumerate(sources):
            name = f"{title}: {source.kind} {source.root or config.data.root}"
            dataset, wrong = read(source, config, title)
            place = name_source(source, config.data)
            problems += shorten(wrong) + [f"{place}: {sentence}" for sentence in diagnosis.doubt_angles(wrong)]
            if not dataset:
                continue
            sizes = check_images(dataset, name, workers, problems)
            doubts, notes = doubt(dataset, sizes, source, place)
            problems += doubts
            lines += describe_source(dataset, source, place)
            canvas = describe_canvas(sizes, config.model.size, max(config.model.strides))
            lines += [f"{name}: {dataset.summary()}", *describe_classes(dataset, sizes), *canvas, *notes]
            if draw:
                lines += [
                    f"{name}: drawn in {path}" for path in draw_source(dataset, draw, out, f"{title}{number + 1}")
                ]
            readable = True
            for frame in dataset.frames:
                found.update(frame.labels.name[frame.labels.is_3d].tolist())
        if missing := [name for name in classes if readable and not found[name]]:
            there = ", ".join(f"{name} {count}" for name, count in found.most_common()) or "none"
            sentence = f"data.{title} holds no object of {', '.join(missing)} of model.classes (the rename of a source maps names)"
            sentence += f"; the classes there are: {there}"
            (problems if title == "train" or not found else lines).append(sentence)
        if len(problems) == before:  # what only all sources together show: none of them, or a frame listed twice
            try:
                build_dataset(config.data, sources, classes, config.model.size, title == "train")
            except (ValueError, OSError) as error:
                problems.append(str(error))
    return problems, lines


def shorten(sentences):
    """The first of many sentences, and how many more there are."""
    more = len(sentences) - MOST_TOLD
    return sentences if more <= 0 else [*sentences[:MOST_TOLD], f"and {more} more such sentences"]


def read(source, config, title):
    """(data set of one source as training or evaluation reads it, or None where there is none; sentences on the frames left out)."""
    plain, wrong = dataclasses.replace(config.data, skip_bad=False, cache=""), []
    try:
        frames = Frames(read_source(source, config.data, wrong))
        dataset = Detection3D(frames, config.model.classes, config.model.size, plain, training=title == "train")
    except (ValueError, OSError) as error:
        return None, [*wrong, str(error)]
    return (dataset if frames else None), wrong or [f"{name_source(source, config.data)}: it holds no frame"] * (
        not frames
    )


def name_source(source, config):
    """The place that sentences about a whole source begin with: its file, or its folder and splits."""
    root = source.root or config.root
    return root if source.kind == "jsonl" else f"{root} ({', '.join(source.split)})"


def check_images(dataset, name, workers, problems):
    """Read every frame of a data set; (frames, 2) width and height of the images, NaN of those that add to problems."""
    with ThreadPoolExecutor(workers) as pool:  # decoding leaves Python's lock alone
        found = pool.map(partial(check_frame, dataset), range(len(dataset)))
        found = list(tqdm(found, name, len(dataset), unit="frame", disable=None))
    problems += [sentence for sentence, _ in found if sentence]
    return np.array([size for _, size in found], float).reshape(-1, 2)


def describe_source(dataset, source, place):
    """What reading a source did on the way: objects left out, names that a rename never met."""
    dropped, met = [], {name for part in dataset.frames.parts for name in part.columns.names["name"]}
    if source.kind == "jsonl":
        jsonl.read_frames(place, [], dropped=dropped)
    lines = [f"    rename names {name!r}, and no object is called so" for name in source.rename if name not in met]
    if dropped:
        lines.append(f"    {len(dropped)} objects that cannot be seen are left out, the first: {dropped[0]}")
    return lines


def doubt(dataset, sizes, source, place):
    """(problems, notes) of `diagnose` for one source."""
    reading = diagnosis.KITTI if source.kind in ("kitti", "synthetic") else diagnosis.JSONL
    told = diagnosis.diagnose(dataset.frames, sizes, reading, Path(place) if source.kind == "jsonl" else None)
    return tuple([f"{place}: {sentence}" for sentence in sentences] for sentences in told)


def describe_classes(dataset, sizes):
    """A table with a row for every class in a source, the most frequent first; three numbers are the 5, 50 and 95 % quantiles."""
    labels = join([frame.labels for frame in dataset.frames])
    size = np.repeat(sizes, [len(frame.labels) for frame in dataset.frames], axis=0)
    box = clip_boxes(labels.box, *size.T) if len(labels) else labels.box
    height = (box[:, 3] - box[:, 1]) * (np.array(dataset.size) / size[:, ::-1]).min(1)
    rows = [COLUMNS]
    for name, count in Counter(labels.name.tolist()).most_common():
        own = labels.name == name
        use = (
            "trained"
            if name in dataset.classes
            else "ignored"
            if name in ("DontCare", *dataset.config.neighbours)
            else "background"
        )
        rows.append((name, use, str(count), *describe_boxes(labels[own & labels.is_3d]), spread(height[own], 0)))
    width = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    pad = [str.ljust, str.ljust, *[str.rjust] * (len(COLUMNS) - 2)]
    lines = ["    " + "  ".join(pad[i](text, width[i]) for i, text in enumerate(row)).rstrip() for row in rows]
    return [
        *lines,
        "    (sizes are medians, three numbers 5 / 50 / 95 %; truncated and occluded: per cent of those of which it is known)",
    ]


def describe_boxes(labels):
    """Texts of the columns from size to occlusion for the boxes of one class."""
    if not len(labels):
        return ["-"] * 5
    size = " ".join(f"{value:.2f}" for value in np.median(labels.size, 0))
    facing = np.abs(np.exp(1j * labels.yaw[:, None]) - np.exp(1j * np.array(list(HEADINGS.values())))).argmin(1)
    headings = "/".join(f"{100 * (facing == i).mean():.0f}" for i in range(len(HEADINGS)))
    return size, spread(labels.center[:, 2], 1), headings, share(labels.truncation), share(labels.occlusion)


def spread(values, digits):
    """'5/50/95 %' quantiles of values, those that are not numbers apart."""
    values = values[np.isfinite(values)]
    return " / ".join(f"{value:.{digits}f}" for value in np.quantile(values, (0.05, 0.5, 0.95))) if len(values) else "-"


def share(level):
    """Per cent of the boxes with a level above 0 among those that have one (-1: unknown), and of how many that is."""
    known = level[level >= 0]
    if not len(known):
        return "unknown"
    text = f"{100 * (known > 0).mean():.0f} %"
    return text if len(known) == len(level) else f"{text} of {len(known)}"


def describe_canvas(sizes, canvas, stride):
    """What the canvas (height, width) does to images of sizes (frames, 2) as width, height, and which other would show more of them."""
    sizes = sizes[np.isfinite(sizes).all(1)].astype(int)
    if not len(sizes):
        return []
    kinds, count = np.unique(sizes, axis=0, return_counts=True)
    views = [whole_view(*kind.tolist(), canvas) for kind in kinds]
    fill = np.repeat([view.width * view.height / (canvas[0] * canvas[1]) for view in views], count)
    common, turned = kinds[count.argmax()], np.repeat(kinds[:, 1] > kinds[:, 0], count).mean()
    scale = views[count.argmax()].width / common[0]
    mixed = f", {100 * turned:.0f} % upright" if 0 < turned < 1 else ""
    text = (f"{len(kinds)} image size{'s' * (len(kinds) > 1)}, most often {common[0]}x{common[1]}{mixed}, which the canvas of "
            f"{canvas[1]}x{canvas[0]} shows scaled by {scale:.2f}; the median image fills {100 * np.median(fill):.0f} % of it")  # fmt: skip
    other, larger, fewer = better_canvas(kinds, count, canvas, stride)
    if larger < WORTH_TELLING and fewer > 1 / WORTH_TELLING:
        return [f"    {text}; no other model.size of as many pixels fits better"]
    return [
        f"    {text}",
        f"    model.size={other[0]},{other[1]} would show them {larger:.2f} times as large on {100 * fewer:.0f} % of the pixels",
    ]


def better_canvas(kinds, count, canvas, stride):
    """(height, width) in multiples of stride, of at most as many pixels, that shows images largest in the geometric mean.

    kinds (k, 2): width, height, each so many times. Of canvases that differ by less than a half per cent it is the smallest. Returns
    it, and by which factors it changes the mean scale and the number of pixels.
    """
    cells = canvas[0] * canvas[1] // stride**2
    tried = stride * np.array([(h, w) for h in range(1, cells + 1) for w in range(1, cells // h + 1)])  # (t, 2)
    scale = lambda sides: (
        np.log(np.minimum(sides[:, :1] / kinds[:, 1], sides[:, 1:] / kinds[:, 0])) @ count / count.sum()
    )  # noqa: E731
    gain = scale(tried) - scale(np.array([canvas]))
    pixels = tried.prod(1)
    best = np.where(gain >= gain.max() - 0.005, pixels, np.inf).argmin()
    return tuple(tried[best].tolist()), float(np.exp(gain[best])), float(pixels[best] / (canvas[0] * canvas[1]))


def draw_source(dataset, count, folder, name):
    """Pictures of so many frames, spread over those of a source that hold a box, a few on a sheet. Returns the paths written."""
    places = [i for i, frame in enumerate(dataset.frames) if frame.labels.is_3d.any()] or list(range(len(dataset)))
    chosen = [places[i] for i in np.unique(np.linspace(0, len(places) - 1, min(count, len(places))).astype(int))]
    pictures, paths = [], []
    for index in chosen:
        frame = dataset.frames[index]
        try:
            image = load_image(frame.image)
        except OSError:
            continue  # told above
        draw = ImageDraw.Draw(image)
        for box in frame.labels.box[frame.labels.is_3d]:
            draw.rectangle(tuple(box), outline=GIVEN, width=max(1, round(image.width / 600)))
        caption = (f"{frame.id}   {image.width}x{image.height}   fx {frame.K[0, 0]:.0f}   fy {frame.K[1, 1]:.0f}   "
                   f"cx {frame.K[0, 2]:.0f}   cy {frame.K[1, 2]:.0f}   blue: 3D boxes, yellow: 2D boxes, grey: not trained")  # fmt: skip
        pictures.append((draw_frame(image, frame.K, None, frame.labels, dataset.classes, width=WIDTH), caption))
    for start in range(0, len(pictures), ON_A_SHEET):
        paths.append(folder / f"{name}_{start // ON_A_SHEET + 1}.png")
        draw_sheet(pictures[start : start + ON_A_SHEET]).save(paths[-1])
    return paths


def main(arguments=None):
    """Command line entry: exit code 0 for good data, 1 with a sentence for each thing that is wrong, 2 for a wrong command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", help="a Python run file")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument(
        "--draw", type=int, default=0, metavar="N", help="draw N frames of each source with their boxes"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the pictures (default: check_data)")
    parser.add_argument("--workers", type=int, default=usable_cores(), help="threads (default: one per core)")
    options = parser.parse_intermixed_args(arguments)
    out = options.out or Path("check_data")
    try:
        if options.draw < 0 or options.workers < 1 or (options.out and not options.draw):
            raise ValueError("expected --draw >= 0, --workers >= 1, and --out DIR only together with --draw N")
        config = load_config(options.config, options.overrides)
        if options.draw:
            out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    problems, lines = check(config, options.workers, options.draw, out)
    print(
        "\n".join(
            [
                *lines,
                *problems,
                f"{len(problems)} problem{'s' * (len(problems) > 1)}" if problems else "no problem found",
            ]
        )
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
