"""Configs: overrides by type, suggestions, run files, JSON, and that every field has a comment and a reader."""

import dataclasses
import json

import pytest
from conftest import ROOT

from config import Config, TrainConfig, describe, help_text, load_config, override, read_config, to_dict
from data import DataConfig, Source
from losses import LossConfig
from model import ModelConfig

RUN_FILES = sorted([*(ROOT / "configs").glob("*.py"), *(ROOT / "lab").glob("config_*.py")])


@pytest.mark.parametrize(
    ("text", "read", "value"),
    [
        ("train.lr=1e-4", lambda c: c.train.lr, 1e-4),
        ("train.lr=1", lambda c: c.train.lr, 1.0),
        ("train.steps=12", lambda c: c.train.steps, 12),
        ("out=runs/a=b", lambda c: c.out, "runs/a=b"),
        ("data.skip_bad=true", lambda c: c.data.skip_bad, True),
        ("data.skip_bad=0", lambda c: c.data.skip_bad, False),
        ("model.size=192,640", lambda c: c.model.size, (192, 640)),
        ("model.size=[192, 640]", lambda c: c.model.size, (192, 640)),
        ("model.classes=Car", lambda c: c.model.classes, ("Car",)),
        ("model.classes=Car,Tram", lambda c: c.model.classes, ("Car", "Tram")),
        ("data.neighbours=[]", lambda c: c.data.neighbours, ()),
        ("data.scale=0.9,1", lambda c: c.data.scale, (0.9, 1.0)),
        (
            "model.size_prior=[[4,1.5,2],[1,2,3],[1,1,1]]",
            lambda c: c.model.size_prior,
            ((4.0, 1.5, 2.0), (1.0, 2.0, 3.0), (1.0, 1.0, 1.0)),
        ),
        ('data.val=[{"split": ["a", "b"], "repeat": 2}]', lambda c: c.data.val, (Source(split=("a", "b"), repeat=2),)),
        (
            'data.train=[{"kind": "jsonl", "root": "x.jsonl", "rename": {"auto": "Car"}}]',
            lambda c: c.data.train,
            (Source(kind="jsonl", root="x.jsonl", rename={"auto": "Car"}),),
        ),
    ],
)
def test_overrides_are_read_by_type(text, read, value):
    got = read(override(Config(), [text]))
    assert got == value
    assert type(got) is type(value)


def test_overrides_combine_and_leave_the_original_alone():
    before = Config()
    after = override(before, ["train.lr=0.5", "train.steps=3", "seed=4", "train.lr=0.25"])
    assert (after.train.lr, after.train.steps, after.seed) == (0.25, 3, 4)
    assert before == Config()


def test_a_root_that_no_source_reads_is_refused(tmp_path):
    """It would do nothing: each source names its own."""
    path, sources = tmp_path / "run.py", 'train=(Source(root="/data/mine"),), val=(Source(root="{}"),)'
    for root in ("/data/mine", ""):
        path.write_text(
            "from config import Config\nfrom data import DataConfig, Source\n"
            f"config = Config(data=DataConfig({sources.format(root)}))\n"
        )
        if root:
            with pytest.raises(
                ValueError,
                match=r"data\.root=/x: no source reads it, as each names a root of its own, such as /data/mine",
            ):
                load_config(path, ["data.root=/x"])
        else:
            assert load_config(path, ["data.root=/x"]).data.root == "/x"


def test_keys_that_only_fit_together_may_be_given_together():
    changed = override(
        Config(),
        ["model.strides=8,16", "model.level_sizes=64", "loss.loss_alpha_constrain=1", "model.predict_yaw=true"],
    )
    assert changed.model.strides == (8, 16)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train.lr", r"'train\.lr': expected key=value"),
        ("train.lrr=1", r"unknown key 'train\.lrr'; did you mean train\.lr.*\(python train\.py --help lists all\)"),
        ("trian.lr=1", r"unknown key 'trian\.lr'; did you mean train\.lr"),
        ("lr=1", r"unknown key 'lr'"),
        ("train.lr.x=1", r"unknown key 'train\.lr\.x'"),
        ("train=1", r"'train' is a section, expected one of its keys, such as train\.batch_size"),
        ("train.steps=1.5", r"train\.steps=1\.5: expected a whole number"),
        ("train.lr=fast", r"train\.lr=fast: expected a number"),
        ("train.lr=nan", r"train\.lr=nan: expected a finite number"),
        ("data.skip_bad=maybe", r"data\.skip_bad=maybe: expected true or false"),
        ("model.size=192", r"model\.size: expected 2 values, got 1"),
        ("model.size=a,b", r"model\.size: expected int, got 'a'"),
        ("model.size=192,640.5", r"model\.size: expected int, got 640\.5"),
        ('data.train=[{"splits": ["a"]}]', r"data\.train: unknown key 'splits', expected split"),
        ('data.train=[{"split": "a"}]', r"data\.train\.split: expected a list, got 'a'"),
        (
            "data.train=train",
            r"data\.train: expected an object with keys kind, root, split, repeat, share, .*, got 'train'",
        ),
        ("train.batch_size=0", r"train\.batch_size is 0, expected at least 1"),
        ("train.schedule=linear", r"train\.schedule is 'linear', expected one of cosine, step, constant"),
        ("train.lr=-1", r"expected 0 < lr"),
        ("train.ema=1", r"0 <= beta2, ema < 1"),
        ("loss.loss_alpha_constrain=1", r"it needs model\.predict_yaw=true"),
        ("loss.loss_cls=0", r"loss\.loss_cls is 0, expected > 0"),
        ("loss.loss_size=-1", r"loss\.loss_size is -1\.0, expected a finite weight >= 0"),
        ("data.scale=2,1", r"data: expected 0\.1 <= scale low <= high"),
        ("data.flip=2", r"0 <= flip <= 1"),
        ("seed=-1", r"0 <= seed < 2\^32"),
        ("train.beta2=1", r"0 <= beta2, ema < 1"),
        ("model.channels=130", r"model\.channels is 130, expected a multiple of 32, or of 4 below 128"),
        ("model.tower_convs=0", r"model\.tower_convs is 0, expected at least 1"),
        ("model.strides=16,8", r"model\.strides is \(16, 8\), expected px per cell, ascending"),
    ],
)
def test_mistakes_are_named(text, words):
    with pytest.raises(ValueError, match=words) as error:
        override(Config(), [text])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda p: p.stem)
def test_run_files_load_and_survive_json(path, tmp_path):
    config = load_config(path)
    assert config.out.startswith("runs/")
    assert path.read_text().startswith('"""')
    name = "" if path.stem == "synthetic" else f" {path.relative_to(ROOT)}"
    assert f"train.py{name}" in path.read_text().split('"""')[1]
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    assert read_config(tmp_path / "config.json") == config


def test_run_files_are_there():
    names = {path.stem for path in RUN_FILES}
    assert names >= {"synthetic", "kitti", "kitti_large", "kitti_overfit", "deep3d", "nuscenes", "nuscenes_mini_world"}


def test_all_twelve_losses_run_in_deep3d():
    assert all(weight > 0 for weight in dataclasses.asdict(load_config(ROOT / "configs/deep3d.py").loss).values())
    assert len(dataclasses.fields(LossConfig)) == 12 + 2  # and those of outputs that only some models have


def test_wrong_run_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.py: no such config file; in .* are .*kitti\.py"):
        load_config(tmp_path / "none.py")
    (tmp_path / "a.yaml").write_text("lr: 1")
    with pytest.raises(ValueError, match=r"a\.yaml: expected a Python run file"):
        load_config(tmp_path / "a.yaml")
    (tmp_path / "b.py").write_text("config = 3\n")
    with pytest.raises(ValueError, match=r"b\.py: expected a variable `config` holding a config\.Config, got int"):
        load_config(tmp_path / "b.py")


def test_wrong_json_is_named(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not JSON"):
        read_config(path)
    path.write_text(json.dumps({"trian": {}}))
    with pytest.raises(ValueError, match=r"config\.json: unknown key 'trian', expected train"):
        read_config(path)
    path.write_text(json.dumps({"train": {"lr": "fast"}}))
    with pytest.raises(ValueError, match=r"config\.json\.train\.lr: expected float, got 'fast'"):
        read_config(path)


def test_help_explains_every_key():
    described = describe(Config())
    sections = {"data.": DataConfig, "model.": ModelConfig, "loss.": LossConfig, "train.": TrainConfig}
    fields = [prefix + field.name for prefix, owner in sections.items() for field in dataclasses.fields(owner)]
    fields += [field.name for field in dataclasses.fields(Config) if field.name + "." not in sections]
    assert sorted(described) == sorted(fields)
    text = help_text(Config())
    for key, (_, comment) in described.items():
        if key != "model.classes":  # speaks for itself
            assert comment, key
        assert f"  {key}=" in text


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().out = "x"


def test_a_run_file_with_a_value_of_another_type_is_refused(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from config import Config, TrainConfig\nconfig = Config(seed=0, train=TrainConfig(optimizer=3))\n")
    with pytest.raises(ValueError, match=r"mine\.py\.train\.optimizer: expected str, got 3"):
        load_config(path)
    path.write_text("from config import Config, TrainConfig\nconfig = Config(seed=0, train=TrainConfig(lr=1))\n")
    assert type(load_config(path).train.lr) is float
