"""The index: the frames of the readers to the last bit, read once, read anew when anything changes, always whole."""

import dataclasses
import json
import multiprocessing
import os
import pickle
import re
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from test_world import alive, until

from formats import index, jsonl
from formats.index import Plan
from scene.frames import Frame, UserError, make_labels

K = [[700.0, 0, 320], [0, 710.0, 96], [0, 0, 1]]
CAR = {"class": "Car", "center": [1, 0.6, 14], "size": [4, 1.5, 1.8], "yaw": 0.6}
LINE = {"image": "a.png", "K": K, "objects": [CAR]}


def assert_same(one, two):
    """Two frames are equal to the last bit."""
    for name in ("id", "image", "group", "size", "dropped"):
        assert getattr(one, name) == getattr(two, name)
    columns = [(one.K, two.K), (one.offset, two.offset), (one.pose, two.pose)]
    columns += [
        (getattr(one.labels, field.name), getattr(two.labels, field.name)) for field in dataclasses.fields(one.labels)
    ]
    for a, b in columns:
        assert (a is None) == (b is None)
        if a is not None:
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            assert a.tolist() == b.tolist() if a.dtype == object else a.tobytes() == b.tobytes()


def write(folder, *lines):
    """A JSON-lines file, and the image that its lines name."""
    if not (folder / "a.png").is_file():
        Image.new("RGB", (640, 192)).save(folder / "a.png")
    path = folder / "data.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def lines_of(count):
    return [{**LINE, "id": f"f{i}", "objects": [{**CAR, "yaw": i / count}]} for i in range(count)]


def open_frames(path, folder=""):
    """The frames of a file as a data set sees them."""
    return jsonl.frames(SimpleNamespace(root=str(path), limit=0), SimpleNamespace(root="", index=folder))


def indexes(folder):
    return sorted(path.name for path in folder.glob("deep3d_index/*") if not path.name.endswith(".lock"))


EVERYTHING = [
    {**LINE, "objects": []},
    {**LINE, "id": "b/c d", "objects": [{**CAR, "center": [-6.5, 0.6, 14], "yaw": -4},
                                        {**CAR, "class": "自行车", "truncation": 1, "occlusion": 2}]},
    {**LINE, "id": "c", "objects": [{**CAR, "ignore": True, "box": [-9, 9, 50, 60]},
                                    {**CAR, "class": "traffic cone", "yaw": np.pi}]},
    {**LINE, "id": "d", "ignore": [[1, 1, 9, 9], [-9, -9, -1, -1]],
     "objects": [{**CAR, "velocity": [1, 0, -2], "attribute": "moving"}, CAR]},
    {**LINE, "id": "e", "objects": [{**CAR, "center": [1.2, 0.6, -0.4], "box": [400, 20, 639, 191]},
                                    {**CAR, "center": [0, 0, -5]}, CAR]},
    {**LINE, "id": "f", "objects": [{**CAR, "center": [1.6, 1, 1.2], "yaw": 1.5}, {**CAR, "center": [99, 0, 5]},
                                    {**CAR, "score": 0.5, "depth_sigma": 1.5}]},
]  # fmt: skip


@pytest.mark.parametrize("at_once", [1 << 20, 300])
def test_frames_are_those_of_the_reader(tmp_path, monkeypatch, at_once):
    path = write(tmp_path, *EVERYTHING[:3], "", *EVERYTHING[3:])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"}\n", b"}\r\n").rstrip())
    expected = jsonl.read_frames(path)
    monkeypatch.setattr(jsonl, "AT_ONCE", at_once)
    frames = open_frames(path)
    assert len(frames) == 6
    for one, two in zip(expected, frames, strict=True):
        assert_same(one, two)
    assert [frame.dropped for frame in frames] == [0, 0, 0, 1, 1, 1]
    assert_same(frames[-1], expected[5])
    assert [frame.id for frame in frames[4:1:-2]] == ["e", "c"]
    with pytest.raises(IndexError):
        frames[6]
    frames[1].labels.center[:] = 0  # one's own
    assert_same(frames[1], expected[1])
    for limit, index_folder in ((3, ""), (0, "none")):
        listed = jsonl.frames(
            SimpleNamespace(root="", limit=limit), SimpleNamespace(root=str(path), index=index_folder)
        )
        assert isinstance(listed, list)
        assert [frame.id for frame in listed[:3]] == ["a", "b/c d", "c"]
        assert len(listed) == (limit or 6)


def plan_of(tmp_path, frames):
    return Plan(tmp_path, "any", tmp_path, lambda: "state", [0], lambda _: frames)


def test_any_frames_can_be_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "usable_cores", lambda: 1)  # the plan's functions are this test's own
    labels = make_labels(
        ["Car", "Van"], np.ones((2, 4)), np.ones((2, 3)), np.ones((2, 3)), [0, 1], sigma=np.array([np.nan, 2]),
        velocity=np.array([[1, 2, np.nan], [np.nan] * 3]), attribute=np.array(["", "moving"], dtype=object),
    )  # fmt: skip
    plain = dataclasses.replace(labels, velocity=None, sigma=None, attribute=None)
    own = [plain, plain[:0], labels, plain, dataclasses.replace(labels, sigma=None)]
    frames = [
        Frame(f"{i}", tmp_path / f"{i}.png", np.array(K), own[i], np.full(3, 1.0 * i), f"token{i % 2}")
        for i in range(5)
    ]
    frames[3] = dataclasses.replace(frames[3], pose=np.arange(16.0).reshape(4, 4), group="", size=(9, 7), dropped=2)
    frames[4] = dataclasses.replace(frames[4], image=Path("/elsewhere/4.png"))
    for one, two in zip(frames, index.frames(plan_of(tmp_path, frames)), strict=True):
        assert_same(one, two)
    with pytest.raises(UserError, match="it holds no frames"):
        index.frames(dataclasses.replace(plan_of(tmp_path, []), choice="none"))


def test_what_was_read_is_not_read_again(tmp_path, monkeypatch):
    path = write(tmp_path, *EVERYTHING)
    before = open_frames(path)
    [name] = indexes(tmp_path)
    monkeypatch.setattr(jsonl, "read_block", lambda *_: pytest.fail("it is read"))
    for one, two in zip(before, open_frames(path), strict=True):
        assert_same(one, two)
    assert indexes(tmp_path) == [name]


@pytest.mark.parametrize("change", ["source", "version"])
def test_what_changed_is_read_anew(tmp_path, monkeypatch, change):
    path = write(tmp_path, *EVERYTHING)
    before, [old] = open_frames(path), indexes(tmp_path)
    if change == "source":
        write(tmp_path, *EVERYTHING[::-1])
    else:
        monkeypatch.setattr(index, "VERSION", index.VERSION + 1)
    after, [new] = open_frames(path), indexes(tmp_path)
    assert new != old
    assert after[0].id == ("f" if change == "source" else "a")
    assert before[0].id == "a"  # which a running job may still map


@pytest.mark.parametrize("workers", [1, 2])
def test_errors_name_their_line_wherever_it_is_read(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(jsonl, "AT_ONCE", 500)
    monkeypatch.setattr(index, "usable_cores", lambda: workers)
    lines = [json.dumps(line) for line in lines_of(40)]
    lines[7] = ""
    lines[30] = lines[30].replace('"yaw": 0.75', '"yaw": 90')
    path = write(tmp_path, *lines)
    sentence = f"{path}:31: objects[0].yaw is 90, expected radians from -6.3 to 6.3"
    with pytest.raises(UserError, match=re.escape(sentence)):
        open_frames(path)
    lines[30] = lines[3]
    sentence = f"{write(tmp_path, *lines)}:31: id is 'f3', as on line 4, expected each id once"
    with pytest.raises(UserError, match=re.escape(sentence)):
        open_frames(path)
    assert not indexes(tmp_path)


def test_files_that_hold_nothing(tmp_path):
    with pytest.raises(UserError, match=r"data\.jsonl: it holds no frames"):
        open_frames(write(tmp_path, ""))
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}/none.jsonl: no such JSON-lines file")):
        open_frames(tmp_path / "none.jsonl")


@pytest.mark.parametrize("name", ["ends.npy", "texts", "tars.json", "notes.json"])
def test_an_index_that_is_not_whole_is_made_again(tmp_path, name):
    path = write(tmp_path, *EVERYTHING)
    expected, [folder] = list(open_frames(path)), indexes(tmp_path)
    file = tmp_path / "deep3d_index" / folder / name
    whole = file.read_bytes()
    for damaged in (whole[:-1], b"", None):
        file.unlink()  # another file: the old one is mapped
        if damaged is not None:
            file.write_bytes(damaged)
        for one, two in zip(expected, open_frames(path), strict=True):
            assert_same(one, two)
        assert file.read_bytes() == whole


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    path = write(tmp_path, LINE)
    (tmp_path / "deep3d_index").write_text("a file, where the folder would be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert len(open_frames(path)) == 1
    assert len(indexes(tmp_path / "cache")) == 1
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    sentence = rf"no index can be written \({blocked}/x: Not a directory\); data\.index=FOLDER chooses another"
    with pytest.raises(UserError, match=sentence):
        open_frames(path, folder=str(blocked / "x"))
    assert len(open_frames(path, folder=str(tmp_path / "own"))) == 1
    assert len(list(tmp_path.glob("own/*.index"))) == 1


@pytest.mark.parametrize("at", ["write", "replace"])
def test_a_full_disk_is_a_sentence_and_loses_nothing(tmp_path, monkeypatch, at):
    open_frames(write(tmp_path, LINE))
    before, path = indexes(tmp_path), write(tmp_path, *EVERYTHING)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((np, "save", full) if at == "write" else (os, "replace", full)))
    sentence = r"data\.index: .*deep3d_index cannot be written: No space left on device; data\.index=FOLDER"
    with pytest.raises(UserError, match=sentence):
        open_frames(path)
    assert indexes(tmp_path) == before


def test_a_source_that_changes_while_it_is_read(tmp_path, monkeypatch):
    path, real = write(tmp_path, *EVERYTHING), jsonl.read_block
    monkeypatch.setattr(index, "usable_cores", lambda: 1)
    monkeypatch.setattr(jsonl, "read_block", lambda *job: (real(*job), write(tmp_path, LINE))[0])
    with pytest.raises(UserError, match="its files changed while they were read"):
        open_frames(path)
    assert not indexes(tmp_path)


def test_frames_travel_as_their_path(tmp_path):
    frames = open_frames(write(tmp_path, *EVERYTHING))
    sent = pickle.dumps(frames)
    assert len(sent) < 500
    for one, two in zip(frames, pickle.loads(sent), strict=True):
        assert_same(one, two)


REAL_BLOCK, SLOW = jsonl.read_block, {}


def slow_block(*job):
    (SLOW["started"] / f"worker{os.getpid()}").touch()
    time.sleep(SLOW["seconds"])
    return REAL_BLOCK(*job)


def read_slowly(path, started, seconds):
    """The body of a process that reads with two workers; each leaves a file with its number."""
    os.setsid()
    SLOW.update(started=started, seconds=seconds)
    jsonl.read_block, jsonl.AT_ONCE, index.usable_cores = slow_block, 500, lambda: 2
    (started / f"done{len(open_frames(path))}").touch()


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
        job.join(60)
    assert [job.exitcode for job in jobs] == [0, 0]
    assert [len(list((tmp_path / name).glob("done40"))) for name in ("one", "two")] == [1, 1]
    assert sorted(bool(list((tmp_path / name).glob("worker*"))) for name in ("one", "two")) == [False, True]
    assert len(indexes(tmp_path)) == 1


@linux
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_reader_leaves_no_process_and_the_next_one_no_file(tmp_path, number):
    path = write(tmp_path, *lines_of(40))
    job = multiprocessing.get_context("fork").Process(target=read_slowly, args=(path, tmp_path, 0.5))
    job.start()
    workers = until(lambda: len(found := list(tmp_path.glob("worker*"))) == 2 and found)
    [aside] = until(lambda: list(tmp_path.glob("deep3d_index/.*.partial")))
    os.kill(job.pid, number)
    job.join(30)
    until(lambda: not any(map(alive, workers)))
    assert aside.is_dir()
    assert len(open_frames(path)) == 40
    assert not aside.exists()
    assert len(indexes(tmp_path)) == 1
