"""The check of a whole data set: every broken frame is named, in one go, and a camera that does not fit its labels is noticed."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from formats import jsonl
from formats.kitti import read_split
from tools.check_data import main


@pytest.fixture
def kitti(tiny_run, tmp_path):
    """Both splits of the tiny world as one KITTI folder, to be broken."""
    for split in tiny_run[0].glob("*/training"):
        shutil.copytree(split.parent, tmp_path / "kitti", dirs_exist_ok=True)
    return tmp_path / "kitti"


def check(root, capsys, *more):
    code = main([str(ROOT / "configs/kitti.py"), f"data.root={root}", "model.pretrained=false", *more, "--workers", "1"])
    return code, capsys.readouterr().out


def test_good_data(kitti, capsys):
    code, out = check(kitti, capsys)
    assert code == 0, out
    assert out.splitlines()[-1] == "no problem found"
    assert re.search(r"train: kitti .*: 8 frames; trained: Car \d+", out)
    for title in ("train", "val"):
        [overlap] = re.findall(rf"{title}: kitti .*: projected and labelled 2D boxes overlap by (0\.\d+|1\.00) in the median of \d+", out)
        assert float(overlap) > 0.9


def test_every_broken_frame_is_named_at_once(kitti, capsys):
    ids = read_split(kitti, "train")
    (kitti / f"training/label_2/{ids[0]}.txt").write_text("Car 1 2\n")
    (kitti / f"training/calib/{ids[1]}.txt").unlink()
    image = kitti / f"training/image_2/{ids[2]}.png"
    image.write_bytes(image.read_bytes()[:900])
    (kitti / f"training/image_2/{ids[3]}.png").unlink()
    code, out = check(kitti, capsys)
    assert code == 1
    assert f"{ids[0]}.txt:1: expected 15 or 16 fields, got 3" in out
    assert f"{ids[1]}.txt: frame {ids[1]} of split train has no calib file" in out
    assert f"{ids[2]}.png: cannot read the image" in out
    assert f"{ids[3]}.png: no such image" in out
    assert out.splitlines()[-1] == "4 problems"


def test_a_wrong_camera_is_noticed(kitti, capsys):
    for path in (kitti / "training/calib").iterdir():
        path.write_text(re.sub(r"P2: (\S+)", lambda m: f"P2: {float(m[1]) * 2}", path.read_text()))
    code, out = check(kitti, capsys)
    assert code == 1
    assert "the projected 3D boxes miss the labelled 2D boxes: is K, the unit or the box's centre wrong?" in out


def test_json_lines_and_missing_sources(kitti, tmp_path, capsys):
    lines = tmp_path / "my.jsonl"
    shutil.copy(next((kitti / "training/image_2").iterdir()), tmp_path / "a.png")
    good = {"image": "a.png", "K": [[370, 0, 320], [0, 370, 90], [0, 0, 1]], "objects": []}
    lines.write_text(json.dumps(good) + "\n" + json.dumps({**good, "K": 3}) + "\n{\n")
    code, out = check(kitti, capsys, f'data.train=[{{"kind":"jsonl","root":"{lines}"}}]', 'data.val=[{"kind":"kitti","root":"/nowhere"}]')
    assert code == 1
    assert re.search(r"my\.jsonl:2: ", out)
    assert re.search(r"my\.jsonl:3: ", out)
    assert "/nowhere: expected a KITTI folder" in out


def test_json_lines_are_wrong_in_the_same_words_as_their_own_check(kitti, tmp_path, capsys):
    lines = tmp_path / "my.jsonl"
    shutil.copy(next((kitti / "training/image_2").iterdir()), tmp_path / "a.png")
    good = {"image": "a.png", "K": [[370, 0, 320], [0, 370, 90], [0, 0, 1]], "objects": []}
    wrong = [
        {"image": "b.png"},
        {"K": [[370, 0, 9000], [0, 370, 90], [0, 0, 1]]},
        {"ignore": [[5, 5, 1, 1]]},
        {"id": "a", "objects": 3},
        {"x": 1},
    ]
    texts = [json.dumps(good), *(json.dumps({**good, **change}) for change in wrong), json.dumps(good), "[" * 9999]
    lines.write_text("\n".join(texts) + "\n")
    assert jsonl.main([str(lines)]) == 1
    own = capsys.readouterr().out.splitlines()[:-1]
    assert len({line.split(": ")[0] for line in own}) == 7
    code, out = check(kitti, capsys, f'data.train=[{{"kind":"jsonl","root":"{lines}"}}]', f'data.val=[{{"kind":"kitti","root":"{kitti}"}}]')
    assert code == 1
    assert [line for line in out.splitlines() if line.startswith(str(lines))] == own


def test_what_only_all_sources_together_show(kitti, capsys):
    twice = json.dumps([{"kind": "kitti", "split": ["val", "val"]}])
    code, out = check(kitti, capsys, f"data.val={twice}", f"data.train={twice}")
    assert code == 1
    for title in ("train", "val"):
        assert re.search(rf"frame \d+ is listed 2 times in data\.{title}", out)
    code, out = check(kitti, capsys, 'data.val=[{"kind":"kitti","repeat":2}]')
    assert code == 1
    assert "data.val lists frames more than once" in out


def test_the_command_ends_with_a_sentence(tmp_path):
    command = [sys.executable, "-m", "tools.check_data", "configs/kitti.py", "data.rot=x"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert finished.returncode == 2
    assert re.fullmatch(r"error: unknown key 'data\.rot'; did you mean data\.root.*\n", finished.stderr)
