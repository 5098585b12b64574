"""Readers under damaged input: a sentence that names the file, or numbers that are finite; never another exception.

DEEP3D_FUZZ=100000 tries so many cases of each reader instead of a few.
"""

import contextlib
import io
import json
import os
import re
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from config import Config, build, load_config, override, read_config, to_dict
from data import Source
from formats import jsonl, kitti
from scene.frames import UserError, load_image
from scene.geometry import camera_problem

CASES = int(os.environ.get("DEEP3D_FUZZ", 200))
LABELS = (
    b"Car 0.00 0 -1.56 564.62 174.59 616.43 224.74 1.61 1.66 3.20 -0.69 1.69 25.01 -1.59\n"
    b"Pedestrian 0.00 1 0.21 423.17 173.67 433.17 224.03 1.60 0.38 0.30 -5.87 1.63 23.11 -0.03\n"
    b"DontCare -1 -1 -10 503.89 169.71 590.61 190.13 -1 -1 -1 -1000 -1000 -1000 -10\n"
)
CALIB = b"P2: 721.5377 0 609.5593 44.85728 0 721.5377 172.854 0.2163791 0 0 1 0.002745884\nR0_rect: 1 0 0 0 1 0 0 0 1\n"
SPLIT = b"000000\n000001\n000002\n"
CAR = {"class": "Car", "center": [1, 0.6, 14], "size": [4, 1.5, 1.8], "yaw": 0.6, "box": [300, 90, 400, 150]}
FRAME = {"image": "a.png", "id": "a", "K": [[700.0, 0, 320], [0, 710.0, 96], [0, 0, 1]], "objects": [CAR]}
JSONL = (json.dumps(FRAME) + "\n" + json.dumps({**FRAME, "id": "b"}) + "\n").encode()
CONFIG = json.dumps(to_dict(Config()), indent=1).encode()
TOKENS = [
    b"nan", b"-inf", b"1e999", b"1e300", b"-1e300", b"-1", b"0", b"", b"\0", b"\xff", b"\xc3\xa9", b"9" * 400,
    b"[" * 3000, b"{", b"}", b'"', b",", b":", b"\n", b" ", b"\t", b"null", b"true", b"0x10", b"1_0",
    b"../../etc/passwd", b"P2:", b"Car", b"\r\n", b"\x1a",
]  # fmt: skip
fuzz = settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck), database=None)


@st.composite
def damaged(draw, content):
    """Bytes with a few bits flipped, parts cut, repeated or replaced, numbers changed."""
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["flip", "cut", "repeat", "insert", "number", "truncate"]))
        spots = draw(st.integers(0, max(0, len(content) - 1)))
        end = min(len(content), spots + draw(st.integers(1, 60)))
        if kind == "flip" and content:
            content = content[:spots] + bytes([content[spots] ^ (1 << draw(st.integers(0, 7)))]) + content[spots + 1 :]
        elif kind == "cut":
            content = content[:spots] + content[end:]
        elif kind == "repeat":
            content = content[:end] + content[spots:]
        elif kind == "insert":
            content = content[:spots] + draw(st.sampled_from(TOKENS)) + content[spots:]
        elif kind == "truncate":
            content = content[:spots]
        else:
            numbers = list(re.finditer(rb"-?\d+(\.\d+)?", content))
            if numbers:
                found = numbers[draw(st.integers(0, len(numbers) - 1))]
                content = content[: found.start()] + draw(st.sampled_from(TOKENS)) + content[found.end() :]
    return content


def read(reader, path, content):
    """What a reader makes of content, or None when it refuses in a sentence that names the file."""
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # numpy's, for numbers that overflow
        warnings.simplefilter(
            "ignore", Image.DecompressionBombWarning
        )  # Pillow's, for a header that claims a huge picture
        try:
            return reader(path)
        except (ValueError, FileNotFoundError, OSError) as caught:
            error = caught
    assert type(error) in (ValueError, UserError, FileNotFoundError, OSError), repr(error)
    assert path.name in str(error) or path.parent.name in str(error), error
    assert len(str(error)) < 1000
    return None


def finite(labels):
    columns = [column for column in vars(labels).values() if column is not None and column.dtype != object]
    return all(np.isfinite(column).all() and np.abs(column).max(initial=0) < 1e9 for column in columns)


def plausible(labels):
    """What training can compute with, in 32 bits."""
    real = labels[labels.is_3d & (labels.name != "DontCare")]
    small = [(real.center, 1e5), (real.size, 100.1), (1 / real.size, 100.1), (real.yaw, 6.4), (labels.box, 1e6)]
    return finite(labels) and all(np.abs(column).max(initial=0) <= most for column, most in small)


@fuzz
@given(content=damaged(LABELS))
def test_labels(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp()
    for scores in (False, True):
        labels = read(lambda p, scores=scores: kitti.read_labels(p, scores), folder / "fuzz_label.txt", content)
        assert labels is None or (finite if scores else plausible)(labels)


@fuzz
@given(content=damaged(CALIB))
def test_calibration(tmp_path_factory, content):
    def camera(path):
        K, offset = kitti.split_projection(kitti.read_calib(path))
        return K, offset

    found = read(camera, tmp_path_factory.getbasetemp() / "fuzz_calib.txt", content)
    if found is not None:
        assert np.isfinite(found[0]).all()
        assert np.isfinite(found[1]).all()
        assert isinstance(camera_problem(found[0], 1242, 375), str | None)


@fuzz
@given(content=damaged(SPLIT))
def test_split(tmp_path_factory, content):
    root = tmp_path_factory.getbasetemp() / "fuzz_kitti"
    for folder in ("ImageSets", "training/image_2", "training/label_2", "training/calib"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    frames = read(
        lambda p: kitti.frames(Source(root=str(root), split=("fuzz",)), None), root / "ImageSets/fuzz.txt", content
    )
    assert frames is None  # there is no image


@fuzz
@given(content=damaged(JSONL))
def test_json_lines(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp()
    if not (folder / "a.png").exists():
        Image.new("RGB", (640, 192)).save(folder / "a.png")
    frames = read(jsonl.read_frames, folder / "fuzz.jsonl", content)
    for frame in frames or ():
        assert np.isfinite(frame.K).all()
        assert plausible(frame.labels)
    problems = []
    jsonl.read_frames(folder / "fuzz.jsonl", problems)
    assert (frames is None) == bool(problems) or not content.strip()


@fuzz
@given(content=damaged(CONFIG))
def test_config_json(tmp_path_factory, content):
    config = read(read_config, tmp_path_factory.getbasetemp() / "fuzz_config.json", content)
    assert config is None or build(to_dict(config), Config, "again") == config


@fuzz
@given(content=damaged(b'from config import Config\nconfig = Config(out="x", seed=3)\n'))
def test_run_file(tmp_path_factory, content):
    if b"passwd" not in content:
        config = read(load_config, tmp_path_factory.getbasetemp() / "fuzz_run.py", content)
        assert config is None or build(to_dict(config), Config, "again") == config


@fuzz
@given(content=damaged(b"train.lr=1e-3"))
def test_override(content):
    text = content.decode(errors="replace")
    config = Config()
    with contextlib.suppress(ValueError):
        config = override(config, [text])
    assert build(to_dict(config), Config, "again") == config  # refused, or a config that can be saved


def encoded(kind):
    buffer, rng = io.BytesIO(), np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (24, 40, 3), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_image(tmp_path_factory, kind):
    path = tmp_path_factory.getbasetemp() / f"fuzz_image.{kind.lower()}"

    @fuzz
    @given(content=damaged(encoded(kind)))
    def run(content):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture = read(load_image, path, content)
        assert picture is None or picture.mode == "RGB"

    run()
