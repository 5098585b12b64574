"""Replaying a broken step: an overflow that only the norm shows is named, and what is no replay is refused in one sentence."""

import json
import math

import pytest

from guard import write_replay
from model import Detector, ModelConfig
from tools import replay


def test_replay_sees_a_norm_that_overflows_and_refuses_other_files(tiny_run, tmp_path, capsys):
    """Gradients up to 1e38 are finite in fp32, their squares are not."""
    config = json.loads((tiny_run[1] / "config.json").read_text())
    config["loss"]["loss_size"] = 1e30
    net = Detector(ModelConfig(**config["model"]))
    path = write_replay(tmp_path, config, net, {"step": 0, "process": 0, "losses": {}, "frames": [], "batches": [[(0, 1)], [(0, 2)]]})
    losses, findings = replay.replay(path)
    assert all(map(math.isfinite, losses.values()))
    assert len(findings) == 1
    assert findings[0].startswith("the gradient's norm is inf, although each")
    for text in ("[" * 100_000, "[1]", "3", "{", json.dumps({**json.loads(path.read_text()), "batches": [1]})):
        path.write_text(text)
        with pytest.raises(SystemExit) as stop:
            replay.main([str(path)])
        assert stop.value.code == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {path}: not a replay that train.py wrote: ")
