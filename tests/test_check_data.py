"""The check of a whole data set: every broken frame is named, in one go, and likely mistakes are."""

import json
import re
import shutil

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from data import DataConfig, Source
from formats.kitti import frames, read_split, split_projection
from scene.draw import TRUTH
from scene.frames import join
from tools.check_data import GIVEN, main
from world.street import build_world, render_frame


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Both splits of a small world."""
    folder = tmp_path_factory.mktemp("world")
    return [build_world(folder, split, count, size=(640, 192)) for split, count in (("train", 8), ("val", 4))]


@pytest.fixture
def kitti(world, tmp_path):
    """Them as one KITTI folder, to be broken."""
    for split in world:
        shutil.copytree(split, tmp_path / "kitti", dirs_exist_ok=True)
    return tmp_path / "kitti"


def check(root, capsys, *more):
    """Exit code and output of the check of a folder with configs/kitti.py, on a small canvas."""
    given = [] if all("root" in text for text in more) and more else [f"data.root={root}"]
    code = main([str(ROOT / "configs/kitti.py"), *given, "model.size=96,320", *more])
    return code, capsys.readouterr().out


def test_good_data(kitti, capsys):
    code, out = check(kitti, capsys)
    assert code == 0, out
    assert out.splitlines()[-1] == "no problem found"
    assert re.search(r"train: kitti .*: 8 frames; trained: Car \d+", out)
    for title in ("train", "val"):
        [overlap] = re.findall(
            rf"kitti \({title}\): projected and given 2D boxes overlap by (0\.\d+|1\.00) in the median of \d+", out
        )
        assert float(overlap) > 0.9


def test_the_table_tells_each_class(kitti, capsys):
    _, out = check(kitti, capsys, 'model.classes=["Car","Cyclist"]', "data.neighbours=Van")
    train, _, _ = out.partition("val: kitti")
    rows = {
        line.split()[0]: re.split(r"\s{2,}", line.strip()) for line in train.splitlines() if line.startswith("    ")
    }
    labels = join([frame.labels for frame in frames(Source(root=str(kitti)), DataConfig())])
    cars = labels[labels.name == "Car"]
    name, use, count, size, depth, headings, height = rows["Car"]
    assert (name, use, count) == ("Car", "trained", str(len(cars)))
    assert [float(v) for v in size.split()] == pytest.approx(np.median(cars.size, 0), abs=0.0051)
    assert [float(v) for v in depth.split(" / ")] == pytest.approx(
        np.quantile(cars.center[:, 2], (0.05, 0.5, 0.95)), abs=0.051
    )
    x, z = np.cos(cars.yaw), -np.sin(cars.yaw)  # where a car looks
    facing = z > np.abs(x), x > np.abs(z), -z > np.abs(x), -x > np.abs(z)  # away, right, toward, left
    assert headings.split("/") == [f"{100 * share.mean():.0f}" for share in facing]
    high = (cars.box[:, 3] - cars.box[:, 1]) / 2  # images of 640x192 on a canvas of 320x96
    assert [float(v) for v in height.split(" / ")] == pytest.approx(np.quantile(high, (0.05, 0.5, 0.95)), abs=0.51)
    assert rows["Pedestrian"][1] == "background"
    assert rows["DontCare"][1] == "ignored"


def test_what_the_canvas_does_to_the_images(kitti, capsys):
    shown = "image sizes: 1, most often 640x192, which the canvas of"
    assert f"{shown} 320x96 shows scaled by 0.50; it fills 100 % of it" in check(kitti, capsys)[1]
    out = check(kitti, capsys, "model.size=192,192")[1]
    assert f"{shown} 192x192 shows scaled by 0.30; it fills 30 % of it" in out


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
        r"no frame of data\.train holds an object of class 'Tram' .*; the classes there are: (.*)", out
    )
    assert sentence.startswith("Car, ")
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


def test_mistakes_in_json_lines_are_named(tmp_path, capsys):
    """The world's labels as JSON lines with sizes in another order, and an object behind the camera."""
    lines = []
    for index in range(12):
        image, P2, labels = render_frame(0, index, (320, 96))
        K, offset = split_projection(P2)
        Image.fromarray(image).save(tmp_path / f"{index}.png")
        real = labels[labels.is_3d].moved(offset)
        columns = zip(
            real.name, real.center.tolist(), real.size[:, [2, 0, 1]].tolist(), real.yaw, real.box.tolist(), strict=True
        )
        objects = [dict(zip(("class", "center", "size", "yaw", "box"), row, strict=True)) for row in columns]
        lines.append(json.dumps({"image": f"{index}.png", "K": K.tolist(), "objects": objects}))
    (tmp_path / "my.jsonl").write_text("\n".join(lines) + "\n")
    source = json.dumps([{"kind": "jsonl", "root": str(tmp_path / "my.jsonl")}])
    code, out = check(tmp_path, capsys, f"data.train={source}", f"data.val={source}")
    assert code == 1
    assert re.search(r"my\.jsonl: Car.*: size looks like \(w, l, h\) where \(l, h, w\) is expected", out)


def test_a_name_that_a_rename_never_meets_is_told(kitti, capsys):
    code, out = check(kitti, capsys, 'data.train=[{"split":["train"],"rename":{"Car":"Car","car":"Car"}}]')
    assert code == 0
    assert re.findall(r"(\S+ .*): rename names (.*), and no object is called so", out) == [
        (f"{kitti} (train)", "'car'")
    ]


def test_what_only_all_sources_together_show(kitti, capsys):
    code, out = check(kitti, capsys, 'data.val=[{"kind":"kitti","repeat":2}]')
    assert code == 1
    assert "data.val has a repeat or a share, expected neither" in out


def test_a_mistake_in_the_config_is_a_sentence(capsys):
    assert main([str(ROOT / "configs/kitti.py"), "data.rot=x"]) == 2
    assert re.fullmatch(r"error: unknown key 'data\.rot'; did you mean data\.root.*\n", capsys.readouterr().err)


def test_a_wrong_command_line_ends_with_a_sentence(capsys):
    assert main([str(ROOT / "configs/kitti.py"), "--draw", "-1"]) == 2
    assert capsys.readouterr().err == "error: --draw -1: expected at least 0\n"
