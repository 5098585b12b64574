"""Two runs side by side, and colours that everybody tells apart."""

import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest
from conftest import ROOT

from config import Config, to_dict
from data import DataConfig, Source, build_dataset
from engine.checkpoint import CONFIG, MODEL
from metrics import kitti
from metrics.kitti_files import LEVELS
from model import ModelConfig
from scene import draw
from scene.records import write_jsonl
from tools import compare, training
from tools.compare import differences

INVENTED = ROOT / "tests/data/kitti_invented"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three evaluated runs on four rendered frames: a1 and a2 alike but for a little, b much too far."""
    folder = tmp_path_factory.mktemp("runs")
    source = (Source(kind="synthetic", split=("val",), world_frames=4),)
    config = Config(data=DataConfig(root=str(folder / "world"), train=source, val=source), model=ModelConfig())
    dataset = build_dataset(config, training=False)
    for name, factor in (("a1", 1.001), ("a2", 1.002), ("b", 1.3)):
        out = folder / name / "evaluation"
        out.mkdir(parents=True)
        (folder / name / CONFIG).write_text(json.dumps(to_dict(config)))
        (folder / name / MODEL).write_bytes(b"")
        frames = []
        for frame in dataset.frames:
            labels = frame.labels[frame.labels.is_3d]
            labels = dataclasses.replace(labels, center=labels.center * factor)
            frames.append(dataclasses.replace(frame, labels=labels))
        write_jsonl(out / "predictions.jsonl", frames)
        metrics = kitti.evaluate(dataset, {frame.id: frame.labels.moved(-frame.offset) for frame in frames}, config)
        (out / "metrics.json").write_text(json.dumps(metrics))
    return folder


def test_two_runs_are_compared_with_the_spread_over_seeds(runs, tmp_path, capsys):
    sides = f"{runs / 'a1'},{runs / 'a2'}", str(runs / "b")
    out, numbers = tmp_path / "c.html", tmp_path / "c.json"
    assert compare.main([*sides, "--report", "--out", str(out), "--json", str(numbers)]) == 0
    text = capsys.readouterr().out
    rows = {row["number"]: row for row in json.loads(numbers.read_text())}
    row = rows["errors/Car/all/depth_percent"]
    assert row["first"] == pytest.approx(0.15, abs=1e-3)
    assert row["second"] == pytest.approx(30, abs=1e-2)
    assert row["difference"] == pytest.approx(29.85, abs=1e-2)
    assert row["spread"] == pytest.approx(0.1 / np.sqrt(2), abs=1e-3)
    assert row["beyond"]
    assert "errors/Car/all/depth_percent" in text
    assert "errors/Car/10-20/depth_percent" not in text
    assert "a1+a2" in text
    data = json.loads(out.read_text(encoding="utf-8").split('id="data">')[1].split("</script>")[0])
    assert [one["title"] for one in data["runs"]] == ["a1", "b"]
    assert len(data["differences"]) == len(rows) == len(data["beyond"])
    assert max(frame["difference"] for frame in data["frames"]) > 0
    assert all(len(frame["detections"]) == 2 for frame in data["frames"])
    worst = max(data["frames"], key=lambda frame: frame["difference"])
    assert f"{worst['id']:24}     0.0 {worst['difference']:7.1f} {worst['difference']:+7.1f}" in text


def test_runs_that_were_counted_by_other_rules_are_refused(runs, tmp_path, capsys):
    other = tmp_path / "lr=1e-3"  # no key=value
    shutil.copytree(runs / "b", other)
    path = other / "evaluation/metrics.json"
    metrics = json.loads(path.read_text())
    assert compare.main([str(runs / "a1"), str(other)]) == 0
    capsys.readouterr()
    for name, value, words in (
        ("repeat", 40, "repeat: 1 for a1, 40 for lr=1e-3"),
        (
            "min_overlap",
            {"Car": [0.7, 0.5, 0.5]},
            "overlap of Car: [0.7, 0.7, 0.7] for a1, [0.7, 0.5, 0.5] for lr=1e-3",
        ),
    ):
        path.write_text(json.dumps(metrics | {"settings": metrics["settings"] | {name: value}}))
        assert compare.main([str(runs / "a1"), str(other)]) == 2
        assert f"the runs were evaluated by different rules, {words}" in capsys.readouterr().err


def test_what_cannot_be_compared_is_one_sentence(runs, tmp_path, capsys):
    a, b = str(runs / "a1"), str(runs / "b")
    (tmp_path / "other/evaluation").mkdir(parents=True)
    for words, message in (
        ([a], "expected two runs, or two lists of runs, got 1"),
        ([a, str(tmp_path / "other")], "expected a run after evaluate.py"),
        ([a, b, "data.limit=2"], "unknown key 'data.limit'"),
        ([a, b, "--out", str(tmp_path / "no/c.html"), "--report"], "it cannot be written, as there is no folder"),
    ):
        assert compare.main(words) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_a_difference_needs_several_seeds_for_its_spread():
    [row] = differences([[{"NDS": 0.4, "cfg": {"x": 1}}], [{"NDS": 0.5, "cfg": {"x": 2}}]])
    assert row == ("NDS", 0.4, 0.5, pytest.approx(0.1), None, False)
    [row] = differences([[{"NDS": 0.4}, {"NDS": 0.44}], [{"NDS": 0.45}, {"NDS": 0.45}]])
    assert row[4] == pytest.approx(0.04 / np.sqrt(2))
    assert not row[5]


# ---- colours

VISION = {  # linear RGB -> what the colour-blind see (Machado, Oliveira and Fernandes, TVCG 2009, severity 1)
    "all cones": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def lab(colour, vision):
    """CIE L*a*b* of an sRGB colour as somebody sees it."""
    share = np.array(colour) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    linear = np.clip(np.array(VISION[vision]) @ linear, 0, 1)
    matrix = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(matrix @ linear / [0.95047, 1, 1.08883])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_colours_are_told_apart_by_the_colour_blind():
    """A difference of 2.3 is just noticed; 25 is one at a glance."""
    page = (ROOT / "tools/report.html").read_text(encoding="utf-8")
    own = page.split("const COLOURS = [")[1].split("]")[0].replace('"', "").replace(",", " ").split()
    own = [tuple(int(text[i : i + 2], 16) for i in (1, 3, 5)) for text in own]
    assert len(own) == 6
    for colours in ((draw.PREDICTION, draw.TRUTH, draw.OTHER), LEVELS.values(), own, training.COLOURS):
        for vision in VISION:
            pairs = itertools.combinations(colours, 2)
            assert min(np.linalg.norm(lab(a, vision) - lab(b, vision)) for a, b in pairs) > 25
    for key, colour in (("PREDICTION", draw.PREDICTION), ("TRUTH", draw.TRUTH), ("OTHER", draw.OTHER)):
        assert f'{key} = "{",".join(map(str, colour))}"' in page  # the page draws as draw.py does
