"""Run again the batch of a step that was not finite, on the CPU, and say where it breaks.

python -m tools.replay RUN/nonfinite.json
"""

import argparse
import dataclasses
import json
import sys
import textwrap
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from config import Config, build
from data import UserError, build_dataset, change_colours, collate, seed_of, user_errors
from losses import compute_losses, count_positives, weighted_sum
from model import Detector
from targets import assign


def load(path):
    """(config, model, batches, step) of a nonfinite.json and the weights beside it, the generator seeded for it. Raises UserError."""
    try:
        record = json.loads(path.read_text())
        config = build(record["config"], Config, "config")
        model = Detector(dataclasses.replace(config.model, pretrained=False))
        model.load_state_dict(load_file(path.parent / record["weights"]))
        torch.manual_seed(seed_of(config.seed, record["step"], record["process"] or 0))
        return config, model, [[(epoch, index) for epoch, index in samples] for samples in record["batches"]], record["step"]
    except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:  # RuntimeError: nested too deeply, or other weights
        raise UserError(f"{path}: not a replay that train.py wrote: {textwrap.shorten(repr(error), 300)}") from None


def replay(path):
    """The losses {name: float} of the step that nonfinite.json describes, with the weights beside it, and what is not finite.

    Returns (losses, findings): sentences in the order in which numbers flow, the first names the cause. Raises UserError.
    """
    with user_errors():
        config, model, batches, step = load(Path(path))
        more = config.seed, config.model.velocity, config.model.attribute_names
        dataset = build_dataset(config.data, config.data.train, config.model.classes, config.model.size, True, *more)
    parts, findings, rows = [[dataset[sample] for sample in samples] for samples in batches], [], []
    for item in (item for items in parts for item in items):
        numbers = {name: value for name, value in item.items() if value.is_floating_point() and name != "velocity"}  # NaN there: unknown
        names = [name for name, value in numbers.items() if not torch.isfinite(value).all()]
        findings += [f"frame {dataset.ids[item['index']]}: its {name} is not finite" for name in names]
    parts = [collate(items) for items in parts]
    targets = [assign(batch, config.model) for batch in parts]
    positives = sum(map(count_positives, targets)).clamp(min=1) / len(parts)
    for batch, target in zip(parts, targets, strict=True):  # micro-step by micro-step, as they came
        logits, raw = model(change_colours(batch), batch["K"])
        findings += [f"the head's {n} are not finite" for n, x in (("logits", logits), ("outputs", raw)) if not torch.isfinite(x).all()]
        losses = compute_losses(model, logits, raw, target, batch, config.loss, positives, step >= config.train.all_cells)
        findings += [f"{name} is {value.item()}" for name, value in losses.items() if not torch.isfinite(value)]
        (weighted_sum(losses, config.loss) / len(parts)).backward()
        rows.append(losses)
    broken = [name for name, p in model.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()]
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.clip)  # what train.py looks at
    if broken:
        findings.append(f"the gradients of {len(broken)} parameters are not finite, the last one is {broken[-1]}")
    elif not torch.isfinite(norm):
        findings.append(f"the gradient's norm is {norm.item()}, although each of its numbers is finite: they are too large to be squared")
    return {name: sum(row[name].item() for row in rows) / len(rows) for name in rows[0]}, findings


def main(arguments=None):
    """Command line entry: exit code 3 when the batch breaks again, 0 when it is fine here."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", help="nonfinite.json of a run that stopped")
    try:
        losses, findings = replay(parser.parse_args(arguments).path)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(*(f"{name}: {value:.4f}" for name, value in losses.items()), sep="\n")
    print("\n".join(findings) or "all finite here: the cause was in another process, in the precision, or in the machine")
    sys.exit(3 if findings else 0)


if __name__ == "__main__":
    main()
