"""A frame, its boxes, and how its image lies on the network's canvas: what readers make and everything else takes.

`Frame` is one image with its camera; `Labels` are boxes in columns, labelled or detected; `View` places an image on the
canvas, and K follows exactly.
"""

import contextlib
import dataclasses
import os
from dataclasses import field
from errno import EDQUOT, ENOSPC
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps

from scene.geometry import box_corners, camera_problem, clip_boxes, flip_boxes, project, ray_angle, wrap_angle

PAD_COLOUR = (124, 116, 104)  # ImageNet's mean, so that padding is near zero after normalisation
PLAUSIBLE = {  # lowest and highest number of a labelled box; beyond them is damage or another unit
    "size": (0.01, 100.0),  # m
    "center": (-1e4, 1e4),  # m
    "yaw": (-6.3, 6.3),  # radians, 2 pi as files round it
    "box": (-1e6, 1e6),  # px
}
LARGEST = 1e8  # of any other number in a file: larger ones would overflow later


class UserError(ValueError):
    """A mistake of the user, or no room on a disk, in one sentence; commands show it without a traceback."""

    @property
    def sentence(self):
        """The last line: an error of a loader worker arrives with its traceback above it."""
        return (str(self).strip().splitlines() or [repr(self)])[-1].removeprefix("scene.frames.UserError: ")


def usable_cores():
    """Number of cores that this process may use, where the system says so."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def check_writable(*files):
    """Raises UserError for the first of the files, None and "" apart, that could not be written."""
    for path in (Path(file) for file in files if file):
        folder = path.absolute().parent
        if path.is_dir():
            raise UserError(f"{path}: there is a folder of that name, expected a file to write")
        if not folder.is_dir():
            raise UserError(f"{path}: it cannot be written, as there is no folder {folder}")
        if not os.access(path if path.exists() else folder, os.W_OK):
            raise UserError(f"{path}: it cannot be written: permission denied")


def make_folder(folder, option):
    """Make a folder where there is none. Raises UserError, naming the option that it was given by."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option} {folder}: no folder can be made there: {error.strerror}") from None


def sentence_of(error):
    """What a command shows of a UserError, a missing file or a full disk; any other error is raised again."""
    if isinstance(error, UserError):
        return error.sentence
    if isinstance(error, FileNotFoundError) or error.errno in (ENOSPC, EDQUOT):
        return str(error)
    raise error


@dataclasses.dataclass(frozen=True)
class Labels:
    """n boxes as columns, labelled or detected, in the camera frame and pixels that their holder states.

    `labels[mask]`, `labels[rows]` and `labels[a:b]` are Labels of some rows. `labels[i]` and `for one in labels` give
    one row, the columns without their first axis: `one.score` is a number, `one.center` (3,), `one.corners()` (8, 3).
    The last columns may be None: no row has them. A row that is only a 2D region (DontCare) has size -1, center -1000,
    yaw and alpha -10.
    """

    name: np.ndarray  # (n,) str
    box: np.ndarray  # (n, 4) visible 2D box, px
    size: np.ndarray  # (n, 3) l, h, w, m
    center: np.ndarray  # (n, 3) geometric centre, m
    yaw: np.ndarray  # (n,) radians
    alpha: np.ndarray  # (n,) radians
    truncation: np.ndarray  # (n,) in [0, 1], -1 unknown
    occlusion: np.ndarray  # (n,) 0-3, -1 unknown
    score: np.ndarray  # (n,) 1 for labels
    sigma: np.ndarray | None = None  # (n,) standard deviation of the depth, m, NaN unknown
    velocity: np.ndarray | None = None  # (n, 3) m/s in the camera frame, NaN unknown
    attribute: np.ndarray | None = None  # (n,) str, "" unknown

    def __len__(self):
        return len(self.yaw)

    def __getitem__(self, rows):
        """Labels of an index array, a mask or a slice; one row of an index. Raises IndexError beyond the last."""
        return Labels(*(None if column is None else column[rows] for column in vars(self).values()))

    @property
    def is_3d(self):
        """(n,) bool: rows with a 3D box, i.e. all but DontCare."""
        return self.size[..., 0] > 0

    def moved(self, offset):
        """The same boxes with centres shifted by offset (3,) m; alpha stays, and so do rows without a 3D box."""
        center = np.where(self.is_3d[..., None], self.center + np.asarray(offset, float), self.center)
        return dataclasses.replace(self, center=center)

    def corners(self):
        """(n, 8, 3) m, bottom four first."""
        return box_corners(self.center, self.size, self.yaw)

    def project(self, K):
        """Corners in the image of K (3, 3): (n, 8, 2) px, meaningless behind the camera."""
        return project(self.corners(), np.asarray(K, float))

    def to_dict(self):
        """{column: list of n values, or of a row its value} as JSON has them, None for NaN, without columns of None."""
        columns = {name: np.asarray(column) for name, column in vars(self).items() if column is not None}
        return {name: np.where(column == column, column, None).tolist() for name, column in columns.items()}


def make_labels(name, box, size, center, yaw, truncation=None, occlusion=None, score=None, **optional):
    """Labels from n rows; alpha follows from yaw and center; truncation and occlusion default to -1, score to 1."""
    n = len(name)
    center, yaw = np.asarray(center, float).reshape(n, 3), np.asarray(yaw, float).reshape(n)
    return Labels(
        name=np.asarray(name, dtype=object).reshape(n),
        box=np.asarray(box, float).reshape(n, 4),
        size=np.asarray(size, float).reshape(n, 3),
        center=center,
        yaw=yaw,
        alpha=wrap_angle(yaw - ray_angle(center)),
        truncation=np.full(n, -1.0) if truncation is None else np.asarray(truncation, float),
        occlusion=np.full(n, -1) if occlusion is None else np.asarray(occlusion, int),
        score=np.ones(n) if score is None else np.asarray(score, float),
        **optional,
    )


def join(parts):
    """Labels of all rows of several Labels; a column that only some have is filled with NaN, or ""."""
    if not parts:
        return make_labels([], [], [], [], [])
    columns = {}
    for name in vars(parts[0]):
        values = [getattr(part, name) for part in parts]
        like = next((value for value in values if value is not None), None)
        if like is None:
            continue
        blank = "" if like.dtype == object else np.nan
        for row, part in enumerate(parts):
            if values[row] is None:
                values[row] = np.full((len(part), *like.shape[1:]), blank)
        columns[name] = np.concatenate(values)
    return Labels(**columns)


@dataclasses.dataclass(frozen=True)
class Frame:
    """One image as its source describes it."""

    id: str
    image: Path  # or what has `open("rb")` and a text that names it, such as formats.tar.Member
    K: np.ndarray  # (3, 3) px
    labels: Labels  # in the image's own camera frame and pixels; all classes; DontCare rows are ignore regions
    offset: np.ndarray = field(default_factory=lambda: np.zeros(3))  # m: camera frame = source frame + offset
    group: str = ""  # frames of one moment, seen by several cameras, share it
    pose: np.ndarray | None = None  # (4, 4) camera -> global frame, m
    size: tuple[int, int] | None = None  # (width, height) of the image, px, where its source tells
    dropped: int = 0  # objects that the reader left out because the image does not show them


@contextlib.contextmanager
def opened(image):
    """An `upright` PIL image of which only the header is read yet; image: a path, or as `Frame.image`.

    Raises FileNotFoundError or OSError, naming the file, here and inside the block.
    """
    image = Path(image) if isinstance(image, str | os.PathLike) else image
    try:
        with image.open("rb") as file, Image.open(file) as picture:
            yield upright(picture)
    except FileNotFoundError:
        raise FileNotFoundError(f"{image}: no such image") from None
    except UserError:  # of a cache
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise OSError(f"{image}: cannot read the image: {error}") from None


def upright(picture):
    """A PIL image as viewers show it, turned as its EXIF orientation says; itself where that says nothing.

    Raises ValueError for a TIFF on its side, whose pixels Pillow 13 may read in rows of a wrong length.
    """
    says_nothing = "exif" not in picture.info and picture.format != "TIFF"  # asking such a PNG would decode it
    orientation = 1 if says_nothing else picture.getexif().get(ExifTags.Base.Orientation, 1)
    if orientation in range(5, 9) and picture.format == "TIFF":
        raise ValueError("it is a TIFF on its side, which Pillow may garble, expected an upright one")
    return ImageOps.exif_transpose(picture) if orientation in range(2, 9) else picture


def image_size(image):
    """(width, height) of an image as viewers show it. Raises what `opened` raises."""
    with opened(image) as picture:
        return picture.size


def decode(image, reduction=1):
    """An RGB PIL image of an `opened` one of 8 or 16 bits; a JPEG's may be reduced. Raises ValueError."""
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range, expected 8 or 16 bits")
    if reduction > 1:
        image.draft("RGB", (image.width // reduction, image.height // reduction))
    image.load()
    if image.mode.startswith("I"):  # Pillow clips 16 bits to 255 instead of scaling them
        image = Image.fromarray((np.clip(np.asarray(image), 0, 65535) / 257 + 0.5).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def load_image(image):
    """RGB PIL image, whole and upright. Raises what `opened` raises."""
    with opened(image) as picture:
        return decode(picture).copy()


def reduction_of(picture, canvas, scale=1.0):
    """How far a JPEG may be reduced while it is decoded (a DCT of fewer terms): 1, 2, 4 or 8.

    Never below what the canvas (height, width) shows at that scale, and only where sides divide, so that the reduced
    pixels are exact blocks of the stored ones and K follows exactly.
    """
    if picture.format != "JPEG":
        return 1
    (width, height), shown = picture.size, whole_view(*picture.size, canvas).width * scale
    return next((r for r in (8, 4, 2) if not (width % r or height % r) and width // r >= shown), 1)


def load_pixels(image, canvas, scale=1.0, cache=None):
    """RGB (h, w, 3) uint8 of an image, reduced as `reduction_of` allows, and its whole (width, height).

    cache: a `formats.cache.FrameCache`. Raises what `opened` raises.
    """
    with opened(image) as picture:
        size, reduction = picture.size, reduction_of(picture, canvas, scale)
        return cache.read(image, picture, reduction) if cache else np.array(decode(picture, reduction)), size


@dataclasses.dataclass(frozen=True)
class View:
    """How an image lies on the canvas: scaled to (width, height), its left top corner at (left, top), mirrored or not.

    In whole pixels, so that u' = (u + 0.5) width / image_width - 0.5 + left is exact.
    """

    image_size: tuple[int, int]  # (width, height) of the image, px
    canvas: tuple[int, int]  # (height, width) of the network input, px
    width: int  # of the whole scaled image on the canvas, px
    height: int
    left: int = 0
    top: int = 0
    flip: bool = False

    def _scale_and_shift(self):
        """(2,) each: canvas pixels = scale * image pixels + shift, but for the flip."""
        scale = np.array([self.width, self.height]) / self.image_size
        return scale, 0.5 * scale - 0.5 + [self.left, self.top]

    @property
    def matrix(self):
        """(3, 3) affine map of homogeneous image pixels to canvas pixels."""
        (sx, sy), (tx, ty) = self._scale_and_shift()
        matrix = np.array([[sx, 0, tx], [0, sy, ty], [0, 0, 1]])
        return np.array([[-1, 0, self.canvas[1] - 1], [0, 1, 0], [0, 0, 1]]) @ matrix if self.flip else matrix

    def camera(self, K):
        """K (3, 3) of the image -> K of the canvas. A flip mirrors the world (x -> -x), so that fx stays positive."""
        return self.matrix @ K @ np.diag([-1.0 if self.flip else 1.0, 1.0, 1.0])

    def boxes_to_canvas(self, boxes):
        """2D boxes (n, 4) of the image -> of the canvas, not clipped."""
        scale, shift = self._scale_and_shift()
        moved = boxes * np.tile(scale, 2) + np.tile(shift, 2)
        return flip_boxes(moved, self.canvas[1]) if self.flip else moved

    def boxes_to_image(self, boxes):
        """Inverse of `boxes_to_canvas`, clipped to the image."""
        scale, shift = self._scale_and_shift()
        moved = flip_boxes(boxes, self.canvas[1]) if self.flip else boxes
        return clip_boxes((moved - np.tile(shift, 2)) / np.tile(scale, 2), *self.image_size)

    @property
    def edge(self):
        """Canvas x of the left edge of the image as it lies there, mirrored or not."""
        return self.canvas[1] - self.left - self.width if self.flip else self.left

    @property
    def covered(self):
        """Canvas rectangle that the image covers: x1, y1, x2, y2 with x2, y2 exclusive."""
        right, bottom = min(self.edge + self.width, self.canvas[1]), min(self.top + self.height, self.canvas[0])
        return max(self.edge, 0), max(self.top, 0), right, bottom


def whole_view(width, height, canvas):
    """The whole image, as large as fits, in the canvas' left top corner; the rest is padding."""
    scale = min(canvas[1] / width, canvas[0] / height)
    return View((width, height), canvas, max(1, round(width * scale)), max(1, round(height * scale)))


def random_view(rng, width, height, canvas, scale, flip):
    """A `whole_view` varied by a scale from the range (low, high), a position, and a flip with that probability.

    The range (1, 1) leaves the position alone too.
    """
    base = whole_view(width, height, canvas)
    if tuple(scale) == (1, 1):
        return dataclasses.replace(base, flip=bool(rng.random() < flip))
    factor = rng.uniform(*scale)
    wide, high = max(1, round(base.width * factor)), max(1, round(base.height * factor))
    room, below = canvas[1] - wide, canvas[0] - high
    left = int(rng.integers(min(0, room), max(0, room) + 1))
    top = int(rng.integers(min(0, below), max(0, below) + 1))
    return View((width, height), canvas, wide, high, left, top, bool(rng.random() < flip))


def place_image(pixels, view):
    """RGB (h, w, 3) uint8 of `view.image_size`, or reduced, -> canvas (H, W, 3) uint8: resampled once, then moved.

    Bilinear with antialiasing, by torch: Pillow's filter in a sixth of the time, equal but for one rounding in 60,000.
    """
    x1, y1, x2, y2 = view.covered
    image = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)  # strides that torch knows as channels last, and keeps
    if view.flip:  # by torch, which mirrors 30 times as fast as numpy
        image = image.flip(3)
    scaled = F.interpolate(image, (view.height, view.width), mode="bilinear", antialias=True)[0]
    scaled = scaled.permute(1, 2, 0).numpy()
    canvas = np.empty((*view.canvas, 3), np.uint8)
    canvas[y1:y2, x1:x2] = scaled[y1 - view.top : y2 - view.top, x1 - view.edge : x2 - view.edge]
    for outside in (canvas[:y1], canvas[y2:], canvas[y1:y2, :x1], canvas[y1:y2, x2:]):
        outside[:] = PAD_COLOUR
    return canvas


def place_labels(labels, view):
    """Labels of an image -> of the canvas, all rows: boxes clipped to what it shows, the rest mirrored by a flip."""
    x1, y1, x2, y2 = view.covered
    boxes = np.clip(view.boxes_to_canvas(labels.box), [x1, y1, x1, y1], [x2 - 1, y2 - 1, x2 - 1, y2 - 1])
    if not view.flip:
        return dataclasses.replace(labels, box=boxes)
    real = labels.is_3d
    return dataclasses.replace(
        labels,
        box=boxes,
        center=np.where(real[:, None], labels.center * [-1, 1, 1], labels.center),
        yaw=np.where(real, wrap_angle(np.pi - labels.yaw), labels.yaw),
        alpha=np.where(real, wrap_angle(np.pi - labels.alpha), labels.alpha),
        velocity=None if labels.velocity is None else labels.velocity * [-1, 1, 1],
    )


def to_canvas(image, K, canvas):
    """A path, PIL image or RGB array (h, w, 3) with its K -> pixels of the canvas (H, W, 3), the K of that, the `View`.

    Raises UserError for an implausible K or something else than an image, OSError naming an unreadable file.
    """
    if isinstance(image, str | os.PathLike):
        pixels, whole = load_pixels(Path(image), canvas)
    else:  # whole, as a JPEG that is decoded at a reduced size would be another image afterwards
        pixels = np.array(decode(upright(_as_picture(image))))
        whole = pixels.shape[1::-1]
    if problem := camera_problem(K, *whole):
        raise UserError(f"K of the image: {problem}")
    view = whole_view(*whole, canvas)
    return place_image(pixels, view), view.camera(K), view


def _as_picture(image):
    """A PIL image of a PIL image or an array. Raises UserError that says what to do with anything else."""
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape[2:] == (3,) and image.size:
        return Image.fromarray(image)
    about = f" of {image.dtype} and shape {tuple(image.shape)}" if isinstance(image, np.ndarray | torch.Tensor) else ""
    expected = "expected a path, a PIL image or an array (H, W, 3) of uint8 in RGB"
    advice = "tensor.cpu().numpy(), (255 * image).astype(np.uint8), image[..., :3]"
    raise UserError(f"image is {type(image).__name__}{about}, {expected}: {advice}")
