"""Videos: upright pictures out of a file and into one, by PyAV, which is asked for only when there is a video."""

import contextlib
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from scene.frames import UserError


def import_av():
    """PyAV. Raises UserError with the pip line when it is not installed."""
    try:
        import av
    except ImportError:
        raise UserError("videos are read by PyAV, which is not installed: pip install av") from None
    return av


@contextlib.contextmanager
def opened_video(path: str | Path) -> Iterator[tuple[Iterator[np.ndarray], Fraction, int]]:
    """The frames of a video, upright (h, w, 3) uint8 RGB; their rate a second; their number in the header, or 0.

    Raises OSError naming the file, here and while frames are taken, which also end early where the file does.
    """
    av = import_av()
    try:
        container = av.open(str(path))
    except av.FFmpegError as error:
        raise OSError(f"{path}: cannot read the video: {error.strerror}") from None
    with container:
        if not container.streams.video:
            raise OSError(f"{path}: cannot read the video: there is only sound in it")
        stream = container.streams.video[0]
        yield _read(av, path, container, stream), stream.average_rate or Fraction(25), stream.frames


def _read(av, path, container, stream):
    count = 0
    try:
        for frame in container.decode(stream):
            pixels = frame.to_ndarray(format="rgb24")
            turned = np.rot90(pixels, round(frame.rotation / 90))  # counter-clockwise: telephones store it on its side
            yield np.ascontiguousarray(turned)  # torch takes no negative strides
            count += 1
    except av.FFmpegError as error:
        raise OSError(f"{path}: cannot read the video after {count} frames: {error.strerror}") from None


@contextlib.contextmanager
def written_video(path: str | Path, rate: Fraction) -> Iterator[Callable[[Image.Image], None]]:
    """A function that adds an RGB picture to an H.264 video; all as large as the first, cut to even sides."""
    av = import_av()
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "20"})
        stream.pix_fmt = "yuv420p"  # which every player takes

        def add(picture):
            if not stream.codec_context.is_open:
                stream.width, stream.height = picture.width // 2 * 2, picture.height // 2 * 2
            frame = av.VideoFrame.from_image(picture.crop((0, 0, stream.width, stream.height)))
            container.mux(stream.encode(frame))

        yield add
        if stream.codec_context.is_open:
            container.mux(stream.encode())
