"""The frames of a source as columns in one file, which is written once and which every process and worker maps.

A reader gives `Chunk`s, or any `Frame`s, in jobs that run on all cores; `find_columns` writes them into a file whose name tells what they
were made from, or finds it there. `Frames` is what data.py sees: a sequence that makes a `Frame` of its columns when one is asked for.
"""

import bisect
import contextlib
import dataclasses
import glob
import hashlib
import io
import itertools
import json
import mmap
import os
import shutil
import time
import uuid
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from formats.pool import fcntl, in_order, lock, processes
from scene.frames import Frame, Labels, join

VERSION = 1  # of the file and of what the readers make of a source: raise it whenever either changes
FOLDER = "deep3d_index"  # beside a source, or in the user's cache folder
MAGIC = b"deep3d index\n"
OBJECT_COLUMNS = {"box": 4, "size": 3, "center": 3, "yaw": 0, "alpha": 0, "truncation": 0, "occlusion": 0, "score": 0, "sigma": 0,
                  "velocity": 3}  # of Labels, beside name and attribute: numbers a row, 0 for a plain number  # fmt: skip
BLOCK = 1 << 16  # frames that are looked at together; some 100 MB


@dataclasses.dataclass
class Chunk:
    """n frames in a row of a source, their objects in columns, as a fast reader makes them."""

    id: list[str]
    image: list[str]  # relative to the folder of the `Reading`
    K: np.ndarray  # (n, 3, 3) px
    image_size: np.ndarray  # (n, 2) width, height, px; 0 unknown
    count: np.ndarray  # (n,) rows of labels that are the frame's
    labels: Labels  # of all frames, one after another
    offset: np.ndarray | None = None  # (n, 3) m, as Frame has it; None: 0
    dropped: np.ndarray | None = None  # (n,) objects that were left out because they cannot be seen; None: none
    place: np.ndarray | None = (
        None  # (n, 2) where the image lies in a tar, `frames.find_member`; None or 0: it is a file
    )
    group: list[str] | None = None  # as Frame has it
    pose: np.ndarray | None = None  # (n, 4, 4), NaN for a frame that has none
    tars: frozenset[str] = frozenset()  # that images lie in


def chunk_of(frames: list[Frame]) -> Chunk:
    """A chunk of any frames, for readers that make one at a time; their images are not opened."""
    n = len(frames)
    return Chunk(
        id=[frame.id for frame in frames],
        image=[str(frame.image) for frame in frames],
        K=np.array([frame.K for frame in frames], float).reshape(n, 3, 3),
        image_size=np.zeros((n, 2)),
        count=np.array([len(frame.labels) for frame in frames], int),
        labels=join([frame.labels for frame in frames]),
        offset=np.array([frame.offset for frame in frames], float).reshape(n, 3),
        group=[frame.group for frame in frames],
        pose=np.array(
            [np.full((4, 4), np.nan) if frame.pose is None else frame.pose for frame in frames], float
        ).reshape(n, 4, 4),
    )


@dataclasses.dataclass(frozen=True)
class Reading:
    """How a source is read: `read(job)` for each job gives a `Chunk` or an iterable of `Frame`s, in the order of the source."""

    source: Path  # file or folder; the index lies beside it, or in it
    choice: str  # which frames of it: splits and the like
    folder: Path  # that image paths are relative to
    made_from: Callable[[], str]  # path, size and time of every file that is read, as text
    jobs: Iterable
    read: Callable
    unit: str = "frames"
    sizes: Sequence[int] = ()  # of the jobs, in that unit


# ---- writing


def pack(chunk: Chunk) -> dict:
    """Columns of a chunk by name, all that an index may hold; what a chunk lacks is filled in. Names of objects become numbers."""
    n, m, labels = len(chunk.id), len(chunk.labels), chunk.labels
    packed = {
        "K": np.asarray(chunk.K, float).reshape(n, 9),
        "offset": np.zeros((n, 3)) if chunk.offset is None else chunk.offset,
        "image_size": np.asarray(chunk.image_size, np.int32),
        "dropped": np.zeros(n, np.int32) if chunk.dropped is None else chunk.dropped.astype(np.int32),
        "place": np.zeros((n, 2), np.int64) if chunk.place is None else chunk.place.astype(np.int64),
        "pose": np.full((n, 16), np.nan) if chunk.pose is None else chunk.pose.reshape(n, 16),
        "count": np.asarray(chunk.count, np.int64),
        "checksum": np.array([zlib.crc32(id.encode()) for id in chunk.id], np.uint32),
    }
    for column, width in OBJECT_COLUMNS.items():
        values = getattr(labels, column)
        blank = np.full((m, width) if width else m, np.nan)
        packed[column] = blank if values is None else np.asarray(values, np.int64 if column == "occlusion" else float)
    texts = {"id": chunk.id, "image": chunk.image, "group": chunk.group or [""] * n}
    for column, values in texts.items():
        coded = [value.encode() for value in values]
        packed[f"{column}.text"] = np.frombuffer(b"".join(coded), np.uint8)
        packed[f"{column}.length"] = np.array([len(value) for value in coded], np.int64)
    for column, values in (
        ("name", labels.name),
        ("attribute", [""] * m if labels.attribute is None else labels.attribute),
    ):
        places = {}
        packed[column] = np.array([places.setdefault(value, len(places)) for value in values], np.int32)
        packed[f"{column}.of"] = [str(value) for value in places]
    packed["digest"] = _digests(packed, texts)
    packed["tars"] = {os.path.abspath(tar) for tar in chunk.tars}
    return packed


def _digests(packed, texts):
    """(n, 16) uint8: a digest of each frame: its id, group, camera and objects. Neither where it lies nor its image counts."""
    names = [
        np.array([_number(text) for text in packed[f"{column}.of"]], np.int64)[packed[column]]
        for column in ("name", "attribute")
    ]
    columns = [np.asarray(packed[column], float).reshape(-1, width or 1) for column, width in OBJECT_COLUMNS.items()]
    rows = np.concatenate([*columns, *(name.view(float)[:, None] for name in names)], 1)
    heads = np.concatenate([packed["K"], packed["offset"], packed["pose"]], 1)
    rows, heads, row, head, start = rows.tobytes(), heads.tobytes(), 8 * rows.shape[1], 8 * heads.shape[1], 0
    found = []
    for i, count in enumerate(packed["count"].tolist()):
        text = f"{texts['id'][i]}\0{texts['group'][i]}\0".encode()
        stop = start + count * row
        found.append(
            hashlib.blake2b(text + heads[i * head : (i + 1) * head] + rows[start:stop], digest_size=16).digest()
        )
        start = stop
    return np.frombuffer(b"".join(found), np.uint8).reshape(-1, 16)


def _number(text):
    """A number of 8 bytes for a text, equal in all processes."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


class _Column:
    """One column on its way into a file. As long as all its rows are equal it is one row and a count, and costs nothing."""

    def __init__(self, name, create):
        self.name, self.create, self.row, self.count, self.file = name, create, None, 0, None

    def add(self, rows):
        rows = np.ascontiguousarray(rows)
        if not self.count:
            self.row = rows[:1].copy() if len(rows) else np.zeros((1, *rows.shape[1:]), rows.dtype)
        if not len(rows):
            return
        equal = (
            self.file is None
            and (rows.view(np.uint8).reshape(len(rows), -1) == self.row.view(np.uint8).reshape(1, -1)).all()
        )
        if not equal:
            if self.file is None:
                self.file = self.create(self.name)
                self.file.write(self.row.tobytes() * self.count)
            self.file.write(rows.data)
        self.count += len(rows)


class Writer:
    """Collects packed chunks and writes them as one file. create(name): a new binary file to write to and read again."""

    def __init__(self, create):
        self.create, self.columns, self.names, self.tars, self.ends = (
            create,
            {},
            {"name": {}, "attribute": {}},
            set(),
            Counter(),
        )
        self.add(pack(chunk_of([])))  # so that a source without frames has every column, too

    def add(self, packed):
        """Append the frames of one packed chunk."""
        for column, known in self.names.items():
            table = np.array([known.setdefault(name, len(known)) for name in packed[f"{column}.of"]], np.int32)
            self.append(column, table[packed[column]])
        for column in ("count", "id.length", "image.length", "group.length"):  # become the place after each row
            ends = np.cumsum(packed[column]) + self.ends[column]
            self.append(column.replace("count", "last").replace("length", "end"), ends)
            self.ends[column] = int(ends[-1]) if len(ends) else self.ends[column]
        for column, values in packed.items():
            if isinstance(values, np.ndarray) and column not in self.names and column not in self.ends:
                self.append(column, values)
        self.tars |= packed["tars"]

    def append(self, name, rows):
        self.columns.setdefault(name, _Column(name, self.create)).add(rows)

    def finish(self, file):
        """Write the whole file: a line that says what it is, a line of JSON that says what lies where, then the columns."""
        head = {
            "columns": {},
            "names": {column: list(known) for column, known in self.names.items()},
            "tars": tar_states(self.tars),
        }
        at = 0
        for name, column in self.columns.items():
            head["columns"][name] = entry = {
                "dtype": column.row.dtype.str,
                "shape": column.row.shape[1:],
                "rows": column.count,
            }
            if column.file is None:
                entry["value"] = column.row.tobytes().hex()
            else:
                entry["at"] = at
                at += -(-column.row.nbytes * column.count // 64) * 64
        head = json.dumps({**head, "bytes": at}).encode() + b"\n"
        start = -(-(len(MAGIC) + len(head)) // 64) * 64
        file.write(MAGIC + head + bytes(start - len(MAGIC) - len(head)))
        for column in self.columns.values():
            if column.file:
                with column.file as own:
                    own.seek(0)
                    shutil.copyfileobj(own, file, 1 << 22)
                file.write(bytes(-column.row.nbytes * column.count % 64))


def tar_states(paths):
    """[[path, bytes, time of change]] of files; an empty state for one that is not there."""
    found = []
    for path in sorted(paths):
        try:
            stat = os.stat(path)
            found.append([path, stat.st_size, stat.st_mtime_ns])
        except OSError:
            found.append([path])
    return found


def _read_job(reading, job):
    """What a process does: one job, read and packed."""
    return list(_packed(reading.read(job)))


def _packed(found):
    """Packed chunks of what a reader's job gives, of other frames than chunks a thousand at a time."""
    if isinstance(found, Chunk):
        yield pack(found)
        return
    frames = iter(found)
    while some := list(itertools.islice(frames, 1000)):
        yield pack(chunk_of(some))


def read_packed(reading: Reading, limit: int = 0, workers: int = 1, quiet: bool = False) -> Iterator[dict]:
    """Packed chunks of at least the first `limit` frames, 0: of all, in order, read by so many processes."""
    jobs, found = list(reading.jobs), 0
    with contextlib.ExitStack() as stack:
        if workers > 1 and len(jobs) > 1:
            pool = stack.enter_context(processes(min(workers, len(jobs))))
            results = in_order(
                pool, partial(_read_job, dataclasses.replace(reading, jobs=(), made_from=None)), jobs, 3 * workers
            )
        else:
            results = (_packed(reading.read(job)) for job in jobs)
        bar = tqdm(desc=f"reading {reading.source.name}", total=sum(reading.sizes) or None, unit=f" {reading.unit}", unit_scale=True,
                   disable=True if quiet else None, delay=1)  # fmt: skip
        with bar:
            for number, result in enumerate(results):
                for packed in result:
                    found += len(packed["count"])
                    yield packed
                bar.update(reading.sizes[number] if reading.sizes else 1)
                if limit and found >= limit:
                    return


# ---- reading


class Columns:
    """The columns of n frames and m objects, in memory that the system shares between all processes that map the same file.

    K (n, 9), offset (n, 3), image_size (n, 2), dropped, place (n, 2), pose (n, 16), digest (n, 16), checksum (n,), last (n,): the place
    after a frame's last object; of objects the columns of Labels, name and attribute as places in `names`.
    """

    def __init__(self, buffer: bytes | mmap.mmap, path: Path | None = None):
        self.path, self.buffer = path, buffer
        if buffer[: len(MAGIC)] != MAGIC:
            raise ValueError(f"{path}: not an index")
        end = buffer.find(b"\n", len(MAGIC))
        head = json.loads(bytes(buffer[len(MAGIC) : end]))
        start = -(-(end + 1) // 64) * 64
        if len(buffer) != start + head["bytes"]:
            raise ValueError(f"{path}: an index of {len(buffer)} bytes, expected {start + head['bytes']}")
        self.tars, self.columns = head["tars"], {}
        self.names = {column: np.array(names, dtype=object) for column, names in head["names"].items()}
        for name, entry in head["columns"].items():
            shape, dtype = (entry["rows"], *entry["shape"]), np.dtype(entry["dtype"])
            if "value" in entry:
                row = np.frombuffer(bytes.fromhex(entry["value"]), dtype).reshape(entry["shape"])
                self.columns[name] = np.broadcast_to(row, shape)
            else:
                self.columns[name] = np.frombuffer(buffer, dtype, int(np.prod(shape)), start + entry["at"]).reshape(
                    shape
                )
        self.constant = {
            name for name, entry in head["columns"].items() if "value" in entry
        }  # all rows are equal: they cost nothing
        blank = {
            name for name in {"sigma", "velocity", "pose"} & self.constant if np.isnan(self.columns[name][:1]).all()
        }
        self.absent = blank | (
            {"attribute"} if self.names["attribute"].tolist() in ([], [""]) else set()
        )  # no row has a value

    @classmethod
    def open(cls, path: Path) -> "Columns":
        """Map an index. Raises OSError, or ValueError for a file that is none or not whole."""
        with open(path, "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise ValueError(f"{path}: an empty file")
            return cls(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), path)

    def __reduce__(self):  # for workers that are not forked: they map the file again
        return (Columns.open, (self.path,)) if self.path else (Columns, (bytes(self.buffer),))

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]

    def __len__(self):
        return len(self.columns["last"])

    def text(self, column: str, row: int) -> str:
        """id, image or group of a frame."""
        end = self.columns[f"{column}.end"]
        start, stop = int(end[row - 1]) if row else 0, int(end[row])
        return self.columns[f"{column}.text"][start:stop].tobytes().decode() if stop > start else ""

    def objects(self, start: int, stop: int) -> slice:
        """Rows of the objects of frames start to stop."""
        before = lambda frame: int(self.columns["last"][frame - 1]) if frame else 0  # noqa: E731 - objects of the frames before
        return slice(before(start), before(max(start, stop)))

    def repeated(self, count: int) -> tuple[str, int] | None:
        """An id that the first `count` frames hold several times, and how often; None when each is there once."""
        checksum = self["checksum"][:count]
        order = np.argsort(checksum, kind="stable")
        twice = np.flatnonzero(np.diff(checksum[order]) == 0)
        rows = np.unique(np.concatenate([order[twice], order[twice + 1]])) if len(twice) else []
        ids = Counter(self.text("id", int(row)) for row in rows)  # of different ids some have equal checksums
        return next(((id, times) for id, times in ids.items() if times > 1), None)

    def forget(self):
        """Give back the memory that looking at many rows has mapped; the system keeps the file's pages as long as it likes."""
        if isinstance(self.buffer, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            self.buffer.madvise(mmap.MADV_DONTNEED)


def gather(packed: Iterable[dict]) -> Columns:
    """Columns of packed chunks, in memory of this process."""
    writer, file = Writer(lambda name: io.BytesIO()), io.BytesIO()
    for chunk in packed:
        writer.add(chunk)
    writer.finish(file)
    return Columns(file.getvalue())


# ---- the file


def find_columns(reading: Reading, folder: str = "", limit: int = 0, workers: int = 1) -> Columns:
    """Columns of at least the first `limit` frames of a source (0: of all), from its index, which is made when it is not there.

    folder: of the index; empty: FOLDER beside the source, or the user's cache folder where that cannot be written. Raises what the
    reader raises, and OSError in a sentence when no index can be written.
    """
    source = reading.source.absolute()
    beside = (source if source.is_dir() else source.parent) / FOLDER
    folders = [Path(folder)] if folder else [beside, user_folder()]
    state = reading.made_from()
    names = [
        _name(source, reading.choice, first, state) for first in dict.fromkeys((0, limit))
    ]  # the whole one serves a limit, too
    for place in dict.fromkeys([*folders, beside]):  # where it may not be written, it may be read
        for name in names:
            if (columns := _open(place / name)) is not None:
                return columns
    place = _writable(folders)
    key = names[-1].rpartition("-")[0]
    with contextlib.ExitStack() as stack:
        locked = True
        try:
            stack.enter_context(lock(place / f".{key}.lock", wait=True))
        except OSError:  # a file system without locks: several may read at a time, and the last one's file stays
            locked = False
        if (columns := _open(place / names[-1])) is not None:
            return columns
        _remove_leftovers(place, key, locked)
        return _build(reading, place / names[-1], state, limit, workers)


def user_folder() -> Path:
    """Where indexes lie whose sources cannot be written: in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / FOLDER


def _name(source, choice, limit, state):
    """File name of an index: source, which frames of it, what they were made from."""
    which = hashlib.sha256(f"{source}\0{choice}\0{limit}".encode(errors="surrogateescape")).hexdigest()[:12]
    made = hashlib.sha256(f"{VERSION}\0{state}".encode(errors="surrogateescape")).hexdigest()[:16]
    return f"{source.stem[:80]}-{which}-{made}.columns"


def _open(path):
    """Columns of an index, or None when there is none, it is not whole, or the tars that it leads into have changed."""
    try:
        columns = Columns.open(path)
    except (OSError, ValueError):
        return None
    return columns if columns.tars == tar_states(tar for tar, *_ in columns.tars) else None


def _writable(folders):
    """The first of some folders in which a file can be made. Raises OSError in a sentence."""
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
    raise OSError(
        f"data.index: no index can be written ({'; '.join(reasons)}); data.index=FOLDER chooses another folder"
    )


def _remove_leftovers(folder, key, locked):
    """Remove what killed processes left of an index half written; where nobody can be kept out, what is a day old."""
    for path in folder.glob(f"{glob.escape(key)}-*.partial-*"):
        with contextlib.suppress(OSError):
            if (locked and fcntl) or time.time() - path.stat().st_ctime > 86400:
                shutil.rmtree(path)


def _build(reading, path, state, limit, workers):
    """Read a source into an index, and remove those that were made of it before it changed."""
    aside = path.with_name(f"{path.name}.partial-{uuid.uuid4().hex}")
    try:
        with _writing(path.parent):
            aside.mkdir()
        writer = Writer(lambda name: open(aside / name, "w+b"))  # noqa: SIM115
        for packed in read_packed(reading, limit, workers):
            with _writing(path.parent):
                writer.add(packed)
        if reading.made_from() != state:
            raise OSError(
                f"{reading.source}: its files changed while they were read; start again when they no longer do"
            )
        with _writing(path.parent):
            with open(aside / "whole", "wb") as file:
                writer.finish(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside / "whole", path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    for old in path.parent.glob(f"{glob.escape(path.name.rpartition('-')[0])}-*.columns"):
        if old.name != path.name:
            with contextlib.suppress(OSError):  # Windows keeps what another process maps
                old.unlink()
    return Columns.open(path)


@contextlib.contextmanager
def _writing(folder):
    """Around what writes an index: its OSError becomes a sentence."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"data.index: {folder} cannot be written: {error.strerror}; data.index=FOLDER chooses another folder"
        ) from error


# ---- what the data set sees


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """The first `count` frames of some columns, with other names for some classes and a mark before each id."""

    columns: Columns
    folder: Path  # that image paths are relative to
    count: int
    rename: dict[str, str] = dataclasses.field(default_factory=dict)
    mark: str = ""

    @property
    def names(self) -> np.ndarray:
        """Class names of the columns' numbers, as they are called now."""
        return np.array([self.rename.get(name, name) for name in self.columns.names["name"]], dtype=object)

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """Rows of frames and of their objects, some ten thousand frames at a time, each frame once."""
        for start in range(0, self.count, BLOCK):
            stop = min(start + BLOCK, self.count)
            yield slice(start, stop), self.columns.objects(start, stop)
        self.columns.forget()

    def labels(self, rows: slice) -> Labels:
        """The objects of some rows of the columns, all of them views: name holds places in `names`, and what is absent is None."""
        columns = self.columns
        own = {
            name: None if name in ("sigma", "velocity") and name in columns.absent else columns[name][rows]
            for name in OBJECT_COLUMNS
        }
        return Labels(name=columns["name"][rows], **own)

    def owners(self, frames: slice) -> np.ndarray:
        """For each object of some rows of frames, which of these rows it belongs to."""
        first = self.columns.objects(frames.start, frames.stop).start
        counts = np.diff(self.columns["last"][frames], prepend=first)
        return np.repeat(np.arange(len(counts)), counts)

    def counts(self) -> np.ndarray:
        """How many objects of each of `names` there are."""
        found = np.zeros(len(self.names), int)
        for _, rows in self.blocks():
            found += np.bincount(self.columns["name"][rows], minlength=len(found))
        return found


class Frames(Sequence):
    """The frames of some parts, one after another; each `Frame` is made when it is asked for."""

    def __init__(self, parts: list[Part]):
        self.parts, self.names = list(parts), [part.names for part in parts]
        self.ends = np.cumsum([part.count for part in parts], dtype=int).tolist()

    @classmethod
    def of(cls, frames: Iterable[Frame]) -> "Frames":
        """Of any frames, in this process's memory."""
        columns = gather(_packed(frames))
        return cls([Part(columns, Path(), len(columns))])

    def __len__(self):
        return self.ends[-1] if self.ends else 0

    def find(self, index: int) -> tuple[int, int]:
        """Number of the part and row in its columns of a frame; negative indices count from the end."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"frame {index} of {len(self)}")
        index %= len(self)
        number = bisect.bisect_right(self.ends, index)
        return number, index - (self.ends[number - 1] if number else 0)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number, row = self.find(index)
        part, columns = self.parts[number], self.parts[number].columns
        rows = columns.objects(row, row + 1)
        own = {name: np.array(columns[name][rows]) for name in OBJECT_COLUMNS if name not in ("sigma", "velocity")}
        for name in ("sigma", "velocity"):
            values = None if name in columns.absent else np.array(columns[name][rows])
            own[name] = None if values is None or np.isnan(values).all() else values
        if "attribute" not in columns.absent:
            attribute = columns.names["attribute"][columns["attribute"][rows]]
            own["attribute"] = attribute if any(attribute) else None
        pose = None if "pose" in columns.absent else np.array(columns["pose"][row]).reshape(4, 4)
        return Frame(
            id=part.mark + columns.text("id", row),
            image=part.folder / columns.text("image", row),
            K=np.array(columns["K"][row]).reshape(3, 3),
            labels=Labels(name=self.names[number][columns["name"][rows]], **own),
            offset=np.array(columns["offset"][row]),
            group=columns.text("group", row),
            pose=None if pose is None or np.isnan(pose).all() else pose,
        )

    def image_size(self, index: int) -> tuple[int, int] | None:
        """(width, height) of a frame's image as it was when it was read, None where that is not known."""
        number, row = self.find(index)
        width, height = self.parts[number].columns["image_size"][row].tolist()
        return (width, height) if width else None

    def place(self, index: int) -> tuple[int, int] | None:
        """Where a frame's image lies in a tar (`frames.find_member`), None for one that is a file."""
        number, row = self.find(index)
        place = tuple(self.parts[number].columns["place"][row].tolist())
        return place if place[1] else None

    @property
    def ids(self) -> "Ids":
        return Ids(self)

    def repeated(self) -> tuple[str, int] | None:
        """An id that a part lists more than once without being asked to, and how often."""
        return next(
            ((part.mark + twice[0], twice[1]) for part in self.parts if (twice := part.columns.repeated(part.count))),
            None,
        )

    def count_names(self) -> Counter:
        """How many objects of each name there are; those of a frame that is listed several times count as often."""
        found = Counter()
        for part, times in Counter(self.parts).items():
            for name, count in zip(part.names, part.counts().tolist(), strict=True):
                found[name] += count * times
        return +found

    def grouped(self) -> set[bool]:
        """Whether frames belong to a group (`Frame.group`): the answers that there are."""
        lengths = [np.diff(part.columns["group.end"][: part.count], prepend=0) for part in self.parts]
        return set(np.unique(np.concatenate(lengths) > 0).tolist()) if lengths else set()

    def groups(self) -> list[str]:
        """Of each frame, its group."""
        return [part.columns.text("group", row) for part in self.parts for row in range(part.count)]

    def dropped(self) -> int:
        """How many objects the readers left out because they cannot be seen."""
        return sum(int(part.columns["dropped"][: part.count].sum()) for part in self.parts)

    def digest(self) -> str:
        """SHA-256 of all labels, cameras, ids and their order, as hex digits. Images are not read."""
        found = hashlib.sha256()
        for part in self.parts:
            there = set(part.columns.names["name"][part.counts() > 0]) if part.rename else ()
            renamed = sorted((old, new) for old, new in part.rename.items() if old in there and old != new)
            found.update(repr((part.mark, part.count, renamed)).encode())
            found.update(np.ascontiguousarray(part.columns["digest"][: part.count]).data)
        return found.hexdigest()


class Ids(Sequence):
    """The ids of `Frames`, read when they are asked for; equal to a list of them."""

    def __init__(self, frames: Frames):
        self.frames = frames

    def __len__(self):
        return len(self.frames)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number, row = self.frames.find(index)
        return self.frames.parts[number].mark + self.frames.parts[number].columns.text("id", row)

    def __eq__(self, other):
        return list(self) == list(other)

    __hash__ = None
