"""The house stays small: a KITTI run imports no extra, and no more than it needs."""

import shutil

import pytest
from conftest import ROOT

from lab.measure_house import AIMS, closure, core_files, count_lines, is_extra, measure_loop

pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="not a git checkout")


def test_extras_are_told_from_the_core():
    """That no core file imports one is tested in test_repository.py."""
    assert {"train.py", "formats/kitti.py", "metrics/kitti.py", "engine/guard.py", "scene/draw.py"} <= {*core_files()}
    assert all(map(is_extra, ("formats/jsonl.py", "metrics/nuscenes.py", "world/street.py", "tools/benchmark.py")))


def test_a_kitti_run_imports_no_more_than_it_needs():
    files = closure()
    assert {"train.py", "model.py", "evaluate.py", "formats/kitti.py", "metrics/kitti.py", "scene/draw.py"} <= {*files}
    assert [path for path in files if is_extra(path)] == []
    assert len(files) <= AIMS["closure files"]
    assert sum(map(count_lines, files)) <= 1.05 * AIMS["closure lines"]  # an estimate


def test_the_loop_is_measured():
    measures = measure_loop()
    assert set(measures) <= set(AIMS)
    assert measures["train() lines"] > 20
    assert measures["train() own names"] > 5
