"""The command line on files, and a run evaluated by one and by two processes."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

import evaluate
from config import Config, read_config
from data import DataConfig, Source, build_dataset
from engine.checkpoint import save_weights, verify
from engine.mirror import Mirrored
from engine.weights import stay_at_home
from formats.jsonl import read_frames
from formats.kitti import read_labels, write_labels
from metrics import kitti, kitti_files
from metrics.kitti import kitti_ap
from metrics.kitti_notes import refuse_overlaps
from model import Detector, ModelConfig
from scene.draw import best_score, frame_quality
from scene.frames import UserError, make_labels
from tools.submit import write_submission

ROOT = Path(__file__).parents[1]
INVENTED = ROOT / "tests" / "data" / "kitti_invented"
KITTI = ROOT.parent / "shared/data/kitti_mini"
LABEL = "Car 0.00 0 0.10 100.00 100.00 200.00 150.00 1.50 1.60 4.00 0.00 1.60 20.00 0.10\n"


@pytest.fixture
def folders(tmp_path):
    """Two frames with a car each, and their labels as results with a score."""
    for id in ("000000", "000001"):
        for folder, text in (("label_2", LABEL), ("results", LABEL.rstrip() + " 0.9\n")):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / f"{id}.txt").write_text(text)
    return tmp_path


def run_files(folder, *more):
    assert kitti.main([str(folder / "label_2"), str(folder / "results"), *more]) == 0


def test_files_mode_prints_the_table_and_writes_the_expected_layout(tmp_path, capsys):
    run_files(INVENTED, "--json", str(tmp_path / "out.json"), "--curves", str(tmp_path / "curves.png"), "--errors")
    written = json.loads((tmp_path / "out.json").read_text())
    expected = json.loads((INVENTED / "expected.json").read_text())
    for name, cells in expected.items():
        for metric, levels in cells.items():
            for difficulty, averages in levels.items():
                assert written[name][metric][difficulty] == pytest.approx(averages, abs=1e-6)
    assert written["counted"]["Car"]["moderate"] == 199
    assert (tmp_path / "curves.png").stat().st_size > 1000
    text = capsys.readouterr().out
    assert "AP_R40, per cent: 120 frames" in text
    assert "51.80" in text
    assert "10-20" in text
    files = ["--labels", str(INVENTED / "label_2"), "--results", str(INVENTED / "results"), "--errors"]
    assert evaluate.main(files) == 0  # as it was called before
    assert capsys.readouterr().out == text


def test_split_repeat_and_metric(folders, capsys):
    (folders / "one.txt").write_text("000001\n")
    run_files(folders, "--split", str(folders / "one.txt"), "--repeat", "41", "--metric", "R11", "--overlap", "loose")
    text = capsys.readouterr().out
    assert "AP_R11, per cent: 1 frames, each frame counted 41 times" in text
    assert "Car        100.00  100.00  100.00" in text
    assert "1 result files belong to no evaluated frame and are left out, the first is 000000.txt" in text


def test_missing_results_count_as_empty_and_are_reported(folders, capsys):
    (folders / "results" / "000000.txt").unlink()
    (folders / "results" / "000001.txt").write_text("")
    run_files(folders)
    assert "1 of 2 frames have no result file and count as empty, the first is 000000.txt" in capsys.readouterr().out


def fail(capsys, *arguments):
    """The one sentence that a wrong command line ends with."""
    try:
        code = evaluate.main([str(argument) for argument in arguments])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LABEL, "results/000001.txt:1: expected 16 fields"),
        (LABEL.rstrip() + " 0.9\n" + LABEL.rstrip() + " high\n", "results/000001.txt:2: expected numbers"),
        (LABEL.rstrip() + " nan\n", "results/000001.txt:1: field 16 is nan"),
    ],
)
def test_malformed_line_is_named(folders, capsys, text, message):
    (folders / "results" / "000001.txt").write_text(text)
    assert message in fail(capsys, "--labels", folders / "label_2", "--results", folders / "results")


def test_wrong_command_lines_end_in_one_sentence(folders, capsys):
    labels, results, split = folders / "label_2", folders / "results", folders / "val.txt"
    files = ("--labels", labels, "--results", results)
    assert "the following arguments are required: RUN" in fail(capsys)
    for one in (("--labels", labels), ("--results", results)):
        assert "an evaluation of files needs --labels, --nuscenes or --argoverse, and --results" in fail(capsys, *one)
    for more in (["runs/x"], ["--out", "x"], ["--flip"]):
        assert f"metrics.kitti: unrecognized arguments: {' '.join(more)}" in fail(capsys, *files, *more)
    assert "--repeat is 0" in fail(capsys, *files, "--repeat", 0)
    missing = folders / "nowhere"
    assert f"LABELS {missing}: no such folder" in fail(capsys, "--labels", missing, "--results", results)
    assert f"did you mean {labels}?" in fail(capsys, "--labels", folders, "--results", results)
    assert f"did you mean {results}?" in fail(capsys, "--labels", labels, "--results", folders)
    assert "no such split file" in fail(capsys, *files, "--split", split)
    assert "--split val: expected a .txt file" in fail(capsys, *files, "--split", "val")
    assert "LABELS is empty, expected a folder" in fail(capsys, "--labels", "", "--results", "")
    assert "--classes names 'Bus', which no file does; there are " in fail(capsys, *files, "--classes", "Bus")
    split.write_bytes(b"\xff")
    assert "val.txt: not a text file" in fail(capsys, *files, "--split", split)
    split.write_text("000000 000007")
    assert "000007.txt: no label file" in fail(capsys, *files, "--split", split)
    split.write_text("000000 000000")
    assert "frame 000000 is listed twice" in fail(capsys, *files, "--split", split)
    assert "runs/nowhere: no such folder, expected a run or a checkpoint" in fail(capsys, "runs/nowhere")
    assert "no weights there" in fail(capsys, folders)


def test_a_full_disk_is_one_sentence(folders, capsys):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    assert "No space left on device" in fail(
        capsys, "--labels", folders / "label_2", "--results", folders / "results", "--json", "/dev/full"
    )


def test_files_need_neither_timm_nor_accelerate(folders):
    files = [str(folders / "label_2"), str(folders / "results")]
    code = (
        f"import sys, evaluate; evaluate.main(['--labels', {files[0]!r}, '--results', {files[1]!r}]); "
        "assert not {'timm', 'accelerate', 'model'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


# ---- runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder whose best checkpoint has random weights, on five frames of the built-in world."""
    folder = tmp_path_factory.mktemp("run")
    model = ModelConfig(
        backbone="resnet18", size=(96, 320), channels=32, tower_convs=1, score_threshold=0.0, max_detections=20,
        size_prior=((4, 1.5, 1.7),) * 3, depth_mean=(20.0,) * 3, depth_std=(5.0,) * 3,
    )  # fmt: skip
    source = (Source(kind="synthetic", split=("val",), world_frames=5),)
    data = DataConfig(root=str(folder / "world"), train=source, val=source, workers=0)
    config = Config(out=str(folder), data=data, model=model)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=2))
    build_dataset(config, training=False)  # rendered
    torch.manual_seed(0)
    save_weights(folder / "best", Detector(model), config, {}, {})
    return folder


def test_a_run_is_evaluated_alike_by_one_and_two_processes(run, capsys):
    root = f"data.root={run / 'world'}"
    more = ["--json", str(run / "one.json"), "--report-frames", "2"]
    assert evaluate.main([str(run), root, "--out", str(run / "one"), *more]) == 0
    assert "AP_R40, per cent: 5 frames" in capsys.readouterr().out
    assert (run / "one.json").read_text() == (run / "one/metrics.json").read_text()
    both = forked.run(ROOT, "evaluate.py", run, root, "--out", run / "two", processes=2)
    assert [(done.returncode, done.stdout.count("AP_R40, per cent: 5 frames")) for done in both] == [(0, 1), (0, 0)]
    one, two = (json.loads((run / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert one["settings"]["frames"] == two["settings"]["frames"] == 5
    assert one["settings"]["detections"] == two["settings"]["detections"] == 100
    results = [
        {path.name: read_labels(path, scores=True) for path in (run / n / "results").glob("*.txt")}
        for n in ("one", "two")
    ]
    assert len(results[0]) == len(results[1]) == 5
    for name, labels in results[0].items():  # batches differ, and with them the last bits
        np.testing.assert_allclose(labels.score, results[1][name].score, atol=1e-4)
    for name in ("predictions.jsonl", "curves.png", "worst.png", "report.html"):
        assert (run / "one" / name).stat().st_size > 1000
    assert (run / "one/report.html").read_text().count('"image":') == 2
    assert not (run / "two/report.html").exists()
    frames = read_frames(run / "one" / "predictions.jsonl")
    assert [len(frame.labels) for frame in frames] == [20] * 5
    assert np.isfinite(frames[0].labels.sigma).all()


def test_a_run_is_evaluated_with_mirror_images_on_request(run, monkeypatch):
    seen = []
    monkeypatch.setattr(
        evaluate, "write_evaluation", lambda out, dataset, metrics, found: seen.append((dataset.frames, found))
    )
    assert evaluate.main([str(run), f"data.root={run / 'world'}", "--flip"]) == 0
    [(frames, found)] = seen
    detector = Detector.from_pretrained(run / "best")
    plain, both = (one.predict(frames[0].image, frames[0].K) for one in (detector, Mirrored(detector)))
    np.testing.assert_allclose(found[frames[0].id].score, both.score, atol=1e-4)
    assert not np.allclose(plain.score, both.score, atol=1e-4)
    assert len(found) == 5


def test_a_process_count_that_was_not_granted_is_an_error(run, capsys, monkeypatch):
    accelerator = Accelerator(cpu=True)  # before the environment says that there are more
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr("engine.guard.Accelerator", lambda **_: accelerator)
    message = fail(capsys, run, f"data.root={run / 'world'}")
    assert "launched 3 processes, but Accelerate joins only 1" in message


def test_damaged_weights_and_unknown_keys_are_named(run, capsys, tmp_path):
    assert "unknown key 'data.rot'; did you mean data.root" in fail(capsys, run, "--repeat", 2, "data.rot=x")
    (tmp_path / "config.json").write_text((run / "best" / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((run / "best" / "model.safetensors").read_bytes()[:1000])
    assert f"{tmp_path / 'model.safetensors'}: damaged, or of another architecture" in fail(capsys, tmp_path)
    (tmp_path / "config.json").unlink()
    assert "config.json: missing beside the weights" in fail(capsys, tmp_path)


class Oracle(torch.nn.Module):
    """Answers with the ground truth of the frames, in the order in which one process sees them."""

    def __init__(self, dataset):
        super().__init__()
        self.dataset, self.next, self.config = dataset, 0, ModelConfig()

    def detect(self, image, K):
        found = []
        for _ in image:
            labels = self.dataset.frames[self.next].labels
            labels = labels[np.isin(labels.name.astype(str), self.dataset.classes)]
            box = self.dataset.view_of(self.next).boxes_to_canvas(labels.box)
            label = np.array([self.dataset.classes.index(name) for name in labels.name], dtype=int)
            row = {
                "label": label,
                "score": np.full(len(labels), 0.9),
                "box": box,
                "center": labels.center,
                "size": labels.size,
            }
            row |= {"yaw": labels.yaw, "sigma": np.ones(len(labels))}
            found.append({name: torch.as_tensor(value) for name, value in row.items()})
            self.next += 1
        return found


@pytest.mark.skipif(not KITTI.is_dir(), reason=f"{KITTI} is absent: KITTI's images are not part of this project")
def test_ground_truth_through_the_whole_path_gives_100(tmp_path):
    config = Config(
        data=DataConfig(root=str(KITTI), val=(Source(split=("val",)),)), model=ModelConfig(size=(384, 1280))
    )
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, eval_repeat=41))
    classes, dataset = config.model.classes, build_dataset(config, training=False)
    metrics, predictions = evaluate.evaluate(Oracle(dataset), dataset, Accelerator(cpu=True), config, folder=tmp_path)
    evaluate.write_evaluation(tmp_path, dataset, metrics, predictions)
    for id, labels in predictions.items():
        write_labels(tmp_path / f"{id}.txt", labels, scores=True)  # with KITTI's two digits too
    truth = {frame.id: dataset.truth(index) for index, frame in enumerate(dataset.frames)}
    again = [
        {id: read_labels(folder / f"{id}.txt", scores=True) for id in truth}
        for folder in (tmp_path, tmp_path / "results")
    ]
    for result in (metrics, *(kitti_ap(truth, labels, classes, repeat=41) for labels in again)):
        reached = 0
        for name in classes:
            for metric in ("bbox", "aos", "bev", "3d"):
                for difficulty, averages in result[name][metric].items():
                    if result["counted"][name][difficulty]:
                        # labelled alpha and rotation_y are rounded apart by up to 0.03 rad
                        assert averages["AP_R40"] == pytest.approx(100, abs=0.02 if metric == "aos" else 1e-9), (
                            name,
                            metric,
                            difficulty,
                        )
                        reached += 1
        assert reached >= 30
    everything = metrics["errors"]["Car"]["all"]
    assert everything["recall"] == 1
    assert everything["depth_error"] < 1e-6
    assert everything["within_1_sigma"] == 1


def test_sigma_is_calibrated_class_by_class():
    """By the ratio of its errors; a class with few objects, or none that tells one, keeps its own; no factors at all
    for nuScenes.
    """
    errors = {
        name: {"all": {"matched": n, "sigma_ratio": 1.5}}
        for name, n in (("Car", 100), ("Pedestrian", 99), ("Cyclist", 0))
    }
    assert evaluate.calibrate(ModelConfig(), {"errors": errors}).sigma_scale == (1.5, 1.0, 1.0)
    for ratio in (0.0, None, math.nan, math.inf):
        errors["Car"]["all"]["sigma_ratio"] = ratio
        assert evaluate.calibrate(ModelConfig(), {"errors": errors}).sigma_scale == ()
    assert evaluate.calibrate(ModelConfig(), {"NDS": 0.1}).sigma_scale == ()


def test_a_strangers_run_writes_nowhere_unasked(run, capsys, tmp_path):
    """Neither the cache nor the world of its config.json, unless the command line says so."""
    folder = tmp_path / "stranger"
    config = read_config(run / "best" / "config.json")
    data = dataclasses.replace(config.data, root=str(tmp_path / "elsewhere"), cache=str(tmp_path / "cache"))
    model = Detector(config.model)
    save_weights(folder / "best", model, dataclasses.replace(config, data=data), {}, {})
    place = tmp_path / "elsewhere"
    assert f"would render its world into {place}; data.root={place} allows that" in fail(capsys, folder)
    like = dataclasses.replace(data, val=(Source(kind="synthetic", like="data.train"),))  # rendered below here
    assert stay_at_home(dataclasses.replace(config, data=like), ()).data.val == like.val
    assert evaluate.main([str(folder), f"data.root={run / 'world'}"]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["stranger"]


def test_changed_weights_are_refused_by_name(run, capsys, tmp_path):
    shutil.copytree(run / "best", tmp_path / "best")
    content = (tmp_path / "best/model.safetensors").read_bytes()
    (tmp_path / "best/model.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "model.safetensors is damaged" in fail(capsys, tmp_path)


def test_an_evaluation_deletes_nobodys_files(run, capsys, tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results/notes.txt").write_text("mine")
    given = (run, f"data.root={run / 'world'}", "--out", tmp_path)
    assert "holds results of something else; --out chooses another folder" in fail(capsys, *given)
    assert (tmp_path / "results/notes.txt").read_text() == "mine"


def test_flags_that_a_run_would_ignore_are_refused(run, capsys):
    assert "unrecognized arguments: --classes" in fail(capsys, run, "--classes", "Car")
    sources = 'data.val=[{"root": "/data/mine", "split": ["val"]}]'
    assert "data.root=/data/kitti: no source reads it" in fail(capsys, run, sources, "data.root=/data/kitti")


def test_outputs_that_cannot_be_are_told_before_the_work(run, folders, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "evaluate", None)
    monkeypatch.setattr(kitti, "compute_metrics", lambda truth, results, classes: {})  # of nothing, to learn the names
    (folders / "taken").write_text("")
    files, no = ("--labels", folders / "label_2", "--results", folders / "results"), folders / "no"
    assert f"it cannot be written, as there is no folder {no}" in fail(capsys, *files, "--json", no / "x.json")
    assert f"{folders}: there is a folder of that name" in fail(capsys, *files, "--json", folders)
    given = (run, f"data.root={run / 'world'}", "--out", folders / "taken/out")
    assert f"--out {folders / 'taken/out'}: no folder can be made there: Not a directory" in fail(capsys, *given)
    given = (*given[:-1], folders / "out", "--json", no / "x.json")
    assert f"it cannot be written, as there is no folder {no}" in fail(capsys, *given)


def test_a_mistake_in_code_keeps_its_traceback(run, folders, monkeypatch):
    def broken(*_):
        raise PermissionError("by a mistake")

    monkeypatch.setattr(evaluate, "open_run", broken)
    monkeypatch.setattr(kitti_files, "read_folder", broken)
    files = ["--labels", str(folders / "label_2"), "--results", str(folders / "results")]
    for arguments in ([str(run)], files):
        with pytest.raises(PermissionError, match="by a mistake"):
            evaluate.main(arguments)


@pytest.fixture(scope="module")
def testing_half(run, tmp_path_factory):
    """Three images and calibrations of the run's world as the testing half of a KITTI folder, one of them of another
    size.
    """
    folder = tmp_path_factory.mktemp("testing")
    for name in ("image_2", "calib"):
        (folder / "testing" / name).mkdir(parents=True)
    [world] = (run / "world").glob("world*")
    for number, source in enumerate(sorted((world / "training/image_2").iterdir())[:3]):
        shutil.copy(source, folder / f"testing/image_2/{number:06d}.png")
        shutil.copy(world / f"training/calib/{source.stem}.txt", folder / f"testing/calib/{number:06d}.txt")
    image = folder / "testing/image_2/000001.png"
    with Image.open(image) as file:
        file.crop((0, 0, 500, 150)).save(image)
    return folder


def test_a_submission_is_what_the_server_takes(run, testing_half, capsys, tmp_path, monkeypatch):
    detect = Detector.detect

    def blind_once(self, image, K):  # the first frame holds nothing
        found = detect(self, image, K)
        return [{key: value[:0] for key, value in found[0].items()}, *found[1:]] if len(found) == 2 else found

    monkeypatch.setattr(Detector, "detect", blind_once)
    out = tmp_path / "submission"
    (out / "data").mkdir(parents=True)  # as a run that was killed leaves it
    assert evaluate.main([str(run), "--submission", str(out), f"data.root={testing_half}"]) == 0
    text = capsys.readouterr().out
    assert f"{out / 'data'}: 40 detections in 3 files, 1 of them empty" in text
    assert "the server expects 7518 files, as many as" in text
    assert "AP_R40" not in text
    assert [path.relative_to(out).as_posix() for path in sorted(out.rglob("*.*"))] == [
        f"data/00000{i}.txt" for i in range(3)
    ]
    assert (out / "data/000000.txt").read_text() == ""
    for id, (width, height) in (("000001", (500, 150)), ("000002", (640, 192))):
        rows = [line.split() for line in (out / f"data/{id}.txt").read_text().splitlines()]
        assert {len(row) for row in rows} == {16}
        assert {row[0] for row in rows} <= {"Car", "Pedestrian", "Cyclist"}
        assert {(row[1], row[2]) for row in rows} == {("-1.00", "-1")}
        numbers = np.array([row[3:] for row in rows], float)
        box, location, score = numbers[:, 1:5], numbers[:, 8:11], numbers[:, 12]
        assert (np.diff(score) <= 0).all()
        assert (box >= 0).all()
        assert (box <= np.tile([width - 1, height - 1], 2)).all()
        alpha = numbers[:, 11] - np.arctan2(location[:, 0], location[:, 2])
        assert np.abs(np.sin((alpha - numbers[:, 0]) / 2)).max() < 1e-3
    assert f"{out}: it holds something else already" in fail(capsys, run, "--submission", out)
    own = 'data.val=[{"root": "/data/mine", "split": ["val"]}]'  # whose root gives way to the one that is asked for
    again = ["--submission", str(tmp_path / "again"), own, f"data.root={testing_half}", "--split", "test"]
    assert evaluate.main([str(run), *again]) == 0
    assert "detections in 3 files" in capsys.readouterr().out


def test_classes_of_a_submission(tmp_path, capsys, run, testing_half):
    box = np.tile([1.0, 2, 3, 4], (3, 1))
    labels = make_labels(
        ["Van", "Car", "Pedestrian"], box, np.ones((3, 3)), np.ones((3, 3)), np.zeros(3), score=[0.9, 0.2, 0.3]
    )
    (tmp_path / "data").mkdir()
    sentence = "2 detections in 1 files, 0 of them empty; 1 of classes that the server does not know are left out"
    assert write_submission(tmp_path, {"000003": labels}) == f"{tmp_path / 'data'}: {sentence}"
    assert [line.split()[0] for line in (tmp_path / "data/000003.txt").read_text().splitlines()] == [
        "Pedestrian",
        "Car",
    ]
    message = fail(
        capsys, run, "--submission", tmp_path / "a", f"data.root={testing_half}", 'model.classes=["a","b","c"]'
    )
    assert "KITTI's server knows Car, Pedestrian, Cyclist, this run only a, b, c" in message


def test_submissions_that_make_no_sense(run, testing_half, capsys, tmp_path):
    assert "unrecognized arguments: --errors" in fail(capsys, run, "--submission", tmp_path / "a", "--errors")
    assert "unrecognized arguments: --split val" in fail(capsys, run, "--split", "val")
    assert "expected a run and a folder, got " in fail(capsys, "--submission", tmp_path / "a")
    assert "expected a KITTI folder with testing/image_2" in fail(
        capsys, run, "--submission", tmp_path / "a", f"data.root={tmp_path}"
    )
    assert "expected a KITTI folder with training/image_2" in fail(
        capsys, run, "--submission", tmp_path / "a", "--split", "val", f"data.root={testing_half}"
    )
    (tmp_path / "file").write_text("")
    assert "it holds something else already" in fail(capsys, run, "--submission", tmp_path / "file")
    shutil.copytree(testing_half / "testing", tmp_path / "odd/testing")
    for path in (tmp_path / "odd/testing").glob("*/000001.*"):
        path.rename(path.with_stem("1"))
    message = fail(capsys, run, "--submission", tmp_path / "a", f"data.root={tmp_path / 'odd'}")
    assert "frame 1 of split testing, expected a name of six digits" in message
    assert not (tmp_path / "a").exists()


def test_one_number_of_an_evaluation_by_its_path():
    truth = read_labels(INVENTED / "label_2" / "000005.txt")
    metrics = kitti.compute_metrics({"0": truth}, {"0": truth}, ("Car", "Pedestrian", "Tram"), repeat=41)
    car = evaluate.read_metric(metrics, "Car/3d/moderate/AP_R40")
    assert evaluate.read_metric(metrics, "Car/bbox/hard/AP_R11") > 0
    assert evaluate.read_metric(metrics, "-errors/Car/all/depth_error") == 0
    assert evaluate.read_metric(metrics, "-errors/Tram/all/depth_error") == evaluate.WORST  # nothing to average
    counted = [
        evaluate.read_metric(metrics, f"{c}/3d/moderate/AP_R40")
        for c in ("Car", "Pedestrian")
        if metrics["counted"][c]["hard"]
    ]
    assert evaluate.read_metric(metrics, "mean/3d/moderate/AP_R40") == pytest.approx(np.mean(counted))
    assert evaluate.read_metric({**metrics, "mine": 1.5}, "mine") == 1.5
    unknown = {**metrics, "Car": {"mine": None}, "Pedestrian": {"mine": None}, "Tram": {"mine": None}}
    assert evaluate.read_metric(unknown, "-mean/mine") == evaluate.WORST  # the sign goes along
    for name in (
        "Truck/3d/moderate/AP_R40",
        "Car/3d/moderate",
        "Car/4d/moderate/AP_R40",
        "Car/3d/moderate/AP_R40/x",
        "",
    ):
        with pytest.raises(ValueError, match=f"best={name}"):
            evaluate.read_metric(metrics, name)
    numbers = evaluate.flat_metrics(metrics)
    assert numbers["Car/3d/moderate/AP_R40"] == car
    assert numbers["errors/Car/all/depth_error"] == 0
    empty = kitti.compute_metrics({}, {}, ("Car",))
    assert evaluate.read_metric(empty, "mean/3d/moderate/AP_R40") == 0
    own = kitti.compute_metrics({"0": truth}, {"0": truth}, ("Car", "Tram"), own_overlap={"Tram": (0.4, 0.3, 0.2)})
    for overlap in ({"car": (0.5,) * 3}, {"Car": (90.0,) * 3}):
        with pytest.raises(UserError, match=r"data.overlap has '[cC]ar': .*, expected .* of one of Car, Tram"):
            refuse_overlaps(overlap, ("Car", "Tram"))
    assert own["settings"]["min_overlap"] == {"Car": [0.7, 0.7, 0.7], "Tram": [0.4, 0.3, 0.2]}


def test_evaluation_leaves_the_random_state_and_the_mode_alone(run):
    dataset = build_dataset(read_config(run / "best/config.json"), training=False)
    oracle = Oracle(dataset)
    before = torch.get_rng_state()
    evaluate.predict_dataset(oracle, dataset, Accelerator(cpu=True), batch_size=4)
    assert torch.equal(before, torch.get_rng_state())
    assert oracle.training


def test_a_frame_that_cannot_be_read_has_no_detections(run, tmp_path):
    """With data.skip_bad; and whose place in the order another frame has taken."""
    config = read_config(run / "best/config.json")
    shutil.copytree(run / "world", tmp_path / "world")
    data = dataclasses.replace(config.data, root=str(tmp_path / "world"), skip_bad=True)
    dataset = build_dataset(dataclasses.replace(config, data=data), training=False)
    bad = dataset.frames[2]
    detector = Detector.from_pretrained(run / "best")
    for content in (bad.image.read_bytes()[:2000], b""):  # the second has no header either
        bad.image.write_bytes(content)
        predictions = evaluate.predict_dataset(detector, dataset, Accelerator(cpu=True), batch_size=2)
        assert list(predictions) == [frame.id for frame in dataset.frames]
        assert [len(predictions[frame.id]) for frame in dataset.frames] == [20, 20, 0, 20, 20]


def test_a_folder_of_weights_is_still_one_after_its_evaluation(run, tmp_path):
    shutil.copytree(run / "best", tmp_path / "best")
    for _ in range(2):
        assert evaluate.main([str(tmp_path / "best"), f"data.root={run / 'world'}"]) == 0
    assert (tmp_path / "best/evaluation/metrics.json").is_file()
    verify(tmp_path / "best")


def test_frame_quality_and_best_score():
    truth = read_labels(INVENTED / "label_2" / "000005.txt")
    cars = truth[truth.name == "Car"]
    assert frame_quality(truth, cars, ("Car",)) == pytest.approx(1)
    assert frame_quality(truth, cars[:0], ("Car",)) == 0
    assert np.isnan(frame_quality(cars[:0], cars, ("Car",)))
    assert frame_quality(truth, cars[:1], ("Car",)) == pytest.approx(1 / len(cars))
    assert best_score(kitti_ap({"0": cars}, {"0": cars[:0]})) == 0.3
    results = dataclasses.replace(cars, score=np.linspace(0.5, 0.8, len(cars)))
    assert 0.5 <= best_score(kitti_ap({"0": cars}, {"0": results}, ("Car",))) < 0.81


def test_a_hopeless_class_does_not_decide_what_pictures_show():
    """One of thirty weak Cyclists meets the only one there is: the level stays where the many Cars are found."""
    names = ["Car"] * 20 + ["Cyclist"]
    box = np.array([[50.0 * i, 100, 50 * i + 40, 140] for i in range(21)])
    center, size, yaw = np.tile([0.0, 1, 20], (21, 1)), np.full((21, 3), 2.0), np.zeros(21)
    truth = make_labels(names, box, size, center, yaw)
    weak = np.concatenate([box[20:], box[:20] + np.array([0, 100, 0, 100])])
    found = make_labels(
        ["Car"] * 20 + ["Cyclist"] * 21,
        np.concatenate([box[:20], weak]),
        np.full((41, 3), 2.0),
        np.tile([0.0, 1, 20], (41, 1)),
        np.zeros(41),
        score=np.concatenate([np.linspace(0.9, 0.5, 20), np.full(21, 0.06)]),
    )
    assert best_score(kitti_ap({"0": truth}, {"0": found}, ("Car", "Cyclist"))) >= 0.5
