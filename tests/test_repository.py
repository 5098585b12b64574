"""The repository as a whole: who imports whom, nothing happens on import, and what the README names exists."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

MODULES = {path.stem: ast.parse(path.read_text()) for path in ROOT.glob("*.py")}
READERS = {"data_kitti", "data_json", "data_synthetic"}
MAY_IMPORT = {  # module: the project's modules that it may import at its top
    "geometry": set(),
    "data_kitti": {"geometry"},
    "data_json": {"geometry", "data_kitti"},
    "data_synthetic": {"geometry", "data_kitti"},
    "data": {"geometry", *READERS},
    "metrics": {"geometry", "data_kitti"},
    "draw": {"geometry", "data_kitti"},
    "targets": {"geometry"},
    "model": {"geometry", "data"},  # predict places an image as the data does
    "losses": {"geometry"},
    "checkpoint": set(),
    "config": {"data", "losses", "model"},
}


def imports_of(tree, top_only):
    """Names of the project's modules that a tree imports."""
    nodes = tree.body if top_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found & set(MODULES)


@pytest.mark.parametrize("module", sorted(MAY_IMPORT))
def test_modules_import_only_what_they_may(module):
    assert imports_of(MODULES[module], top_only=True) <= MAY_IMPORT[module]


def test_there_are_no_import_cycles_and_nothing_imports_train():
    graph = {name: imports_of(tree, top_only=False) for name, tree in MODULES.items()}
    assert not [name for name, imported in graph.items() if "train" in imported]

    def reach(name, path):
        assert name not in path, " -> ".join([*path, name])
        for other in graph[name]:
            reach(other, [*path, name])

    for name in graph:
        reach(name, [])


CHECK = """
import os, sys, threading
import torch, numpy
def state():
    own = {k: v for k, v in os.environ.items() if not k.startswith("TORCHINDUCTOR")}  # torch names its own cache folder at times
    return torch.get_rng_state(), numpy.random.get_state()[1].tolist(), torch.get_num_threads(), threading.active_count(), own
before = state()
import {module}
after = state()
assert torch.equal(before[0], after[0]), "torch's generator moved"
for name, a, b in zip(("numpy's generator", "threads of torch", "threads", "environment"), before[1:], after[1:]):
    assert a == b, (name, a, b)
print(*[m for m in ("timm", "accelerate", "matplotlib", "tensorboard", "wandb") if m in sys.modules])
"""


def import_quietly(modules):
    code = CHECK.replace("{module}", modules)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    return done.stdout.split()


def test_reading_data_and_computing_metrics_need_neither_timm_nor_accelerate():
    assert import_quietly("geometry, data, data_kitti, data_json, data_synthetic, metrics, draw, targets, checkpoint") == []


def test_importing_everything_changes_nothing():
    loaded = import_quietly(", ".join(sorted(MODULES)))
    assert set(loaded) <= {"timm", "accelerate"}


def test_modules_are_documented():
    for name, tree in MODULES.items():
        assert ast.get_docstring(tree), name
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{name}.{node.name}"


def text_files():
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / line for line in listed.stdout.splitlines()]
    return [p for p in paths if p.is_file() and p.suffix in (".py", ".md", ".toml", ".txt", ".sh", ".json", "") and p.stat().st_size < 2e6]


def test_no_file_knows_one_machine():
    homes = re.compile(r"(?<![\w.])/(?:home|root|Users|work|mnt)/\w+")
    for path in text_files():
        if path.name != "test_repository.py":
            assert not homes.search(path.read_text(errors="ignore")), path


def test_files_are_under_an_open_licence_and_clean():
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    for path in text_files():
        if path.suffix == ".py":
            assert path.read_text().endswith("\n"), path


@pytest.fixture(scope="module")
def readme():
    if not (ROOT / "README.md").is_file():
        pytest.skip("no README.md yet")
    return (ROOT / "README.md").read_text()


def test_files_that_the_readme_names_exist(readme):
    named = set(re.findall(r"(?<![\w/.-])((?:configs/|tests/|assets/|docs/)?[\w]+\.(?:py|sh|txt|png|jpg))(?![\w/])", readme))
    named |= set(re.findall(r"\]\(([^)#:]+)\)", readme))
    folders = ("configs/", "tests/", "assets/", "docs/")
    ours = {n for n in named if n.startswith(folders) or n.endswith((".py", ".sh")) or n == "requirements.txt"}
    assert {"train.py", "evaluate.py", "predict.py"} <= ours
    assert not [name for name in ours if not (ROOT / name).exists()]


def test_keys_that_the_readme_uses_exist(readme):
    from config import Config, describe

    keys = set(re.findall(r"\b((?:data|model|loss|train)\.\w+)=", readme))
    assert keys <= set(describe(Config()))


def test_the_readme_names_every_loss(readme):
    from losses import LossConfig

    assert not [name for name in LossConfig.__dataclass_fields__ if name not in readme]


def test_the_config_that_the_readme_shows_is_one(readme):
    from config import Config
    from data import DataConfig
    from model import ModelConfig

    (block,) = (block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "DataConfig" in block)
    names = {}
    exec(block, names)
    assert isinstance(names["config"], Config)
    assert isinstance(names["config"].data, DataConfig)
    assert isinstance(names["config"].model, ModelConfig)
