"""Pictures: 3D boxes on the image and from above, and sheets of them, with Pillow alone.

Predictions are solid orange with class, depth and score, ground truth is dashed blue, or solid with class and depth
where it is alone; the face of a box that looks forward is filled, and from above a tick leaves it. Frames are drawn at
twice the final size and averaged down, which smooths lines.
"""

import contextlib
import functools
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
SHEET_WIDTH = 900  # pixels of an image on a sheet
SHOWN_FRAMES = 3  # best frames on a sheet, and as many worst
PEOPLE_SCORE = 0.25  # least score of what is shown to people, where nothing better is known
FRONT = [0, 1, 5, 4]  # corners of the face towards the box's own +x
FONTS = ("DejaVuSans", "NotoSans-Regular", "Arial", "NotoSansCJK-Regular", "wqy-microhei", "Arial Unicode", "msyh")


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
    """One picture of a frame: image with boxes on the left, the scene from above on the right.

    image: a path, PIL, or (H, W, 3) uint8 RGB, turned where its EXIF says so. K (3, 3) and both Labels belong to that
    image: its pixels, its camera frame, metres. Of the predictions those with score >= min_score are drawn. With
    `classes`, predictions of other classes are left out and ground truth of other classes is grey; DontCare regions are
    grey rectangles. max_range: metres shown ahead of the camera; by default as far as the farthest box, between 30 and
    100. Returns an RGB image, `width` pixels plus the view from above.
    """
    image = Image.fromarray(np.ascontiguousarray(image)) if isinstance(image, np.ndarray) else image
    picture = decode(upright(image)) if isinstance(image, Image.Image) else load_image(image)
    K = np.asarray(K, float)
    layers = _layers(predictions, truth, classes, min_score)
    scale = min(width / picture.width, HEIGHT / picture.height)
    final = [max(round(scale * side), 1) for side in picture.size]
    size = [SUPERSAMPLE * side for side in final]
    letters = SUPERSAMPLE * max(11, round(size[0] / SUPERSAMPLE / 90))
    field = [(edge - K[0, 2]) / K[0, 0] for edge in (-0.5, picture.width - 0.5)]  # x / z of the outermost rays
    farthest = max((labels.center[labels.is_3d, 2].max(initial=0) for _, labels, _, _ in layers), default=0)
    reach = max_range or min(max(math.ceil((farthest + 3) / 10) * 10, 30), 100)
    above = _draw_above(size[1], field, layers, reach, letters)
    canvas = picture.resize(final, Image.Resampling.BICUBIC).resize(size, Image.Resampling.NEAREST)
    front = _draw_image(canvas, K, layers, picture.size, letters)
    return Image.fromarray(np.concatenate([front, above], axis=1)).reduce(SUPERSAMPLE)


def _layers(predictions, truth, classes, min_score):
    """What is drawn, in order, predictions on top: (caption, Labels, colour, dashed). What is dashed has no text."""

    def wanted(labels):
        return np.array([classes is None or name in classes for name in labels.name], bool)

    layers = []
    if truth is not None:
        counted = wanted(truth) & (truth.name != "DontCare")
        beside = predictions is not None
        layers += [("not counted", truth[~counted], OTHER, beside), ("true", truth[counted], TRUTH, beside)]
    if predictions is not None:
        shown = predictions[wanted(predictions) & (predictions.score >= min_score)]
        layers.append(("predicted", shown, PREDICTION, False))
    return layers


def _draw_image(canvas, K, layers, size, letters):
    """Boxes and texts on the enlarged image; size is the (width, height) that K belongs to. Returns the canvas."""
    draw = ImageDraw.Draw(canvas, "RGBA")
    extents, captions = [], []

    def enlarge(pixels):
        return (pixels + 0.5) * (np.array(canvas.size) / size) - 0.5

    for _, labels, colour, dashed in layers:
        for box in labels.box[~labels.is_3d]:
            region = tuple(enlarge(box.reshape(2, 2)).ravel())
            draw.rectangle(region, fill=(*colour, 35), outline=(*colour, 150), width=SUPERSAMPLE)
        boxes = labels[labels.is_3d]
        corners = boxes.corners()
        edges, visible = clip_edges(corners)
        pixels = enlarge(project(np.where(visible[..., None, None], edges, [0.0, 0.0, 1.0]), K))  # (n, 12, 2, 2)
        for i in np.argsort(-boxes.center[:, 2]):  # far to near
            if not visible[i].any():
                continue
            if (corners[i, FRONT, 2] >= NEAR).all():
                face = [tuple(p) for p in enlarge(project(corners[i, FRONT], K))]
                draw.polygon(face, fill=(*colour, 30 if dashed else 55))
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
    """Texts (text, colour, row of extents), nearest first, each where it hides no other text and object, or nowhere.

    extents: (n, 4) of all objects as drawn, canvas pixels. What meets an object's own box, such as its ground truth,
    may be touched.
    """
    taken = np.zeros((0, 4))
    named = {row for *_, row in captions}
    for text, colour, row in captions:
        own = extents[row]
        x1, y1, x2, y2 = own
        if _apart(own, np.array([0, 0, *size])):
            continue
        others = [i for i in range(len(extents)) if i != row and (i in named or _apart(own, extents[i]))]
        shown, font = _fit(text, letters)
        width, height = font.getlength(shown) + 0.6 * letters, 1.3 * letters
        for x, y in [(x, y) for y in (y1 - height - 2, y2 + 2) for x in ((x1 + x2 - width) / 2, x1, x2 - width)]:
            x, y = float(np.clip(x, 0, size[0] - width)), float(np.clip(y, 0, size[1] - height))
            place = np.array([x, y, x + width, y + height])
            if _apart(place, np.concatenate([taken, extents[others]])).all():
                taken = np.concatenate([taken, place[None]])
                draw.rectangle(tuple(place), fill=(10, 10, 12, 185))
                write(draw, (x + width / 2, y + height / 2), text, letters, colour, "mm")
                break


def _apart(a, b):
    """Whether boxes (..., 4) have no pixel in common."""
    aside = (a[..., 2] <= b[..., 0]) | (b[..., 2] <= a[..., 0])
    return aside | (a[..., 3] <= b[..., 1]) | (b[..., 3] <= a[..., 1])


def _draw_above(height, field, layers, reach, letters):
    """An image of the scene from above: grid, field of view between two rays `field` (x / z), boxes, legend."""
    width, margin = round(0.95 * height), 20 * SUPERSAMPLE
    scale = (height - 2 * margin) / reach  # pixels a metre

    def place(x, z):
        return np.stack([width / 2 + scale * np.asarray(x), height - margin - scale * np.asarray(z)], -1)

    canvas = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(canvas, "RGBA")
    far = reach + margin / scale
    draw.polygon([tuple(place(x, z)) for x, z in ((0, 0), (field[0] * far, far), (field[1] * far, far))], fill=WEDGE)
    side = width / 2 / scale  # metres to either side
    for x in range(-10 * int(side // 10), int(side) + 1, 10):
        draw.line([tuple(place(x, 0)), tuple(place(x, far))], fill=GRID, width=SUPERSAMPLE)
        if x and scale * (side - abs(x)) > margin:
            write(draw, tuple(place(x, 0) + np.array([0, 3])), f"{x:+d}", letters, TEXT, "ma")
    for z in range(0, int(reach) + 1, 10):
        draw.line([tuple(place(-side, z)), tuple(place(side, z))], fill=GRID, width=SUPERSAMPLE)
        write(draw, tuple(place(-side, z) + np.array([6, -2])), f"{z} m", letters, TEXT, "ls")
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
            write(draw, (x, margin / 2), text, letters, colour, "lm")
            x += _fit(text, letters)[1].getlength(text) + letters
    draw.polygon([tuple(place(0, 0) + SUPERSAMPLE * np.array(p)) for p in ((0, -9), (6, 3), (-6, 3))], fill=TEXT)
    return canvas


def _line(draw, a, b, colour, width, dashed, size, halo=True):
    """A line from a to b (2,), cut near the canvas `size`: an edge next to the camera may be a million pixels long."""
    step = np.where(a == b, 1e-9, b - a)
    # Where it enters and leaves, as fractions of it in x and y (Liang and Barsky 1984).
    enter, leave = np.sort([(-50 - a) / step, (np.array(size) + 50 - a) / step], axis=0)
    low, high = max(enter.max(), 0.0), min(leave.min(), 1.0)
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
    """A sheet of so many best frames, then the worst, by `frame_quality`; detections above a level. An RGB image.

    predictions: frame id -> Labels in the frame's source. A frame whose image cannot be read is passed over.
    """
    detections = [predictions[frame.id].moved(frame.offset) for frame in frames]
    pairs = zip(frames, detections, strict=True)
    quality = np.array([frame_quality(frame.labels, labels, classes) for frame, labels in pairs])
    ranked = [int(i) for i in np.argsort(-quality, kind="stable") if np.isfinite(quality[i])]
    ranked = ranked or list(range(len(quality)))
    if "curves" in metrics:
        least = best_score(metrics)
    else:
        truth = [frame.labels[frame.labels.is_3d] for frame in frames]
        objects = sum(int(np.isin(labels.name.astype(str), classes).sum()) for labels in truth)
        least = balanced_score(objects, np.concatenate([[], *(labels.score for labels in detections)]))
    pictures = {}
    for side, places, count in (("best", ranked, best), ("worst", ranked[::-1], worst)):
        wanted = len(pictures) + count
        for index in places:
            if len(pictures) == wanted or index in pictures:
                break
            frame = frames[index]
            with contextlib.suppress(OSError):
                image = load_image(frame.image)
                picture = draw_frame(image, frame.K, detections[index], frame.labels, classes, least, width=SHEET_WIDTH)
                caption = f"{side}: {frame.id}   mean 3D overlap {quality[index]:.2f}   scores from {least:.2f}"
                pictures[index] = picture, caption
    sheet = draw_sheet([pictures[index] for index in sorted(pictures, key=ranked.index)])
    return ImageOps.posterize(sheet, 6)  # noise that no one looks for is most of a PNG


def draw_sheet(pictures: Sequence[tuple[Image.Image, str]], line: int = 22) -> Image.Image:
    """Pictures one below the other, each under a line of text, `line` pixels high. Of none an empty sheet."""
    width = max((picture.width for picture, _ in pictures), default=SHEET_WIDTH)
    height = sum(picture.height + line for picture, _ in pictures)
    sheet = Image.new("RGB", (width, max(height, line)), BACKGROUND)
    draw, top = ImageDraw.Draw(sheet), 0
    for picture, text in pictures:
        write(draw, (8, top + line / 2), text, 13, TEXT, "lm")
        sheet.paste(picture, (0, top + line))
        top += line + picture.height
    return sheet


def best_score(metrics: dict) -> float:
    """The score with the highest F1 on moderate objects in 2D, all classes together: a level for pictures."""
    curves, counted = ([metrics[key][name] for name in metrics["settings"]["classes"]] for key in ("curves", "counted"))
    curves = [{key: np.array(values) for key, values in curve["bbox"]["moderate"].items()} for curve in curves]
    levels = np.unique(np.concatenate([curve["score"] for curve in curves]))
    true, detected = np.zeros(len(levels)), np.zeros(len(levels))
    for curve, objects in zip(curves, counted, strict=True):
        last = (curve["score"][None] >= levels[:, None]).sum(1) - 1  # scores fall along a curve
        hits = objects["moderate"] * np.append(curve["recall"], 0.0)[last]  # none above a class's best score
        true += hits
        detected += hits / np.maximum(np.append(curve["precision"], 1.0)[last], 1e-9)
    f1 = 2 * true / np.maximum(detected + sum(objects["moderate"] for objects in counted), 1e-9)
    return float(levels[f1.argmax()]) if f1.max(initial=0) > 0 else 0.3


def balanced_score(objects: int, scores: np.ndarray) -> float:
    """The score above which there are as many of the scores (n,) as objects, or 0: a level for pictures."""
    falling = np.sort(np.append(scores, 0.0))[::-1]
    return float(falling[min(objects, len(falling) - 1)])


def frame_quality(truth: Labels, detections: Labels, classes: Sequence[str]) -> float:
    """Mean over the k objects of a frame of the best 3D overlap with one of its k top-scored detections of the class.

    Returns a share in [0, 1], or NaN for a frame without objects. Independent of the level of the scores.
    """
    truth = truth[np.isin(truth.name.astype(str), classes) & truth.is_3d]
    if not len(truth):
        return float("nan")
    best = detections[np.argsort(-detections.score, kind="stable")[: len(truth)]]
    if not len(best):
        return 0.0
    i, j = np.indices((len(truth), len(best))).reshape(2, -1)
    boxes = [np.concatenate([labels.center, labels.size, labels.yaw[:, None]], 1) for labels in (truth, best)]
    overlap = box3d_iou(boxes[0][i], boxes[1][j]) * (truth.name[i] == best.name[j])
    return float(overlap.reshape(len(truth), len(best)).max(1).mean())


def write(draw, xy, text, size, fill, anchor):
    """Draw text whose anchor, as Pillow names it, lies at xy; size: letters' height, px."""
    text, font = _fit(text, size)
    draw.text(xy, text, font=font, fill=fill, anchor=anchor)


@functools.cache
def _fit(text, size):
    """(text, font): Pillow's own for ASCII, else the machine's first with all its letters, else the text in ASCII."""
    text = unicodedata.normalize("NFC", text)
    for name in () if text.isascii() else FONTS:
        with contextlib.suppress(OSError):
            font = ImageFont.truetype(name, size)
            missing = bytes(font.getmask("\uffff"))  # the box that is drawn for a letter that a font lacks
            if all(letter.isascii() or bytes(font.getmask(letter)) != missing for letter in text):
                return text, font
    letters = (letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))
    return "".join(letters).encode("ascii", "replace").decode(), ImageFont.load_default(size)
