"""What is odd in KITTI's labels is told once a source, and by every command that reads it; what is usual is not."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT

from config import Config
from data import DataConfig, Detection3D, Source, build_dataset
from formats.kitti import frames, read_labels
from formats.odd import describe_labels
from metrics.kitti import blank, compute_metrics, evaluate, table
from metrics.kitti_files import main as evaluate_files
from metrics.kitti_notes import repeated
from scene.frames import UserError, make_labels
from tools.check_data import main as check_data
from tools.diagnosis import doubt_alpha, doubt_repeats
from world.street import build_world

INVENTED = Path(__file__).parent / "data/kitti_invented"
CAR = "Car 0.10 1 1.50 100.00 20.00 180.00 80.00 1.50 1.80 4.20 -3.00 1.70 20.00 1.35"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small rendered world, both splits in one KITTI folder."""
    folder = tmp_path_factory.mktemp("odd")
    for split, count in (("train", 3), ("val", 4)):
        shutil.copytree(build_world(folder, split, count, size=(320, 96)), folder / "kitti", dirs_exist_ok=True)
    return folder / "kitti"


@pytest.fixture
def kitti(world, tmp_path):
    shutil.copytree(world, tmp_path / "kitti")
    return tmp_path / "kitti"


def edit_labels(root, edit):
    """Rewrite label files; edit: a function of the fields of a row, which returns those of some rows."""
    for path in (root / "training/label_2").iterdir():
        rows = [row for line in path.read_text().splitlines() for row in edit(line.split())]
        path.write_text("".join(" ".join(row) + "\n" for row in rows))


def with_field(place, value):
    """An edit that writes a field of all rows but DontCare."""
    return lambda row: [row if row[0] == "DontCare" else [*row[:place], value, *row[place + 1 :]]]


def check(root, capsys, *more):
    """Exit code and output of tools.check_data."""
    code = check_data([str(ROOT / "configs/kitti.py"), f"data.root={root}", "model.size=96,320", *more])
    return code, capsys.readouterr().out


# ---- columns of labels


@pytest.mark.parametrize(
    ("fields", "taken", "words"),
    [
        ("1757 0", (-1, 0), "truncation of 1 labels is neither from 0 to 1 nor -1"),
        ("2 0", (-1, 0), "has 2"),
        ("-0.5 0", (-1, 0), "has -0.5"),
        ("0 4", (0, -1), "occlusion of 1 labels is none of -1, 0, 1, 2, 3"),
        ("0 0.4", (0, -1), "has 0.4"),
        ("0 -2", (0, -1), "has -2"),
        ("1 3", (1, 3), ""),
        ("-1 -1", (-1, -1), ""),
    ],
)
def test_columns_without_kittis_meaning_count_as_unknown(tmp_path, fields, taken, words):
    path = tmp_path / "000001.txt"
    path.write_text(f"{CAR}\n{CAR.replace('0.10 1', fields)}\n")
    odd = []
    labels = read_labels(path, odd=odd)
    assert (labels.truncation[1], labels.occlusion[1]) == taken
    assert len(odd) == bool(words)
    assert words in " ".join(describe_labels(odd))
    assert all(f"{path}:2 has" in sentence for sentence in describe_labels(odd))


def test_odd_columns_are_told_once_a_source(kitti, caplog, capsys):
    edit_labels(kitti, with_field(1, "1757"))
    frames(Source(root=str(kitti)), DataConfig())
    [record] = caplog.records
    count = sum(len(read_labels(path)) for path in (kitti / "training/label_2").glob("*.txt"))
    assert "truncation of " in record.message
    assert str(kitti / "training/label_2") in record.message
    assert int(record.message.split("truncation of ")[1].split()[0]) <= count
    code, out = check(kitti, capsys)
    assert code == 1
    assert out.count("neither from 0 to 1 nor -1") == 2  # train, val


def test_a_class_of_which_nothing_counts_is_told_with_the_reasons(kitti, caplog, capsys):
    """View-of-Delft's moving flags: a truncation of 1."""
    good = check(kitti, capsys)
    assert good[0] == 0, good[1]
    edit_labels(kitti, with_field(1, "1"))
    code, out = check(kitti, capsys)
    assert code == 1
    assert "Car: none of its " in out
    dataset = Detection3D(frames(Source(root=str(kitti), split=("val",)), None), model(), DataConfig())
    blank(dataset, Config())  # before the first step of a training
    words = [record.message for record in caplog.records if record.message.startswith("Car: none of its")]
    assert "for truncation above 0.5" in words[0]
    truth = {frame.id: frame.labels for frame in dataset.frames}
    assert words[0] in table(compute_metrics(truth, {}, ("Car",)))
    assert compute_metrics(truth, {}, ("Car",))["counted"]["Car"]["hard"] == 0


def test_reasons_are_counted_each():
    n = 10
    box = np.array([[10.0, 10, 60, 60]] * n)
    box[:3, 3] = 30  # 20 px high
    labels = make_labels(["Car"] * n, box, [[4, 1.5, 1.7]] * n, [[0, 1, 20.0]] * n, [0.0] * n, [0.9] * 5 + [0.1] * 5)
    labels.occlusion[4:] = 3
    [note] = compute_metrics({"a": labels}, {}, ("Car",))["notes"]
    assert "none of its 10 labels counts" in note
    for words in ("5 for truncation above 0.5", "6 for occlusion above 2", "3 for a 2D box at most 25 px high"):
        assert words in note
    assert compute_metrics({"a": labels[:0]}, {}, ("Car",))["notes"] == []


# ---- alpha


def test_labels_without_alpha_have_no_aos():
    """The official program takes -10 for an angle, and perfect results score about 50."""
    ids = sorted(path.stem for path in (INVENTED / "label_2").glob("*.txt"))[:60]
    truth = {id: read_labels(INVENTED / f"label_2/{id}.txt") for id in ids}
    whole = compute_metrics(truth, truth)
    assert whole["notes"] == []
    unknown = {}
    for id, labels in truth.items():
        alpha = np.where(labels.name == "Car", -10.0, labels.alpha)
        unknown[id] = dataclasses.replace(labels, alpha=alpha)
    metrics = compute_metrics(unknown, truth)
    assert metrics["Car"]["aos"]["moderate"] == {"AP_R40": None, "AP_R11": None}
    assert metrics["Pedestrian"] == whole["Pedestrian"]
    assert metrics["Car"]["3d"] == whole["Car"]["3d"]
    [note] = metrics["notes"]
    assert note.startswith("Car: alpha is -10 in ")
    assert "rotation_y - atan2(x, z)" in note
    assert note in table(metrics)


def test_an_alpha_that_is_another_angle_is_told(world):
    there = frames(Source(root=str(world)), DataConfig())
    assert doubt_alpha(there) == []
    turned = [
        dataclasses.replace(f, labels=dataclasses.replace(f.labels, alpha=np.where(f.labels.is_3d, 0.0, -10)))
        for f in there
    ]
    assert "alpha of labels is not rotation_y - atan2(x, z)" in doubt_alpha(turned)[0]


# ---- 2D-only rows

FLAT = [
    "trafficcone 0 0 0 10 10 50 60 0 0 0 0 0 0 0",
    "sign -1 -1 -1 10 10 50 60 -1 -1 -1 -1 -1 -1 -1",
    "Cyclist 0 0 -10 10 10 50 60 -1 -1 -1 -1000 -1000 -1000 -10",
    "Tram 0 0 0 10 10 50 60 2.5 0 9 3 1.6 30 0",
    "Misc 0 0 0 10 10 50 60 2.5 1 9 0 0 0 0",
]


def model(**changes):
    fields = {"classes": ("Car", "Pedestrian", "Cyclist"), "size": (96, 320), "velocity": False, "attribute_names": ()}
    return SimpleNamespace(**fields | changes)


def test_rows_without_a_3d_box_are_ignore_regions_that_are_counted(kitti, caplog):
    first = sorted((kitti / "training/label_2").glob("*.txt"))[0]
    first.write_text("\n".join([CAR, *FLAT]) + "\n")
    there = frames(Source(root=str(kitti)), DataConfig())
    labels = next(frame.labels for frame in there if frame.id == first.stem)
    assert labels.is_3d.tolist() == [True] + [False] * 5
    assert set(labels.size[1:].ravel()) == {-1}
    assert set(labels.center[1:].ravel()) == {-1000}
    assert "3D box of 5 labels is not known" in caplog.text
    assert f"{first}:2 has 0 0 0 0 0 0 0" in caplog.text
    dataset = Detection3D([frame for frame in there if frame.id == first.stem], model(), DataConfig(), training=True)
    assert "trained: Car 1, Pedestrian 0, Cyclist 0" in dataset.summary()
    assert "ignored: Cyclist 1, Misc 1, Tram 1, sign 1, trafficcone 1" in dataset.summary()
    assert len(dataset[0]["ignore"]) == 5


def test_without_a_list_a_box_of_some_sides_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(FLAT[3] + "\n")
    with pytest.raises(UserError, match=r"a\.txt:1: h, w, l are 2\.5, 0, 9, expected numbers from 0\.01 to 100"):
        read_labels(path)
    path.write_text(CAR.replace("1.50 1.80", "1.50 -1.80") + "\n")
    with pytest.raises(UserError, match=r"h, w, l are 1\.5, -1\.8, 4\.2"):
        read_labels(path, odd=[])


def test_evaluation_counts_them_as_officially(tmp_path, capsys):
    """evaluate_object.cpp looks at class, height, occlusion and truncation alone: found in 2D, missed in space."""
    for name, rows in {"label_2": [CAR, *FLAT, FLAT[2]], "results": [f"{CAR} 0.9", f"{FLAT[2]} 0.8"]}.items():
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}/000001.txt").write_text("\n".join(rows) + "\n")
    assert evaluate_files([str(tmp_path / "label_2"), str(tmp_path / "results"), "--json", str(tmp_path / "o")]) == 0
    counted = json.loads((tmp_path / "o").read_text())["counted"]
    assert (counted["Car"]["moderate"], counted["Cyclist"]["moderate"]) == (1, 2)
    out = capsys.readouterr().out
    assert "labels without a 3D box: 'Cyclist' (2); officially they count in 2D, and are missed in BEV and 3D" in out
    assert "1 labels repeat one of their file" in out
    assert "3D box of 6 labels is not known" in out


# ---- part of a data set


def test_frames_without_an_image_are_left_out_when_asked_for(kitti, caplog):
    images = sorted((kitti / "training/image_2").iterdir())
    ids = (kitti / "ImageSets/train.txt").read_text().split()
    for path in images:
        if path.stem in ids[:2]:
            path.unlink()
    with pytest.raises(UserError, match=rf"{ids[0]}\.png: no such image, .*data\.skip_bad=true leaves out frames"):
        frames(Source(root=str(kitti)), DataConfig())
    there = frames(Source(root=str(kitti)), DataConfig(skip_bad=True))
    assert [frame.id for frame in there] == ids[2:]
    [record] = caplog.records
    assert record.message == f"{kitti}: 2 frames have no image and are left out, the first is {ids[0]}"
    shutil.rmtree(kitti / "training/image_2")
    (kitti / "training/image_2").mkdir()
    assert frames(Source(root=str(kitti)), DataConfig(skip_bad=True)) == []
    data = DataConfig(root=str(kitti), val=(Source(),), skip_bad=True)
    with pytest.raises(UserError, match=r"data\.val holds no frame"):
        build_dataset(Config(data=data), training=False)


# ---- repeats, separators


def test_repeats(world):
    there = frames(Source(root=str(world)), DataConfig())
    assert doubt_repeats(there) == []
    labels = there[0].labels
    rows = np.r_[0 : len(labels), 0, 0]
    assert repeated(labels[rows], np.zeros(len(rows))).sum() == 2
    assert not repeated(labels[rows], np.arange(len(rows))).any()
    twice = [dataclasses.replace(there[0], labels=labels[rows]), dataclasses.replace(there[1], image=there[0].image)]
    objects, images = doubt_repeats(twice)
    assert objects.startswith("objects that stand in their frame more than once, with equal boxes: 2")
    assert images.startswith("images of more than one frame: 1")


def test_a_run_is_told_of_its_labels(kitti, tmp_path):
    """What evaluate.py RUN prints below its table."""
    edit_labels(kitti, lambda row: [row, row] if row[0] == "Car" else [row])
    dataset = Detection3D(frames(Source(root=str(kitti), split=("val",)), None), model(), DataConfig())
    config = SimpleNamespace(data=SimpleNamespace(overlap={}), train=SimpleNamespace(eval_repeat=1))
    predictions = {frame.id: frame.labels for frame in dataset.frames}
    assert "labels repeat one of their file" in table(evaluate(dataset, predictions, config, tmp_path))
    assert "labels repeat" not in table(evaluate(dataset, predictions, config))


def test_separators(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(CAR.replace(" ", ",") + "\n")
    with pytest.raises(UserError, match=r"expected 15 or 16 fields, got 1 \(blanks part them\)"):
        read_labels(path)
    path.write_text(CAR.replace(" ", ", ") + "\n")
    with pytest.raises(UserError, match=r"could not convert string to float: '0\.10,'"):
        read_labels(path)
    path.write_text(CAR.replace(" ", "\t") + "\n")
    assert read_labels(path).name.tolist() == ["Car"]
