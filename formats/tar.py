"""Images in uncompressed tars, read where they lie: millions of small files are what breaks shared file systems."""

import dataclasses
import functools
import io
import os
import posixpath
import tarfile
from pathlib import Path

import numpy as np

from scene.frames import UserError


@dataclasses.dataclass(frozen=True)
class Member:
    """A file in a tar; stands where a Path of an image does."""

    tar: Path
    member: str  # its name in the tar
    first: int  # byte of the tar
    length: int  # bytes

    def __str__(self):
        return os.path.join(self.tar, self.member)

    def absolute(self):
        return dataclasses.replace(self, tar=self.tar.absolute())

    def stat(self):
        """That of the tar."""
        return os.stat(self.tar)

    def open(self, mode="rb"):
        """The member's bytes, as a file. Raises OSError."""
        with open(self.tar, mode, buffering=0) as file:
            file.seek(self.first)
            content = file.read(self.length)
        if len(content) < self.length:
            raise OSError(f"{self.tar}: ends within {self.member}, expected {self.first + self.length} bytes")
        return io.BytesIO(content)


def find_member(path):
    """`Member` at a path that leads into a tar, `shard-0001.tar/a/000123.jpg`; None where it leads into no file.

    Raises UserError for a tar that has no such member, or is no whole uncompressed one.
    """
    tar = next((folder for folder in Path(path).parents if folder.is_file()), None)
    if tar is None:
        return None
    member = posixpath.normpath(str(path)[len(str(tar)) + 1 :].replace(os.sep, "/"))
    stat = tar.stat()
    names, places = list_tar(tar, stat.st_size, stat.st_mtime_ns)
    at = min(int(np.searchsorted(names, member.encode())), len(names) - 1)
    if at < 0 or names[at] != member.encode():
        raise UserError(f"{path}: the tar of {len(names)} files has no such member")
    return Member(tar, member, *places[at].tolist())


@functools.lru_cache(maxsize=256)
def list_tar(tar, *state):
    """The files in an uncompressed tar: sorted names as bytes (n,), and places (n, 2): first byte, number of bytes.

    state: of the file, so that one that has changed is listed anew. Raises UserError for what is no whole one.
    """
    places = {}
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                if member.isreg():  # of equal names the last one counts
                    places[posixpath.normpath(member.name).encode()] = member.offset_data, member.size
                archive.members.clear()  # half a kilobyte each
            end = archive.offset
        if end > os.stat(tar).st_size:
            raise tarfile.ReadError("its last member ends early")
    except tarfile.TarError as error:
        raise UserError(f"{tar}: not a whole uncompressed tar, as images are read from: {error}") from None
    names = np.array(list(places), dtype=np.bytes_)
    order = np.argsort(names)
    return names[order], np.array(list(places.values()), np.int64).reshape(-1, 2)[order]
