"""Predict 3D boxes for images and videos.

python predict.py RUN PATH ... --calib calib.txt | --intrinsics FX FY CX CY | --hfov DEG | --cameras FILE.jsonl   [...]

RUN is a run folder, a folder with config.json and model.safetensors, a Hugging Face hub id, or with --runtime a file
that export.py wrote. A PATH is an image, a video, a folder, which is searched with all folders below it, or a quoted
pattern such as 'drives/*/left.png'. The camera is that of the picture as viewers show it, turned where its EXIF says
so. In FILE.jsonl every line has an `image`, relative to that file, and its `K`; nothing else of a line is read, so
labels and predictions do.

Written to DIR, whose folders results and pictures are made anew. NAME is a file's path below the folder that holds all
of them, without its suffix unless two would be equal:
    predictions.jsonl    JSON lines as in formats/jsonl.py, in each image's own camera frame, of images and of every
                         frame of a video, which is called VIDEO.mp4/000000 and so on
    results/NAME.txt     KITTI result format, of images; in rectified camera 0 with --calib
    pictures/NAME.jpg    the boxes on the image and from above; of a video pictures/NAME.mp4, without sound

Exit code 1: something could not be read and was passed over; 2: nothing was done, or the disk is full, as is said.
"""

import argparse
import contextlib
import dataclasses
import glob
import importlib
import itertools
import json
import math
import os
import shutil
import sys
from collections import Counter, deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import DataConfig, Detection3D
from engine.checkpoint import near
from engine.weights import fetch, find_checkpoint
from evaluate import detect_frames
from formats.kitti import read_calib, split_projection, write_labels
from formats.odd import distortion_problem
from model import Detector
from scene.draw import PEOPLE_SCORE, draw_frame
from scene.frames import Frame, UserError, check_writable, image_size, make_folder, make_labels, sentence_of
from scene.geometry import camera_problem
from scene.records import to_json

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")  # what is looked for in folders
VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")
VIDEO_RANGE = 60.0  # metres of the bird's-eye view, which would jump if every frame had its own
THREADS = min(torch.get_num_threads(), 8)  # that read headers and draw, and processes that read images
ONE_THING = 0.5  # IoU of visible boxes above which people are shown the best one, whatever the classes
NOTHING = make_labels([], [], [], [], [])


def load_detector(run: str, device="cpu") -> Detector:
    """The detector of a run (its best, else its newest), a checkpoint or a hub id, ready to use. Raises UserError."""
    return Detector.from_pretrained(find_checkpoint(fetch(run))).to(device).eval()


def open_detector(options):
    """What the command line names: a run for torch, which --precision tells `autocast`, or a file for a runtime."""
    options.autocast = options.precision == "bf16" and not options.runtime
    if options.runtime:
        return importlib.import_module("engine.runtime").FileDetector(options.run, options.runtime, options.precision)
    if options.autocast:
        importlib.import_module("engine.runtime").refuse_emulation("bf16", torch.device(options.device))
    return load_detector(options.run, options.device)


def find_inputs(given: Iterable[str], out: Path) -> dict[Path, str]:
    """Every image and video of some paths but those in `out`: absolute path -> NAME of outputs. Raises UserError."""
    paths = {}
    for text in given:
        if Path(text).is_file():
            files = [Path(text)]
        else:
            roots = [text] if text and Path(text).is_dir() else sorted(glob.glob(text, recursive=True))
            if not roots and not glob.has_magic(text):
                raise UserError(f"{text or 'a path is empty'}: no such image, video or folder{near(Path(text))}")
            files = [file for root in roots for file in search(Path(root))]
            files = [file for file in files if not resolved(file).is_relative_to(os.path.realpath(out))]
            if not files:
                raise UserError(f"{text}: no image or video there, looked for {', '.join(IMAGES + VIDEOS)}")
        paths |= dict.fromkeys(Path(os.path.abspath(file)) for file in files)
    base = os.path.commonpath([path.parent for path in paths])
    whole = [path.relative_to(base) for path in paths]
    bare = [path.with_suffix("") for path in whole]
    names = bare if len({*bare}) == len(bare) else whole
    return {path: name.as_posix() for path, name in zip(paths, names, strict=True)}


def search(root: Path) -> list[Path]:
    """The images and videos of a folder and those below it, links included, hidden ones apart; of a file itself."""
    files, places = [] if root.is_dir() else [root], set()
    for folder, below, names in os.walk(root, followlinks=True):
        if os.path.realpath(folder) in places:  # a link to where we were
            below.clear()
            continue
        places.add(os.path.realpath(folder))
        below[:] = sorted(name for name in below if name[0] != ".")
        files += [Path(folder, name) for name in names]
    return sorted(f for f in files if f.suffix.lower() in IMAGES + VIDEOS and f.is_file() and f.name[0] != ".")


def resolved(path: Path) -> Path:
    """A path with its folder's links resolved, not its own: two names of one file may have cameras of their own."""
    return Path(os.path.realpath(path.parent), path.name)


def find_camera(options, paths: Iterable[Path]):
    """A function (absolute path, (width, height)) -> K (3, 3), and offset (3,) m: camera = rectified camera 0 + offset.

    Raises UserError for a file that does not give the camera of every path.
    """
    if options.calib:
        K, offset = split_projection(read_calib(options.calib))
        return (lambda path, size: K), offset
    if options.cameras:
        cameras = read_cameras(Path(options.cameras))
        if missing := [path for path in paths if resolved(path) not in cameras]:
            raise UserError(f"--cameras {options.cameras}: none of its {len(cameras)} lines is of {missing[0]}")
        return (lambda path, size: cameras[resolved(path)]), np.zeros(3)

    def pinhole(path, size):
        if options.intrinsics:
            fx, fy, cx, cy = options.intrinsics
        else:
            fx = fy = size[0] / 2 / math.tan(math.radians(options.hfov) / 2)
            cx, cy = (size[0] - 1) / 2, (size[1] - 1) / 2
        return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])

    return pinhole, np.zeros(3)


def read_cameras(path: Path) -> dict[Path, np.ndarray]:
    """`resolved` image -> K (3, 3) of the lines of a JSON-lines file; all else in it is ignored. Raises UserError."""
    cameras = {}
    for number, text in enumerate(path.read_text(encoding="utf-8-sig", errors="replace").split("\n"), 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            place, K = resolved(path.parent / str(line["image"])), np.asarray(line["K"], float)
        except (ValueError, KeyError, TypeError):
            expected = f"expected a JSON object with an image and its K, got {text[:80]}"
            raise UserError(f"{path}:{number}: {expected}") from None
        if problem := next(filter(None, itertools.starmap(distortion_problem, line.items())), camera_problem(K)):
            raise UserError(f"{path}:{number}: K: {problem}")
        if not np.array_equal(cameras.setdefault(place, K), K):
            raise UserError(f"{path}:{number}: another K for {line['image']} than before, expected one for an image")
    return cameras


def adapt(detector: Detector, options) -> torch.nn.Module:
    """The detector as the command line wants it. Raises UserError naming the classes that there are."""
    known = detector.config.classes
    if unknown := [name for name in options.classes or () if name not in known]:
        raise UserError(f"--classes names {unknown[0]!r}, this detector knows {', '.join(known)}")
    across, least = options.nms_across_classes, min(options.min_score, detector.config.score_threshold)
    if across is None:
        across = detector.config.nms_across_classes or ONE_THING
    detector.config = dataclasses.replace(detector.config, nms_across_classes=across, score_threshold=least)
    return importlib.import_module("engine.mirror").Mirrored(detector) if options.flip else detector


def find_frames(inputs: dict[Path, str], camera, offset) -> tuple[list[Frame], list[str]]:
    """Frames without labels of images and videos {path: name}, sentences for others. UserError if all are others."""

    def frame_of(path):
        try:
            size = video_size(path) if path.suffix.lower() in VIDEOS else image_size(path)
        except OSError as error:
            return str(error)
        K = camera(path, size)
        if problem := camera_problem(K, *size):
            return f"{path}: the camera given does not suit it: {problem}"
        return Frame(inputs[path], path, K, NOTHING, offset, size=size)

    with ThreadPoolExecutor(THREADS) as pool:
        answers = list(pool.map(frame_of, inputs))
    problems = [answer for answer in answers if isinstance(answer, str)]
    if len(problems) == len(answers):
        raise UserError(problems[0])
    return [answer for answer in answers if isinstance(answer, Frame)], problems


def video_size(path: Path) -> tuple[int, int]:
    """(width, height) of a video's first picture. Raises OSError."""
    with importlib.import_module("formats.video").opened_video(path) as (pictures, _, _):
        if (pixels := next(pictures, None)) is None:
            raise OSError(f"{path}: cannot read the video: there is no picture in it")
        return pixels.shape[1::-1]


def predict_images(detector, frames: list[Frame], options, report):
    """Yield the frames with their labels; writes result files and pictures, and reports what cannot be read."""
    dataset = Detection3D(frames, detector.config, DataConfig(neighbours=(), skip_bad=True))
    order = [range(start, min(start + options.batch, len(frames))) for start in range(0, len(frames), options.batch)]
    detected = detect_frames(detector, dataset, order, min(THREADS, len(order) - 1), torch.device(options.device))
    drawing = deque()
    with ThreadPoolExecutor(THREADS) as pool:
        for frame, labels in tqdm(detected, "predicting", len(frames), unit=" images", disable=None):
            if labels is None:
                report(f"{frame.image}: cannot read the image")  # the worker has said why
                continue
            labels = choose(labels, options)
            write_labels(options.out / "results" / f"{frame.id}.txt", labels, scores=True, digits=4)
            frame = dataclasses.replace(frame, labels=labels.moved(frame.offset))
            if options.pictures:
                drawing.append(pool.submit(save_picture, frame, options.out))
            if len(drawing) > 2 * THREADS:
                drawing.popleft().result()
            yield frame
        for picture in drawing:
            picture.result()


def choose(labels, options):
    """Those that the command line wants."""
    named = np.isin(labels.name.astype(str), options.classes) if options.classes else True
    return labels[(labels.score >= options.min_score) & named]


def save_picture(frame: Frame, out: Path) -> None:
    """Draw the image of a frame with its boxes, all of them."""
    picture = draw_frame(frame.image, frame.K, frame.labels, min_score=0.0)
    picture.save(out / "pictures" / f"{frame.id}.jpg", quality=92, subsampling=0)  # a PNG takes as long as the drawing


def predict_video(detector, clip: Frame, options, report):
    """Yield the frames of a video with their labels; writes it with its boxes, and reports where it cannot be read."""
    video = importlib.import_module("formats.video")
    name = clip.id.removesuffix(clip.image.suffix) + clip.image.suffix  # which it has beside a picture of that name

    def draw(pixels, labels):
        return draw_frame(pixels, clip.K, labels, min_score=0.0, max_range=VIDEO_RANGE)

    with contextlib.ExitStack() as stack:
        pictures, rate, count = stack.enter_context(video.opened_video(clip.image))
        pictures = iter(tqdm(readable(pictures, report), clip.id, count or None, unit=" frames", disable=None))
        pool, numbers = stack.enter_context(ThreadPoolExecutor(THREADS)), itertools.count()
        if options.pictures:
            place = options.out / "pictures" / f"{clip.id}.mp4"
            add = stack.enter_context(video.written_video(place, rate))
        while batch := list(itertools.islice(pictures, options.batch)):
            labels = [choose(one, options) for one in detector.predict(batch, clip.K)]
            for picture in pool.map(draw, batch, labels) if options.pictures else ():
                add(picture)
            for one in labels:
                yield dataclasses.replace(clip, id=f"{name}/{next(numbers):06d}", labels=one)


def readable(pictures, report):
    """Yield the pictures of a video up to where it cannot be read, which is reported."""
    try:
        yield from pictures
    except OSError as error:
        report(str(error))


def predict(detector, frames: list[Frame], problems: list[str], options) -> int:
    """Everything for some images and videos. Returns the exit code: 1 when something could not be read, else 0."""

    def report(problem):
        problems.append(problem)
        tqdm.write(f"passed over: {problem}", file=sys.stderr)

    images = [frame for frame in frames if frame.image.suffix.lower() not in VIDEOS]
    videos = [frame for frame in frames if frame.image.suffix.lower() in VIDEOS]
    done = [predict_images(detector, images, options, report)] if images else []
    done += [predict_video(detector, clip, options, report) for clip in videos]
    counts, pictures = Counter(), 0
    with open(options.out / "predictions.jsonl", "w", encoding="utf-8") as lines:
        for frame in itertools.chain.from_iterable(done):
            lines.write(json.dumps(to_json(frame, options.out.absolute()), allow_nan=False) + "\n")
            counts.update(frame.labels.name)
            pictures += 1
    found = ", ".join(f"{number} {name}" for name, number in counts.most_common()) or "nothing"
    print(f"{options.out}{os.sep}: {found} with a score from {options.min_score:g} in {pictures} pictures")
    if problems:
        print(f"{len(problems)} were passed over, the first: {problems[0]}", file=sys.stderr)
    return 1 if problems else 0


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line. Exits with code 2 and one sentence when it is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    add = parser.add_argument
    add("run", metavar="RUN")
    add("paths", metavar="PATH", nargs="+")
    camera = parser.add_mutually_exclusive_group(required=True).add_argument
    camera("--calib", metavar="FILE", help="KITTI calibration file (P2); results are then in rectified camera 0")
    camera("--intrinsics", metavar=("FX", "FY", "CX", "CY"), nargs=4, type=float, help="pixels of the upright picture")
    camera("--hfov", metavar="DEG", type=float, help="horizontal field of view, degrees")
    camera("--cameras", metavar="FILE.jsonl", help="JSON lines with image (or video) and K; every PATH needs one")
    add("--out", metavar="DIR", type=Path, default=Path("predictions"), help="default: %(default)s")
    add("--min-score", metavar="S", type=float, default=PEOPLE_SCORE, help="least score kept; default: %(default)s")
    add("--classes", metavar="NAME", nargs="+", help="keep only these; default: all that the detector knows")
    add("--nms-across-classes", metavar="IOU", type=float, help="boxes that overlap more are one thing, whatever their "
        f"class; 0: not so; default: the run's, or {ONE_THING} where that is 0")  # fmt: skip
    add("--flip", action="store_true", help="average what is said of a picture and its mirror image; half as fast")
    add("--no-pictures", dest="pictures", action="store_false", help="draw nothing, and write no video")
    add("--batch", metavar="N", type=int, default=8, help="pictures looked at at once; default: %(default)s")
    add("--runtime", choices=("onnx", "openvino"), help="what runs RUN, a file that export.py wrote, in place of torch")
    add("--precision", choices=("fp32", "bf16"), help="of torch (fp32 unless asked) or OpenVINO (its own choice)")
    add("--device", help="of torch; default: cuda where there is one")
    options = parser.parse_intermixed_args(arguments)  # a PATH may follow an option
    checks = (
        ("hfov", options.hfov is None or 0 < options.hfov < 180, "degrees between 0 and 180"),
        ("intrinsics", options.intrinsics is None or min(options.intrinsics[:2]) > 0, "pixels with FX and FY > 0"),
        ("min_score", 0 <= options.min_score <= 1, "a number from 0 to 1"),
        ("nms_across_classes", 0 <= (options.nms_across_classes or 0) <= 1, "a number from 0 to 1"),
        ("batch", options.batch >= 1, "at least 1"),
    )
    for name, fine, expected in checks:
        if not fine:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}, expected {expected}")
    if options.device and options.runtime:
        parser.error(f"--device {options.device} is torch's, and --runtime {options.runtime} computes on the CPU")
    options.device = options.device or ("cuda" if torch.cuda.is_available() and not options.runtime else "cpu")
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        parser.error(f"--device {options.device}: {str(error).splitlines()[0]}")
    return options


def prepare_folder(out: Path, inputs: dict[Path, str], pictures: bool) -> None:
    """Make the folders of the outputs, without an earlier prediction. Raises UserError before an input would go."""
    for folder in (out / "results", out / "pictures"):
        for path in inputs:
            if resolved(path).is_relative_to(os.path.realpath(folder)):
                raise UserError(f"{path} lies in a folder of {out} that is made anew; --out DIR chooses another one")
    make_folder(out, "--out")
    check_writable(out / "predictions.jsonl")
    for folder, is_asked in ((out / "results", True), (out / "pictures", pictures)):
        if (out / "predictions.jsonl").exists():
            shutil.rmtree(folder, ignore_errors=True)
        for name in inputs.values() if is_asked else ():
            make_folder((folder / name).parent, "--out")


def main(arguments: list[str] | None = None) -> int:
    """Command line entry. Returns 0, 1 when something was passed over, or 2 after one sentence on stderr."""
    options = parse_arguments(arguments)
    try:
        inputs = find_inputs(options.paths, options.out)
        frames, problems = find_frames(inputs, *find_camera(options, inputs))
        detector = adapt(open_detector(options), options)
        prepare_folder(options.out, inputs, options.pictures)
        for problem in problems:
            print(f"passed over: {problem}", file=sys.stderr)
        if (skew := max(abs(frame.K[0, 1]) for frame in frames)) > 1e-4:
            print(f"K has a skew of {skew:.2g} px in its first row, which is passed over", file=sys.stderr)
        sizes = {frame.size for frame in frames}
        if len(sizes) > 1 and (options.calib or options.intrinsics):
            several = " and ".join("x".join(map(str, size)) for size in (min(sizes), max(sizes)))
            print(f"pictures of {len(sizes)} sizes, such as {several}, have one camera: --cameras gives each its own")
        with torch.autocast(torch.device(options.device).type, torch.bfloat16, enabled=options.autocast):
            return predict(detector, frames, problems, options)
    except (UserError, OSError) as error:
        print(f"error: {sentence_of(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
