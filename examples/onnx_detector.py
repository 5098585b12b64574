"""Monocular 3D detection from an exported model.onnx, with numpy, Pillow and onnxruntime alone.

python onnx_detector.py model.onnx image.png --intrinsics FX FY CX CY

Prints a line per detection: `center`, `size` (l, h, w) and `yaw` about +y of the box, metres and radians, camera frame
x right, y down, z forward; `sigma`, the depth's standard deviation; `box`, visible, in pixels of the upright image.
"""

import argparse
import json

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


class OnnxDetector:
    """A model.onnx written by export.py: one image of any size and its camera matrix in, 3D boxes out."""

    def __init__(self, path, options=None, providers=("CPUExecutionProvider",)):
        """options: onnxruntime.SessionOptions, such as its threads; providers: in onnxruntime's words, best first."""
        self.session = onnxruntime.InferenceSession(str(path), options, providers=list(providers))
        self.names = [output.name for output in self.session.get_outputs()]
        self.about = json.loads(self.session.get_modelmeta().custom_metadata_map.get("deep3d", '{"version": 0}'))
        if (version := self.about["version"]) != 1:
            raise ValueError(f"{path}: layout {version}, expected 1: take the onnx_detector.py that lies beside it")
        self.config = self.about["model"]
        self.attributes = np.array([*sorted(set().union(*self.config["attributes"].values())), ""])  # the last is none

    def predict(self, image, K, min_score=0.0):
        """Detections of one image, best first: a path, PIL image or (H, W, 3) uint8 RGB array; K (3, 3) of it."""
        return self.predict_batch([image], [K], min_score)[0]

    def predict_batch(self, images, cameras, min_score=0.0):
        """The same for n images and n K, as one batch: n dicts of name (k,), score (k,), box (k, 4), center (k, 3),
        size (k, 3), yaw (k,), sigma (k,), and where the model has them velocity (k, 3) and attribute (k,)."""
        pairs = zip(images, cameras, strict=True)
        views = [place(read_image(image), np.asarray(K, float), self.config["size"]) for image, K in pairs]
        feed = {"image": np.array([view[0] for view in views]), "K": np.float32([view[1] for view in views])}
        rows = dict(zip(self.names, self.session.run(self.names, feed), strict=True)) if views else {}
        results = []
        for i, (_, _, scale, size) in enumerate(views):
            boxes = {name: value[i].astype(np.float64) for name, value in rows.items()}
            boxes = boxes if self.about["nms"] else select(boxes, feed["K"][i], self.config)
            best = boxes["score"] >= max(min_score, 1e-12)  # rows of score 0 hold nothing
            boxes = {name: value[best] for name, value in boxes.items()}
            boxes["box"] = np.clip((boxes["box"] + 0.5) / np.tile(scale, 2) - 0.5, 0, np.tile(size, 2) - 1.0)
            if "attribute" in boxes:
                boxes["attribute"] = self.attributes[boxes["attribute"].astype(int)]
            results.append({"name": np.array(self.config["classes"])[boxes.pop("label").astype(int)], **boxes})
        return results


def read_image(image):
    """A path, PIL image or RGB array -> PIL image in RGB with 8 bits, upright."""
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image = ImageOps.exif_transpose(image if isinstance(image, Image.Image) else Image.open(image))
    if image.mode.startswith("I"):  # 16 bits
        image = Image.fromarray((np.clip(np.asarray(image), 0, 65535) / 257 + 0.5).astype(np.uint8))
    return image.convert("RGB")


def place(image, K, canvas):
    """An image as large as fits in the left top corner of the canvas (height, width): that canvas (H, W, 3) uint8, K
    (3, 3) in its pixels, the scale (x, y) of the image and its (width, height)."""
    w, h = image.size
    fine = K.shape == (3, 3) and K[1, 0] == 0 and np.abs(K[2] - [0, 0, 1]).max() <= 1e-6 and abs(K[0, 1]) <= 0.5
    fine = fine and 0.1 * w < K[0, 0] < 50 * w and 0.1 * h < K[1, 1] < 50 * max(w, h)
    if not fine or not (-w < K[0, 2] < 2 * w and -h < K[1, 2] < 2 * h):
        expected = f"[[fx, 0, cx], [0, fy, cy], [0, 0, 1]] for {w}x{h} px; with a skew above 0.5, rectify the image"
        raise ValueError(f"K is {K.tolist()}, expected {expected}")
    fit = min(canvas[1] / w, canvas[0] / h)
    width, height = max(1, round(w * fit)), max(1, round(h * fit))
    pixels = np.full((*canvas, 3), (124, 116, 104), np.uint8)
    pixels[:height, :width] = resample(resample(np.asarray(image).swapaxes(0, 1), width).swapaxes(0, 1), height)
    scale = np.array([width / w, height / h])
    moved = np.array([[scale[0], 0, scale[0] / 2 - 0.5], [0, scale[1], scale[1] / 2 - 0.5], [0, 0, 1]]) @ K
    return pixels, moved, scale, image.size


def resample(pixels, count):
    """uint8 pixels (n, m, 3) -> (count, m, 3), bilinear with antialiasing, as torch's integer weights to the bit."""
    scale = len(pixels) / count
    reach = max(scale, 1.0)
    middle = (np.arange(count) + 0.5) * scale
    first = np.maximum((middle - reach + 0.5).astype(int), 0)[:, None]
    last = np.minimum((middle + reach + 0.5).astype(int), len(pixels))[:, None]
    taps = first + np.arange((last - first).max())
    weight = np.where(taps < last, np.maximum(1 - np.abs((taps - middle[:, None] + 0.5) / reach), 0), 0)
    weight /= weight.sum(1, keepdims=True)
    bits = next(b for b in range(23) if b == 22 or int(0.5 + weight.max() * 2 ** (b + 1)) >= 2**15)
    weight, taps = (weight * 2**bits + 0.5).astype(np.int32), np.minimum(taps, len(pixels) - 1)
    total = sum(weight[:, i, None, None] * pixels[taps[:, i]] for i in range(taps.shape[1]))
    return ((total + 2 ** (bits - 1)) >> bits).clip(0, 255).astype(np.uint8)


def select(rows, K, config):
    """Candidates of one image -> its detections: the best of each thing above the threshold, averaged."""
    rows = {name: value[np.argsort(-rows["score"], kind="stable")] for name, value in rows.items()}
    a, b = rows["box"][:, None], rows["box"]
    sides = np.clip(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0, None)
    common, area = sides.prod(-1), (b[..., 2:] - b[..., :2]).prod(-1)
    overlap = common / np.maximum(area[:, None] + area - common, 1e-12)
    np.fill_diagonal(overlap, 1.0)  # a box without area would not even overlap itself
    same = rows["label"][:, None] == rows["label"]
    best = suppress(np.arange(len(overlap)), (overlap > config["nms_iou"]) & same)
    best = best[rows["score"][best] > config["score_threshold"]]
    best = suppress(best, overlap > (config["nms_across_classes"] or 1))[: config["max_detections"]]
    boxes = {name: value[best] for name, value in rows.items()}
    if config["fuse_duplicates"]:
        weight = np.where(same & (overlap > config["nms_iou"]), overlap * rows["score"], 0.0)[best]
        trusted = weight / rows["sigma"] ** 2
        for name, shares in (("box", weight), ("pixel", trusted), ("depth", trusted)):
            boxes[name] = (shares / shares.sum(1, keepdims=True)) @ rows[name]
    pixel, depth, alpha = boxes.pop("pixel"), boxes.pop("depth"), boxes.pop("alpha")
    ray = (pixel - K[:2, 2]) / K[[0, 1], [0, 1]]
    boxes["center"] = np.concatenate([ray * depth[:, None], depth[:, None]], 1)
    boxes["yaw"] = (alpha + np.arctan2(ray[:, 0], 1.0) + np.pi) % (2 * np.pi) - np.pi
    return boxes


def suppress(rows, hits):
    """Those of the row indices, best first, that are hit by no earlier one that stays. hits: (S, S) bool."""
    stay = []
    for row in rows:
        if not hits[stay, row].any():
            stay.append(row)
    return np.array(stay, dtype=int)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="model.onnx")
    parser.add_argument("image")
    parser.add_argument("--intrinsics", metavar=("FX", "FY", "CX", "CY"), nargs=4, type=float, required=True, help="px")
    parser.add_argument("--min-score", metavar="S", type=float, default=0.25, help="default: 0.25")
    options = parser.parse_args()
    fx, fy, cx, cy = options.intrinsics
    try:
        K = [[fx, 0, cx], [0, fy, cy], [0, 0, 1]]
        boxes = OnnxDetector(options.model).predict(options.image, K, options.min_score)
    except Exception as error:  # onnxruntime's errors have no class in common
        parser.exit(2, f"error: {options.model} on {options.image}: {str(error).splitlines()[0]}\n")
    for i, name in enumerate(boxes["name"]):
        values = [f"{key} {np.round(boxes[key][i], 2)}" for key in ("score", "center", "size", "yaw", "sigma", "box")]
        print(name, *values)


if __name__ == "__main__":
    main()
