"""Monocular 3D detection from an exported model.onnx, with numpy, Pillow and onnxruntime alone.

python onnx_detector.py model.onnx image.png --intrinsics FX FY CX CY

Prints one line per detection, in the camera of the image: x right, y down, z forward, metres; `center` is the geometric centre,
`size` (l, h, w), `yaw` the rotation about +y, `sigma` the standard deviation of the depth, `box` the visible 2D box in pixels of the
image, upright where EXIF turns it. Pixel centres lie at whole numbers.
"""

import argparse
import json

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


class OnnxDetector:
    """A model.onnx written by export.py: one image of any size and its camera matrix in, 3D boxes out."""

    def __init__(self, path, options=None, providers=("CPUExecutionProvider",)):
        """options: onnxruntime.SessionOptions, such as its threads; providers: as onnxruntime names them, the preferred first."""
        self.session = onnxruntime.InferenceSession(str(path), options, providers=list(providers))
        self.names = [output.name for output in self.session.get_outputs()]
        self.about = json.loads(
            self.session.get_modelmeta().custom_metadata_map.get("deep3d", '{"version": "of something else"}')
        )
        if self.about["version"] != 1:
            raise ValueError(
                f"{path}: layout {self.about['version']}, expected 1: take the onnx_detector.py that lies beside it"
            )
        self.config = self.about["model"]
        self.attributes = np.array(
            [*sorted({name for names in self.config["attributes"].values() for name in names}), ""]
        )

    def predict(self, image, K, min_score=0.0):
        """Detections of one image, best first: a path, PIL image or (H, W, 3) uint8 RGB array; K (3, 3) in its pixels."""
        return self.predict_batch([image], [K], min_score)[0]

    def predict_batch(self, images, cameras, min_score=0.0):
        """The same for n images, each with its own K, as one batch. Returns n dicts of numpy arrays: name (k,), score (k,), box (k, 4),
        center (k, 3), size (k, 3), yaw (k,), sigma (k,), and velocity (k, 3), attribute (k,) where the model has them."""
        views = [
            place(read_image(image), np.asarray(K, float), self.config["size"])
            for image, K in zip(images, cameras, strict=True)
        ]
        canvas, K = np.stack([view[0] for view in views]), np.float32([view[1] for view in views])
        rows = dict(zip(self.names, self.session.run(self.names, {"image": canvas, "K": K}), strict=True))
        found = []
        for i, (_, _, scale, size) in enumerate(views):
            boxes = {name: value[i].astype(np.float64) for name, value in rows.items()}
            boxes = boxes if self.about["nms"] else select(boxes, K[i], self.config)
            boxes = {
                name: value[boxes["score"] >= max(min_score, 1e-12)] for name, value in boxes.items()
            }  # rows of score 0 hold nothing
            boxes["box"] = np.clip((boxes["box"] + 0.5) / np.tile(scale, 2) - 0.5, 0, np.tile(size, 2) - 1.0)
            if "attribute" in boxes:
                boxes["attribute"] = self.attributes[
                    boxes["attribute"].astype(int)
                ]  # -1 stands for none, and is the last
            found.append({"name": np.array(self.config["classes"])[boxes.pop("label").astype(int)], **boxes})
        return found


def read_image(image):
    """A path, PIL image or RGB array -> PIL image in RGB with 8 bits, upright."""
    image = (
        Image.fromarray(image)
        if isinstance(image, np.ndarray)
        else image
        if isinstance(image, Image.Image)
        else Image.open(image)
    )
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits
        image = Image.fromarray((np.clip(np.asarray(image), 0, 65535) / 257 + 0.5).astype(np.uint8))
    return image.convert("RGB")


def place(image, K, canvas):
    """An image as large as fits in the left top corner of the canvas (height, width).

    Returns the canvas (H, W, 3) uint8, K (3, 3) in its pixels, the scale (x, y) of the image and its (width, height).
    """
    if (
        K.shape != (3, 3)
        or not np.isfinite(K).all()
        or min(K[0, 0], K[1, 1]) <= 0
        or K[0, 1]
        or K[1, 0]
        or (K[2] != [0, 0, 1]).any()
    ):
        raise ValueError(f"K is {K.tolist()}, expected [[fx, 0, cx], [0, fy, cy], [0, 0, 1]] in pixels of the image")
    fit = min(canvas[1] / image.width, canvas[0] / image.height)
    width, height = max(1, round(image.width * fit)), max(1, round(image.height * fit))
    pixels = np.full((*canvas, 3), (124, 116, 104), np.uint8)
    pixels[:height, :width] = resample(resample(np.asarray(image).swapaxes(0, 1), width).swapaxes(0, 1), height)
    scale = np.array([width / image.width, height / image.height])
    moved = np.array([[scale[0], 0, scale[0] / 2 - 0.5], [0, scale[1], scale[1] / 2 - 0.5], [0, 0, 1]]) @ K
    return pixels, moved, scale, image.size


def resample(pixels, count):
    """uint8 pixels (n, m, 3) -> (count, m, 3), bilinear with antialiasing, to the bit as torch does it with integer weights."""
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
    """Candidates of one image -> its detections: above the threshold, without duplicates, whose boxes and places are averaged."""
    rows = {name: value[np.argsort(-rows["score"], kind="stable")] for name, value in rows.items()}
    overlap = box_iou(rows["box"][:, None], rows["box"])
    np.fill_diagonal(overlap, 1.0)  # a box without area would not even overlap itself
    same = rows["label"][:, None] == rows["label"]
    kept = suppress(np.arange(len(overlap)), (overlap > config["nms_iou"]) & same)
    kept = kept[rows["score"][kept] > config["score_threshold"]]
    kept = suppress(kept, overlap > (config["nms_across_classes"] or 1))[: config["max_detections"]]
    found = {name: value[kept] for name, value in rows.items()}
    if config["fuse_duplicates"]:
        weight = np.where(same & (overlap > config["nms_iou"]), overlap * rows["score"], 0.0)[kept]
        trusted = weight / rows["sigma"] ** 2
        for name, shares in (("box", weight), ("pixel", trusted), ("depth", trusted)):
            found[name] = (shares / shares.sum(1, keepdims=True)) @ rows[name]
    pixel, depth, alpha = found.pop("pixel"), found.pop("depth"), found.pop("alpha")
    ray = (pixel - K[:2, 2]) / K[[0, 1], [0, 1]]
    found["center"] = np.concatenate([ray * depth[:, None], depth[:, None]], 1)
    found["yaw"] = (alpha + np.arctan2(ray[:, 0], 1.0) + np.pi) % (2 * np.pi) - np.pi
    return found


def suppress(rows, hits):
    """Those of the row indices, best first, that are not hit by an earlier one that stays. hits: (S, S) bool."""
    kept, gone = [], np.zeros(len(hits), bool)
    for row in rows:
        if not gone[row]:
            kept.append(row)
            gone |= hits[row]
    return np.array(kept, dtype=int)


def box_iou(a, b):
    """Overlaps of 2D boxes whose leading shapes broadcast, 0 for boxes without area."""
    width, height = (
        np.clip(np.minimum(a[..., i + 2], b[..., i + 2]) - np.maximum(a[..., i], b[..., i]), 0, None) for i in (0, 1)
    )
    area_a, area_b = ((c[..., 2] - c[..., 0]) * (c[..., 3] - c[..., 1]) for c in (a, b))
    return width * height / np.maximum(area_a + area_b - width * height, 1e-12)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="model.onnx")
    parser.add_argument("image")
    parser.add_argument(
        "--intrinsics", metavar=("FX", "FY", "CX", "CY"), nargs=4, type=float, required=True, help="pixels of the image"
    )
    parser.add_argument("--min-score", metavar="S", type=float, default=0.25, help="default: 0.25")
    options = parser.parse_args()
    fx, fy, cx, cy = options.intrinsics
    try:
        found = OnnxDetector(options.model).predict(
            options.image, [[fx, 0, cx], [0, fy, cy], [0, 0, 1]], options.min_score
        )
    except Exception as error:  # onnxruntime's errors have no class in common
        parser.exit(2, f"error: {options.model} on {options.image}: {str(error).splitlines()[0]}\n")
    for i, name in enumerate(found["name"]):
        print(
            name, *(f"{key} {np.round(found[key][i], 2)}" for key in ("score", "center", "size", "yaw", "sigma", "box"))
        )


if __name__ == "__main__":
    main()
