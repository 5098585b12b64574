"""The repository as a whole: who imports whom, nothing happens on import, and what the README names exists."""

import ast
import os
import re
import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT

FOLDERS = ("engine", "scene", "formats", "metrics", "world", "tools", "lab")
PATHS = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))]
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text()) for path in PATHS}
ROOMS = {folder: {name for name in MODULES if name.startswith(f"{folder}.")} for folder in FOLDERS}
CORE = (
    {name for name in MODULES if "." not in name}
    | ROOMS["engine"]
    | ROOMS["scene"]
    | {"formats.kitti", "formats.odd", "metrics.kitti", "metrics.kitti_files", "metrics.kitti_notes"}
)
COMMANDS = {"train", "predict", "export"}
BELOW = ROOMS["scene"]
MAY_IMPORT = {  # module, or all of a room: the project's modules that it may import; core never an extra
    "scene": BELOW,
    "formats": BELOW | ROOMS["formats"] | ROOMS["world"],
    "metrics": BELOW | ROOMS["formats"] | ROOMS["metrics"],
    "world": BELOW | ROOMS["world"] | ROOMS["formats"],
    "targets": BELOW,
    "losses": BELOW,
    "model": BELOW,
    "data": BELOW,
    "config": BELOW | {"data", "losses", "model"},
    "engine": BELOW | ROOMS["engine"] | {"config", "model"},
    "evaluate": BELOW | ROOMS["engine"] | {"config", "data", "model"},
    "train": CORE - COMMANDS,
    "predict": CORE - COMMANDS,
    "export": CORE - COMMANDS | {"predict"},
}


def imports_of(tree, top_only):
    """Names of the project's modules that a tree imports."""
    nodes = tree.body if top_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & set(MODULES)


@pytest.mark.parametrize("module", sorted(set(MODULES) - ROOMS["tools"] - ROOMS["lab"]))
def test_modules_import_only_what_they_may(module):
    may = MAY_IMPORT.get(module) or MAY_IMPORT[module.partition(".")[0]]
    assert imports_of(MODULES[module], top_only=False) <= may - {module}


def test_an_installed_module_hides_no_folder(tmp_path):
    """Without __init__.py a module named metrics anywhere on the path, such as onnxruntime's, comes before metrics/."""
    for folder in FOLDERS:
        (tmp_path / f"{folder}.py").write_text("")
    code = "import sys; from importlib.util import find_spec; print(*(find_spec(name).origin for name in sys.argv[1:]))"
    command, paths = [sys.executable, "-c", code, *FOLDERS], os.environ | {"PYTHONPATH": str(tmp_path)}
    origins = subprocess.run(command, cwd=ROOT, env=paths, capture_output=True, text=True, check=True).stdout.split()
    assert origins == [str(ROOT / folder / "__init__.py") for folder in FOLDERS]


def test_core_imports_no_extra():
    extras = set(MODULES) - CORE
    assert not {name: found for name in CORE if (found := imports_of(MODULES[name], top_only=False) & extras)}


def test_there_are_no_import_cycles_and_nothing_imports_train_or_tools():
    graph = {name: imports_of(tree, top_only=False) for name, tree in MODULES.items()}
    outer = {"train"} | ROOMS["tools"] | ROOMS["lab"]
    assert not [name for name, imported in graph.items() if name not in outer and imported & outer]

    def reach(name, path):
        assert name not in path, " -> ".join([*path, name])
        for other in graph[name]:
            reach(other, [*path, name])

    for name in graph:
        reach(name, [])


def test_the_first_screen_shows_a_handful():
    names = {path.stem for path in ROOT.glob("*.py")}
    assert names == {"train", "model", "data", "losses", "targets", "config", "evaluate", "predict", "export"}
    assert not list(ROOT.glob("*/*/*.py"))


def test_an_installed_project_holds_every_module():
    """`pip install -e .` lists them one by one: setuptools finds no modules beside several folders."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert sorted(listed["py-modules"]) == sorted(path.stem for path in ROOT.glob("*.py"))
    assert listed["packages"] == ["engine", "formats", "metrics", "scene", "tools", "world"]


CHECK = """
import os, sys, threading
import torch, numpy
def state():
    # torch names its own cache folder at times
    own = {k: v for k, v in os.environ.items() if not k.startswith("TORCHINDUCTOR")}
    threads = torch.get_num_threads(), threading.active_count()
    return torch.get_rng_state(), numpy.random.get_state()[1].tolist(), *threads, own
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
    modules = (
        "scene.geometry, scene.frames, data, formats.kitti, formats.jsonl, world.street, metrics.kitti, scene.draw"
    )
    assert import_quietly(f"{modules}, targets") == []


def test_the_detector_needs_no_formats():
    rooms = "('formats', 'metrics', 'data')"
    code = f"import sys; from model import Detector; print(*[m for m in sys.modules if m.split('.')[0] in {rooms}])"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split()
        == []
    )


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
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / line for line in listed.stdout.splitlines()]
    return [
        p
        for p in paths
        if p.is_file() and p.suffix in (".py", ".md", ".toml", ".txt", ".sh", ".json", "") and p.stat().st_size < 2e6
    ]


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
    return (ROOT / "README.md").read_text()


def test_ci_runs_what_the_readme_says(readme):
    """.ci/run takes both set-up commands out of the README by these patterns, and installs nothing else beside the
    tests."""
    ci = (ROOT / ".ci/run").read_text()
    patterns = re.findall(r"grep -m 1 '(.*)' README\.md", ci)
    assert len(patterns) == 2
    found = [[line for line in readme.splitlines() if re.match(pattern, line)] for pattern in patterns]
    assert [len(lines) for lines in found] == [1, 1]
    main, tests = (lines[0].partition("  #")[0].strip() for lines in found)
    assert main == "pip install -r requirements.txt && python train.py"
    assert tests == "pip install -r requirements.txt -r tests/requirements.txt && python -m pytest -n 2"
    assert re.findall(r"pip\S* install ([^\n]*)", ci.replace("pip install .*", "")) == ["ruff"]


def test_the_readme_is_short(readme):
    assert len(readme.splitlines()) <= 120
    assert len(readme.split()) <= 1100
    assert (ROOT / "RESULTS.md").stat().st_size <= 20_000


def test_files_that_the_readme_names_exist(readme):
    named = set(
        re.findall(
            r"(?<![\w/.-])((?:configs/|tests/|docs/|formats/|metrics/|tools/|lab/|engine/|scene/)?[\w]+\.(?:py|sh|txt|png|jpg))(?![\w/])",
            readme,
        )
    )
    named |= set(re.findall(r"\]\(([^)#:]+)\)", readme))
    folders = ("configs/", "tests/", "docs/", "formats/", "metrics/", "tools/")
    ours = {n for n in named if n.startswith(folders) or n.endswith((".py", ".sh")) or n == "requirements.txt"}
    assert {"train.py", "evaluate.py", "predict.py"} <= ours
    assert [name for name in ours if not (ROOT / name).exists()] == ["mine.py"]  # the reader's own
    for module in re.findall(r"python -m ((?:tools|formats|metrics|lab)\.\w+)", readme):
        assert module in MODULES


def test_the_readme_lists_every_file_at_the_root(readme):
    assert not [path.name for path in ROOT.glob("*.py") if f"`{path.name}`" not in readme]


def test_keys_that_the_readme_uses_exist(readme):
    from config import Config, describe

    keys = set(re.findall(r"\b((?:data|model|loss|train)\.\w+)=", readme))
    assert keys <= set(describe(Config()))


def test_the_documents_name_every_loss(readme):
    from losses import LossConfig

    assert not [
        name for name in LossConfig.__dataclass_fields__ if name not in readme + (ROOT / "RESULTS.md").read_text()
    ]


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
