"""The picture of a run's course."""

import json

import numpy as np
from PIL import Image

from tools import training
from tools.training import draw_log, read_log, read_skipped


def test_the_log_of_a_run_that_went_on_is_read_once(tmp_path):
    lines = [
        {"mode": "train", "step": step, "loss": float(loss), "lr": 0.1, "grad_norm": 1.0, "time": 1.0, "data_time": 0.1}
        for step, loss in ((10, 5), (20, 4), (30, 3), (20, 4.5), (30, 3.5))
    ]
    lines.insert(3, {"mode": "val", "step": 30, "epoch": 1, "mAP": 0.2})
    text = "\n".join(map(json.dumps, lines)) + '\n5\n{"a": 1}\n{"mode": "train", "st\n'  # two of somebody else
    (tmp_path / "log.jsonl").write_text(text)
    train, evaluations = read_log(tmp_path / "log.jsonl")
    assert [(one["step"], one["loss"]) for one in train] == [(10, 5.0), (20, 4.5), (30, 3.5)]
    assert [one["mAP"] for one in evaluations] == [0.2]
    (tmp_path / "train.log").write_text(
        "2026-03-05 09:20:25,198 - WARNING - step 17 skipped, its gradient is not finite; process unknown: frames 7\n"
    )
    assert read_skipped(tmp_path / "train.log") == [17]
    draw_log(tmp_path)
    with Image.open(tmp_path / "training.png") as picture:
        marked = np.asarray(picture.convert("RGB"))
    assert (marked == training.SKIPPED).all(-1).any()
    assert training.main([str(tmp_path)]) == 0
    assert training.main([str(tmp_path / "nowhere")]) == 2
