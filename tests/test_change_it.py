"""README's "Change it": a copy of the project with each of those edits made, which must be one place, trains and shows
every effect."""

import json
import shutil

import forked
import torch
from conftest import ROOT, tiny
from safetensors.torch import load_file
from test_train import losses_of, records

DETECTOR = "    net = Detector(dataclasses.replace(config.model, pretrained=pretrained))\n"
STEP = "losses = find_losses(net, logits, raw, target, batch, config.loss, positives, best_cells)\n"
METRICS = "    return metrics\n"
RNG = "        rng = np.random.default_rng((self.seed, epoch, index))\n"
VALIDATE = "result = validate(config, accelerator, average.module, val_set, log, done)\n"
EDITS = {  # what README calls it: (file, the one place, what stands there then)
    "Optimizer": (
        "train.py",
        "make_optimizer(net, options)",
        "torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.01, momentum=0.9)",
    ),
    "Freeze the backbone": ("train.py", DETECTOR, DETECTOR + "    net.backbone.requires_grad_(False)\n"),
    "A loss": ("train.py", STEP, STEP + 20 * " " + 'losses["loss_mine"] = 0.1 * raw.float().square().mean()\n'),
    "An augmentation": (
        "data.py",
        RNG,
        RNG + "        pixels = np.full_like(pixels, rng.integers(256)) if self.training else pixels\n",
    ),
    "A metric": ("evaluate.py", METRICS, '    metrics["mine"] = 2.5 + len(predictions)\n' + METRICS),
    "Early stopping": (
        "train.py",
        VALIDATE,
        VALIDATE + 20 * " " + 'if result[0]["mine"] < 9:\n' + 24 * " " + "break\n",
    ),
    "A checkpoint per epoch": (
        "train.py",
        "or done % options.save_every == 0:",
        "or done % (len(train_set) // progress.global_batch) == 0:",
    ),
}


def test_each_place_that_the_readme_names_is_one_place(tiny_run, tmp_path):
    copy, out = tmp_path / "mine", tmp_path / "out"
    copy.mkdir()
    for path in ROOT.iterdir():
        if path.suffix == ".py":
            shutil.copy(path, copy)
        elif path.name in ("engine", "scene", "formats", "metrics", "world", "configs"):
            shutil.copytree(path, copy / path.name)
    readme = (ROOT / "README.md").read_text()
    for name, (file, place, change) in EDITS.items():
        assert f"**{name}**" in readme
        text = (copy / file).read_text()
        assert text.count(place) == 1, name
        (copy / file).write_text(text.replace(place, change))
    more = (
        "best=-mine",
        "model.norm=frozen",
        "train.batch_size=1",
        "train.steps=20",
        "train.eval_every=1.25",
        "train.save_every=100",
    )
    [done] = forked.run(copy, "train.py", *tiny(tiny_run[0], out, *more))
    assert done.returncode == 0, done.stderr
    assert [r["step"] for r in records(out)] == list(range(1, 11))  # the evaluation at step 10 ended it
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == [
        "step_00000008",
        "step_00000010",
    ]  # 8 frames an epoch
    assert records(out, "val")[0]["val/-mine"] == 6.5
    assert json.loads((out / "best/meta.json").read_text())["metric"] == "-mine"
    assert all(row["loss_mine"] > 0 for row in losses_of(out))
    last, best = (
        load_file(out / name) for name in ("checkpoints/step_00000010/model_1.safetensors", "best/model.safetensors")
    )
    first = load_file(out / "checkpoints/step_00000008/model_1.safetensors")
    for name, value in last.items():
        assert torch.equal(value, first[name]) == name.startswith("backbone"), name
    assert best.keys() == last.keys()
    moments = torch.load(out / "checkpoints/step_00000010/optimizer.bin", weights_only=True)["state"]
    assert set(moments[0]) == {"momentum_buffer"}
    before, after = (losses_of(folder)[0]["loss_cls"] for folder in (tiny_run[1], out))
    assert before != after  # the pictures are grey now
