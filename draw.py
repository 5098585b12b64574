"""Pictures: 3D boxes on the image and a bird's-eye view beside it, with Pillow alone.

Predictions are solid orange, ground truth is dashed blue; the face of a box that looks forward is filled, and in the bird's-eye view a
tick leaves it. Everything is drawn at twice the final size and averaged down, which smooths the lines.
"""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from frames import Frame, Labels, load_image
from geometry import EDGES, NEAR, box3d_iou, box_corners, clip_edges, project

PREDICTION, TRUTH, OTHER = (255, 126, 22), (64, 200, 255), (190, 190, 190)
BACKGROUND, WEDGE, GRID, TEXT = (22, 24, 28), (38, 42, 49), (66, 71, 80), (214, 217, 222)
SUPERSAMPLE = 2
WIDTH, HEIGHT = 1440, 900  # pixels: the image is scaled to the first, unless it then exceeds the second
SHOWN_FRAMES = 3  # best, and as many worst, on a sheet
FRONT = [0, 1, 5, 4]  # corners of the face towards the box's own +x


def draw_frame(
    image: Image.Image | np.ndarray,
    K: np.ndarray,
    predictions: Labels | None,
    truth: Labels | None,
    classes: Sequence[str] | None = None,
    min_score: float = 0.3,
    max_range: float | None = None,
) -> Image.Image:
    """One picture of a frame: image with boxes on the left, bird's-eye view on the right.

    image: PIL, or (H, W, 3) uint8 RGB. K (3, 3) and both Labels belong to that image: its pixels, its camera frame, metres. Of the
    predictions those with score >= min_score are drawn. With `classes`, predictions of other classes are left out and ground truth of
    other classes is grey; DontCare regions are grey rectangles. max_range: metres shown ahead of the camera; by default as
    far as the farthest box, between 30 and 100. Returns an RGB image, 1440 pixels wide plus the bird's-eye view.
    """
    picture = (image if isinstance(image, Image.Image) else Image.fromarray(np.ascontiguousarray(image))).convert("RGB")
    K = np.asarray(K, float)
    layers = _layers(predictions, truth, classes, min_score)
    scale = min(WIDTH / picture.width, HEIGHT / picture.height)
    size = [SUPERSAMPLE * round(scale * side) for side in picture.size]
    front = _draw_image(picture.resize(size, Image.Resampling.BICUBIC), K, layers, picture.size)
    field = [(edge - K[0, 2]) / K[0, 0] for edge in (-0.5, picture.width - 0.5)]  # x / z of the outermost rays
    above = _draw_above(size[1], field, layers, max_range or _range_of(layers))
    both = Image.new("RGB", (front.width + above.width, size[1]))
    both.paste(front, (0, 0))
    both.paste(above, (front.width, 0))
    return both.reduce(SUPERSAMPLE)


def draw_sheet(images: Sequence[Image.Image], columns: int = 1, gap: int = 6) -> Image.Image:
    """Pictures in reading order on one sheet, `columns` to a row, `gap` pixels apart. Raises ValueError when there are none."""
    if not images or columns < 1:
        raise ValueError(f"a sheet needs at least one picture and one column, got {len(images)} and {columns}")
    rows = [images[start : start + columns] for start in range(0, len(images), columns)]
    width = max(image.width for image in images)
    heights = [max(image.height for image in row) for row in rows]
    shape = (min(columns, len(images)) * (width + gap) - gap, sum(heights) + gap * (len(rows) - 1))
    sheet = Image.new("RGB", shape, BACKGROUND)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            sheet.paste(image, (j * (width + gap), sum(heights[:i]) + i * gap))
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
    frames: Sequence[Frame], predictions: dict[str, Labels], metrics: dict, classes: Sequence[str], count: int = SHOWN_FRAMES
) -> Image.Image:
    """A sheet of the best frames, then the worst, by `frame_quality`; detections above `best_score`. Returns a PIL image.

    predictions: frame id -> Labels in the frame's source. A frame whose image cannot be read is passed over.
    """
    found = [predictions[frame.id].moved(frame.offset) for frame in frames]
    quality = np.array([frame_quality(frame.labels, labels, classes) for frame, labels in zip(frames, found, strict=True)])
    order = np.argsort(-quality, kind="stable")  # NaN last
    ranked = [int(i) for i in order if np.isfinite(quality[i])] or list(range(len(quality)))
    least = best_score(metrics)
    pictures = {}
    for side, places in (("best", ranked), ("worst", ranked[::-1])):
        shown = 0
        for index in places:
            if shown == count or index in pictures:
                break
            try:
                image = load_image(frames[index].image)
            except OSError:
                continue
            picture = draw_frame(image, frames[index].K, found[index], frames[index].labels, classes, min_score=least)
            caption = f"{side}: {frames[index].id}   mean 3D overlap {quality[index]:.2f}   scores from {least:.2f}"
            pictures[index] = _captioned(picture, caption)
            shown += 1
    order = sorted(pictures, key=ranked.index)
    return draw_sheet([pictures[index] for index in order]) if order else Image.new("RGB", (WIDTH, 40), BACKGROUND)


def _captioned(picture, text):
    """The picture under a line of text."""
    canvas = Image.new("RGB", (picture.width, picture.height + 26), (22, 24, 28))
    canvas.paste(picture, (0, 26))
    ImageDraw.Draw(canvas).text((8, 13), text, font=ImageFont.load_default(size=15), fill=(214, 217, 222), anchor="lm")
    return canvas


def _layers(predictions, truth, classes, min_score):
    """What is drawn, in order: (caption, Labels, colour, dashed). Predictions come last, on top."""
    layers = []
    if truth is not None:
        counted = np.array([name != "DontCare" and (classes is None or name in classes) for name in truth.name], bool)
        layers += [("not counted", truth[~counted], OTHER, True), ("ground truth", truth[counted], TRUTH, True)]
    if predictions is not None:
        named = np.array([classes is None or name in classes for name in predictions.name], bool)
        layers.append(("prediction", predictions[named & (predictions.score >= min_score)], PREDICTION, False))
    return layers


def _range_of(layers):
    """Metres ahead that hold every box, in tens, between 30 and 100."""
    farthest = max((labels.center[labels.is_3d, 2].max(initial=0) for _, labels, _, _ in layers), default=0)
    return min(max(math.ceil((farthest + 3) / 10) * 10, 30), 100)


def _draw_image(canvas, K, layers, size):
    """Boxes and their captions on the enlarged image; size is the (width, height) that K belongs to. Returns the canvas."""
    draw = ImageDraw.Draw(canvas, "RGBA")
    scale = np.array(canvas.size) / size
    enlarge = lambda pixels: (pixels + 0.5) * scale - 0.5  # noqa: E731
    captions = []
    for _, labels, colour, dashed in layers:
        for box in labels.box[~labels.is_3d]:
            _rectangle(draw, enlarge(box.reshape(2, 2)).ravel(), colour)
        boxes = labels[labels.is_3d]
        corners = box_corners(boxes.center, boxes.size, boxes.yaw)
        edges, visible = clip_edges(corners)
        pixels = enlarge(project(np.where(visible[..., None, None], edges, [0.0, 0.0, 1.0]), K))  # (n, 12, 2, 2)
        for i in np.argsort(-boxes.center[:, 2]):  # far to near
            if not visible[i].any():
                continue
            if (corners[i, FRONT, 2] >= NEAR).all():
                draw.polygon([tuple(p) for p in enlarge(project(corners[i, FRONT], K))], fill=(*colour, 30 if dashed else 55))
            width = SUPERSAMPLE * float(np.clip(30 / max(boxes.center[i, 2], 1), 1.2, 2.4))
            for a, b in pixels[i][visible[i]]:
                _line(draw, a, b, colour, width, dashed, canvas.size)
            extent = pixels[i][visible[i]].reshape(-1, 2)
            anchor = (*extent.min(0), *extent.max(0))
            score = f" {boxes.score[i]:.2f}" if not dashed else ""
            captions.append((dashed, boxes.center[i, 2], f"{boxes.name[i]}{score}", anchor, colour))
    _draw_captions(draw, captions, canvas.size)
    return canvas


def _draw_captions(draw, captions, size):
    """Class and score at each box where there is room: predictions and near boxes first, never one over another."""
    font = ImageFont.load_default(size=12 * SUPERSAMPLE)
    taken = []
    for _, _, text, (x1, y1, x2, y2), colour in sorted(captions, key=lambda caption: caption[:2]):
        if x2 < 0 or y2 < 0 or x1 >= size[0] or y1 >= size[1]:
            continue
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        width, height = right - left + 8, bottom - top + 6
        x = float(np.clip((x1 + x2 - width) / 2, 0, size[0] - width))
        for y in (y1 - height - 2, y2 + 2, y1 - 2 * height - 4, y2 + height + 4):
            y = float(np.clip(y, 0, size[1] - height))
            place = (x, y, x + width, y + height)
            if all(place[2] <= t[0] or t[2] <= place[0] or place[3] <= t[1] or t[3] <= place[1] for t in taken):
                taken.append(place)
                draw.rectangle(place, fill=(10, 10, 12, 165))
                draw.text((x + 4 - left, y + 3 - top), text, font=font, fill=colour)
                break


def _draw_above(height, field, layers, reach):
    """The scene from above: metric grid, field of view between the two rays `field` (x / z), boxes, legend. Returns an image."""
    width, margin = round(0.95 * height), 20 * SUPERSAMPLE
    scale = (height - 2 * margin) / reach  # pixels a metre
    place = lambda x, z: np.stack([width / 2 + scale * np.asarray(x), height - margin - scale * np.asarray(z)], -1)  # noqa: E731
    canvas = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(canvas, "RGBA")
    font = ImageFont.load_default(size=11 * SUPERSAMPLE)
    far = reach + margin / scale
    draw.polygon([tuple(place(x, z)) for x, z in ((0, 0), (field[0] * far, far), (field[1] * far, far))], fill=WEDGE)
    side = width / 2 / scale  # metres to either side
    for x in range(-10 * int(side // 10), int(side) + 1, 10):
        draw.line([tuple(place(x, 0)), tuple(place(x, far))], fill=GRID, width=SUPERSAMPLE)
        if x and scale * (side - abs(x)) > margin:
            draw.text(tuple(place(x, 0) + np.array([0, 3])), f"{x:+d}", font=font, fill=TEXT, anchor="ma")
    for z in range(0, int(reach) + 1, 10):
        draw.line([tuple(place(-side, z)), tuple(place(side, z))], fill=GRID, width=SUPERSAMPLE)
        draw.text(tuple(place(-side, z) + np.array([6, -2])), f"{z} m", font=font, fill=TEXT, anchor="ls")
    for _, labels, colour, dashed in layers:
        boxes = labels[labels.is_3d]
        for box, center, yaw, length in zip(
            box_corners(boxes.center, boxes.size, boxes.yaw), boxes.center, boxes.yaw, boxes.size[:, 0], strict=True
        ):
            outline = place(box[:4, 0], box[:4, 2])
            draw.polygon([tuple(p) for p in outline], fill=(*colour, 40))
            for a, b in EDGES[:4]:
                _line(draw, outline[a], outline[b], colour, 1.7 * SUPERSAMPLE, dashed, canvas.size, halo=False)
            heading, ahead = np.array([math.cos(yaw), -math.sin(yaw)]), length / 2
            tip = center[[0, 2]] + heading * (ahead + max(1.2, 0.3 * ahead))
            start = center[[0, 2]] + heading * ahead * 0.4
            _line(draw, place(*start), place(*tip), colour, 1.7 * SUPERSAMPLE, False, canvas.size, halo=False)
    _draw_legend(draw, layers, (width, height - margin), font)
    draw.polygon([tuple(place(0, 0) + SUPERSAMPLE * np.array(p)) for p in ((0, -9), (6, 3), (-6, 3))], fill=TEXT)
    return canvas


def _draw_legend(draw, layers, corner, font):
    """Line style, meaning and count of each layer that holds a box; its lower right corner is given, beside the field of view."""
    step = 17 * SUPERSAMPLE
    shown = [layer for layer in reversed(layers) if len(layer[1]) or layer[0] != "not counted"]
    if not shown:
        return
    texts = [f"{caption}: {len(labels)}" for caption, labels, _, _ in shown]
    left = corner[0] - max(draw.textlength(text, font=font) for text in texts) - 42 * SUPERSAMPLE
    top = corner[1] - step * len(shown) - 6 * SUPERSAMPLE
    draw.rectangle((left, top, corner[0] - 4, corner[1] - 4), fill=(*BACKGROUND, 215))
    for i, (text, (_, _, colour, dashed)) in enumerate(zip(texts, shown, strict=True)):
        y = top + 2 * SUPERSAMPLE + step * (i + 0.5)
        ends = np.array([left + 6 * SUPERSAMPLE, y]), np.array([left + 29 * SUPERSAMPLE, y])
        _line(draw, *ends, colour, 2 * SUPERSAMPLE, dashed, corner, halo=False)
        draw.text((left + 35 * SUPERSAMPLE, y), text, font=font, fill=TEXT, anchor="lm")


def _line(draw, a, b, colour, width, dashed, size, halo=True):
    """A line from a to b (2,), cut to the canvas `size` first: an edge next to the camera may be a million pixels long."""
    low, high = _cut(a, b, size)
    if low >= high:
        return
    a, b = a + low * (b - a), a + high * (b - a)
    if halo:
        draw.line([*a, *b], fill=(0, 0, 0, 70), width=round(width + 2 * SUPERSAMPLE))
    pieces = [(0.0, 1.0)]
    if dashed:
        count = max(1, round(math.dist(a, b) / (11 * SUPERSAMPLE)))
        pieces = [(i / (count - 0.4), min((i + 0.6) / (count - 0.4), 1.0)) for i in range(count)]  # a dash at either end
    for start, stop in pieces:
        draw.line([*(a + start * (b - a)), *(a + stop * (b - a))], fill=colour, width=round(width))


def _cut(a, b, size, margin=50):
    """Fractions of the segment a, b (2,) between which it lies inside the canvas, with a margin in pixels (Liang and Barsky 1984)."""
    low, high = 0.0, 1.0
    for axis in range(2):
        step = b[axis] - a[axis]
        for distance, slope in ((a[axis] + margin, -step), (size[axis] + margin - a[axis], step)):
            if slope > 0:
                high = min(high, distance / slope)
            elif slope < 0:
                low = max(low, distance / slope)
            elif distance < 0:
                return 1.0, 0.0
    return low, high


def _rectangle(draw, box, colour):
    """A region that is not counted: thin outline and a light veil."""
    draw.rectangle(tuple(box), fill=(*colour, 35), outline=(*colour, 150), width=SUPERSAMPLE)


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
    for number, difficulty in enumerate(COLOURS):
        values = np.zeros(41)
        values[: len(curves[difficulty]["precision"])] = curves[difficulty]["precision"]
        draw.line([place(i / 40, value) for i, value in enumerate(values)], fill=COLOURS[difficulty], width=2)
        average = averages[difficulty]["AP_R40"]
        text = f"{difficulty} {'-' if average is None else f'{average:.1f}'}"
        draw.text((left + PANEL[0] - 6, top + 6 + 14 * number), text, font=small, fill=COLOURS[difficulty], anchor="ra")
