"""What was read of a source, in a folder that all processes and workers map: read once, by the first that needs it.

A reader gives lists of `Frame`s in jobs that run on all cores; `frames` writes them into a folder whose name tells what
they were made from, or finds it there, and makes a `Frame` of it when one is asked for. The folder holds texts, a JSON
object for each frame (numbers in JSON keep their last bit); ends.npy, where each ends; tars.json, the tars that
images lie in; and notes.json, what was odd, which is told whenever the index is opened.
"""

import contextlib
import dataclasses
import glob
import hashlib
import json
import logging
import os
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
from tqdm import tqdm

from formats.files import lock, processes, remove, replacing
from scene.frames import Frame, Labels, UserError, usable_cores

VERSION = 4  # of the files and of what the readers make of a source: raise it whenever either changes
FOLDER = "deep3d_index"  # beside a source, or in the user's cache folder
NUMBERS = {"box": (4,), "size": (3,), "center": (3,), "velocity": (3,)}  # in a row of a column of Labels; of others one
TYPES = {"name": object, "attribute": object, "occlusion": int}  # of columns, float that of others
ADVICE = "data.index=FOLDER chooses another folder"
log = logging.getLogger("deep3d")


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a source is read: `read(job)` for each job gives a list of `Frame`s, in the order of the source."""

    source: Path  # file or folder; the index lies beside it, or in it
    choice: str  # which frames of it: splits and the like
    folder: Path  # that image paths are relative to
    made_from: Callable[[], str]  # path, size and time of every file that is read, as text
    jobs: Sequence
    read: Callable[..., list[Frame]]
    repeated: Callable[[], object] | None = None  # raises UserError where several frames have one id
    unit: str = "frames"  # of progress, a job each
    notes: list[str] = dataclasses.field(default_factory=list)  # that `read` adds to, where all is one job


class Frames(Sequence):
    """The frames of an index, each made when it is asked for; pickled as its path.

    Raises OSError or ValueError for an index that is not whole.
    """

    def __init__(self, path: Path, folder: Path):
        self.path, self.folder = path, folder
        self.ends = np.load(path / "ends.npy", mmap_mode="r").view(np.ndarray)
        self.texts = np.memmap(path / "texts", np.uint8, "r").view(np.ndarray)
        self.notes = json.loads((path / "notes.json").read_text())
        if self.ends[-1] != len(self.texts):
            raise ValueError(f"{path}: not a whole index")

    def __reduce__(self):
        return Frames, (self.path, self.folder)

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]  # raises IndexError
        start = self.ends[index - 1] if index else 0
        return _to_frame(json.loads(self.texts[start : self.ends[index]].tobytes()), self.folder)


def frames(plan: Plan, folder: str = "") -> Frames:
    """The frames of a source from its index, which is made when it is not there.

    folder: of the index; empty: FOLDER beside the source, or the user's cache folder where that cannot be written.
    What the reader noted is logged each time. Raises what the reader raises, and UserError when no index can be
    written, or there are no frames.
    """
    source = plan.source.absolute()
    beside = (source if source.is_dir() else source.parent) / FOLDER
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / FOLDER
    folders = [Path(folder)] if folder else [beside, cache]
    state = plan.made_from()
    choice = f"{source.stem[:40]}-{_digest(source, plan.choice)[:12]}"
    name = f"{choice}-{_digest(VERSION, state)[:16]}.index"
    for place in dict.fromkeys([*folders, beside]):  # also where it may not be written
        if (index := _open(place / name, plan.folder)) is not None:
            return _tell(index)
    path = _writable(folders) / name
    with lock(path.with_name(f".{choice}.lock")) as alone:
        if (index := _open(path, plan.folder)) is None:
            _build(plan, path, state, alone)
            for old in path.parent.glob(f"{glob.escape(choice)}-*.index"):  # what was made before the source changed
                if old != path:
                    remove(old)  # as far as that goes: Windows keeps what another process maps
            index = _open(path, plan.folder)
    return _tell(index)


def _tell(index):
    """The same index; logs what was odd when it was made."""
    for note in index.notes:
        log.warning(note)
    return index


def _digest(*parts):
    return hashlib.sha256("\0".join(map(str, parts)).encode(errors="surrogateescape")).hexdigest()


def _open(path, folder):
    """`Frames` of an index, or None when there is none, it is not whole, or tars that it leads into have changed."""
    with contextlib.suppress(OSError, ValueError, EOFError):
        tars = json.loads((path / "tars.json").read_text())
        return Frames(path, folder) if tars == _tar_states(tars) else None


def _tar_states(tars):
    """{path: [bytes, time of change]} of those tars that are there."""
    states = {}
    for path in sorted(tars):
        with contextlib.suppress(OSError):
            stat = os.stat(path)
            states[path] = [stat.st_size, stat.st_mtime_ns]
    return states


def _writable(folders):
    """The first of some folders in which a file can be made."""
    reasons = []
    for folder in folders:
        probe = folder / f".{uuid.uuid4().hex}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
            return folder
        except OSError as error:
            reasons.append(f"{folder}: {error.strerror}")
    raise UserError(f"data.index: no index can be written ({'; '.join(reasons)}); {ADVICE}")


def _build(plan, path, state, alone):
    """Read a source into an index."""
    try:
        with replacing(path, alone) as aside:
            aside.mkdir()
            hashes = _write(plan, aside)
            if plan.repeated and len(np.unique(hashes)) < len(hashes):
                plan.repeated()
            if plan.made_from() != state:
                advice = "start again when they no longer do"
                raise UserError(f"{plan.source}: its files changed while they were read; {advice}")
    except OSError as error:
        raise UserError(f"data.index: {path.parent} cannot be written: {error.strerror}; {ADVICE}") from error


def _write(plan, folder):
    """Write the files of an index; returns a hash of each frame's id."""
    lengths, hashes, tars = [np.zeros(0, int)], [np.zeros(0, np.uint64)], set()
    with open(folder / "texts", "wb") as file:
        for texts, some_hashes, some_tars in _read(plan):
            file.writelines(texts)
            lengths.append(np.array([len(text) for text in texts], int))
            hashes.append(some_hashes)
            tars |= some_tars
    ends = np.cumsum(np.concatenate(lengths))
    if not len(ends):
        raise UserError(f"{plan.source}: it holds no frames")
    np.save(folder / "ends.npy", ends)
    (folder / "tars.json").write_text(json.dumps(_tar_states(tars)))
    (folder / "notes.json").write_text(json.dumps(plan.notes))
    return np.concatenate(hashes)


def _read(plan):
    """What `_pack` makes of one job after another; by a process for each core."""
    read, workers = partial(_pack, plan.read, plan.folder), min(usable_cores(), len(plan.jobs))
    with processes(workers) if workers > 1 else contextlib.nullcontext() as pool:
        packed = pool.map(read, plan.jobs) if pool else map(read, plan.jobs)
        title = f"reading {plan.source.name}"
        yield from tqdm(packed, title, len(plan.jobs), unit=f" {plan.unit}", disable=None, delay=1)


def _pack(read, folder, job):
    """The frames of a job: their texts, a hash of each id (n,), and the tars that they lead into."""
    try:
        frames = read(job)
    except OSError as error:  # which is not of the index
        raise UserError(str(error)) from error
    digests = [hashlib.blake2b(frame.id.encode(), digest_size=8).digest() for frame in frames]
    tars = {os.path.abspath(frame.image.tar) for frame in frames if not isinstance(frame.image, Path)}
    return [_to_text(frame, folder) for frame in frames], np.frombuffer(b"".join(digests), np.uint64), tars


def _to_text(frame, folder):
    """A frame as JSON; a path below a folder is written from there."""
    image = frame.image
    file, *place = (image,) if isinstance(image, Path) else (image.tar, image.member, image.first, image.length)
    file = str(file.relative_to(folder) if file.is_relative_to(folder) else file)
    values = vars(frame) | {"image": [file, *place], "labels": vars(frame.labels)}
    return json.dumps(values, default=np.ndarray.tolist).encode()


def _to_frame(values, folder):
    """The frame of a decoded text."""
    labels, (file, *place) = values["labels"], values["image"]
    n = len(labels["name"])
    for name, column in labels.items():
        if column is not None:
            labels[name] = np.array(column, TYPES.get(name, float)).reshape(n, *NUMBERS.get(name, ()))
    arrays = {name: values[name] and np.array(values[name]) for name in ("K", "offset", "pose")}
    image, size = folder / file, values["size"]
    image = import_module("formats.tar").Member(image, *place) if place else image
    return Frame(**values | arrays | {"labels": Labels(**labels), "image": image, "size": size and tuple(size)})
