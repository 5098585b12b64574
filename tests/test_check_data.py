"""The check of a whole data set: every broken frame is named, in one go, and a camera that does not fit its labels is noticed."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from test_train import copy_as_kitti

from check_data import main


@pytest.fixture
def kitti(tiny_run, tmp_path):
    return copy_as_kitti(tiny_run[0], tmp_path / "kitti")[0]


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
    ids = sorted(p.stem for p in (kitti / "training/label_2").iterdir())
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


def test_the_command_ends_with_a_sentence(tmp_path):
    command = [sys.executable, "check_data.py", "configs/kitti.py", "data.rot=x"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert finished.returncode == 2
    assert re.fullmatch(r"error: unknown key 'data\.rot'; did you mean data\.root.*\n", finished.stderr)
