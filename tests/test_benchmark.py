"""The benchmark runs, counts what it says it counts, and writes the keys that others read."""

import json
import os

import pytest
import torch
from conftest import ROOT, tiny

from benchmark import Count, main, prepare_model, table
from config import load_config


def test_every_number_is_there(tiny_run, tmp_path, capsys):
    words = [word for word in tiny(tiny_run[0], tmp_path / "out") if not word.startswith("data.workers")]
    assert main([str(tmp_path.parent / "none.py")]) == 2
    arguments = [str(ROOT / "configs/synthetic.py"), *words, "--rounds", "2", "--threads", "1", "--json", str(tmp_path / "b.json")]
    assert main(arguments) == 0
    found = json.loads((tmp_path / "b.json").read_text())
    ratios = ("train_step_over_backbone", "predict_over_backbone_forward", "peak_memory_over_backbone", "loader_over_bare_decode")
    for name in (*ratios, "cached_loader_over_loader", "step_gflop"):
        assert found[name] > 0, name
    assert 0 <= found["data_wait_share"] < 1
    assert found["host_syncs_per_step"] == 0
    assert set(found["targets_losses_ms"]) == set(found["operator_calls"]) == {"8", "30", "100"}
    assert len({*found["operator_calls"].values()}) == 1  # the work does not depend on the number of objects
    assert set(found["decode_nms_ms"]) == {"threshold", "900_candidates"}
    assert table(found) in capsys.readouterr().out


def test_a_checkpointed_backbone_is_measured_as_one():
    for on in (False, True):
        config = load_config(str(ROOT / "configs/kitti.py"), [f"train.checkpoint_backbone={str(on).lower()}"])
        net = prepare_model(config, torch.device("cpu"))
        assert any(getattr(module, "grad_checkpointing", False) for module in net.backbone.modules()) == on


def test_waits_are_counted():
    x = torch.arange(3.0)
    with Count() as count:
        x + 1
        x[x > 1]
        x.sum().item()
        x.nonzero()
    assert count.waits == 3
    assert count.calls["add"] == 1


@pytest.mark.skipif(not os.environ.get("DEEP3D_SLOW"), reason="compiles and launches for minutes; set DEEP3D_SLOW=1")
def test_growth_and_variants(tiny_run, tmp_path):
    words = [word for word in tiny(tiny_run[0], tmp_path / "out") if not word.startswith("data.workers")]
    arguments = [str(ROOT / "configs/synthetic.py"), *words, "--rounds", "2", "--threads", "1", "--json", str(tmp_path / "b.json")]
    assert main([*arguments, "--growth"]) == 0
    found = json.loads((tmp_path / "b.json").read_text())
    assert {len(values) for name, values in found.items() if name.startswith("step_s_over")} == {2, 3}
    assert main([*arguments, "--variants"]) == 0
    found = json.loads((tmp_path / "b.json").read_text())["variants"]
    assert set(found) == {"fp32", "bf16", "bf16 channels_last", "bf16 channels_last compile"}
    assert all(entry["step_s"] > 0 for entry in found.values())
