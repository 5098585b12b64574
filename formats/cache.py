"""Decoded frames in a folder (data.cache), read instead of decoding their images again."""

import hashlib
from pathlib import Path

import numpy as np

from formats.files import replacing
from scene.frames import UserError, decode

VERSION = 1  # raise it when `scene.frames.decode` gives other pixels


class FrameCache:
    """Pixels in a folder, a file per image and reduction, written by the process that first reads it.

    A file begins with a digest of what it was made from (length and times of the image file, or of the tar that holds
    it); one that differs is written anew. Any number of processes may share a folder, and any may be killed.
    """

    def __init__(self, folder):
        self.folder = Path(folder)

    def read(self, image, picture, reduction):
        """Pixels (h, w, 3) of an image, decoded where they are not there yet; picture: the `opened` image.

        Raises UserError where the folder cannot be written.
        """
        stat = image.stat()
        made_from = f"{VERSION} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
        digest = hashlib.sha256(made_from.encode()).digest()
        entry = self.folder / f"{hashlib.sha256(f'{image.absolute()} {reduction}'.encode()).hexdigest()[:32]}.rgb"
        width, height = (side // reduction for side in picture.size)
        if entry.is_file():
            content = np.fromfile(entry, np.uint8)
            if content[: len(digest)].tobytes() == digest and len(content) == len(digest) + 3 * width * height:
                return content[len(digest) :].reshape(height, width, 3)
        pixels = np.array(decode(picture, reduction))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(entry) as aside:
                aside.write_bytes(digest + pixels.tobytes())
        except OSError as error:
            raise UserError(f"data.cache {self.folder}: cannot be written: {error.strerror}") from None
        return pixels
