"""From sources of frames to batches: reading, augmentation, collation, and the order of a run.

A source is read by the module formats.<kind>. Every random draw is a pure function of (seed, epoch, index), never of a
worker's state.
"""

import bisect
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import itertools
import logging
import signal
from collections import Counter
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from scene.frames import Frame, UserError, image_size, load_pixels, place_image, place_labels, random_view, whole_view
from scene.geometry import camera_problem, project_boxes

GREY = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as Pillow's L
SURVEYED = 10_000  # frames at most that are looked at before training
log = logging.getLogger("deep3d")


@dataclasses.dataclass(frozen=True)
class Source:
    """One list of frames."""

    kind: str = "kitti"  # formats.<kind>: 'kitti', 'nuscenes', 'argoverse' folder, 'jsonl' file, 'synthetic' world
    root: str = ""  # folder or .jsonl file; empty: data.root
    split: tuple[str, ...] = ("train",)  # ImageSets/<split>.txt or any file.txt, 'all', 'testing'; or nuScenes' names
    repeat: int = 1  # how many times each frame is listed in an epoch
    share: float = 0.0  # of the images of each batch; sources of 0 divide the rest; epochs stay as long as the lists
    limit: int = 0  # use only the first frames of the list; 0: all
    rename: dict[str, str] = field(default_factory=dict)  # class names of the source -> the model's
    version: str = ""  # of nuScenes' tables, such as v1.0-mini; empty: the only one that root holds
    dialect: str = ""  # of nuScenes' tables: 'truckscenes', 't4', a JSON file; empty: nuScenes
    pose: str = "image"  # of nuScenes' tables: the ego pose that an image names, or 'sample': that nearest its sample
    cameras: tuple[str, ...] = ()  # such as CAM_FRONT; empty: all of nuScenes, Argoverse's ring
    world_frames: int = 600  # of the built-in world: 'train', 'val' from one camera, 'mini_train', 'mini_val' from six
    world_seed: int = 0  # another world for every number
    like: str = ""  # what rendered frames take after: 'data.train', root of one of its sources, KITTI folder or .jsonl


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which frames, and how they are varied in training."""

    root: str = "data/kitti"  # folder of sources that name none
    train: tuple[Source, ...] = (Source(),)  # sources to train on
    val: tuple[Source, ...] = (Source(split=("val",)),)  # sources to evaluate on
    neighbours: tuple[str, ...] = ("Van", "Person_sitting")  # neither object nor background: ignored, with DontCare
    min_height: float = 0.0  # input px: objects whose visible box is lower are ignored in training as well
    max_occlusion: int = 3  # objects with a higher KITTI occlusion level (0-3) are ignored in training as well
    flip: float = 0.5  # probability of a mirror image
    scale: tuple[float, float] = (1.0, 1.0)  # range of the random scale: above 1 crops, below 1 pads, anywhere
    colour: float = 0.0  # strength of brightness, contrast and saturation changes: each factor in 1 +- colour
    overlap: dict[str, tuple[float, float, float]] = field(default_factory=dict)  # class -> to exceed in 2D, BEV, 3D
    workers: int = 2  # loader processes per training process
    index: str = ""  # folder for what was read of the sources; empty: beside each, or the user's cache; 'none': memory
    cache: str = ""  # folder for decoded frames, read instead of decoding again; 1.4 MB a KITTI frame; empty: none
    skip_bad: bool = False  # warn, not stop: the next image stands for one that is unreadable; absent ones are left out


def find_format(source):
    """The module formats.<kind> of a source. Raises UserError that lists those that are there."""
    modules = sorted((Path(__file__).parent / "formats").glob("*.py"))
    kinds = [path.stem for path in modules if "\nFIELDS = " in path.read_text("utf-8")]
    if source.kind not in kinds:
        raise UserError(f"data source kind is {source.kind!r}, expected {', '.join(map(repr, kinds))}")
    return importlib.import_module(f"formats.{source.kind}")


def find_metrics(source):
    """Name of the module of metrics that judges the frames of a source."""
    reader = find_format(source)
    return reader.metrics_of(source) if hasattr(reader, "metrics_of") else reader.METRICS


def open_source(source, config, problems=None):
    """`Part` with the frames of a source. Raises UserError.

    With a list `problems`, what is wrong with a frame is added to it as a sentence, and the frame left out, instead.
    """
    root, reader = source.root or config.root, find_format(source)
    place = f"data source {root}"
    if source.repeat < 1 or source.limit < 0 or not 0 <= source.share <= 1:
        numbers = f"repeat {source.repeat}, limit {source.limit} and share {source.share:g}"
        raise UserError(f"{place}: {numbers}, expected >= 1, >= 0 and 0 to 1")
    for name in ("split", "version", "cameras", "dialect", "pose", "world_frames", "world_seed", "like"):
        if name not in reader.FIELDS and getattr(source, name) != getattr(Source(), name):
            raise UserError(f"{place}: {name} means nothing to kind={source.kind}")
    try:
        frames = reader.frames(source, config, problems)
    except OSError as error:
        raise UserError(str(error)) from error
    if (skew := max((abs(frame.K[0, 1]) for frame in frames[:100]), default=0)) > 1e-4:
        log.warning(f"{place}: K has a skew of {skew:.2g} px in its first row, which is passed over")
    return Part(frames, source.rename, repeat=source.repeat)


def build_dataset(config, training):
    """`Detection3D` over the sources of config.data.train or config.data.val, one after another. Raises UserError."""
    name, sources = ("data.train", config.data.train) if training else ("data.val", config.data.val)
    if not sources:
        raise UserError(f"{name} lists no source, expected at least one")
    if not training and any(source.repeat > 1 or source.share for source in sources):
        raise UserError(f"{name} has a repeat or a share, expected neither; train.eval_repeat repeats frames")
    if not training and len({source.kind == "synthetic" for source in sources}) > 1:
        raise UserError(f"{name} lists rendered frames (kind=synthetic) beside others, expected one kind")
    metrics = ["kitti"] if training else sorted({find_metrics(source) for source in sources})
    if len(metrics) > 1:
        raise UserError(f"{name} lists sources with different metrics, {' and '.join(metrics)}, expected one kind")
    parts = [open_source(source, config.data) for source in sources]
    if len(parts) > 1:
        parts = [dataclasses.replace(part, mark=f"{number}_") for number, part in enumerate(parts)]
    dataset = Detection3D(Frames(parts), config.model, config.data, training, config.seed, metrics[0])
    if not len(dataset):
        raise UserError(f"{name} holds no frame")
    dataset.sources = sources
    if training and any(shares := [source.share for source in sources]):
        dataset.find = importlib.import_module("formats.mixture").Mixture(shares, dataset.frames.ends, config.seed)
    if training:
        check_classes(dataset)
    return dataset


def check_classes(dataset):
    """Raises UserError for a class of the model that no frame holds. Looks at all frames where a survey shows none."""
    names = set().union(*dataset.survey[0].values())
    if not names.issuperset(dataset.classes) and len(dataset) > SURVEYED:
        names.update(name for frame in dataset.frames for name in frame.labels.name)
    if missing := [name for name in dataset.classes if name not in names]:
        sentence = f"no frame of data.train holds an object of class {missing[0]!r} of model.classes"
        raise UserError(f"{sentence}; the classes there are: {', '.join(sorted(names - {'DontCare'})) or 'none'}")


@dataclasses.dataclass(frozen=True)
class Part:
    """The frames of a source, and how a data set shows them."""

    frames: Sequence[Frame]
    rename: dict[str, str] = field(default_factory=dict)  # class names -> others
    mark: str = ""  # before each id
    repeat: int = 1  # how many times the frames are listed


class Frames(Sequence):
    """The frames of some parts, one after another."""

    def __init__(self, parts):
        self.parts = list(parts)
        self.ends = list(itertools.accumulate(len(part.frames) * part.repeat for part in self.parts))

    def __len__(self):
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]  # raises IndexError
        number = bisect.bisect_right(self.ends, index)
        part = self.parts[number]
        frame = part.frames[(index - self.ends[number]) % len(part.frames)]
        if not part.mark and not part.rename:
            return frame
        names = np.array([part.rename.get(name, name) for name in frame.labels.name], dtype=object)
        return dataclasses.replace(frame, id=part.mark + frame.id, labels=dataclasses.replace(frame.labels, name=names))

    def spread(self):
        """Indices of at most `SURVEYED` frames, evenly spaced; of a part that is repeated, of its first turn."""
        turns = zip(self.parts, [0, *self.ends], strict=False)
        indices = np.concatenate([np.arange(len(part.frames)) + start for part, start in turns] or [np.zeros(0, int)])
        return indices[:: max(1, -(-len(indices) // SURVEYED))].tolist()


def sample_colour(rng, pixels, strength):
    """Brightness, contrast about mean grey, saturation, each by a factor in 1 +- strength; as affine map of RGB (3, 4).

    pixels (h, w, 3) uint8; the mean is that of every eighth pixel of every eighth row.
    """
    brightness, contrast, saturation = rng.uniform(1 - strength, 1 + strength, 3)
    mean = brightness * sum(grey * pixels[::8, ::8, channel].mean() for channel, grey in enumerate(GREY))
    linear = brightness * contrast * (saturation * np.eye(3) + (1 - saturation) * GREY)
    offset = np.full((3, 1), (1 - contrast) * mean)  # grey, so saturation leaves it alone
    return np.hstack([linear, offset])


def change_colours(batch):
    """The images (B, H, W, 3) uint8 of a batch, changed by its "colour" (B, 3, 4) within "covered" (B, 4) if any.

    Done on the batch's device: in a worker it takes longer than the rest of reading a cached frame.
    """
    image, colour = batch["image"], batch.get("colour")
    if colour is None:
        return image
    planes = image.permute(0, 3, 1, 2).flatten(2)  # (B, 3, H W)
    with torch.autocast(image.device.type, enabled=False):
        changed = torch.baddbmm(colour[..., 3:], colour[..., :3], planes.float())
    changed = changed.round_().clamp_(0, 255).to(torch.uint8)
    row, column = (torch.arange(n, device=image.device) for n in image.shape[1:3])
    x1, y1, x2, y2 = batch["covered"][..., None].unbind(1)  # (B, 1) each
    inside = ((row >= y1) & (row < y2))[:, :, None] & ((column >= x1) & (column < x2))[:, None]
    changed = torch.where(inside.flatten(1)[:, None], changed, planes)
    return changed.transpose(1, 2).contiguous().view_as(image)


class Detection3D(Dataset):
    """Frames as tensors for a model. Index with i, or (epoch, i) for training, where the epoch varies the augmentation.

    frames: `Frames`, or any sequence of `Frame`; metrics: the module of metrics that judges them. Rows named by
    config.neighbours or DontCare, and those without a 3D box, become ignore regions; others that are none of
    model.classes are background.
    """

    def __init__(self, frames, model, config, training=False, seed=0, metrics="kitti"):
        self.frames = frames if isinstance(frames, Frames) else Frames([Part(frames)])
        self.model, self.config, self.training, self.seed, self.metrics = model, config, training, seed, metrics
        self.classes, self.size, self.sources, self.find = model.classes, model.size, (), None
        self.regions = {*config.neighbours, "DontCare"}
        self.cache = importlib.import_module("formats.cache").FrameCache(config.cache) if config.cache else None
        self.told = {}  # what this process has warned of
        if clash := {*self.classes} & self.regions:
            raise UserError(f"data.neighbours names {sorted(clash)}, which model.classes trains; expected one of them")

    def __len__(self):
        return len(self.frames)

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, tuple) else (0, key)
        for number in range(len(self)):
            try:
                return self.load(epoch, (index + number) % len(self))
            except OSError as error:
                if not self.config.skip_bad:
                    raise UserError(str(error)) from error
                self.tell(str(error), f"{error}; another image stands for it")
        raise UserError(f"none of the {len(self)} images of the data set can be read")

    def tell(self, about, sentence):
        """Log a warning, of each thing that they are about the first."""
        if sentence and self.told.setdefault(about, sentence) is sentence:
            log.warning(sentence)

    def load(self, epoch, index):
        """The sample of a frame: `sample_from`, index, image (H, W, 3) uint8; for `change_colours` colour and covered.

        Raises OSError for an image that cannot be read.
        """
        frame, config = self.frames[index], self.config
        scale = max(1.0, config.scale[1]) if self.training else 1.0
        pixels, size = load_pixels(frame.image, self.size, scale, self.cache)
        if problem := camera_problem(frame.K, *size):
            raise UserError(f"{frame.image}: its camera matrix: {problem}")
        if frame.size and frame.size != size:
            sizes = "{}x{}, and {}x{} by its source".format(*size, *frame.size)
            raise UserError(f"{frame.image}: the image is {sizes}; if it was replaced, touch the source")
        middle = frame.K[:2, 2] / size
        if middle.max() < 0.3 or middle.min() > 0.75:
            self.tell("size", f"{frame.image}: {'x'.join(map(str, size))} px, and K looks like that of another size")
        if pixels[::8, ::8].max() <= 64:  # as good as black
            self.tell("dark", importlib.import_module("formats.odd").dark_problem(frame.image, pixels))
        rng = np.random.default_rng((self.seed, epoch, index))
        view = whole_view(*size, self.size)
        if self.training:
            view = random_view(rng, *size, self.size, config.scale, config.flip)
        sample = self.sample_from(frame, view)
        sample |= {"image": torch.from_numpy(place_image(pixels, view)), "index": torch.tensor(index)}
        if self.training and config.colour:
            sample["colour"] = torch.from_numpy(sample_colour(rng, pixels, config.colour).astype(np.float32))
            sample["covered"] = torch.tensor(view.covered)
        return sample

    def sample_from(self, frame, view):
        """Targets of a frame seen through a view, M objects, R ignore regions.

        K (3, 3); label (M,) class index; center, size (M, 3) m; yaw (M,); box, full_box (M, 4) canvas px, full_box 0
        where `crosses` (M,) says that the object reaches behind the camera plane; ignore (R, 4) px; where they are
        trained velocity (M, 3) m/s, NaN unknown, and attribute (M,) index, -1 unknown.
        """
        K = view.camera(frame.K)
        labels = place_labels(frame.labels, view)
        labels = labels[(labels.box[:, 2:] - labels.box[:, :2] >= 1).all(1)]  # those that the view shows
        label, trained, ignored = self.roles(labels)
        objects = labels[trained]
        full_box, crosses = project_boxes(objects.center, objects.size, objects.yaw, K)
        full_box[crosses] = 0
        arrays = {name: getattr(objects, name) for name in ("center", "size", "yaw", "box")}
        arrays |= {"K": K, "full_box": full_box, "ignore": labels.box[ignored]}
        if self.model.velocity:
            unknown = np.full((len(objects), 3), np.nan)
            arrays["velocity"] = unknown if objects.velocity is None else objects.velocity
        sample = {name: torch.from_numpy(np.asarray(array, np.float32)) for name, array in arrays.items()}
        sample |= {"label": torch.from_numpy(label[trained]), "crosses": torch.from_numpy(crosses)}
        if names := self.model.attribute_names:
            attributes = [""] * len(objects) if objects.attribute is None else objects.attribute
            places = [names.index(name) if name in names else -1 for name in attributes]
            sample["attribute"] = torch.tensor(places, dtype=torch.long)
        return sample

    def roles(self, labels):
        """Class index (n,), -1 for none, and which of n boxes on the canvas are trained, which ignored: (n,) bool."""
        places = {name: i for i, name in enumerate(self.classes)}
        label = np.array([places.get(name, -1) for name in labels.name], dtype=np.int64)
        region = np.array([name in self.regions for name in labels.name], dtype=bool)
        extent = labels.box[:, 2:] - labels.box[:, :2]
        shown = (extent > 0).all(1)  # converters write boxes without area for what a camera does not see
        hard = (extent[:, 1] < self.config.min_height) | (labels.occlusion > self.config.max_occlusion)
        trained = (label >= 0) & labels.is_3d & shown & ~(hard & self.training)
        return label, trained, region | ~labels.is_3d | ((label >= 0) & ~trained)

    def view_of(self, index):
        """The `View` through which a frame is seen in evaluation. Raises OSError for an image that cannot be read."""
        frame = self.frames[index]
        return whole_view(*(frame.size or image_size(frame.image)), self.size)

    def truth(self, index):
        """All labels of a frame in its source's own frame and pixels, as evaluation wants them."""
        return self.frames[index].labels.moved(-self.frames[index].offset)

    @functools.cached_property
    def survey(self):
        """Of the frames of `Frames.spread`: {what becomes of a label: Counter of names}, objects left out, a SHA-256.

        That is of ids, groups, cameras, labels, their order and the number of frames, in hex digits.
        """
        counts = {"trained": Counter(), "ignored": Counter(), "background": Counter()}
        dropped, digest = 0, hashlib.sha256(str(len(self)).encode())
        for index in self.frames.spread():
            frame = self.frames[index]
            labels = frame.labels
            dropped += frame.dropped
            digest.update(f"{frame.id}\0{frame.group}\0{len(labels)}\0".encode())
            for column in (frame.K, frame.offset, frame.pose, *vars(labels).values()):
                if column is not None:
                    is_text = column.dtype.kind in "OU"
                    digest.update("\0".join(column).encode() if is_text else column.astype(float).tobytes())
            if self.training and self.config.min_height:  # of what the canvas shows
                with contextlib.suppress(OSError):  # the loader names it, or passes it over
                    labels = place_labels(labels, self.view_of(index))
            _, trained, ignored = self.roles(labels)
            for counter, rows in zip(counts.values(), (trained, ignored, ~trained & ~ignored), strict=True):
                counter.update(labels.name[rows].tolist())
        return counts, dropped, digest.hexdigest()

    def digest(self):
        """The SHA-256 of `survey`."""
        return self.survey[2]

    def summary(self):
        """One line: frames, and how many labels of each name are trained, ignored or background in whole images."""
        counts, dropped, _ = self.survey
        surveyed = len(self.frames.spread())
        parts = [f"{len(self)} frames" + (f", {surveyed} of them counted" if surveyed < len(self) else "")]
        for title, counter in counts.items():
            if names := self.classes if title == "trained" else sorted(counter):
                parts.append(f"{title}: " + ", ".join(f"{name} {counter[name]}" for name in names))
        if dropped:
            parts.append(f"left out, as they cannot be seen: {dropped}")
        return "; ".join(parts)


def collate(samples, multiple=16):
    """Samples -> batch: images (B, H, W, 3) uint8, objects padded to M, a multiple of 16, and which are `valid` (B, M).

    Padding is harmless in every formula: sizes of 1, 10 m ahead, velocity and attribute unknown, ignore regions empty.
    """
    whole = ("image", "colour", "covered", "K", "index")
    batch = {name: torch.stack([s[name] for s in samples]) for name in whole if name in samples[0]}
    most = max(1, *(len(s["label"]) for s in samples))
    rows = -(-most // multiple) * multiple
    box = [0.0, 0, 1, 1]
    fill = {"label": 0, "center": [0.0, 0, 10], "size": 1.0, "yaw": 0.0, "box": box, "full_box": box, "crosses": True}
    fill |= {"velocity": torch.nan, "attribute": -1, "ignore": [0.0, 0, -1, -1]}
    for name in (name for name in fill if name in samples[0]):
        first = samples[0][name]
        count = max(1, *(len(s["ignore"]) for s in samples)) if name == "ignore" else rows
        blank = torch.as_tensor(fill[name], dtype=first.dtype)
        batch[name] = blank.expand(len(samples), count, *first.shape[1:]).clone()
        for row, sample in zip(batch[name], samples, strict=True):
            row[: len(sample[name])] = sample[name]
    lengths = torch.tensor([len(s["label"]) for s in samples])
    batch["valid"] = torch.arange(rows) < lengths[:, None]
    return batch


def seed_of(*numbers):
    """A 63-bit seed, a pure function of some integers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def start_worker(_):
    """For loader workers: one thread each, and deaf to the signals that ask the whole job to stop after the step."""
    torch.set_num_threads(1)
    for name in {"SIGTERM", "SIGUSR1", "SIGINT"} & {*dir(signal)}:  # Windows has no SIGUSR1
        signal.signal(getattr(signal, name), signal.SIG_IGN)


@contextlib.contextmanager
def loading(dataset, order, workers, device, minutes=10.0):
    """The batches of lists of indices, such as a `StepBatches` order, from workers that end with the block.

    A worker that gives nothing for so many minutes ends in a RuntimeError.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=order,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=start_worker,
        timeout=60 * minutes if workers else 0,
        generator=torch.Generator().manual_seed(0),  # else making the iterator draws from the global generator
    )
    batches = iter(loader)
    try:
        yield batches
    finally:
        if workers:  # they ignore SIGTERM, and one that hangs would hold up the exit for ever
            batches._shutdown_workers()
            for worker in batches._workers:
                worker.kill()


class StepBatches:
    """Batch sampler that never ends an epoch short: step -> [(epoch, index)] of a process, a function of (seed, step).

    The samples form one endless stream of permutations, one per epoch; a step takes the next global batch of it and
    each process its slice, so the order does not depend on the number of processes, and a run resumes at any step.
    """

    def __init__(self, count, global_batch, rank, world, seed, start, stop, find=None):
        if global_batch % world:
            raise ValueError(f"a global batch of {global_batch} does not divide over {world} processes")
        self.count, self.global_batch, self.share = count, global_batch, global_batch // world
        self.rank, self.start, self.stop = rank, start, stop
        self.find = find or functools.partial(find_in_epochs, seed, count)  # or another stream, `formats.mixture`

    def __len__(self):
        return self.stop - self.start

    def __iter__(self):
        for step in range(self.start, self.stop):
            yield self.at(step)

    def at(self, step, rank=None):
        """[(epoch, index)] of this process, or another one, at a step."""
        first = step * self.global_batch + (self.rank if rank is None else rank) * self.share
        return [self.find(position) for position in range(first, first + self.share)]


def find_in_epochs(seed, count, position):
    """(epoch, index) at a position of the stream of permutations of all indices, one per epoch."""
    epoch, place = divmod(position, count)
    return epoch, int(permutation(seed, epoch, count)[place])


@functools.lru_cache(maxsize=2)  # a batch may begin in one epoch and end in the next
def permutation(seed, epoch, count):
    """Order of the indices of an epoch."""
    return np.random.default_rng((seed, epoch)).permutation(count)
