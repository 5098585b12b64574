"""The command line on files, and a run evaluated by one and by two processes."""

import dataclasses
import json
import math
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

import evaluate
from config import Config, read_config, to_dict
from data import DataConfig, Source, build_dataset
from engine.checkpoint import save_weights
from formats.jsonl import read_frames
from formats.kitti import read_labels, write_labels
from metrics.kitti import kitti_ap
from model import Detector, ModelConfig
from scene.draw import best_score, frame_quality
from scene.frames import make_labels

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


def run_files(folder, *more, labels="label_2", results="results"):
    evaluate.main(["--labels", str(folder / labels), "--results", str(folder / results), *more])


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
    with pytest.raises(SystemExit) as caught:
        evaluate.main([str(argument) for argument in arguments])
    assert caught.value.code == 2
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
    labels, results = folders / "label_2", folders / "results"
    assert "expected either a run folder, or --labels DIR and --results DIR" in fail(capsys)
    assert "an evaluation of files needs --results as well" in fail(capsys, "--labels", labels)
    assert "an evaluation of files needs --labels as well" in fail(capsys, "--results", results)
    assert "a run folder does not go with an evaluation of files" in fail(
        capsys, "runs/x", "--labels", labels, "--results", results
    )
    expected = "--out does not go with an evaluation of files, which takes --labels, --results, --split, --classes, --metric, --overlap, --repeat"
    assert expected in fail(capsys, "--labels", labels, "--results", results, "--out", folders)
    assert "--flip does not go with an evaluation of files" in fail(
        capsys, "--labels", labels, "--results", results, "--flip"
    )
    assert "--repeat is 0" in fail(capsys, "--labels", labels, "--results", results, "--repeat", 0)
    assert f"--labels {folders / 'nowhere'}: no such folder" in fail(
        capsys, "--labels", folders / "nowhere", "--results", results
    )
    assert f"did you mean {labels}?" in fail(capsys, "--labels", folders, "--results", results)
    assert f"did you mean {results}?" in fail(capsys, "--labels", labels, "--results", folders)
    assert "no such split file" in fail(
        capsys, "--labels", labels, "--results", results, "--split", folders / "val.txt"
    )
    assert "--labels is empty, expected a folder" in fail(capsys, "--labels", "", "--results", "")
    assert "--classes names 'Bus', which no file does; there are " in fail(
        capsys, "--labels", labels, "--results", results, "--classes", "Bus"
    )
    (folders / "val.txt").write_bytes(b"\xff")
    assert "val.txt: not a text file" in fail(
        capsys, "--labels", labels, "--results", results, "--split", folders / "val.txt"
    )
    (folders / "val.txt").write_text("000000 000007")
    assert "000007.txt: no label file" in fail(
        capsys, "--labels", labels, "--results", results, "--split", folders / "val.txt"
    )
    (folders / "val.txt").write_text("000000 000000")
    assert "frame 000000 is listed twice" in fail(
        capsys, "--labels", labels, "--results", results, "--split", folders / "val.txt"
    )
    assert "runs/nowhere: no such folder, expected a run or a checkpoint" in fail(capsys, "runs/nowhere")
    assert "no weights there" in fail(capsys, folders)


def test_a_full_disk_is_one_sentence(folders, capsys):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    assert "No space left on device" in fail(
        capsys, "--labels", folders / "label_2", "--results", folders / "results", "--json", "/dev/full"
    )


def test_files_mode_needs_neither_timm_nor_accelerate(folders):
    code = (
        f"import sys, evaluate; evaluate.main(['--labels', {str(folders / 'label_2')!r}, '--results', {str(folders / 'results')!r}]); "
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
    build_dataset(data, source, model.classes, model.size, training=False)  # rendered
    config = Config(out=str(folder), data=data, model=model)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=2))
    torch.manual_seed(0)
    save_weights(folder / "best", Detector(model), to_dict(config), {}, {})
    return folder


def run_processes(count, *arguments):
    """Outputs of evaluate.py in as many processes, joined as `accelerate launch` joins them, without its own seconds of start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    processes = []
    for rank in range(count):
        environment = shared | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
        }
        command = [sys.executable, str(ROOT / "evaluate.py"), *arguments]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * count, outputs[0][1][-2000:]
    return [text for text, _ in outputs]


def test_a_run_is_evaluated_alike_by_one_and_two_processes(run, capsys):
    evaluate.main([str(run), "--out", str(run / "one"), "--curves", str(run / "one/also.png")])
    assert (run / "one/also.png").exists()
    assert "AP_R40, per cent: 5 frames" in capsys.readouterr().out
    outputs = run_processes(2, str(run), "--out", str(run / "two"))
    assert [text.count("AP_R40, per cent: 5 frames") for text in outputs] == [1, 0]
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
    for name in ("predictions.jsonl", "curves.png", "worst.png"):
        assert (run / "one" / name).stat().st_size > 1000
    frames = read_frames(run / "one" / "predictions.jsonl")
    assert [len(frame.labels) for frame in frames] == [20] * 5
    assert np.isfinite(frames[0].labels.sigma).all()


def test_a_run_is_evaluated_with_mirror_images_on_request(run, monkeypatch):
    seen = []
    monkeypatch.setattr(
        evaluate, "write_evaluation", lambda out, dataset, metrics, found: seen.append((dataset.frames, found))
    )
    evaluate.main([str(run), "--flip"])
    [(frames, found)] = seen
    detector = Detector.from_pretrained(run / "best")
    plain, both = (detector.predict(frames[0].image, frames[0].K, flip=flip) for flip in (False, True))
    np.testing.assert_allclose(found[frames[0].id].score, both.score, atol=1e-4)
    assert not np.allclose(plain.score, both.score, atol=1e-4)
    assert len(found) == 5


def test_a_process_count_that_was_not_granted_is_an_error(run, capsys, monkeypatch):
    accelerator = Accelerator(cpu=True)  # before the environment says that there are more
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr("guard.Accelerator", lambda **_: accelerator)
    message = fail(capsys, run)
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

    def detect(self, image, K, flip=False):
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
    config = DataConfig(root=str(KITTI), val=(Source(split=("val",)),))
    classes = ("Car", "Pedestrian", "Cyclist")
    dataset = build_dataset(config, config.val, classes, (384, 1280), training=False)
    metrics, predictions = evaluate.evaluate(
        Oracle(dataset), dataset, Accelerator(cpu=True), Config(data=config), repeat=41
    )
    evaluate.write_evaluation(tmp_path, dataset, metrics, predictions)
    for id, labels in predictions.items():
        write_labels(tmp_path / f"{id}.txt", labels, scores=True)  # with KITTI's two digits too
    truth = {id: dataset.truth(i) for i, id in enumerate(dataset.ids)}
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
    """By the ratio of its errors; a class with few objects, or none that tells one, keeps its own; no factors at all for nuScenes."""
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
    save_weights(folder / "best", model, to_dict(dataclasses.replace(config, data=data)), {}, {})
    assert f"would render the built-in world into {tmp_path / 'elsewhere'}; data.root=FOLDER" in fail(capsys, folder)
    evaluate.main([str(folder), f"data.root={run / 'world'}"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["stranger"]


def test_changed_weights_are_refused_by_name(run, capsys, tmp_path):
    shutil.copytree(run / "best", tmp_path / "best")
    content = (tmp_path / "best/model.safetensors").read_bytes()
    (tmp_path / "best/model.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "model.safetensors is damaged" in fail(capsys, tmp_path)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        Detector.from_pretrained(tmp_path / "best")


def test_an_evaluation_deletes_nobodys_files(run, capsys, tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results/notes.txt").write_text("mine")
    assert "holds results of something else; --out chooses another folder" in fail(capsys, run, "--out", tmp_path)
    assert (tmp_path / "results/notes.txt").read_text() == "mine"


def test_flags_that_a_run_would_ignore_are_refused(run, capsys):
    assert "--classes does not go with a run folder, which takes key=value, --flip, --out, --metric" in fail(
        capsys, run, "--classes", "Car"
    )
    sources = 'data.val=[{"root": "/data/mine", "split": ["val"]}]'
    assert "data.root=/data/kitti: no source reads it" in fail(capsys, run, sources, "data.root=/data/kitti")


def test_outputs_that_cannot_be_are_told_before_the_work(run, folders, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "evaluate", None)
    monkeypatch.setattr(evaluate, "compute_metrics", None)
    (folders / "taken").write_text("")
    files = ("--labels", folders / "label_2", "--results", folders / "results")
    for given in ((run,), files):
        assert f"it cannot be written, as there is no folder {folders / 'no'}" in fail(
            capsys, *given, "--json", folders / "no/x.json"
        )
        assert f"{folders}: there is a folder of that name" in fail(capsys, *given, "--json", folders)
        assert "not a picture's suffix, expected a name such as curves.png" in fail(
            capsys, *given, "--curves", folders / "c.psd"
        )
    assert f"{folders / 'taken'} is a file, expected a folder to write into" in fail(
        capsys, run, "--out", folders / "taken/out"
    )


@pytest.fixture(scope="module")
def testing_half(run, tmp_path_factory):
    """Three images and calibrations of the run's world as the testing half of a KITTI folder, one of them of another size."""
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

    def blind_once(self, image, K, flip):  # the first frame holds nothing
        found = detect(self, image, K, flip)
        return [{key: value[:0] for key, value in found[0].items()}, *found[1:]] if len(found) == 2 else found

    monkeypatch.setattr(Detector, "detect", blind_once)
    out = tmp_path / "submission"
    (out / "data").mkdir(parents=True)  # as a run that was killed leaves it
    evaluate.main([str(run), "--submission", str(out), f"data.root={testing_half}"])
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
    assert f"--submission {out}: it holds something else already" in fail(capsys, run, "--submission", out)
    own = 'data.val=[{"root": "/data/mine", "split": ["val"]}]'  # whose root gives way to the one that is asked for
    evaluate.main([str(run), "--submission", str(tmp_path / "again"), own, f"data.root={testing_half}"])
    assert "detections in 3 files" in capsys.readouterr().out


def test_classes_of_a_submission(tmp_path, capsys, run, testing_half):
    box = np.tile([1.0, 2, 3, 4], (3, 1))
    labels = make_labels(
        ["Van", "Car", "Pedestrian"], box, np.ones((3, 3)), np.ones((3, 3)), np.zeros(3), score=[0.9, 0.2, 0.3]
    )
    assert evaluate.write_submission(tmp_path, {"000003": labels}) == (2, 1)
    assert [line.split()[0] for line in (tmp_path / "data/000003.txt").read_text().splitlines()] == [
        "Pedestrian",
        "Car",
    ]
    message = fail(
        capsys, run, "--submission", tmp_path / "a", f"data.root={testing_half}", 'model.classes=["a","b","c"]'
    )
    assert "KITTI's server knows Car, Pedestrian, Cyclist, this run only a, b, c" in message


def test_submissions_that_make_no_sense(run, testing_half, capsys, tmp_path):
    for given in (
        "--json x",
        "--curves x",
        "--labels x",
        "--out x",
        "--metric R40",
        "--overlap strict",
        "--errors",
        "--repeat 1",
    ):
        message = fail(capsys, run, "--submission", tmp_path / "a", *given.split())
        assert (
            f"{given.split()[0]} does not go with --submission DIR, which takes a run folder, key=value, --split, --flip\n"
            in message
        )
    assert "--submission DIR needs a run folder as well" in fail(capsys, "--submission", tmp_path / "a")
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
    metrics = evaluate.compute_metrics({"0": truth}, {"0": truth}, ("Car", "Pedestrian", "Tram"), repeat=41)
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
    empty = evaluate.compute_metrics({}, {}, ("Car",))
    assert evaluate.read_metric(empty, "mean/3d/moderate/AP_R40") == 0
    own = evaluate.compute_metrics({"0": truth}, {"0": truth}, ("Car", "Tram"), own_overlap={"Tram": (0.4, 0.3, 0.2)})
    assert own["settings"]["min_overlap"] == {"Car": [0.7, 0.7, 0.7], "Tram": [0.4, 0.3, 0.2]}


def test_evaluation_leaves_the_random_state_and_the_mode_alone(run):
    config = dataclasses.replace(DataConfig(), root=str(run / "world"))
    source = (Source(kind="synthetic", split=("val",), world_frames=5),)
    dataset = build_dataset(config, source, ("Car",), (96, 320), training=False)
    oracle = Oracle(dataset)
    before = torch.get_rng_state()
    evaluate.predict_dataset(oracle, dataset, Accelerator(cpu=True), batch_size=4, progress=False)
    assert torch.equal(before, torch.get_rng_state())
    assert oracle.training


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
