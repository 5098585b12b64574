"""Pictures: 3D boxes on the image and a bird's-eye view beside it, sheets of them, and precision-recall curves, with Pillow alone.

Predictions are solid orange with class, depth and score, ground truth is dashed blue without text, or solid with class and depth where it
is alone; the face of a box that looks forward is filled, and in the bird's-eye view a tick leaves it. Frames are drawn at twice the final
size and averaged down, which smooths lines.
"""

import functools
import io
import math
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from scene.frames import Frame, Labels, decode, load_image, upright
from scene.geometry import EDGES, NEAR, box3d_iou, clip_edges, project

PREDICTION, TRUTH, OTHER = (255, 126, 22), (64, 200, 255), (190, 190, 190)
BACKGROUND, WEDGE, GRID, TEXT = (22, 24, 28), (38, 42, 49), (66, 71, 80), (214, 217, 222)
SUPERSAMPLE = 2
WIDTH, HEIGHT = 1440, 900  # pixels: the image is scaled to the first, unless it then exceeds the second
SHEET_WIDTH, SHEET_BYTES, SHOWN_FRAMES = (
    900,
    1_500_000,
    3,
)  # of a sheet: pixels of an image, file size, best frames and as many worst
PEOPLE_SCORE = 0.25  # least score of what is shown to people, where nothing better is known
FRONT = [0, 1, 5, 4]  # corners of the face towards the box's own +x
LEVELS = {"easy": (46, 139, 87), "moderate": (31, 95, 180), "hard": (200, 60, 50)}
PANEL, MARGIN = (300, 220), (52, 46)  # pixels: plotting area, and the room around it
PANELS = {
    "bbox": ("2D", 0),
    "aos": ("AOS", 0),
    "bev": ("BEV", 1),
    "3d": ("3D", 2),
}  # title, place among a class's overlap thresholds
# for letters beyond ASCII: usual fonts of Linux, macOS and Windows, then ones with Chinese, Japanese and Korean
FONTS = (
    "DejaVuSans",
    "NotoSans-Regular",
    "Arial",
    "arial",
    "NotoSansCJK-Regular",
    "wqy-microhei",
    "Arial Unicode",
    "msyh",
)


def draw_frame(
    image: str | Path | Image.Image | np.ndarray,
    K: np.ndarray,
    predictions: Labels | None,
    truth: Labels | None = None,
    classes: Sequence[str] | None = None,
    min_score: float = PEOPLE_SCORE,
    max_range: float | None = None,
    width: int = WIDTH,
) -> Image.Image:
    """One picture of a frame: image with boxes on the left, bird's-eye view on the right.

    image: a path, PIL, or (H, W, 3) uint8 RGB, turned where its EXIF says so. K (3, 3) and both Labels belong to that image: its pixels,
    its camera frame, metres. Of the predictions those with score >= min_score are drawn. With `classes`, predictions of other classes are
    left out and ground truth of other classes is grey; DontCare regions are grey rectangles. max_range: metres shown ahead of the camera;
    by default as far as the farthest box, between 30 and 100. Returns an RGB image, `width` pixels plus the bird's-eye view.
    """
    if isinstance(image, str | Path):
        picture = load_image(image)
    else:
        picture = decode(
            upright(image if isinstance(image, Image.Image) else Image.fromarray(np.ascontiguousarray(image)))
        )
    K = np.asarray(K, float)
    layers = _layers(predictions, truth, classes, min_score)
    scale = min(width / picture.width, HEIGHT / picture.height)
    size = [SUPERSAMPLE * max(round(scale * side), 1) for side in picture.size]
    letters = SUPERSAMPLE * max(11, round(size[0] / SUPERSAMPLE / 90))
    field = [(edge - K[0, 2]) / K[0, 0] for edge in (-0.5, picture.width - 0.5)]  # x / z of the outermost rays
    farthest = max((labels.center[labels.is_3d, 2].max(initial=0) for _, labels, _, _ in layers), default=0)
    above = _draw_above(
        size[1], field, layers, max_range or min(max(math.ceil((farthest + 3) / 10) * 10, 30), 100), letters
    )
    front = _draw_image(picture.resize(size, Image.Resampling.BICUBIC), K, layers, picture.size, letters)
    return Image.fromarray(np.concatenate([front, above], axis=1)).reduce(SUPERSAMPLE)


def _layers(predictions, truth, classes, min_score):
    """What is drawn, in order: (caption, Labels, colour, dashed). Predictions come last, on top. What is dashed has no text."""
    layers, named = [], lambda labels: np.array([classes is None or name in classes for name in labels.name], bool)
    if truth is not None:
        counted = named(truth) & (truth.name != "DontCare")
        beside = predictions is not None
        layers += [("not counted", truth[~counted], OTHER, beside), ("true", truth[counted], TRUTH, beside)]
    if predictions is not None:
        layers.append(
            ("predicted", predictions[named(predictions) & (predictions.score >= min_score)], PREDICTION, False)
        )
    return layers


def _draw_image(canvas, K, layers, size, letters):
    """Boxes and texts on the enlarged image; size is the (width, height) that K belongs to. Returns the canvas."""
    draw = ImageDraw.Draw(canvas, "RGBA")
    scale = np.array(canvas.size) / size
    enlarge = lambda pixels: (pixels + 0.5) * scale - 0.5  # noqa: E731
    extents, captions = [], []
    for _, labels, colour, dashed in layers:
        for box in labels.box[~labels.is_3d]:
            draw.rectangle(
                tuple(enlarge(box.reshape(2, 2)).ravel()), fill=(*colour, 35), outline=(*colour, 150), width=SUPERSAMPLE
            )
        boxes = labels[labels.is_3d]
        corners = boxes.corners()
        edges, visible = clip_edges(corners)
        pixels = enlarge(project(np.where(visible[..., None, None], edges, [0.0, 0.0, 1.0]), K))  # (n, 12, 2, 2)
        for i in np.argsort(-boxes.center[:, 2]):  # far to near
            if not visible[i].any():
                continue
            if (corners[i, FRONT, 2] >= NEAR).all():
                draw.polygon(
                    [tuple(p) for p in enlarge(project(corners[i, FRONT], K))], fill=(*colour, 30 if dashed else 55)
                )
            width = SUPERSAMPLE * float(np.clip(30 / max(boxes.center[i, 2], 1), 1.2, 2.4))
            lines = pixels[i][visible[i]]
            for a, b in lines:
                _line(draw, a, b, colour, width, dashed, canvas.size)
            extents.append((*lines.min((0, 1)), *lines.max((0, 1))))
            if not dashed:
                score = f" {boxes.score[i]:.2f}".replace(" 0", " ") if colour == PREDICTION else ""
                captions.append((f"{boxes.name[i]} {boxes.center[i, 2]:.0f} m{score}", colour, len(extents) - 1))
    _draw_captions(draw, captions[::-1], np.array(extents).reshape(-1, 4), canvas.size, letters)
    return canvas


def _draw_captions(draw, captions, extents, size, letters):
    """Texts (text, colour, row of extents), the last layer's nearest first, each where it hides no text and no other object, if anywhere.

    extents: (n, 4) of all objects as drawn, canvas pixels. What meets an object's own box, such as its ground truth, may be touched.
    """
    apart = lambda a, b: (
        (a[..., 2] <= b[..., 0]) | (b[..., 2] <= a[..., 0]) | (a[..., 3] <= b[..., 1]) | (b[..., 3] <= a[..., 1])
    )  # noqa: E731
    taken = np.zeros((0, 4))
    named = {row for *_, row in captions}
    for text, colour, row in captions:
        own = extents[row]
        x1, y1, x2, y2 = own
        if apart(own, np.array([0, 0, *size])):
            continue
        others = [i for i in range(len(extents)) if i != row and (i in named or apart(own, extents[i]))]
        drawn, font = _fit(text, letters)
        width, height = font.getlength(drawn) + 0.6 * letters, 1.3 * letters
        for x, y in [(x, y) for y in (y1 - height - 2, y2 + 2) for x in ((x1 + x2 - width) / 2, x1, x2 - width)]:
            x, y = float(np.clip(x, 0, size[0] - width)), float(np.clip(y, 0, size[1] - height))
            place = np.array([x, y, x + width, y + height])
            if apart(place, np.concatenate([taken, extents[others]])).all():
                taken = np.concatenate([taken, place[None]])
                draw.rectangle(tuple(place), fill=(10, 10, 12, 185))
                _write(draw, (x + width / 2, y + height / 2), text, letters, colour, "mm")
                break


def _draw_above(height, field, layers, reach, letters):
    """The scene from above: metric grid, field of view between the two rays `field` (x / z), boxes, legend. Returns an image."""
    width, margin = round(0.95 * height), 20 * SUPERSAMPLE
    scale = (height - 2 * margin) / reach  # pixels a metre
    place = lambda x, z: np.stack([width / 2 + scale * np.asarray(x), height - margin - scale * np.asarray(z)], -1)  # noqa: E731
    canvas = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(canvas, "RGBA")
    far = reach + margin / scale
    draw.polygon([tuple(place(x, z)) for x, z in ((0, 0), (field[0] * far, far), (field[1] * far, far))], fill=WEDGE)
    side = width / 2 / scale  # metres to either side
    for x in range(-10 * int(side // 10), int(side) + 1, 10):
        draw.line([tuple(place(x, 0)), tuple(place(x, far))], fill=GRID, width=SUPERSAMPLE)
        if x and scale * (side - abs(x)) > margin:
            _write(draw, tuple(place(x, 0) + np.array([0, 3])), f"{x:+d}", letters, TEXT, "ma")
    for z in range(0, int(reach) + 1, 10):
        draw.line([tuple(place(-side, z)), tuple(place(side, z))], fill=GRID, width=SUPERSAMPLE)
        _write(draw, tuple(place(-side, z) + np.array([6, -2])), f"{z} m", letters, TEXT, "ls")
    for _, labels, colour, dashed in layers:
        boxes = labels[labels.is_3d]
        for box, center, yaw, length in zip(boxes.corners(), boxes.center, boxes.yaw, boxes.size[:, 0], strict=True):
            outline = place(box[:4, 0], box[:4, 2])
            draw.polygon([tuple(p) for p in outline], fill=(*colour, 40))
            for a, b in EDGES[:4]:
                _line(draw, outline[a], outline[b], colour, 1.7 * SUPERSAMPLE, dashed, canvas.size, halo=False)
            tick = np.array([0.2 * length, max(0.5 * length + 1.2, 0.65 * length)])  # from its center, m
            ends = place(center[0] + math.cos(yaw) * tick, center[2] - math.sin(yaw) * tick)
            _line(draw, *ends, colour, 1.7 * SUPERSAMPLE, False, canvas.size, halo=False)
    x = 3.2 * letters  # beside the farthest distance
    for caption, labels, colour, _ in reversed(layers):  # the legend, above the boxes
        if len(labels) or caption != "not counted":
            text = f"{len(labels)} {caption}"
            _write(draw, (x, margin / 2), text, letters, colour, "lm")
            x += _font(None, letters).getlength(text) + letters
    draw.polygon([tuple(place(0, 0) + SUPERSAMPLE * np.array(p)) for p in ((0, -9), (6, 3), (-6, 3))], fill=TEXT)
    return canvas


def _line(draw, a, b, colour, width, dashed, size, halo=True):
    """A line from a to b (2,), cut near the canvas `size` first: an edge next to the camera may be a million pixels long."""
    step = np.where(a == b, 1e-9, b - a)
    low, high = np.sort(
        [(-50 - a) / step, (np.array(size) + 50 - a) / step], axis=0
    )  # (2,) fractions of it (Liang and Barsky 1984)
    low, high = max(low.max(), 0.0), min(high.min(), 1.0)
    if low >= high:
        return
    a, b = a + low * (b - a), a + high * (b - a)
    if halo:
        draw.line([*a, *b], fill=(0, 0, 0, 70), width=round(width + 2 * SUPERSAMPLE))
    count = max(1, round(math.dist(a, b) / (11 * SUPERSAMPLE))) if dashed else 1
    for start in range(count):  # a dash at either end
        ends = [a + (b - a) * place / (count - 0.4) for place in (start, start + 0.6)]
        draw.line([*ends[0], *ends[1]], fill=colour, width=round(width))


def draw_frames(
    frames: Sequence[Frame],
    predictions: dict[str, Labels],
    metrics: dict,
    classes: Sequence[str],
    best: int = SHOWN_FRAMES,
    worst: int = SHOWN_FRAMES,
) -> Image.Image:
    """A sheet of so many best frames, then the worst, by `frame_quality`; detections above `best_score`. Returns an RGB image.

    predictions: frame id -> Labels in the frame's source. A frame whose image cannot be read is passed over.
    """
    found = [predictions[frame.id].moved(frame.offset) for frame in frames]
    quality = np.array(
        [frame_quality(frame.labels, labels, classes) for frame, labels in zip(frames, found, strict=True)]
    )
    ranked = [int(i) for i in np.argsort(-quality, kind="stable") if np.isfinite(quality[i])] or list(
        range(len(quality))
    )
    least, pictures = best_score(metrics) if "curves" in metrics else balanced_score(frames, found, classes), {}
    for side, places, count in (("best", ranked, best), ("worst", ranked[::-1], worst)):
        wanted = len(pictures) + count
        for index in places:
            if len(pictures) == wanted or index in pictures:
                break
            try:
                image = load_image(frames[index].image)
            except OSError:
                continue
            picture = draw_frame(
                image, frames[index].K, found[index], frames[index].labels, classes, least, width=SHEET_WIDTH
            )
            caption = f"{side}: {frames[index].id}   mean 3D overlap {quality[index]:.2f}   scores from {least:.2f}"
            pictures[index] = picture, caption
    sheet = draw_sheet([pictures[index] for index in sorted(pictures, key=ranked.index)])
    for bits in (6, 5, 4, 3, 2):  # a channel; noise that no one looks for is most of a PNG
        coarse, file = ImageOps.posterize(sheet, bits), io.BytesIO()
        coarse.save(file, "PNG", compress_level=1)  # a tenth larger than a plain save, in a fifth of the time
        if 0.9 * file.tell() <= SHEET_BYTES:
            break
    return coarse


def draw_sheet(pictures: Sequence[tuple[Image.Image, str]], line: int = 22) -> Image.Image:
    """Pictures one below the other, each under a line of text, `line` pixels high. Of none an empty sheet."""
    size = (
        max((picture.width for picture, _ in pictures), default=SHEET_WIDTH),
        sum(picture.height + line for picture, _ in pictures),
    )
    sheet = Image.new("RGB", (size[0], max(size[1], line)), BACKGROUND)
    draw, top = ImageDraw.Draw(sheet), 0
    for picture, text in pictures:
        _write(draw, (8, top + line / 2), text, 13, TEXT, "lm")
        sheet.paste(picture, (0, top + line))
        top += line + picture.height
    return sheet


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


def balanced_score(frames: Sequence[Frame], found: Sequence[Labels], classes: Sequence[str]) -> float:
    """The score above which there are as many detections as labelled objects: a level for pictures, of metrics without curves."""
    objects = sum(int((np.isin(frame.labels.name.astype(str), classes) & frame.labels.is_3d).sum()) for frame in frames)
    scores = np.sort(np.concatenate([np.zeros(1), *(labels.score for labels in found)]))[::-1]
    return float(scores[min(objects, len(scores) - 1)])


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


def draw_curves(metrics: dict) -> Image.Image:
    """Precision over recall of the result of `kitti_ap`: a row per class, a panel per metric, a line per difficulty. Returns a PIL image.

    Drawn over the 41 recall positions that AP averages, so the area under a line is its AP.
    """
    classes = metrics["settings"]["classes"]
    step = (PANEL[0] + MARGIN[0] + 16, PANEL[1] + MARGIN[1] + 44)
    canvas = Image.new("RGB", (step[0] * len(PANELS) + 10, step[1] * len(classes) + 10), (255, 255, 255))
    for row, name in enumerate(classes):
        for column, (metric, (title, threshold)) in enumerate(PANELS.items()):
            corner = (MARGIN[0] + column * step[0], 48 + row * step[1])
            overlap = f"AP_R40, overlap > {metrics['settings']['min_overlap'][name][threshold]:g}"
            axis = "orientation similarity" if metric == "aos" else "precision"
            texts = (f"{name} {title}", overlap, f"{axis} over recall")
            _draw_panel(ImageDraw.Draw(canvas), corner, texts, metrics["curves"][name][metric], metrics[name][metric])
    return canvas


def _draw_panel(draw, corner, texts, curves, averages):
    """One panel of `draw_curves` with its left top corner at `corner`; texts: title, overlap threshold, axes. The legend is above it."""
    left, top = corner
    right, bottom = left + PANEL[0], top + PANEL[1]
    place = lambda recall, precision: (left + recall * PANEL[0], bottom - precision * PANEL[1])  # noqa: E731
    write = lambda xy, text, fill, anchor, size=11: _write(draw, xy, text, size, fill, anchor)  # noqa: E731
    for tick in (0, 0.25, 0.5, 0.75, 1):
        draw.line([place(tick, 0), place(tick, 1)], fill=(228, 228, 228))
        draw.line([place(0, tick), place(1, tick)], fill=(228, 228, 228))
        write((place(tick, 0)[0], bottom + 4), f"{tick:g}", (90, 90, 90), "ma")
        write((left - 5, place(0, tick)[1]), f"{tick:g}", (90, 90, 90), "rm")
    draw.rectangle((left, top, right, bottom), outline=(120, 120, 120))
    write((left, top - 28), texts[0], (20, 20, 20), "ls", 15)
    write((right, top - 28), texts[1], (90, 90, 90), "rs")
    write(((left + right) / 2, bottom + 18), texts[2], (90, 90, 90), "ma")
    for number, (difficulty, colour) in enumerate(LEVELS.items()):
        values = np.zeros(41)
        values[: len(curves[difficulty]["precision"])] = curves[difficulty]["precision"]
        draw.line([place(i / 40, value) for i, value in enumerate(values)], fill=colour, width=2)
        average, x = averages[difficulty]["AP_R40"], left + number * PANEL[0] / 2.8
        draw.line([(x, top - 14), (x + 14, top - 14)], fill=colour, width=2)
        write((x + 19, top - 14), f"{difficulty} {'-' if average is None else f'{average:.1f}'}", colour, "lm")


def _write(draw, xy, text, size, fill, anchor):
    """Text whose anchor, as Pillow names it, lies at xy."""
    text, font = _fit(text, size)
    draw.text(xy, text, font=font, fill=fill, anchor=anchor)


def _fit(text, size):
    """(text, font) that draw it: the font with most of its characters, and what that lacks as ASCII, '?' where nothing is like it."""
    text = unicodedata.normalize("NFC", text)
    font = _font(None, size)
    if text.isascii():
        return text, font
    fonts = [font, *(font for name in FONTS if (font := _font(name, size)))]
    font = max(fonts, key=lambda font: sum(_has(font, letter) for letter in text))
    plain = lambda letter: unicodedata.normalize("NFKD", letter).encode("ascii", "ignore").decode() or "?"  # noqa: E731
    return "".join(letter if _has(font, letter) else plain(letter) for letter in text), font


@functools.cache
def _font(name, size):
    """The machine's font file of that name, None where there is none; for None Pillow's own, which holds ASCII alone."""
    try:
        return ImageFont.truetype(name, size) if name else ImageFont.load_default(size)
    except OSError:
        return None


@functools.cache
def _has(font, letter):
    """Whether a font has more for a character than the box for what is missing, which it draws for the non-character U+FFFF."""
    return letter.isascii() or bytes(font.getmask(letter)) != bytes(font.getmask("\uffff"))
