"""From sources of frames to batches: reading, augmentation, collation, and the order of a run.

A source (KITTI folder, JSON lines, nuScenes tables, built-in world) is a list of frames, read once into an index that all processes map.
Every random draw is a pure function of (seed, epoch, index), never of a worker's state, so the loader gives a step the same pixels on any
machine.
"""

import collections
import contextlib
import dataclasses
import errno
import hashlib
import os
import signal
import uuid
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from formats import jsonl, kitti, nuscenes
from formats.index import Frames
from scene.frames import (
    UserError,
    decode,
    in_tar,
    opened,
    place_image,
    place_labels,
    random_view,
    reduction_of,
    tar_of,
    upright,
    usable_cores,
    whole_sizes,
    whole_view,
)
from scene.geometry import camera_problem, project_boxes
from world import cameras as nuscenes_world
from world import street as world

GREY = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as Pillow's L


@contextlib.contextmanager
def user_errors(about=""):
    """Around what reads a config or data: its ValueError or OSError is the user's. Elsewhere they are mistakes in code.

    about: only those are whose sentence begins so.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if not str(error).startswith(about):
            raise
        raise UserError(str(error)) from error


def disk_is_full(error):
    """Whether an OSError tells that there is no room left: nobody's mistake in code."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def check_writable(*files):
    """Raises UserError for the first of the files, those that are None or empty apart, that could not be written once the work is done."""
    for path in (Path(file) for file in files if file):
        folder = path.absolute().parent
        if path.is_dir():
            raise UserError(f"{path}: there is a folder of that name, expected a file to write")
        if not folder.is_dir():
            raise UserError(f"{path}: it cannot be written, as there is no folder {folder}")
        if not os.access(path if path.exists() else folder, os.W_OK):
            raise UserError(f"{path}: it cannot be written: permission denied")


@dataclasses.dataclass(frozen=True)
class Source:
    """One list of frames. Several sources with different cameras may be listed together."""

    kind: str = (
        "kitti"  # 'kitti' folder, 'jsonl' file, 'nuscenes' folder, 'synthetic' built-in world (rendered on first use)
    )
    root: str = ""  # folder or .jsonl file; empty: data.root
    split: tuple[str, ...] = (
        "train",
    )  # ImageSets/<split>.txt or any file.txt; 'all'; 'testing': KITTI's, no labels; nuScenes' names
    repeat: int = 1  # how many times each frame is listed in an epoch
    limit: int = 0  # use only the first frames of the list; 0: all
    rename: dict[str, str] = dataclasses.field(default_factory=dict)  # class names of the source -> the model's
    version: str = ""  # of nuScenes' tables, such as v1.0-mini; empty: the only one that root holds
    cameras: tuple[str, ...] = ()  # of nuScenes, such as CAM_FRONT; empty: all
    world_frames: int = 600  # of the built-in world's split: 'train' or 'val' in front of a car, 'mini_train' or 'mini_val' all around one
    world_seed: int = 0  # another world for every number


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which frames, and how they are varied in training."""

    root: str = "data/kitti"  # folder of sources that name none
    train: tuple[Source, ...] = (Source(),)  # sources to train on
    val: tuple[Source, ...] = (Source(split=("val",)),)  # sources to evaluate on
    neighbours: tuple[str, ...] = (
        "Van",
        "Person_sitting",
    )  # neither object nor background: ignored in training, with DontCare
    min_height: float = (
        0.0  # input px: objects whose visible box is lower are ignored in training, neither object nor background
    )
    max_occlusion: int = 3  # objects with a higher KITTI occlusion level (0-3) are ignored in training
    flip: float = 0.5  # probability of a mirror image
    scale: tuple[float, float] = (
        1.0,
        1.0,
    )  # range of the random scale; above 1 crops, below 1 pads, both at a random position
    colour: float = 0.0  # strength of brightness, contrast and saturation changes: each factor in 1 +- colour
    overlap: dict[str, tuple[float, float, float]] = dataclasses.field(
        default_factory=dict
    )  # class -> overlap to exceed in 2D, BEV, 3D
    workers: int = 2  # loader processes per training process
    index: str = ""  # folder for what was read of the sources; empty: beside each, or in the user's cache folder
    cache: str = ""  # folder for decoded frames, read instead of decoding again; 1.4 MB a KITTI frame; empty: none
    skip_bad: bool = False  # replace an unreadable image by another one, count and report, instead of stopping


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
        changed = (
            torch.baddbmm(colour[..., 3:], colour[..., :3], planes.float()).round_().clamp_(0, 255).to(torch.uint8)
        )
    row, column = (torch.arange(n, device=image.device) for n in image.shape[1:3])
    x1, y1, x2, y2 = batch["covered"][..., None].unbind(1)  # (B, 1) each
    inside = ((row >= y1) & (row < y2))[:, :, None] & ((column >= x1) & (column < x2))[:, None]
    changed = torch.where(inside.flatten(1)[:, None], changed, planes)
    return changed.transpose(1, 2).contiguous().view_as(image)


def read_source(source, config, problems=None):
    """The frames of one `Source` as parts of `Frames`, renamed and limited, repeated, from their index.

    With a list `problems`, what is wrong with single frames is added to it as a sentence, and the frame left out, instead of raised.
    """
    root = Path(source.root or config.root)
    if source.repeat < 1 or source.limit < 0:
        raise ValueError(f"data source {root}: repeat {source.repeat} and limit {source.limit}, expected >= 1 and >= 0")
    parts, left = [], source.limit
    for kind, folder, split in find_folders(source, root):
        if problems is None:
            part = open_part(kind, folder, split, source, config.index, left)
        else:
            [part] = Frames.of(list_frames(kind, folder, split, source, problems)).parts
        count = min(part.count, left) if source.limit else part.count
        parts.append(dataclasses.replace(part, count=count, rename=source.rename))
        left -= count
    return parts


READ_BY = {  # kind of a source: which of the fields that only some read
    "kitti": ("split",),
    "jsonl": (),
    "nuscenes": ("split", "version", "cameras"),
}


def find_folders(source, root):
    """[(kind, folder or file, splits)] that a source is read from; the built-in world is rendered where it is not there."""
    fields = ("split", "version", "cameras", "world_frames", "world_seed")
    vain = [
        name
        for name in fields
        if name not in READ_BY.get(source.kind, fields) and getattr(source, name) != getattr(Source(), name)
    ]
    if vain:
        raise ValueError(f"data source {root}: {vain[0]} means nothing to kind={source.kind}")
    if source.kind in ("kitti", "jsonl", "nuscenes"):
        return [(source.kind, root, source.split)]
    if source.kind != "synthetic":
        raise ValueError(f"data source kind is {source.kind!r}, expected 'kitti', 'jsonl', 'nuscenes' or 'synthetic'")
    if len({*source.split}) < len(source.split):
        raise ValueError(
            f"data source {root}: split lists {', '.join(source.split)}, expected each once; use repeat= to repeat"
        )
    found, wanted = [], (source.world_frames, source.world_seed)
    for split in source.split:
        if split in nuscenes_world.SPLITS:
            found.append(
                ("nuscenes", nuscenes_world.build_nuscenes_world(root, split, *wanted, usable_cores()), (split,))
            )
        else:
            found.append(("kitti", world.build_world(root, split, *wanted, workers=usable_cores()), (split,)))
    return found


def open_part(kind, folder, split, source, index, limit):
    """`Part` with the frames of a folder or file, from its index; of JSON lines, no more than the limit need be read."""
    if kind == "jsonl":
        return jsonl.open_frames(folder, index, limit, usable_cores())
    if kind == "nuscenes":
        return nuscenes.open_frames(folder, split, source.version, source.cameras, index)
    return kitti.open_frames(folder, split, index, usable_cores())


def list_frames(kind, folder, split, source, problems):
    """The frames of a folder or file, one by one; what is wrong with some is added to problems."""
    if kind == "jsonl":
        return jsonl.read_frames(folder, problems)
    if kind == "nuscenes":
        return nuscenes.read_frames(folder, split, source.version, source.cameras, problems)
    return kitti.read_frames(folder, split, problems)


def build_dataset(config, sources, classes, size, training, seed=0, velocity=False, attributes=()):
    """`Detection3D` over the concatenated sources (config.train or config.val), for the model's classes and input size (H, W).

    velocity and attributes (names in the order of their indices): whether samples hold them.
    """
    name = f"data.{'train' if training else 'val'}"
    if not sources:
        raise ValueError(f"{name} lists no source, expected at least one")
    if not training and any(source.repeat > 1 for source in sources):
        raise ValueError(
            "data.val lists frames more than once, expected repeat=1; train.eval_repeat counts each frame several times"
        )
    listed = [read_source(source, config) for source in sources]
    marks = [f"{number}_" if len(sources) > 1 else "" for number in range(len(sources))]
    listed = [[dataclasses.replace(part, mark=mark) for part in own] for own, mark in zip(listed, marks, strict=True)]
    if twice := next((twice for own in listed if (twice := Frames(own).repeated())), None):
        raise ValueError(f"frame {twice[0]} is listed {twice[1]} times in {name}; use repeat= to repeat")
    frames = Frames([part for source, own in zip(sources, listed, strict=True) for part in own * source.repeat])
    if training:
        names = frames.count_names()
        if missing := [wanted for wanted in classes if wanted not in names]:
            there = ", ".join(sorted(names.keys() - {"DontCare"})) or "none"
            raise ValueError(
                f"no frame of {name} holds an object of class {missing[0]!r} of model.classes; the classes there are: {there}"
            )
    return Detection3D(frames, classes, size, config, training, seed, velocity, attributes)


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
        place, stat = Path(path).absolute(), os.stat(tar_of(path) if in_tar(path) else path)
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
        """Keep the pixels of a file. Raises UserError when the folder cannot be written."""
        entry, digest = self.entry(path, reduction)
        aside = entry.with_suffix(f".{uuid.uuid4().hex}")  # containers that share the folder may have equal process ids
        try:
            aside.write_bytes(digest + pixels.tobytes())
            os.replace(aside, entry)
        except OSError as error:
            aside.unlink(missing_ok=True)
            raise UserError(f"data.cache {self.folder}: cannot be written: {error.strerror}") from None


class Detection3D(Dataset):
    """`Frames`, or any list of `Frame`s, as tensors. Index with i, or (epoch, i) for training, where the epoch varies the augmentation.

    `classes` are the trained classes in order; rows named by config.neighbours or DontCare become ignore regions; all other classes
    are background. `summary()` counts what became of every label.
    """

    def __init__(self, frames, classes, size, config, training, seed=0, velocity=False, attributes=()):
        self.frames = frames if isinstance(frames, Frames) else Frames.of(frames)
        self.classes, self.size, self.config = tuple(classes), tuple(size), config
        self.training, self.seed, self.velocity, self.attributes = training, seed, velocity, tuple(attributes)
        self.ids = self.frames.ids
        self.cache = FrameCache(config.cache) if config.cache else None
        clash = set(classes) & {*config.neighbours, "DontCare"}
        if clash:
            raise ValueError(
                f"data.neighbours names {sorted(clash)}, which model.classes trains; remove it from one of them"
            )

    def __len__(self):
        return len(self.frames)

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, tuple) else (0, key)
        for skipped in range(len(self)):
            try:
                return self.load(epoch, (index + skipped) % len(self), skipped)
            except OSError as error:
                if not self.config.skip_bad:
                    raise UserError(str(error)) from error
        raise UserError(f"none of the {len(self)} images of the data set can be read")

    def load(self, epoch, index, skipped=0):
        """The sample of frame `index`: the tensors of `sample_from`, image (H, W, 3) uint8, and for `change_colours` colour and covered."""
        frame = self.frames[index]
        with opened(frame.image, self.frames.place(index)) as file:
            image = upright(file)
            size, reduction = (
                image.size,
                reduction_of(image, self.size, max(1.0, self.config.scale[1]) if self.training else 1.0),
            )
            kept = (
                self.cache.read(frame.image, (size[0] // reduction, size[1] // reduction), reduction)
                if self.cache
                else None
            )
            pixels = np.array(decode(image, reduction)) if kept is None else kept
        if problem := camera_problem(frame.K, *size):
            raise UserError(f"{frame.image}: its camera matrix: {problem}")
        if (known := self.frames.image_size(index) or size) != size:
            was = f"{known[0]}x{known[1]} when its source was read"
            raise UserError(
                f"{frame.image}: the image is {size[0]}x{size[1]}, and was {was}: touch the source to read it anew"
            )
        if self.cache and kept is None:
            self.cache.write(frame.image, pixels, reduction)
        rng = np.random.default_rng((self.seed, epoch, index))
        view = (
            random_view(rng, *size, self.size, self.config.scale, self.config.flip)
            if self.training
            else whole_view(*size, self.size)
        )
        sample = self.sample_from(frame, view)
        sample.update(
            image=torch.from_numpy(place_image(pixels, view)), index=torch.tensor(index), skipped=torch.tensor(skipped)
        )
        if self.training and self.config.colour:
            sample["colour"] = torch.from_numpy(sample_colour(rng, pixels, self.config.colour).astype(np.float32))
            sample["covered"] = torch.tensor(view.covered)
        return sample

    def sample_from(self, frame, view):
        """Targets of a frame seen through a view, M objects, R ignore regions.

        K (3, 3); label (M,) class index; center, size (M, 3) m; yaw (M,); box, full_box (M, 4) canvas px, full_box 0 where
        `crosses` (M,) says that the object reaches behind the camera plane; ignore (R, 4) px; where they are trained velocity (M, 3)
        m/s, NaN unknown, and attribute (M,) index, -1 unknown.
        """
        K = view.camera(frame.K)
        labels = place_labels(frame.labels, view)
        seen = ((labels.box[:, 2:] - labels.box[:, :2]) >= 1).all(1)  # what the crop leaves out is out of view
        labels = labels[seen]
        label, trained, ignored = self.roles(labels, labels.name, np.arange(len(labels)))
        objects = labels[trained]
        full_box, crosses = project_boxes(objects.center, objects.size, objects.yaw, K)
        full_box[crosses] = 0
        arrays = {
            "K": K,
            "center": objects.center,
            "size": objects.size,
            "yaw": objects.yaw,
            "box": objects.box,
            "full_box": full_box,
        }
        sample = {name: torch.from_numpy(np.asarray(array, np.float32)) for name, array in arrays.items()}
        sample["label"] = torch.from_numpy(label[trained])
        sample["crosses"] = torch.from_numpy(crosses)
        sample["ignore"] = torch.from_numpy(labels.box[ignored].astype(np.float32))
        if self.velocity:
            known = np.full((len(objects), 3), np.nan) if objects.velocity is None else objects.velocity
            sample["velocity"] = torch.from_numpy(known.astype(np.float32))
        if self.attributes:
            index = {name: i for i, name in enumerate(self.attributes)}
            known = [""] * len(objects) if objects.attribute is None else objects.attribute
            sample["attribute"] = torch.tensor([index.get(name, -1) for name in known], dtype=torch.long)
        return sample

    def roles(self, labels, names, kind):
        """Class index (n,), -1 for none, and which of n boxes on the canvas are trained and which ignored: (n,) bool each.

        names (c,): of classes; kind (n,): the place of each box's among them. `labels.name` is not looked at.
        """
        index = {name: i for i, name in enumerate(self.classes)}
        label = np.array([index.get(name, -1) for name in names], dtype=np.int64)[kind]
        ignored = np.array([name in ("DontCare", *self.config.neighbours) for name in names], dtype=bool)[kind]
        hard = (labels.box[:, 3] - labels.box[:, 1] < self.config.min_height) | (
            labels.occlusion > self.config.max_occlusion
        )
        seen = (labels.box[:, 2:] > labels.box[:, :2]).all(
            1
        )  # converters write boxes without area for what a camera does not see
        trained = (label >= 0) & labels.is_3d & seen & ~(hard & self.training)
        return label, trained, ignored | ((label >= 0) & ~trained)

    def view_of(self, index):
        """The `View` through which frame `index` is seen in evaluation. Opens the image's header, where its size is not known."""
        if size := self.frames.image_size(index):
            return whole_view(*size, self.size)
        with opened(self.frames[index].image) as image:
            return whole_view(*upright(image).size, self.size)

    def truth(self, index):
        """All labels of a frame in its source's own frame and pixels, as evaluation wants them."""
        frame = self.frames[index]
        return frame.labels.moved(-frame.offset)

    def digest(self):
        """SHA-256 of all labels, cameras, ids and their order, as hex digits. Images are not read."""
        return self.frames.digest()

    def blocks(self):
        """All frames in blocks, each part of them once: part, index of its first frame, rows of the frames and of their objects."""
        for part in dict.fromkeys(self.frames.parts):
            first = self.frames.ends[self.frames.parts.index(part)] - part.count
            for frames, objects in part.blocks():
                yield part, first, frames, objects

    def sizes(self, part, first, frames, strict):
        """Sizes (n, 2) of the images of a block; those that are not known are looked up, and 0 where they cannot be read.

        strict: an image that cannot be read raises OSError, unless data.skip_bad passes it over.
        """
        sizes = part.columns["image_size"][frames].copy()
        for row in np.flatnonzero(sizes[:, 0] == 0).tolist():
            try:
                sizes[row] = self.view_of(first + frames.start + row).image_size
            except OSError:
                if strict and not self.config.skip_bad:
                    raise
        return sizes

    def whole_objects(self):
        """The objects to train on as `sample_from` gives them when images are shown whole, in blocks, each frame once.

        Yields tensors label (P,), size (P, 3) m, box (P, 4) canvas px, depth (P,) m, focal (P,): fy of the canvas, px. Raises OSError for
        an image that cannot be read, unless data.skip_bad passes it over.
        """
        for part, first, frames, objects in self.blocks():
            sizes, owner = self.sizes(part, first, frames, strict=True), part.owners(frames)
            shown = whole_sizes(np.maximum(sizes, 1), self.size)
            scale = shown / np.maximum(sizes, 1)
            labels = part.labels(objects)
            boxes = labels.box * np.tile(scale, 2)[owner] + np.tile(0.5 * scale - 0.5, 2)[owner]
            boxes = np.clip(boxes, 0, np.tile(shown - 1, 2)[owner])
            label, trained, _ = self.roles(dataclasses.replace(labels, box=boxes), part.names, labels.name)
            rows = np.flatnonzero(trained & (sizes[owner, 0] > 0) & ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(1))
            focal = (scale[:, 1] * part.columns["K"][frames, 4])[owner[rows]]
            columns = labels.size[rows], boxes[rows], labels.center[rows, 2], focal
            yield torch.from_numpy(label[rows]), *(torch.from_numpy(column.astype(np.float32)) for column in columns)

    def summary(self):
        """One line: frames, and how many labels of each name are trained, ignored or background, in images shown whole.

        Opens the images' headers where data.min_height needs sizes that are not known.
        """
        found, times = (
            {title: collections.Counter() for title in ("trained", "ignored", "background")},
            collections.Counter(self.frames.parts),
        )
        for part, first, frames, objects in self.blocks():
            labels, names = part.labels(objects), part.names
            if self.training and self.config.min_height:
                sizes = self.sizes(part, first, frames, strict=False)
                scale = np.where(
                    sizes[:, 1] > 0,
                    whole_sizes(np.maximum(sizes, 1), self.size)[:, 1] / np.maximum(sizes[:, 1], 1),
                    1.0,
                )
                labels = dataclasses.replace(labels, box=labels.box * scale[part.owners(frames)][:, None])
            _, trained, ignored = self.roles(labels, names, labels.name)
            for title, rows in (("trained", trained), ("ignored", ignored), ("background", ~trained & ~ignored)):
                for name, count in zip(
                    names, np.bincount(labels.name[rows], minlength=len(names)).tolist(), strict=True
                ):
                    found[title][name] += count * times[part]
        parts = [f"{len(self)} frames"]
        for title, counts in found.items():
            if names := self.classes if title == "trained" else sorted(+counts):
                parts.append(f"{title}: " + ", ".join(f"{name} {counts[name]}" for name in names))
        if dropped := self.frames.dropped():
            parts.append(f"left out, as they cannot be seen: {dropped}")
        return "; ".join(parts)


def collate(samples, multiple=16):
    """Samples -> batch: images (B, H, W, 3) uint8, objects padded to M, a multiple of 16, `valid` (B, M) telling them from padding.

    Padding is harmless in every formula: boxes and sizes of 1, 10 m ahead, velocity and attribute unknown. Ignore regions are padded
    with an empty box.
    """
    whole = ("image", "colour", "covered", "K", "index", "skipped")
    batch = {name: torch.stack([s[name] for s in samples]) for name in whole if name in samples[0]}
    most = max(1, *(len(s["label"]) for s in samples))
    rows = -(-most // multiple) * multiple
    fill = {"label": 0, "center": torch.tensor([0.0, 0, 10]), "size": 1.0, "yaw": 0.0, "box": torch.tensor([0.0, 0, 1, 1]),
            "full_box": torch.tensor([0.0, 0, 1, 1]), "crosses": True, "velocity": torch.nan, "attribute": -1}  # fmt: skip
    fill = {name: value for name, value in fill.items() if name in samples[0]}
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


def unread(batch):
    """Indices of the frames that a batch holds others for, because their images could not be read (data.skip_bad)."""
    return [
        index - skipped
        for index, skipped in zip(batch["index"].tolist(), batch["skipped"].tolist(), strict=True)
        if skipped
    ]


def seed_of(*numbers):
    """A 63-bit seed, a pure function of some integers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def start_worker(_):
    """For loader workers: one thread each, and deaf to the signals that ask the whole job to stop after the step."""
    torch.set_num_threads(1)
    for name in ("SIGTERM", "SIGUSR1", "SIGINT"):
        if number := getattr(signal, name, None):  # Windows has no SIGUSR1
            signal.signal(number, signal.SIG_IGN)


def make_loader(dataset, order, workers, device, timeout=0.0):
    """Batches of lists of indices, such as a `StepBatches` order: workers live as long as the run; pinned for a GPU.

    A worker that gives nothing for `timeout` minutes (0: for ever) ends in a RuntimeError.
    """
    return DataLoader(
        dataset,
        batch_sampler=order,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=start_worker,
        timeout=60 * timeout if workers else 0,
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
            for worker in batches._workers:
                worker.kill()  # one that hangs would hold up the exit for ever


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
