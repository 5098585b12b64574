"""Predict 3D boxes for images and videos.

python predict.py RUN PATH ... --calib calib.txt | --intrinsics FX FY CX CY | --hfov DEG | --cameras FILE.jsonl   [--out DIR] [...]

RUN is a run folder, a folder with config.json and model.safetensors, or a Hugging Face hub id. A PATH is an image, a video, a folder, which
is searched with all folders below it, or a quoted pattern such as 'drives/*/left.png'. The camera is that of the picture as viewers show
it, turned where its EXIF says so. In FILE.jsonl every line has an `image`, relative to that file, and its `K`, as in formats/jsonl.py;
nothing else of a line is read, so labels and predictions will do.

Written to DIR, whose folders results and pictures are made anew. NAME is a file's path below the given folder, without its suffix; where
two would be equal, below the folder that holds all, and if need be with the suffixes:
    predictions.jsonl    JSON lines as in formats/jsonl.py, in each image's own camera frame, of images and of every frame of a video,
                         which is called VIDEO.mp4/000000 and so on
    results/NAME.txt     KITTI result format, of images; in rectified camera 0 with --calib
    pictures/NAME.png    the boxes on the image and from above; of a video pictures/NAME.mp4 with its frames and rate, without sound

Exit code 1: something could not be read and was passed over; 2: nothing was done, or the disk is full, as the sentence says.
"""

import argparse
import contextlib
import dataclasses
import functools
import glob
import itertools
import json
import math
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from data import UserError, check_writable, disk_is_full, usable_cores, user_errors
from engine.checkpoint import fetch, find_checkpoint, near
from formats import video
from formats.jsonl import to_json
from formats.kitti import read_calib, split_projection, write_labels
from formats.pool import in_order
from model import Detector, to_labels
from scene.draw import HEIGHT, PEOPLE_SCORE, WIDTH, draw_frame
from scene.frames import (
    Frame,
    View,
    decode,
    in_tar,
    make_labels,
    opened,
    place_image,
    reduction_of,
    upright,
    whole_view,
)
from scene.geometry import camera_problem, yaw_to_alpha

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")  # what is looked for in folders
VIDEO_RANGE = 60.0  # metres of the bird's-eye view, which would jump if every frame had its own
THREADS = min(
    usable_cores(), 8
)  # that read, and as many that write; the reading of pixels and most of drawing leave Python's lock
ONE_THING = 0.5  # IoU of visible boxes above which people are shown the best one, whatever the classes

Camera = Callable[[Path, tuple[int, int]], tuple[np.ndarray, np.ndarray]]


# ---- what is asked for


def load_detector(run: str, device: str = "cpu") -> Detector:
    """The detector of a run folder (its best, else its newest), a checkpoint folder, or a hub id (owner/name), ready to predict.

    Raises FileNotFoundError saying what was looked for, ValueError naming the folder when what is there does not load.
    """
    folder = find_checkpoint(fetch(run))
    try:
        detector = Detector.from_pretrained(folder)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{folder}: cannot load the detector: {first}") from error
    return detector.to(device).eval()


def find_inputs(given: Iterable[str], out: Path) -> dict[Path, str]:
    """Every image and video of the paths given, once, as absolute path -> NAME of its outputs; `out` itself is not searched.

    A name is the path below the given folder, or below the fixed part of a pattern, without its suffix; where two would be equal, all
    are paths below the folder that holds everything, and if that is not enough, with their suffixes.
    Raises FileNotFoundError or ValueError for a path at which there is nothing.
    """
    found = {}
    for text in given:
        files, base = _expand(text, out)
        for file in files:
            found.setdefault(Path(os.path.abspath(file)), file.relative_to(base))
    everything = Path(os.path.commonpath([path.parent for path in found]))
    whole = [path.relative_to(everything) for path in found]
    for names in ([name.with_suffix("") for name in found.values()], [name.with_suffix("") for name in whole], whole):
        if len({*names}) == len(names):
            break
    return {path: name.as_posix() for path, name in zip(found, names, strict=True)}


def _expand(text, out):
    """The files that a path given stands for, and the folder below which their names begin."""
    if not text:
        raise ValueError("a path is empty, expected an image, a video, a folder or a pattern")
    path = Path(text)
    if path.is_file() or in_tar(path):
        return [path], path.parent
    if path.is_dir():
        base, roots = path, [path]
    elif glob.has_magic(text):
        base = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
        roots = [Path(match) for match in sorted(glob.glob(text, recursive=True))]
    else:
        raise FileNotFoundError(f"{text}: no such image, video or folder{near(path)}")
    files = [file for root in roots for file in _search(root)]
    own = {*_inside(files, out)}
    files = [file for file in files if file not in own]
    if not files:
        raise ValueError(f"{text}: no image or video there, looked for {', '.join(IMAGES + video.SUFFIXES)}")
    return files, base


def _search(path):
    """The images and videos in a folder and the folders below it, hidden ones apart; of a file itself, if it is one."""
    files, seen = [] if path.is_dir() else [path], set()
    for folder, below, names in os.walk(path, followlinks=True):
        if (place := os.path.realpath(folder)) in seen:  # a link to where we were
            below.clear()
            continue
        seen.add(place)
        below[:] = sorted(
            (n for n in below if n[0] != "."), key=lambda n, folder=folder: (os.path.islink(os.path.join(folder, n)), n)
        )
        files += [Path(folder, name) for name in names]
    return sorted(
        file
        for file in files
        if file.suffix.lower() in IMAGES + video.SUFFIXES and file.is_file() and file.name[0] != "."
    )


def _inside(files, folder):
    """Those of the files that lie in a folder or below it. Links of folders are followed, those of files are files."""
    real = functools.cache(os.path.realpath)
    return [file for file in files if Path(real(file.parent)).is_relative_to(real(folder))]


def _resolved(path):
    """A path with the links of its folder resolved, not its own: two names of one file may have cameras of their own."""
    return Path(os.path.realpath(path.parent), path.name)


def find_camera(options: argparse.Namespace, paths: Iterable[Path]) -> Camera:
    """A function (absolute path, (width, height)) -> K (3, 3), and offset (3,) metres with camera = rectified camera 0 + offset.

    The offset is 0 but with --calib. With --hfov: square pixels, the principal point in the middle of the image, and its width seen under
    that angle. Raises FileNotFoundError or ValueError for a file that does not give the camera of every path.
    """
    if options.calib:
        if not Path(options.calib).is_file():
            raise FileNotFoundError(f"--calib {options.calib}: no such file")
        fixed = split_projection(read_calib(options.calib))
        return lambda path, size: fixed
    nowhere = np.zeros(3)
    if options.cameras:
        cameras = read_cameras(options.cameras)
        if missing := [path for path in paths if _resolved(path) not in cameras]:
            raise ValueError(f"--cameras {options.cameras}: none of its {len(cameras)} lines is of {missing[0]}")
        return lambda path, size: (cameras[_resolved(path)], nowhere)
    if options.intrinsics:
        fx, fy, cx, cy = options.intrinsics
        K = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])
        return lambda path, size: (K, nowhere)
    half = math.tan(math.radians(options.hfov) / 2)
    middle = lambda w, h: np.array([[w / 2 / half, 0, (w - 1) / 2], [0, w / 2 / half, (h - 1) / 2], [0, 0, 1]])  # noqa: E731
    return lambda path, size: (middle(*size), nowhere)


def read_cameras(path: str | Path) -> dict[Path, np.ndarray]:
    """Absolute path, as `_resolved` has it -> K (3, 3) of the lines of a JSON-lines file, of which only `image` and `K` are looked at.

    Raises FileNotFoundError, or ValueError naming file, line, value and what was expected.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"--cameras {path}: no such JSON-lines file")
    cameras, lines = {}, {}  # lines: path -> number of the first line that names it
    try:
        lines_of_text = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"--cameras {path}: not a text file: {error}") from None
    for number, text in enumerate(lines_of_text, 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            image, K = line["image"], np.asarray(line["K"], float)
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{path}:{number}: expected a JSON object with an image and its K, got {text[:80]}"
            ) from None
        if problem := camera_problem(K):
            raise ValueError(f"{path}:{number}: K: {problem}")
        place = _resolved(Path(path).parent / str(image))
        first = lines.setdefault(place, number)
        if not np.array_equal(cameras.setdefault(place, K), K):
            raise ValueError(
                f"{path}:{number}: another K for {image} than on line {first}, expected one camera for an image"
            )
    return cameras


def check_first(paths: Iterable[Path], camera: Camera) -> None:
    """Raises UserError when the camera does not suit the first path that can be read, of which as little as possible is."""
    for path in paths:
        try:
            if path.suffix.lower() in video.SUFFIXES:
                with video.opened_video(path) as (frames, _, _):
                    size = next(frames).shape[1::-1]
            else:
                with opened(path) as file:
                    size = upright(file).size
        except (OSError, StopIteration):
            continue  # reported when its turn comes
        check_camera(path, camera(path, size)[0], size)
        return


def check_camera(path: Path, K: np.ndarray, size: tuple[int, int]) -> None:
    """Raises UserError naming the path when K (3, 3) is implausible for a picture of (width, height)."""
    if problem := camera_problem(K, *size):
        raise UserError(f"{path}: the camera given does not suit it: {problem}")


def set_up(detector: Detector, options: argparse.Namespace) -> None:
    """Adapt a detector to the command line. Raises ValueError naming the classes that there are for one that there is not."""
    known = detector.config.classes
    if unknown := [name for name in options.classes or () if name not in known]:
        raise ValueError(f"--classes names {unknown[0]!r}, this detector knows {', '.join(known)}")
    if options.nms_across_classes is not None or not detector.config.nms_across_classes:
        across = ONE_THING if options.nms_across_classes is None else options.nms_across_classes
        detector.config = dataclasses.replace(detector.config, nms_across_classes=across)
    if options.min_score < detector.config.score_threshold:
        detector.config = dataclasses.replace(detector.config, score_threshold=options.min_score)


# ---- from files to boxes: reading, detecting and writing beside each other, in the order of the inputs


@dataclasses.dataclass(frozen=True)
class Shot:
    """A picture on its way from a file to its boxes."""

    frame: Frame  # without labels until they are found
    view: View  # of the picture on the network's canvas
    canvas: np.ndarray  # (H, W, 3) uint8
    pixels: np.ndarray | None  # (h, w, 3) uint8 as read, perhaps reduced; None where no picture is wanted
    turned: bool = False  # as its EXIF says


def read_image(path: Path, name: str, camera: Camera, canvas: tuple[int, int], keep: bool) -> Shot:
    """An image on the canvas (height, width). Raises OSError or UserError naming the file.

    Large JPEGs are decoded at a reduced size that still fills the canvas and the picture that may be drawn, whether it is or not.
    """
    with opened(path) as file:
        image = upright(file)
        size, turned = image.size, image is not file
        pixels = np.array(decode(image, reduction_of(image, (max(canvas[0], HEIGHT), max(canvas[1], WIDTH)))))
    return place_shot(name, path, pixels, size, camera, canvas, keep, turned)


def place_shot(id, path, pixels, size, camera, canvas, keep, turned=False):
    """Pixels (h, w, 3), perhaps reduced from a picture of (width, height), on the canvas. Raises UserError for an unfit camera."""
    K, offset = camera(path, size)
    check_camera(path, K, size)
    view = whole_view(*size, canvas)
    frame = Frame(id, path, K, make_labels([], [], [], [], []), offset)
    return Shot(frame, view, place_image(pixels, view), pixels if keep else None, turned)


def detect_shots(detector: Detector, shots: Iterator[Shot], options: argparse.Namespace) -> Iterator[Shot]:
    """The shots with the labels found in them, a batch at a time."""
    device = detector.pixel_mean.device
    while batch := list(itertools.islice(shots, options.batch)):
        images = torch.from_numpy(np.stack([shot.canvas for shot in batch])).to(device)
        cameras = torch.from_numpy(np.stack([shot.view.camera(shot.frame.K) for shot in batch])).to(device)
        for shot, found in zip(batch, detector.detect(images, cameras, options.flip), strict=True):
            labels = to_labels(
                found, shot.view, detector.config.classes, options.min_score, detector.config.attribute_names
            )
            labels = labels[np.isin(labels.name.astype(str), options.classes or detector.config.classes)]
            yield dataclasses.replace(shot, frame=dataclasses.replace(shot.frame, labels=labels))


def draw_shot(shot: Shot, max_range: float | None = None) -> Image.Image:
    """The picture of a shot and its boxes, all of them."""
    height, width = shot.pixels.shape[:2]
    K = View(shot.view.image_size, (height, width), width, height).camera(shot.frame.K)  # reduced as the pixels are
    return draw_frame(shot.pixels, K, shot.frame.labels, min_score=0.0, max_range=max_range)


def predict_images(
    detector: Detector,
    images: dict[Path, str],
    camera: Camera,
    options: argparse.Namespace,
    report: Callable[[Exception], None],
) -> Iterator[Shot]:
    """Shots of images {path: name} with their labels; writes their result files and pictures, and reports what cannot be read."""

    def read(item):
        try:
            return read_image(*item, camera, detector.config.size, options.pictures)
        except (OSError, UserError) as error:
            return report(error)

    def write(shot):
        for folder in ("results", *(["pictures"] if options.pictures else [])):
            (options.out / folder / shot.frame.id).parent.mkdir(parents=True, exist_ok=True)
        labels = shot.frame.labels.moved(-shot.frame.offset)
        labels = dataclasses.replace(
            labels, alpha=yaw_to_alpha(labels.yaw, labels.center)
        )  # KITTI's belongs to its own file's x and z
        write_labels(options.out / "results" / f"{shot.frame.id}.txt", labels, scores=True, digits=4)
        if options.pictures:
            draw_shot(shot).save(options.out / "pictures" / f"{shot.frame.id}.png", compress_level=1)
        return shot

    with ThreadPoolExecutor(THREADS) as readers, ThreadPoolExecutor(THREADS) as writers:
        shots = filter(None, in_order(readers, read, images.items(), options.batch + THREADS))
        written = in_order(writers, write, detect_shots(detector, shots, options), options.batch)
        yield from tqdm(written, "predicting", len(images), unit=" images", disable=None)


def predict_video(
    detector: Detector,
    path: Path,
    name: str,
    camera: Camera,
    options: argparse.Namespace,
    report: Callable[[Exception], None],
) -> Iterator[Shot]:
    """Shots of the frames of a video with their labels; writes it with its boxes, and reports where it cannot be read."""

    def read(number):
        try:
            if (pixels := next(frames, None)) is None:
                return None
            id = f"{name}{path.suffix}/{number:06d}"
            return place_shot(id, path, pixels, pixels.shape[1::-1], camera, detector.config.size, options.pictures)
        except (OSError, UserError) as error:
            return report(error)

    def paint(shot):
        return shot, draw_shot(shot, VIDEO_RANGE) if options.pictures else None

    with contextlib.ExitStack() as stack:
        try:
            frames, rate, count = stack.enter_context(video.opened_video(path))
        except OSError as error:
            report(error)
            return
        reader, painters = (stack.enter_context(ThreadPoolExecutor(threads)) for threads in (1, THREADS))
        if options.pictures:
            target = options.out / "pictures" / f"{name}.mp4"
            target.parent.mkdir(parents=True, exist_ok=True)
            add = stack.enter_context(video.written_video(target, rate))
        shots = itertools.takewhile(bool, in_order(reader, read, itertools.count(), options.batch))
        painted = in_order(painters, paint, detect_shots(detector, shots, options), options.batch)
        for shot, picture in tqdm(painted, name, count or None, unit=" frames", disable=None):
            if options.pictures:
                add(picture)
            yield shot


def predict(detector: Detector, inputs: dict[Path, str], camera: Camera, options: argparse.Namespace) -> int:
    """Everything for the inputs {path: name}. Returns the exit code: 1 when something could not be read, else 0."""
    problems, found, shots, turned, sizes = [], Counter(), 0, 0, set()

    def report(error):
        problems.append(str(error))
        tqdm.write(f"passed over: {error}", file=sys.stderr)

    videos = {path: name for path, name in inputs.items() if path.suffix.lower() in video.SUFFIXES}
    images = {path: name for path, name in inputs.items() if path not in videos}
    every = [predict_images(detector, images, camera, options, report)] if images else []
    every += [predict_video(detector, path, name, camera, options, report) for path, name in videos.items()]
    with open(options.out / "predictions.jsonl", "w", encoding="utf-8") as lines:
        for shot in itertools.chain.from_iterable(every):
            lines.write(json.dumps(to_json(shot.frame, options.out.absolute()), allow_nan=False) + "\n")
            found.update(shot.frame.labels.name)
            shots, turned = shots + 1, turned + shot.turned
            sizes.add(shot.view.image_size)
    counts = ", ".join(f"{number} {name}" for name, number in found.most_common()) or "nothing"
    print(f"{options.out}{os.sep}: {counts} with a score from {options.min_score:g} in {shots} pictures")
    if turned:
        print(f"{turned} of them were turned as their EXIF says; the camera given counts as that of the turned picture")
    if len(sizes) > 1 and (options.calib or options.intrinsics):
        small, large = ("x".join(map(str, size)) for size in (min(sizes), max(sizes)))
        print(
            f"they have {len(sizes)} sizes, such as {small} and {large}, and one camera was given for all: --cameras gives each its own"
        )
    if problems:
        print(f"{len(problems)} were passed over, the first: {problems[0]}", file=sys.stderr)
    return 1 if problems else 0


# ---- the command line


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line. Exits with code 2 and one sentence when it is wrong."""
    parser = argparse.ArgumentParser(
        prog="predict.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("paths", metavar="PATH", nargs="+")
    parser.add_argument(
        "--calib", metavar="FILE", help="KITTI calibration file (P2); results are then in rectified camera 0"
    )
    parser.add_argument(
        "--intrinsics", metavar=("FX", "FY", "CX", "CY"), nargs=4, type=float, help="pixels of the upright picture"
    )
    parser.add_argument("--hfov", metavar="DEG", type=float, help="horizontal field of view, degrees")
    parser.add_argument(
        "--cameras", metavar="FILE.jsonl", help="JSON lines with an image (or video) and its K; every PATH needs one"
    )
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("predictions"), help="default: %(default)s")
    parser.add_argument(
        "--min-score",
        metavar="S",
        type=float,
        default=PEOPLE_SCORE,
        help="least score written and drawn; default: %(default)s",
    )
    parser.add_argument(
        "--classes", metavar="NAME", nargs="+", help="write and draw only these; default: all that the detector knows"
    )
    parser.add_argument(
        "--nms-across-classes",
        metavar="IOU",
        type=float,
        help=f"boxes that overlap more are one thing, whatever their class; 0: not so; default: the run's, or {ONE_THING} where that is 0",
    )
    parser.add_argument(
        "--flip", action="store_true", help="average what is said of a picture and of its mirror image; half as fast"
    )
    parser.add_argument("--no-pictures", dest="pictures", action="store_false", help="draw nothing, and write no video")
    parser.add_argument(
        "--batch", metavar="N", type=int, default=8, help="pictures looked at at once; default: %(default)s"
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda where there is one"
    )
    options = parser.parse_intermixed_args(arguments)  # a PATH may follow an option
    given = [name for name in ("calib", "intrinsics", "hfov", "cameras") if getattr(options, name) is not None]
    if len(given) != 1:
        got = " and ".join(f"--{name}" for name in given) or "none"
        wanted = "--calib FILE, --intrinsics FX FY CX CY, --hfov DEG and --cameras FILE.jsonl"
        parser.error(f"expected one of {wanted}, got {got}: depth needs to know the camera")
    if options.hfov is not None and not 0 < options.hfov < 180:
        parser.error(f"--hfov is {options.hfov:g}, expected degrees between 0 and 180")
    if options.intrinsics and (min(options.intrinsics[:2]) <= 0 or not np.isfinite(options.intrinsics).all()):
        parser.error(
            f"--intrinsics is {' '.join(f'{v:g}' for v in options.intrinsics)}, expected finite pixels with FX and FY > 0"
        )
    for option, value in (
        ("--min-score", options.min_score),
        ("--nms-across-classes", options.nms_across_classes or 0),
    ):
        if not 0 <= value <= 1:
            parser.error(f"{option} is {value:g}, expected a number from 0 to 1")
    if options.batch < 1:
        parser.error(f"--batch is {options.batch}, expected at least 1")
    try:
        torch.empty(0, device=options.device).tolist()  # which the device 'meta' has not
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        first = str(error).splitlines()[0]
        parser.error(
            f"--device is {options.device!r}, expected cpu, cuda, cuda:1 and so on, of those that are there: {first}"
        )
    return options


def prepare_folder(out: Path, inputs: Iterable[Path] = ()) -> None:
    """Make the folder, without what an earlier prediction has left in it. Raises ValueError or UserError, with nothing deleted, where it
    cannot be, or an input would go.
    """
    anew = [out / "results", out / "pictures"]
    if lost := [path for folder in anew for path in _inside(inputs, folder)]:
        raise ValueError(f"{lost[0]} lies in a folder of {out} that is made anew; --out DIR chooses another one")
    if files := [folder for folder in anew if folder.exists() and not folder.is_dir()]:
        raise ValueError(f"--out {out}: {files[0]} is a file, expected a folder or nothing")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {out}: no folder can be made there: {error.strerror}") from None
    check_writable(out / "predictions.jsonl")
    if not os.access(out, os.W_OK):
        raise ValueError(f"--out {out}: it cannot be written: permission denied")
    if (out / "predictions.jsonl").exists():
        for folder in anew:
            shutil.rmtree(folder, ignore_errors=True)


def main(arguments: list[str] | None = None) -> int:
    """Command line entry. Returns 0, 1 when something was passed over, or 2 after one sentence on stderr for an error of the user's."""
    options = parse_arguments(arguments)
    try:
        with user_errors():
            inputs = find_inputs(options.paths, options.out)
            if any(path.suffix.lower() in video.SUFFIXES for path in inputs):
                video.import_av()
            camera = find_camera(options, inputs)
            check_first(inputs, camera)
            detector = load_detector(options.run, options.device)
            set_up(detector, options)
            prepare_folder(options.out, inputs)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        return predict(detector, inputs, camera, options)
    except OSError as error:
        if not disk_is_full(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
