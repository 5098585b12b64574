"""From sources of frames to batches: reading, placing images on the network's canvas with K following exactly, augmentation, collation.

A frame is one image with its camera and labels; a source (KITTI folder, JSON lines, built-in world) is a list of frames. Every random
draw is a pure function of (seed, epoch, index), never of a worker's state, so the loader gives a step the same pixels on any machine.
"""

import collections
import contextlib
import dataclasses
import hashlib
import os
import signal
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset

import data_json
import data_kitti
import data_synthetic
from data_kitti import Labels
from geometry import camera_problem, clip_boxes, flip_boxes, project_boxes, wrap_angle

PAD_COLOUR = (124, 116, 104)  # ImageNet's mean, so that padding is near zero after normalisation
GREY = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as Pillow's L


@dataclasses.dataclass(frozen=True)
class Source:
    """One list of frames. Several sources with different cameras may be listed together."""

    kind: str = "kitti"  # 'kitti' folder, 'jsonl' file, 'synthetic' built-in world (rendered on first use)
    root: str = ""  # folder or .jsonl file; empty: data.root
    split: tuple[str, ...] = ("train",)  # ImageSets/<split>.txt, several are concatenated; 'all' for every image; unused by jsonl
    repeat: int = 1  # how many times each frame is listed in an epoch
    limit: int = 0  # use only the first frames of the list; 0: all
    rename: dict[str, str] = dataclasses.field(default_factory=dict)  # class names of the source -> the model's


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which frames, and how they are varied in training."""

    root: str = "data/kitti"  # folder of sources that name none
    train: tuple[Source, ...] = (Source(),)  # sources to train on
    val: tuple[Source, ...] = (Source(split=("val",)),)  # sources to evaluate on
    neighbours: tuple[str, ...] = ("Van", "Person_sitting")  # neither object nor background: ignored in training, with DontCare
    min_height: float = 0.0  # input px: objects whose visible box is lower are ignored in training, neither object nor background
    max_occlusion: int = 3  # objects with a higher KITTI occlusion level (0-3) are ignored in training
    world_train: int = 600  # frames of the built-in world's train split
    world_val: int = 150  # and of its val split
    world_seed: int = 0  # another world for every number
    flip: float = 0.5  # probability of a mirror image
    scale: tuple[float, float] = (1.0, 1.0)  # range of the random scale; above 1 crops, below 1 pads, both at a random position
    colour: float = 0.0  # strength of brightness, contrast and saturation changes: each factor in 1 +- colour
    workers: int = 2  # loader processes per training process
    cache: str = ""  # folder for decoded frames, read instead of decoding again; 1.4 MB a KITTI frame; empty: none
    skip_bad: bool = False  # replace an unreadable image by another one, count and report, instead of stopping


@dataclasses.dataclass(frozen=True)
class Frame:
    """One image as its source describes it."""

    id: str
    image: Path
    K: np.ndarray  # (3, 3) px
    labels: Labels  # in the image's own camera frame and pixels; all classes, renamed; DontCare rows are ignore regions
    offset: np.ndarray  # (3,) m: camera frame = source frame + offset (KITTI labels live in rectified camera 0)


@contextlib.contextmanager
def opened(path):
    """A PIL image of which only the header is read yet. Raises FileNotFoundError or OSError, naming the file, here and inside the block."""
    try:
        with Image.open(path) as image:
            yield image
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such image") from None
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise OSError(f"{path}: cannot read the image: {error}") from None


def decode(image, reduction=1):
    """Pixels of an `opened` image as an RGB PIL image on the grid as stored, from 8 or 16 bits, a JPEG's reduced by 1, 2, 4 or 8."""
    if reduction > 1:
        image.draft("RGB", (image.width // reduction, image.height // reduction))
    image.load()
    if image.mode.startswith("I"):  # Pillow clips 16 bits to 255 instead of scaling them
        image = Image.fromarray((np.clip(np.asarray(image), 0, 65535) / 257 + 0.5).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def load_image(path):
    """RGB PIL image of a file, whole. Raises FileNotFoundError or OSError, naming the file."""
    with opened(path) as image:
        return decode(image).copy()


def reduction_of(image, canvas, scale=1.0):
    """How far a JPEG may be reduced while it is decoded (a DCT of fewer terms): 1, 2, 4 or 8.

    Never below what the canvas (height, width) shows at that scale, and only where sides divide, so that the reduced pixels are exact
    blocks of the stored ones and K follows exactly.
    """
    if image.format != "JPEG":
        return 1
    shown = whole_view(*image.size, canvas).width * scale
    fits = [r for r in (8, 4, 2) if not (image.width % r or image.height % r) and image.width // r >= shown]
    return fits[0] if fits else 1


@dataclasses.dataclass(frozen=True)
class View:
    """How an image lies on the network's canvas: scaled to (width, height), its left top corner at (left, top), then mirrored or not.

    All in whole canvas pixels, so the map of pixel centres u' = (u + 0.5) width / image_width - 0.5 + left is exact, and K with it.
    """

    image_size: tuple[int, int]  # (width, height) of the image, px
    canvas: tuple[int, int]  # (height, width) of the network input, px
    width: int  # of the whole scaled image on the canvas, px
    height: int
    left: int = 0
    top: int = 0
    flip: bool = False

    @property
    def matrix(self):
        """(3, 3) affine map of homogeneous image pixels to canvas pixels."""
        sx, sy = self.width / self.image_size[0], self.height / self.image_size[1]
        matrix = np.array([[sx, 0, 0.5 * sx - 0.5 + self.left], [0, sy, 0.5 * sy - 0.5 + self.top], [0, 0, 1]])
        return np.array([[-1, 0, self.canvas[1] - 1], [0, 1, 0], [0, 0, 1]]) @ matrix if self.flip else matrix

    def camera(self, K):
        """K (3, 3) of the image -> K of the canvas. A flip mirrors the world (x -> -x), so that fx stays positive."""
        return self.matrix @ K @ np.diag([-1.0 if self.flip else 1.0, 1.0, 1.0])

    def boxes_to_canvas(self, boxes):
        """2D boxes (n, 4) of the image -> of the canvas, not clipped."""
        matrix = dataclasses.replace(self, flip=False).matrix
        moved = boxes * np.tile(matrix[[0, 1], [0, 1]], 2) + np.tile(matrix[:2, 2], 2)
        return flip_boxes(moved, self.canvas[1]) if self.flip else moved

    def boxes_to_image(self, boxes):
        """Inverse of `boxes_to_canvas`, clipped to the image."""
        moved = flip_boxes(boxes, self.canvas[1]) if self.flip else boxes
        matrix = dataclasses.replace(self, flip=False).matrix
        moved = (moved - np.tile(matrix[:2, 2], 2)) / np.tile(matrix[[0, 1], [0, 1]], 2)
        return clip_boxes(moved, *self.image_size)

    @property
    def shown(self):
        """Canvas rectangle that the image covers, before the flip: x1, y1, x2, y2 with x2, y2 exclusive."""
        height, width = self.canvas
        return max(self.left, 0), max(self.top, 0), min(self.left + self.width, width), min(self.top + self.height, height)

    @property
    def covered(self):
        """The same rectangle after the flip."""
        x1, y1, x2, y2 = self.shown
        return (self.canvas[1] - x2, y1, self.canvas[1] - x1, y2) if self.flip else (x1, y1, x2, y2)


def whole_view(width, height, canvas):
    """The whole image, as large as fits, in the canvas' left top corner; the rest is padding."""
    scale = min(canvas[1] / width, canvas[0] / height)
    return View((width, height), canvas, max(1, round(width * scale)), max(1, round(height * scale)))


def random_view(rng, width, height, canvas, scale, flip):
    """A `whole_view` varied by a scale from the range (low, high), a position, and a flip with that probability.

    The range (1, 1) leaves the position alone too: such an image is seen in training as it is in evaluation.
    """
    base = whole_view(width, height, canvas)
    if tuple(scale) == (1, 1):
        return dataclasses.replace(base, flip=bool(rng.random() < flip))
    factor = rng.uniform(*scale)
    wide, high = max(1, round(base.width * factor)), max(1, round(base.height * factor))
    low, top = min(0, canvas[1] - wide), min(0, canvas[0] - high)
    left = int(rng.integers(low, max(0, canvas[1] - wide) + 1))
    return View((width, height), canvas, wide, high, left, int(rng.integers(top, max(0, canvas[0] - high) + 1)), bool(rng.random() < flip))


def place_image(pixels, view):
    """RGB (h, w, 3) uint8 of `view.image_size`, or reduced from it, -> canvas (H, W, 3) uint8: one resampling, then whole pixels move.

    Bilinear with antialiasing, by torch: the same filter as Pillow's in a sixth of the time, and equal but for one rounding in 60,000.
    """
    x1, y1, x2, y2 = view.covered
    left, height, width = view.left, *view.canvas
    image = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)  # strides that torch knows as channels last, and keeps
    if view.flip:  # by torch, which mirrors 30 times as fast as numpy
        image = image.flip(3)
        left = width - left - view.width
    scaled = F.interpolate(image, (view.height, view.width), mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
    canvas = np.empty((height, width, 3), np.uint8)
    canvas[y1:y2, x1:x2] = scaled[y1 - view.top : y2 - view.top, x1 - left : x2 - left]
    for outside in (canvas[:y1], canvas[y2:], canvas[y1:y2, :x1], canvas[y1:y2, x2:]):
        outside[:] = PAD_COLOUR
    return canvas


def place_labels(labels, view):
    """Labels of an image -> of the canvas: boxes clipped to what is shown, centres and yaws mirrored by a flip. Keeps every row."""
    x1, y1, x2, y2 = view.shown
    boxes = dataclasses.replace(view, flip=False).boxes_to_canvas(labels.box)
    boxes = np.clip(boxes, [x1, y1, x1, y1], [x2 - 1, y2 - 1, x2 - 1, y2 - 1])
    if not view.flip:
        return dataclasses.replace(labels, box=boxes)
    real = labels.is_3d
    return dataclasses.replace(
        labels,
        box=flip_boxes(boxes, view.canvas[1]),
        center=np.where(real[:, None], labels.center * [-1, 1, 1], labels.center),
        yaw=np.where(real, wrap_angle(np.pi - labels.yaw), labels.yaw),
        alpha=np.where(real, wrap_angle(np.pi - labels.alpha), labels.alpha),
    )


def sample_colour(rng, pixels, strength):
    """Brightness, contrast about the mean grey, then saturation, each by a factor in 1 +- strength, as one affine map of RGB (3, 4).

    pixels (h, w, 3) uint8; the mean is that of every eighth pixel of every eighth row.
    """
    brightness, contrast, saturation = rng.uniform(1 - strength, 1 + strength, 3)
    mean = brightness * sum(grey * pixels[::8, ::8, channel].mean() for channel, grey in enumerate(GREY))
    linear = brightness * contrast * (saturation * np.eye(3) + (1 - saturation) * GREY)
    offset = np.full((3, 1), (1 - contrast) * mean)  # grey, so saturation leaves it alone
    return np.hstack([linear, offset])


def change_colours(batch):
    """The images (B, H, W, 3) uint8 of a batch, changed by its "colour" (B, 3, 4) within "covered" (B, 4) where it has them.

    The padding keeps its colour, as in evaluation. Done on the batch's device, where it costs next to nothing: in a worker it took
    longer than the rest of reading a cached frame.
    """
    image, colour = batch["image"], batch.get("colour")
    if colour is None:
        return image
    planes = image.permute(0, 3, 1, 2).flatten(2)  # (B, 3, H W)
    with torch.autocast(image.device.type, enabled=False):
        changed = torch.baddbmm(colour[..., 3:], colour[..., :3], planes.float()).round_().clamp_(0, 255).to(torch.uint8)
    row, column = (torch.arange(n, device=image.device) for n in image.shape[1:3])
    x1, y1, x2, y2 = batch["covered"][..., None].unbind(1)  # (B, 1) each
    inside = ((row >= y1) & (row < y2))[:, :, None] & ((column >= x1) & (column < x2))[:, None]
    changed = torch.where(inside.flatten(1)[:, None], changed, planes)
    return changed.transpose(1, 2).contiguous().view_as(image)


def read_kitti(source, root, problems=None):
    """Frames of a KITTI folder. Raises FileNotFoundError or ValueError naming the folder, split, file or line.

    With a list `problems`, what is wrong with single frames is added to it as a sentence, and the frame left out, instead.
    """
    root = Path(source.root or root)
    if not (root / "training" / "image_2").is_dir():
        raise FileNotFoundError(f"{root}: expected a KITTI folder with training/image_2, training/label_2, training/calib and ImageSets")
    images = {p.stem: p for p in sorted((root / "training" / "image_2").iterdir()) if p.suffix.lower() in data_kitti.IMAGE_SUFFIXES}
    frames = []
    for split in source.split:
        for id in data_kitti.read_split(root, split):
            try:
                frames.append(read_kitti_frame(root, split, id, images))
            except (ValueError, OSError) as error:
                if problems is None:
                    raise
                problems.append(str(error))
    return frames


def read_kitti_frame(root, split, id, images):
    """One `Frame` of a KITTI folder; images: paths by id. Raises FileNotFoundError or ValueError naming the file or line."""
    if id not in images:
        raise FileNotFoundError(f"{root}/training/image_2/{id[:80]}.png: no such image, named by ImageSets/{split}.txt")
    for folder in ("calib", "label_2"):
        if not (root / "training" / folder / f"{id}.txt").is_file():
            raise FileNotFoundError(f"{root}/training/{folder}/{id}.txt: frame {id} of split {split} has no {folder} file")
    K, offset = data_kitti.split_projection(data_kitti.read_calib(root / "training" / "calib" / f"{id}.txt"))
    labels = data_kitti.read_labels(root / "training" / "label_2" / f"{id}.txt").moved(offset)
    return Frame(id, images[id], K, labels, offset)


def read_source(source, config, problems=None):
    """Frames of one `Source`, renamed and limited, not repeated. problems: see `read_kitti`."""
    if source.kind == "kitti":
        frames = read_kitti(source, config.root, problems)
    elif source.kind == "synthetic":
        world = data_synthetic.build_world(
            Path(source.root or config.root), train=config.world_train, val=config.world_val, seed=config.world_seed
        )
        frames = read_kitti(dataclasses.replace(source, root=str(world)), config.root, problems)
    elif source.kind == "jsonl":
        path = source.root or config.root
        wrong = data_json.check_jsonl(path) if problems is not None else []
        records = [] if wrong else data_json.read_jsonl(path)
        frames = [Frame(r.id, Path(r.image), r.K, r.labels, np.zeros(3)) for r in records]
        if wrong:
            problems += wrong
    else:
        raise ValueError(f"data source kind is {source.kind!r}, expected 'kitti', 'jsonl' or 'synthetic'")
    if source.repeat < 1 or source.limit < 0:
        raise ValueError(
            f"data source {source.root or config.root}: repeat {source.repeat} and limit {source.limit}, expected >= 1 and >= 0"
        )
    frames = frames[: source.limit or None]
    if source.rename:
        rename = np.vectorize(lambda name: source.rename.get(name, name), otypes=[object])
        frames = [
            dataclasses.replace(f, labels=dataclasses.replace(f.labels, name=rename(f.labels.name))) if len(f.labels) else f for f in frames
        ]
    return frames


def build_dataset(config, sources, classes, size, training, seed=0):
    """`Detection3D` over the concatenated sources (config.train or config.val), for the model's classes and input size (H, W)."""
    if not sources:
        raise ValueError(f"data.{'train' if training else 'val'} lists no source, expected at least one")
    frames, ids = [], collections.Counter()
    for number, source in enumerate(sources):
        mark = f"{number}_" if len(sources) > 1 else ""
        listed = [dataclasses.replace(f, id=mark + f.id) for f in read_source(source, config)]
        ids.update(f.id for f in listed)
        frames += listed * source.repeat
    twice = [id for id, count in ids.items() if count > 1]
    if twice:
        raise ValueError(
            f"frame {twice[0]} is listed {ids[twice[0]]} times in data.{'train' if training else 'val'}; use repeat= to repeat"
        )
    return Detection3D(frames, classes, size, config, training, seed)


class FrameCache:
    """Decoded pixels in a folder, a file per image and reduction, written when an image is first read, by whichever process reads it.

    A file begins with a digest of what it was made from (the image file's path, length and times, and the reduction); one that differs is
    written anew in its place. Files appear whole or not at all, so any number of processes may share a folder, and any may be killed.
    """

    VERSION = 1  # raise it when `decode` gives other pixels

    def __init__(self, folder):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def entry(self, path, reduction):
        """Where the pixels of an image file are kept, and the digest that a valid file begins with."""
        place, stat = Path(path).absolute(), os.stat(path)
        made_from = f"{self.VERSION} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
        name = hashlib.sha256(f"{place} {reduction}".encode()).hexdigest()[:32]
        return self.folder / f"{name}.rgb", hashlib.sha256(made_from.encode()).digest()

    def read(self, path, size, reduction):
        """The pixels (height, width, 3) that were kept for a file of (width, height), or None."""
        entry, digest = self.entry(path, reduction)
        try:
            content = np.fromfile(entry, np.uint8)
        except FileNotFoundError:
            return None
        if content[: len(digest)].tobytes() != digest or len(content) != len(digest) + 3 * size[0] * size[1]:
            return None
        return content[len(digest) :].reshape(size[1], size[0], 3)

    def write(self, path, pixels, reduction):
        """Keep the pixels of a file. Raises ValueError when the folder cannot be written."""
        entry, digest = self.entry(path, reduction)
        aside = entry.with_suffix(f".{os.getpid()}")
        try:
            aside.write_bytes(digest + pixels.tobytes())
            os.replace(aside, entry)
        except OSError as error:
            aside.unlink(missing_ok=True)
            raise ValueError(f"data.cache {self.folder}: cannot be written: {error.strerror}") from None


class Detection3D(Dataset):
    """Frames as tensors. Index with i, or (epoch, i) for training, where the epoch varies the augmentation.

    `classes` are the trained classes in order; rows named by config.neighbours or DontCare become ignore regions; all other classes
    are background. `summary()` counts what became of every label.
    """

    def __init__(self, frames, classes, size, config, training, seed=0):
        self.frames, self.classes, self.size, self.config = frames, tuple(classes), tuple(size), config
        self.training, self.seed = training, seed
        self.ids = [frame.id for frame in frames]
        self.cache = FrameCache(config.cache) if config.cache else None
        clash = set(classes) & {*config.neighbours, "DontCare"}
        if clash:
            raise ValueError(f"data.neighbours names {sorted(clash)}, which model.classes trains; remove it from one of them")

    def __len__(self):
        return len(self.frames)

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, tuple) else (0, key)
        for skipped in range(len(self)):
            try:
                return self.load(epoch, (index + skipped) % len(self), skipped)
            except OSError:
                if not self.config.skip_bad:
                    raise
        raise OSError(f"none of the {len(self)} images of the data set can be read")

    def load(self, epoch, index, skipped=0):
        """The sample of frame `index`: the tensors of `sample_from`, image (H, W, 3) uint8, and for `change_colours` colour and covered."""
        frame = self.frames[index]
        with opened(frame.image) as image:
            size, reduction = image.size, reduction_of(image, self.size, max(1.0, self.config.scale[1]) if self.training else 1.0)
            kept = self.cache.read(frame.image, (size[0] // reduction, size[1] // reduction), reduction) if self.cache else None
            pixels = np.array(decode(image, reduction)) if kept is None else kept
        problem = camera_problem(frame.K, *size)
        if problem:
            raise ValueError(f"{frame.image}: its camera matrix: {problem}")
        if self.cache and kept is None:
            self.cache.write(frame.image, pixels, reduction)
        rng = np.random.default_rng((self.seed, epoch, index))
        view = random_view(rng, *size, self.size, self.config.scale, self.config.flip) if self.training else whole_view(*size, self.size)
        sample = self.sample_from(frame, view)
        sample.update(image=torch.from_numpy(place_image(pixels, view)), index=torch.tensor(index), skipped=torch.tensor(skipped))
        if self.training and self.config.colour:
            sample["colour"] = torch.from_numpy(sample_colour(rng, pixels, self.config.colour).astype(np.float32))
            sample["covered"] = torch.tensor(view.covered)
        return sample

    def sample_from(self, frame, view):
        """Targets of a frame seen through a view, M objects, R ignore regions.

        K (3, 3); label (M,) class index; center, size (M, 3) m; yaw (M,); box, full_box (M, 4) canvas px, full_box 0 where
        `crosses` (M,) says that the object reaches behind the camera plane; ignore (R, 4) px.
        """
        K = view.camera(frame.K)
        labels = place_labels(frame.labels, view)
        seen = ((labels.box[:, 2:] - labels.box[:, :2]) >= 1).all(1)  # what the crop leaves out is out of view
        labels = labels[seen]
        index = {name: i for i, name in enumerate(self.classes)}
        label = np.array([index.get(name, -1) for name in labels.name], dtype=np.int64)
        hard = (labels.box[:, 3] - labels.box[:, 1] < self.config.min_height) | (labels.occlusion > self.config.max_occlusion)
        trained = (label >= 0) & labels.is_3d & ~(hard & self.training)
        ignored = np.isin(labels.name.astype(str), ["DontCare", *self.config.neighbours]) | ((label >= 0) & ~trained)
        objects = labels[trained]
        full_box, crosses = project_boxes(objects.center, objects.size, objects.yaw, K)
        full_box[crosses] = 0
        arrays = {"K": K, "center": objects.center, "size": objects.size, "yaw": objects.yaw, "box": objects.box, "full_box": full_box}
        sample = {name: torch.from_numpy(np.asarray(array, np.float32)) for name, array in arrays.items()}
        sample["label"] = torch.from_numpy(label[trained])
        sample["crosses"] = torch.from_numpy(crosses)
        sample["ignore"] = torch.from_numpy(labels.box[ignored].astype(np.float32))
        return sample

    def view_of(self, index):
        """The `View` through which frame `index` is seen in evaluation. Opens the image's header only."""
        with opened(self.frames[index].image) as image:
            return whole_view(*image.size, self.size)

    def truth(self, index):
        """All labels of a frame in its source's own frame and pixels, as evaluation wants them."""
        return self.frames[index].labels.moved(-self.frames[index].offset)

    def summary(self):
        """One line: frames, and how many labels of each name are trained, ignored or background."""
        names = collections.Counter(name for frame in self.frames for name in frame.labels.name)
        ignored = {*self.config.neighbours, "DontCare"}
        groups = (
            ("trained", {n: names.get(n, 0) for n in self.classes}),
            ("ignored", {n: c for n, c in sorted(names.items()) if n in ignored}),
            ("background", {n: c for n, c in sorted(names.items()) if n not in ignored and n not in self.classes}),
        )
        parts = [f"{title}: " + ", ".join(f"{n} {c}" for n, c in group.items()) for title, group in groups if group]
        return f"{len(self)} frames; " + "; ".join(parts)


def collate(samples, multiple=16):
    """Samples -> batch: images (B, H, W, 3) uint8, objects padded to M, a multiple of 16, `valid` (B, M) telling them from padding.

    Padding is harmless in every formula: boxes and sizes of 1, 10 m ahead. Ignore regions are padded with an empty box.
    """
    whole = ("image", "colour", "covered", "K", "index", "skipped")
    batch = {name: torch.stack([s[name] for s in samples]) for name in whole if name in samples[0]}
    most = max(1, *(len(s["label"]) for s in samples))
    rows = -(-most // multiple) * multiple
    fill = {"label": 0, "center": torch.tensor([0.0, 0, 10]), "size": 1.0, "yaw": 0.0, "box": torch.tensor([0.0, 0, 1, 1]),
            "full_box": torch.tensor([0.0, 0, 1, 1]), "crosses": True}  # fmt: skip
    for name, value in fill.items():
        first = samples[0][name]
        batch[name] = torch.empty(len(samples), rows, *first.shape[1:], dtype=first.dtype)
        batch[name][:] = torch.as_tensor(value, dtype=first.dtype)
    regions = max(1, *(len(s["ignore"]) for s in samples))
    batch["ignore"] = torch.tensor([0.0, 0, -1, -1]).repeat(len(samples), regions, 1)
    batch["valid"] = torch.zeros(len(samples), rows, dtype=torch.bool)
    for i, sample in enumerate(samples):
        for name in [*fill, "ignore"]:
            batch[name][i, : len(sample[name])] = sample[name]
        batch["valid"][i, : len(sample["label"])] = True
    return batch


def seed_of(*numbers):
    """A 63-bit seed, a pure function of some integers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def start_worker(_):
    """For loader workers: one thread each, and deaf to the signals that ask the whole job to stop after the step."""
    torch.set_num_threads(1)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def make_loader(dataset, order, workers, device):
    """Batches of a `StepBatches` order: workers live as long as the run; pinned for a GPU."""
    return DataLoader(
        dataset,
        batch_sampler=order,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=start_worker,
        generator=torch.Generator().manual_seed(0),  # else making the iterator draws from the global generator
    )


@contextlib.contextmanager
def loading(loader):
    """The batches of a DataLoader; its workers end with the block. They ignore SIGTERM, so an exit that only sends it would hang."""
    batches = iter(loader)
    try:
        yield batches
    finally:
        if loader.num_workers:
            batches._shutdown_workers()


class StepBatches:
    """Batch sampler that never ends an epoch short: step -> this process's [(epoch, index)], a pure function of (seed, step).

    The samples form one endless stream of permutations, one per epoch; a step takes the next global batch of it and each process its
    slice, so the global order does not depend on the number of processes, and a run resumes at any step without replaying.
    """

    def __init__(self, count, global_batch, rank, world, seed, start, stop):
        if global_batch % world:
            raise ValueError(f"a global batch of {global_batch} does not divide over {world} processes")
        self.count, self.global_batch, self.share = count, global_batch, global_batch // world
        self.rank, self.seed, self.start, self.stop = rank, seed, start, stop

    def __len__(self):
        return self.stop - self.start

    def __iter__(self):
        for step in range(self.start, self.stop):
            yield self.at(step)

    def at(self, step, rank=None):
        """[(epoch, index)] of this process, or another one, at a step."""
        first = step * self.global_batch + (self.rank if rank is None else rank) * self.share
        return [self.sample(position) for position in range(first, first + self.share)]

    def sample(self, position):
        epoch, place = divmod(position, self.count)
        if getattr(self, "_epoch", None) != epoch:
            self._epoch, self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.count)
        return epoch, int(self._order[place])
