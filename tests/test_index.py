"""The index: the frames of today's readers to the last bit, read once, read anew when anything changes, and safe however it ends."""

import copy
import dataclasses
import gzip
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHARED
from hypothesis import HealthCheck, given, settings
from PIL import Image
from test_fuzz import CALIB, JSONL, LABELS, damaged
from test_world import alive, until

import data
from data import DataConfig, Source, build_dataset
from formats import index, jsonl, kitti
from formats.index import Frames, Part, Reading, find_columns, gather, read_packed
from scene import frames
from scene.frames import Frame, decode, image_size, load_image, make_labels, opened, upright
from world.street import build_world

MINI = SHARED / "kitti_mini"
K = [[700.0, 0, 320], [0, 710.0, 96], [0, 0, 1]]
CAR = {"class": "Car", "center": [1, 0.6, 14], "size": [4, 1.5, 1.8], "yaw": 0.6}
LINE = {"image": "a.png", "K": K, "objects": [CAR]}


def assert_same(one, two):
    """Two frames are equal to the last bit."""
    assert (one.id, one.image, one.group) == (two.id, two.image, two.group)
    columns = [(one.K, two.K), (one.offset, two.offset), (one.pose, two.pose)]
    columns += [
        (getattr(one.labels, field.name), getattr(two.labels, field.name)) for field in dataclasses.fields(one.labels)
    ]
    for a, b in columns:
        assert (a is None) == (b is None)
        if a is not None:
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            assert a.tolist() == b.tolist() if a.dtype == object else a.tobytes() == b.tobytes()


def in_memory(reading, workers=1):
    """`Frames` of a reading, without an index."""
    columns = gather(read_packed(reading, workers=workers))
    return Frames([Part(columns, reading.folder, len(columns))])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The built-in world: a KITTI folder of five frames."""
    return build_world(tmp_path_factory.mktemp("world"), "train", 5, size=(160, 48))


@pytest.fixture
def folder(tmp_path, world):
    return Path(shutil.copytree(world, tmp_path / "kitti"))


def write(folder, *lines):
    """A JSON-lines file, and the image that its lines name."""
    if not (folder / "a.png").is_file():
        Image.new("RGB", (640, 192)).save(folder / "a.png")
    path = folder / "data.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def lines_of(count):
    return [{**LINE, "id": f"f{i}", "objects": [{**CAR, "yaw": i / count}]} for i in range(count)]


def indexes(folder):
    return sorted(path.name for path in folder.glob("deep3d_index/*"))


EVERYTHING = [
    {**LINE, "objects": []},
    {**LINE, "id": "b/c d", "objects": [{**CAR, "center": [-6.5, 0.6, 14], "yaw": -4},
                                        {**CAR, "class": "自行车", "truncation": 1, "occlusion": 2}]},
    {**LINE, "id": "c", "objects": [{**CAR, "ignore": True, "box": [-9, 9, 50, 60]}, {**CAR, "class": "traffic cone", "yaw": np.pi}]},
    {**LINE, "id": "d", "ignore": [[1, 1, 9, 9], [-9, -9, -1, -1]],
     "objects": [{**CAR, "velocity": [1, 0, -2], "attribute": "moving"}, CAR]},
    {**LINE, "id": "e", "objects": [{**CAR, "center": [1.2, 0.6, -0.4], "box": [400, 20, 639, 191]}, {**CAR, "center": [0, 0, -5]}, CAR]},
    {**LINE, "id": "f", "objects": [{**CAR, "center": [1.6, 1, 1.2], "yaw": 1.5}, {**CAR, "center": [99, 0, 5]},
                                    {**CAR, "score": 0.5, "depth_sigma": 1.5}]},
]  # fmt: skip


@pytest.mark.parametrize("at_once", [1 << 20, 300])
def test_json_lines_are_those_of_the_reader_line_by_line(tmp_path, monkeypatch, at_once):
    path = write(tmp_path, *EVERYTHING[:3], "", *EVERYTHING[3:])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"}\n", b"}\r\n").rstrip())
    expected = jsonl.read_frames(path, dropped=(dropped := []))
    monkeypatch.setattr(jsonl, "AT_ONCE", at_once)
    frames = in_memory(jsonl.reading(path))
    for one, two in zip(expected, frames, strict=True):
        assert_same(one, two)
    assert frames.dropped() == len(dropped) == 3
    monkeypatch.setattr(jsonl, "_read_together", lambda *_: int("fails"))
    slow = in_memory(jsonl.reading(path))
    for one, two in zip(expected, slow, strict=True):
        assert_same(one, two)
    assert slow.digest() == frames.digest()
    assert slow.dropped() == 3
    assert [slow.image_size(i) for i in range(6)] == [frames.image_size(i) for i in range(6)] == [(640, 192)] * 6


def test_good_lines_are_read_together(tmp_path, monkeypatch):
    """Else they are right, but slow."""
    monkeypatch.setattr(jsonl, "_read_singly", None)
    monkeypatch.setattr(kitti, "_read_frame", None)
    assert len(in_memory(jsonl.reading(write(tmp_path, *EVERYTHING)))) == 6


@pytest.mark.parametrize("kind", ["world", "real"])
def test_kitti_frames_are_those_of_the_reader_file_by_file(world, kind, monkeypatch):
    root, split = (world, "train") if kind == "world" else (MINI, "all")
    if not root.is_dir():
        pytest.skip("the KITTI sample frames are not there")
    expected = kitti.read_frames(root, (split,))
    monkeypatch.setattr(kitti, "AT_ONCE", 30)
    slow = Frames.of(expected)
    monkeypatch.setattr(kitti, "_read_frame", None)
    frames = in_memory(kitti.reading(root, (split,)))
    for one, two, three in zip(expected, frames, slow, strict=True):
        assert_same(one, two)
        assert_same(one, three)
    assert frames.digest() == slow.digest()
    with opened(expected[-1].image) as image:
        assert frames.image_size(-1) == image.size


quick = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None)


def outcome(read):
    """Frames, or the sentence."""
    try:
        return list(read())
    except (ValueError, OSError) as error:
        return str(error)


def assert_same_outcome(one, two):
    assert type(one) is type(two), (one, two)
    if isinstance(one, str):
        assert one == two
    else:
        for a, b in zip(one, two, strict=True):
            assert_same(a, b)


@quick
@given(content=damaged(JSONL))
def test_damaged_json_lines_are_refused_in_the_same_words(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzz_index.jsonl"
    write(path.parent)
    path.write_bytes(content)

    def read():
        part = Part(gather(read_packed(jsonl.reading(path))), path.parent, 0)
        jsonl._check_whole(path, len(part.columns), part.columns.repeated(len(part.columns)))
        return Frames([dataclasses.replace(part, count=len(part.columns))])

    assert_same_outcome(outcome(lambda: jsonl.read_frames(path)), outcome(read))


@quick
@given(label=damaged(LABELS), calib=damaged(CALIB))
def test_damaged_kitti_files_are_refused_in_the_same_words(tmp_path_factory, label, calib):
    root = tmp_path_factory.getbasetemp() / "fuzz_index"
    for name, content in (("image_2/0.png", b""), ("label_2/0.txt", label), ("calib/0.txt", calib)):
        (root / "training" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "training" / name).write_bytes(content)
    for name, content in (
        ("label_2/0.txt", LABELS),
        ("calib/0.txt", CALIB),
    ):  # one of them whole: else the other is rarely looked at
        assert_same_outcome(
            outcome(lambda: kitti.read_frames(root, ("all",))),
            outcome(lambda: in_memory(kitti.reading(root, ("all",)))),
        )
        (root / "training" / name).write_bytes(content)


def test_any_frames_can_be_kept(tmp_path):
    """What a reader of one frame at a time gives, groups and poses among them."""
    labels = make_labels(["Car", "Van"], np.ones((2, 4)), np.ones((2, 3)), np.ones((2, 3)), [0, 1], sigma=np.array([np.nan, 2]),
                         velocity=np.array([[1, 2, np.nan], [np.nan] * 3]), attribute=np.array(["", "moving"], dtype=object))  # fmt: skip
    plain = dataclasses.replace(labels, velocity=None, sigma=None, attribute=None)
    own = [plain, plain, labels, plain, labels]
    frames = [
        Frame(f"{i}", tmp_path / f"{i}.png", np.array(K), own[i], np.full(3, 1.0 * i), f"token{i % 2}")
        for i in range(5)
    ]
    frames[3] = dataclasses.replace(frames[3], pose=np.arange(16.0).reshape(4, 4), group="")
    reading = Reading(tmp_path, "any", Path(), lambda: "state", [()], lambda _: iter(frames))
    columns = find_columns(reading)
    for one, two in zip(frames, Frames([Part(columns, Path(), 5)]), strict=True):
        assert_same(one, two)
    [name] = [name for name in indexes(tmp_path) if name.endswith(".columns")]
    assert columns.path.name == name
    assert not [
        name for name in ("truncation", "image_size", "dropped", "place", "score") if name not in columns.constant
    ]  # cost nothing


def test_values_that_all_rows_share_are_there(tmp_path):
    labels = make_labels(["Car"], np.ones((1, 4)), np.ones((1, 3)), np.ones((1, 3)), [0], sigma=np.ones(1), velocity=np.zeros((1, 3)),
                         attribute=np.array(["moving"], dtype=object))  # fmt: skip
    frames = [Frame(f"{i}", tmp_path / "a.png", np.array(K), labels, group="sample", pose=np.eye(4)) for i in range(2)]
    for one, two in zip(frames, Frames.of(frames), strict=True):
        assert_same(one, two)
    assert Frames.of(frames).grouped() == {True}
    assert Frames.of([frames[0], dataclasses.replace(frames[1], group="")]).grouped() == {True, False}
    assert Frames.of(frames).groups() == ["sample"] * 2


def kitti_frames(root, split=("train",), **changes):
    return build_dataset(DataConfig(root=str(root), **changes), (Source(split=split),), ("Car",), (96, 320), False)


def test_what_was_read_is_not_read_again(folder, monkeypatch):
    before = kitti_frames(folder)
    names = indexes(folder)
    assert len([name for name in names if name.endswith(".columns")]) == 1
    monkeypatch.setattr(kitti, "read_chunk", lambda *_: pytest.fail("it is read"))
    after = kitti_frames(folder)
    assert after.digest() == before.digest()
    assert indexes(folder) == names
    assert not any(
        array.flags.writeable for array in after.frames.parts[0].columns.columns.values()
    )  # nobody can change what all see
    assert after.frames[0].labels.center.flags.writeable


def change_label(folder, monkeypatch):
    path = sorted((folder / "training/label_2").iterdir())[1]
    path.write_text(
        path.read_text() + "Car 0.10 1 1.50 100.00 20.00 120.00 40.00 1.50 1.80 4.20 -3.00 1.70 20.00 1.35\n"
    )


def change_split(folder, monkeypatch):
    path = folder / "ImageSets/train.txt"
    path.write_text("\n".join(path.read_text().split()[1:]))


def change_order(folder, monkeypatch):
    path = folder / "ImageSets/train.txt"
    path.write_text("\n".join(reversed(path.read_text().split())))


def change_camera(folder, monkeypatch):
    path = sorted((folder / "training/calib").iterdir())[0]
    path.write_text("P2: 90 0 80 0 0 90 24 0 0 0 1 0\n")


@pytest.mark.parametrize("change", [change_label, change_split, change_order, change_camera])
def test_a_changed_source_is_read_anew(folder, monkeypatch, change):
    before, [old] = kitti_frames(folder), [name for name in indexes(folder) if name.endswith(".columns")]
    change(folder, monkeypatch)
    after = kitti_frames(folder)
    assert after.digest() != before.digest()
    for one, two in zip(kitti.read_frames(folder, ("train",)), after.frames, strict=True):
        assert_same(one, two)
    [new] = [name for name in indexes(folder) if name.endswith(".columns")]
    assert new != old
    assert before.frames[0].id  # which a running job may still map


def test_another_image_or_reader_is_read_anew(folder, monkeypatch):
    before = kitti_frames(folder)
    path = before.frames[2].image
    Image.new("RGB", (320, 96)).save(path)
    assert kitti_frames(folder).frames.image_size(2) == (320, 96)
    [old] = [name for name in indexes(folder) if name.endswith(".columns")]
    monkeypatch.setattr(index, "VERSION", index.VERSION + 1)
    assert kitti_frames(folder).digest() == before.digest()
    [new] = [name for name in indexes(folder) if name.endswith(".columns")]
    assert new != old


def test_renaming_limits_and_repeats_need_no_other_index(folder, monkeypatch):
    kitti_frames(folder)
    monkeypatch.setattr(kitti, "read_chunk", lambda *_: pytest.fail("it is read"))
    config = DataConfig(root=str(folder))
    build = lambda **options: build_dataset(config, (Source(**options),), ("Auto",), (96, 320), True)  # noqa: E731
    dataset = build(limit=3, repeat=2, rename={"Car": "Auto", "Van": "Auto"})
    whole = build(rename={"Car": "Auto", "Van": "Auto"})
    assert dataset.ids == [*whole.ids[:3]] * 2
    assert "Auto" in dataset.frames[4].labels.name
    assert dataset.frames[4].labels.name.tolist() == whole.frames[1].labels.name.tolist()
    assert len({some.digest() for some in (dataset, whole, build(rename={"Car": "Auto"}))}) == 3
    assert build(rename={"Car": "Auto", "Nothing": "Auto"}).digest() == build(rename={"Car": "Auto"}).digest()


def test_a_limit_reads_no_more_than_it_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "AT_ONCE", 1000)
    monkeypatch.setattr(data, "usable_cores", lambda: 1)  # other processes would not add to the list
    path, read = write(tmp_path, *lines_of(100), "no line that could be read"), []
    real = jsonl.read_chunk
    monkeypatch.setattr(jsonl, "read_chunk", lambda path, bounds: read.append(bounds) or real(path, bounds))
    build = lambda limit: build_dataset(
        DataConfig(), (Source(kind="jsonl", root=str(path), limit=limit),), ("Car",), (96, 320), True
    )  # noqa: E731
    some = build(12)
    assert some.ids == [f"f{i}" for i in range(12)]
    assert len(read) <= 4
    assert build(12).digest() == some.digest()
    assert len(read) <= 4
    with pytest.raises(ValueError, match=r"data\.jsonl:101: not a line of JSON"):
        build(0)
    path.write_text(path.read_text().replace("no line that could be read\n", ""))
    whole = build(0)
    assert len(whole) == 100
    read.clear()
    assert build(12).digest() == some.digest() != whole.digest()  # now of the whole index
    assert not read


@pytest.mark.parametrize("workers", [1, 2])
def test_errors_name_their_line_wherever_it_is_read(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(jsonl, "AT_ONCE", 500)
    lines = [json.dumps(line) for line in lines_of(40)]
    lines[7] = ""
    lines[30] = lines[30].replace('"yaw": 0.75', '"yaw": 90')
    path = write(tmp_path, *lines)
    with pytest.raises(
        ValueError, match=re.escape(f"{path}:31: objects[0].yaw is 90, expected radians from -6.3 to 6.3")
    ):
        jsonl.open_frames(path, workers=workers)
    assert not [name for name in indexes(tmp_path) if not name.endswith(".lock")]
    lines[30] = lines[3]
    with pytest.raises(ValueError, match=re.escape(f"{path}:31: id is 'f3', as on line 4, expected each id once")):
        jsonl.open_frames(write(tmp_path, *lines), workers=workers)


def test_different_ids_may_have_equal_checksums(tmp_path):
    ids = ["plumless", "buckeroo", "b"]  # the first two collide in CRC-32
    part = jsonl.open_frames(write(tmp_path, *({**LINE, "id": id} for id in ids)))
    assert part.columns["checksum"][0] == part.columns["checksum"][1]
    assert part.columns.repeated(3) is None


def test_files_that_hold_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"data\.jsonl: the file holds no frames"):
        jsonl.open_frames(write(tmp_path, ""))
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path}/none.jsonl: no such JSON-lines file")):
        jsonl.open_frames(tmp_path / "none.jsonl")


def test_an_index_that_is_not_whole_is_made_again(folder):
    before = kitti_frames(folder)
    [path] = (folder / "deep3d_index").glob("*.columns")
    whole = path.read_bytes()
    for damaged_bytes in (whole[:-64], b"", b"x" * len(whole)):
        path.unlink()  # another file: the old one is mapped
        path.write_bytes(damaged_bytes)
        assert kitti_frames(folder).digest() == before.digest()
        assert path.read_bytes() == whole


def test_a_folder_that_cannot_be_written(folder, tmp_path, monkeypatch):
    (folder / "deep3d_index").write_text("a file, where the folder would be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert len(kitti_frames(folder)) == 5
    assert len(list(tmp_path.glob("cache/deep3d_index/*.columns"))) == 1
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    with pytest.raises(
        OSError, match=rf"no index can be written \({blocked}/x: Not a directory\); data\.index=FOLDER chooses another"
    ):
        kitti_frames(folder, index=str(blocked / "x"))
    assert len(kitti_frames(folder, index=str(tmp_path / "own"))) == 5
    assert len(list(tmp_path.glob("own/*.columns"))) == 1


@pytest.mark.parametrize("at", ["write", "replace"])
def test_a_full_disk_is_a_sentence_and_loses_nothing(folder, monkeypatch, at):
    kitti_frames(folder)
    before = indexes(folder)
    change_label(folder, None)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((index.Writer, "finish", full) if at == "write" else (index.os, "replace", full)))
    with pytest.raises(
        OSError, match=r"data\.index: .*deep3d_index cannot be written: No space left on device; data\.index=FOLDER"
    ):
        kitti_frames(folder)
    assert indexes(folder) == before


def test_a_source_that_changes_while_it_is_read(folder, monkeypatch):
    real = kitti.read_chunk
    monkeypatch.setattr(kitti, "read_chunk", lambda *arguments: (real(*arguments), change_label(folder, None))[0])
    with pytest.raises(OSError, match="kitti: its files changed while they were read"):
        kitti_frames(folder)
    assert not [name for name in indexes(folder) if not name.endswith(".lock")]


REAL_CHUNK, SLOW = jsonl.read_chunk, {}


def slow_chunk(*arguments):
    (SLOW["started"] / f"worker{os.getpid()}").touch()
    time.sleep(SLOW["seconds"])
    return REAL_CHUNK(*arguments)


def read_slowly(path, started, seconds):
    """The body of a process that reads with two workers; each leaves a file with its number."""
    os.setsid()
    SLOW.update(started=started, seconds=seconds)
    jsonl.read_chunk, jsonl.AT_ONCE = slow_chunk, 500
    part = jsonl.open_frames(path, workers=2)
    (started / f"done{part.count}").touch()


linux = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")


@linux
def test_two_jobs_that_start_together_read_once(tmp_path):
    path = write(tmp_path, *lines_of(40))
    jobs = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        jobs.append(multiprocessing.get_context("fork").Process(target=read_slowly, args=(path, tmp_path / name, 0.02)))
        jobs[-1].start()
    for job in jobs:
        job.join(20)
    assert [job.exitcode for job in jobs] == [0, 0]
    assert [len(list((tmp_path / name).glob("done40"))) for name in ("one", "two")] == [1, 1]
    assert sorted(bool(list((tmp_path / name).glob("worker*"))) for name in ("one", "two")) == [False, True]
    assert len(list(tmp_path.glob("deep3d_index/*.columns"))) == 1


@linux
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_reader_leaves_no_process_and_the_next_one_no_file(tmp_path, number):
    path = write(tmp_path, *lines_of(40))
    job = multiprocessing.get_context("fork").Process(target=read_slowly, args=(path, tmp_path, 0.5))
    job.start()
    workers = until(lambda: len(found := list(tmp_path.glob("worker*"))) == 2 and found)
    [aside] = until(lambda: list(tmp_path.glob("deep3d_index/*.partial-*")))
    os.kill(job.pid, number)
    job.join(10)
    until(lambda: not any(map(alive, workers)), 5)
    assert aside.is_dir()
    assert jsonl.open_frames(path).count == 40
    assert not aside.exists()
    assert (
        len([name for name in indexes(tmp_path) if name.endswith(".columns")]) == len(indexes(tmp_path)) - 1
    )  # and the lock


def test_frames_travel_to_workers_that_are_not_forked(folder):
    dataset = kitti_frames(folder)
    sent = pickle.dumps(dataset)
    assert len(sent) < 5000
    again = pickle.loads(sent)
    for one, two in zip(dataset.frames, again.frames, strict=True):
        assert_same(one, two)
    assert len(copy.deepcopy(Frames.of(list(dataset.frames)))) == 5


def test_an_image_that_took_another_size_is_named(tmp_path):
    """The boxes of JSON lines are clipped to it; only a touched file is read again."""
    path = write(tmp_path, LINE)
    dataset = build_dataset(DataConfig(), (Source(kind="jsonl", root=str(path)),), ("Car",), (96, 320), False)
    Image.new("RGB", (642, 192)).save(tmp_path / "a.png")
    with pytest.raises(
        Exception, match=r"a\.png: the image is 642x192, and was 640x192 when its source was read: touch the source"
    ):
        dataset[0]


@pytest.mark.parametrize("mode", [np.uint8, np.uint16])
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_a_grey_tiff_on_its_side_is_turned_or_refused(tmp_path, mode, compression):
    """Pillow 13 garbles uncompressed ones."""
    exif, path, pixels = Image.Exif(), tmp_path / "a.tif", np.arange(2100).reshape(30, 70).astype(mode)
    exif[0x0112] = 6
    Image.fromarray(pixels).save(path, exif=exif, compression=compression)
    try:
        image = load_image(path)
    except OSError as error:
        assert "a.tif: cannot read the image: it is a TIFF on its side that Pillow cannot turn" in str(error)  # noqa: PT017
        assert compression is None
    else:
        assert np.array_equal(np.asarray(image), np.rot90(np.asarray(decode(Image.fromarray(pixels))), -1))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tif"])
@pytest.mark.parametrize("orientation", [None, 1, 3, 6])
def test_sizes_come_from_headers(tmp_path, suffix, orientation):
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.new("RGB", (70, 30)).save(path, exif=exif)
    with opened(path) as image:
        assert image_size(path) == upright(image).size
    if suffix in ("png", "jpg") and orientation == 6:
        assert image_size(path) == (30, 70)
    content = path.read_bytes()
    for cut in (0, 5, 20, 40):
        path.write_bytes(content[:cut])
        try:
            with opened(path) as image:
                expected = image.size
        except OSError:
            with pytest.raises(OSError, match="cannot read the image"):
                image_size(path)
        else:
            assert image_size(path) == expected


@pytest.fixture
def tar(tmp_path):
    """A tar of two images, one of them in it twice, and a JSON-lines file that names them."""
    for name, colour in (("a.png", (1, 2, 3)), ("b.jpg", (200, 10, 10))):
        Image.new("RGB", (640, 192), colour).save(tmp_path / name)
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        archive.add(tmp_path / "b.jpg", "x/a.png")  # which the one added later replaces
        archive.add(tmp_path / "a.png", "./x/a.png")
        archive.add(tmp_path / "b.jpg", "x/b.jpg")
    write(tmp_path, {**LINE, "image": "s.tar/x/a.png"}, {**LINE, "image": "s.tar/x/b.jpg"})
    return tmp_path / "s.tar"


def tar_set(tar, **changes):
    sources = (Source(kind="jsonl", root=str(tar.parent / "data.jsonl")),)
    return build_dataset(DataConfig(**changes), sources, ("Car",), (96, 320), True)


def test_images_in_a_tar_are_read_where_they_lie(tar, monkeypatch):
    dataset = tar_set(tar)
    assert dataset.ids == ["s.tar/x/a", "s.tar/x/b"]
    (tar.parent / "plain.jsonl").write_text(
        "".join(json.dumps({**LINE, "image": name}) + "\n" for name in ("a.png", "b.jpg"))
    )
    plain = build_dataset(
        DataConfig(), (Source(kind="jsonl", root=str(tar.parent / "plain.jsonl")),), ("Car",), (96, 320), True
    )
    monkeypatch.setattr(frames, "list_tar", None)  # the index holds the places
    for i in range(2):
        assert torch.equal(dataset[(3, i)]["image"], plain[(3, i)]["image"])
    again = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(again[(3, 1)]["image"], plain[(3, 1)]["image"])
    monkeypatch.undo()
    assert load_image(tar / "x/b.jpg").size == (640, 192)  # as predict and draw read it, by the tar's own list


def test_members_are_cached_like_files(tar, monkeypatch):
    plain, cached = tar_set(tar), tar_set(tar, cache=str(tar.parent / "cache"))
    for _ in range(2):
        for i in range(2):
            assert torch.equal(cached[(0, i)]["image"], plain[(0, i)]["image"])
    assert len(list((tar.parent / "cache").iterdir())) == 2
    expected = plain[(0, 1)]["image"]
    monkeypatch.setattr(data, "decode", None)
    assert torch.equal(cached[(0, 1)]["image"], expected)


def test_a_changed_tar_is_read_anew(tar):
    before = tar_set(tar)
    with tarfile.open(tar, "a") as archive:
        archive.add(tar.parent / "b.jpg", "x/a.png")
    os.utime(tar, ns=(1, 1))
    after = tar_set(tar)
    assert after.frames.place(0) != before.frames.place(0)
    assert not torch.equal(after[(0, 0)]["image"], before[(0, 0)]["image"])


def test_tars_that_cannot_be_read_are_named(tar):
    path = tar.parent / "data.jsonl"
    whole, line = tar.read_bytes(), json.dumps({**LINE, "image": "s.tar/x/c.png"})
    path.write_text(line + "\n")
    with pytest.raises(
        ValueError, match=r"data\.jsonl:1: image is 's\.tar/x/c\.png'.*s\.tar/x/c\.png: the tar of 2 files has no such"
    ):
        tar_set(tar)
    tar.write_bytes(whole[:3000])
    with pytest.raises(ValueError, match=r"data\.jsonl:1: image is .*s\.tar: not a whole"):
        tar_set(tar)
    tar.write_bytes(gzip.compress(whole))
    with pytest.raises(ValueError, match=r"data\.jsonl:1: image is .*s\.tar: not a whole"):
        tar_set(tar)
