"""The check of a whole data set: every broken frame is named, in one go, and a camera that does not fit its labels is noticed."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from formats import jsonl
from formats.kitti import read_frames, read_split
from scene.draw import TRUTH
from scene.frames import join
from tools.check_data import GIVEN, better_canvas, main, share


@pytest.fixture
def kitti(tiny_run, tmp_path):
    """Both splits of the tiny world as one KITTI folder, to be broken."""
    for split in tiny_run[0].glob("*/training"):
        shutil.copytree(split.parent, tmp_path / "kitti", dirs_exist_ok=True)
    return tmp_path / "kitti"


def check(root, capsys, *more):
    """Exit code and output of the check of a folder with configs/kitti.py, on a small canvas."""
    given = [] if all("root" in text for text in more) and more else [f"data.root={root}"]
    code = main([str(ROOT / "configs/kitti.py"), *given, "model.size=96,320", *more, "--workers", "1"])
    return code, capsys.readouterr().out


def test_good_data(kitti, capsys):
    code, out = check(kitti, capsys)
    assert code == 0, out
    assert out.splitlines()[-1] == "no problem found"
    assert re.search(r"train: kitti .*: 8 frames; trained: Car \d+", out)
    for title in ("train", "val"):
        [overlap] = re.findall(
            rf"kitti \({title}\): projected and given 2D boxes overlap by (\.\d+|1\.00) in the median of \d+", out
        )
        assert float(overlap) > 0.9


def test_the_table_tells_each_class(kitti, capsys):
    _, out = check(kitti, capsys, 'model.classes=["Car","Cyclist"]', "data.neighbours=Van")
    train, _, _ = out.partition("val: kitti")
    rows = {
        line.split()[0]: re.split(r"\s{2,}", line.strip()) for line in train.splitlines() if line.startswith("    ")
    }
    labels = join([frame.labels for frame in read_frames(kitti, ("train",))])
    cars = labels[labels.name == "Car"]
    name, use, count, size, depth, headings, truncated, occluded, height = rows["Car"]
    assert (name, use, count) == ("Car", "trained", str(len(cars)))
    assert [float(v) for v in size.split()] == pytest.approx(np.median(cars.size, 0), abs=0.0051)
    assert [float(v) for v in depth.split(" / ")] == pytest.approx(
        np.quantile(cars.center[:, 2], (0.05, 0.5, 0.95)), abs=0.051
    )
    x, z = np.cos(cars.yaw), -np.sin(cars.yaw)  # where a car looks
    facing = z > np.abs(x), x > np.abs(z), -z > np.abs(x), -x > np.abs(z)  # away, right, toward, left
    assert headings.split("/") == [f"{100 * share.mean():.0f}" for share in facing]
    assert truncated == f"{100 * (cars.truncation > 0).mean():.0f} %"
    assert occluded == f"{100 * (cars.occlusion > 0).mean():.0f} %"
    high = (cars.box[:, 3] - cars.box[:, 1]) / 2  # images of 640x192 on a canvas of 320x96
    assert [float(v) for v in height.split(" / ")] == pytest.approx(np.quantile(high, (0.05, 0.5, 0.95)), abs=0.51)
    assert rows["Pedestrian"][1] == "background"
    assert rows["DontCare"][1] == "ignored"


def test_levels_that_are_not_known():
    assert share(np.array([-1.0, -1])) == "unknown"
    assert share(np.array([-1, 0.0, 0.2, 0])) == "33 % of 3"
    assert share(np.array([0, 2])) == "50 %"


def test_the_canvas_that_shows_most(kitti, capsys):
    _, out = check(kitti, capsys)
    assert (
        "1 image size, most often 640x192, which the canvas of 320x96 shows scaled by 0.50; the median image fills 100 % of it"
        in out
    )
    assert "no other model.size of as many pixels fits better" in out
    _, out = check(kitti, capsys, "model.size=192,192")
    assert "the canvas of 192x192 shows scaled by 0.30; the median image fills 30 % of it" in out
    assert "model.size=96,320 would show them 1.67 times as large on 83 % of the pixels" in out
    wide, both = np.array([[1920, 1080]]), np.array([[1920, 1080], [1080, 1920]])
    assert better_canvas(wide, np.array([5]), (384, 1280), 32)[0] == (512, 928)
    (height, width), gain, pixels = better_canvas(both, np.array([5, 5]), (384, 1280), 32)
    shown = min(height / 1080, width / 1920) * min(height / 1920, width / 1080)
    assert gain == pytest.approx(np.sqrt(shown / (384 / 1080 * 384 / 1920)))  # both orientations at once
    assert height * width == pytest.approx(pixels * 384 * 1280)
    assert pixels <= 1


def test_pictures_are_spread_over_the_data_set(kitti, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tools.check_data.WIDTH", 640)
    monkeypatch.setattr("tools.check_data.ON_A_SHEET", 2)
    out = tmp_path / "pictures"
    _, text = check(kitti, capsys, "--draw", "3", "--out", str(out))
    assert [path.name for path in sorted(out.iterdir())] == [
        f"{title}1_{page}.png" for title in ("train", "val") for page in (1, 2)
    ]
    assert f"drawn in {out / 'train1_1.png'}" in text
    with Image.open(out / "train1_1.png") as sheet:
        assert sheet.height == 2 * (22 + 192)  # two frames, each under a line of text
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    for colour in (GIVEN, TRUTH):
        assert (np.abs(pixels - colour).max(-1) < 60).any()


def test_a_class_without_objects_fails_and_names_those_there_are(kitti, capsys):
    code, out = check(kitti, capsys, 'model.classes=["Car","Tram","Bus"]')
    assert code == 1
    [sentence] = re.findall(
        r"data\.train holds no object of Tram, Bus of model\.classes .*; the classes there are: (.*)", out
    )
    assert re.match(r"Car \d+, ", sentence)
    assert "DontCare" not in sentence


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
    assert f"{kitti} (train): K looks wrong (fx 2.00 times that of the 2D boxes): median IoU " in out


def edit_labels(kitti, edit):
    """Every label file with the fields of each line but DontCare's changed by edit."""
    for path in (kitti / "training/label_2").iterdir():
        rows = [line.split() for line in path.read_text().splitlines()]
        path.write_text("".join(" ".join(row if row[0] == "DontCare" else edit(row)) + "\n" for row in rows))


def test_sizes_in_another_order_are_named_in_the_order_of_the_format(kitti, capsys):
    edit_labels(kitti, lambda row: [*row[:8], row[10], row[8], row[9], *row[11:]])  # h w l -> l h w
    code, out = check(kitti, capsys)
    assert code == 1
    assert re.search(
        r"kitti \(train\): Car.*: size looks like \(l, h, w\) where \(h, w, l\) is expected: median IoU", out
    )


def test_angles_in_degrees_are_named(kitti, capsys):
    edit_labels(kitti, lambda row: [*row[:14], f"{np.degrees(float(row[14])):.0f}"])
    code, out = check(kitti, capsys)
    assert code == 1
    assert re.search(
        r"kitti \(train\): yaw looks like degrees where radians are expected: \d+ lie beyond 2 pi, from -\d+ to \d+",
        out,
    )
    assert "kitti (train): it holds no frame" not in out


def test_json_lines_and_missing_sources(kitti, tmp_path, capsys):
    lines = tmp_path / "my.jsonl"
    shutil.copy(next((kitti / "training/image_2").iterdir()), tmp_path / "a.png")
    good = {"image": "a.png", "K": [[370, 0, 320], [0, 370, 90], [0, 0, 1]], "objects": []}
    lines.write_text(json.dumps(good) + "\n" + json.dumps({**good, "K": 3}) + "\n{\n")
    code, out = check(
        kitti,
        capsys,
        f'data.train=[{{"kind":"jsonl","root":"{lines}"}}]',
        'data.val=[{"kind":"kitti","root":"/nowhere"}]',
    )
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
    code, out = check(
        kitti,
        capsys,
        f'data.train=[{{"kind":"jsonl","root":"{lines}"}}]',
        f'data.val=[{{"kind":"kitti","root":"{kitti}"}}]',
    )
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


@pytest.mark.parametrize("more", [["--out", "x"], ["--draw", "-1"], ["--workers", "0"]])
def test_wrong_command_lines_end_with_a_sentence(more, capsys):
    assert main([str(ROOT / "configs/kitti.py"), *more]) == 2
    assert (
        capsys.readouterr().err
        == "error: expected --draw >= 0, --workers >= 1, and --out DIR only together with --draw N\n"
    )
