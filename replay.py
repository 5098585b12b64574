"""Run again the batch of a step that was not finite, on the CPU, and say where it breaks.

python replay.py runs/x/nonfinite.json
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from config import Config, build
from data import build_dataset, change_colours, collate, seed_of
from losses import compute_losses, count_positives, weighted_sum
from model import Detector
from targets import assign


def replay(path):
    """The losses {name: float} of the step that nonfinite.json describes, with the weights beside it, and what is not finite.

    Returns (losses, findings): sentences in the order in which numbers flow, the first names the cause. Raises ValueError,
    FileNotFoundError or OSError naming the file.
    """
    path = Path(path)
    try:
        record = json.loads(path.read_text())
        config = build(record["config"], Config, str(path))
        batches, step, process = record["batches"], record["step"], record["process"]
        weights = load_file(path.parent / record["weights"])
    except (json.JSONDecodeError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"{path}: not a replay that train.py wrote: {error!r}") from None
    dataset = build_dataset(config.data, config.data.train, config.model.classes, config.model.size, True, config.seed)
    model = Detector(dataclasses.replace(config.model, pretrained=False))
    model.load_state_dict(weights)
    torch.manual_seed(seed_of(config.seed, step, process or 0))
    findings, shown = [], {}
    for samples in batches:  # micro-step by micro-step, as they came
        model.zero_grad()
        items = [dataset[tuple(sample)] for sample in samples]
        for item in items:
            names = [name for name, value in item.items() if value.is_floating_point() and not torch.isfinite(value).all()]
            findings += [f"frame {dataset.ids[item['index']]}: its {name} is not finite" for name in names]
        batch = collate(items)
        targets = assign(batch, config.model)
        batch["positives"] = count_positives(targets).clamp(min=1)
        logits, raw = model(change_colours(batch), batch["K"])
        outputs = (("logits", logits), ("outputs", raw))
        findings += [f"the head's {name} are not finite" for name, value in outputs if not torch.isfinite(value).all()]
        losses = compute_losses(model, logits, raw, targets, batch, config.loss)
        findings += [f"{name} is {value.item()}" for name, value in losses.items() if not torch.isfinite(value)]
        weighted_sum(losses, config.loss).backward()
        broken = [name for name, p in model.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()]
        if broken:
            findings.append(f"the gradients of {len(broken)} parameters are not finite, the last one is {broken[-1]}")
        shown = {name: value.item() for name, value in losses.items()}
    return shown, findings


def main(arguments=None):
    """Command line entry: exit code 3 when the batch breaks again, 0 when it is fine here."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", help="nonfinite.json of a run that stopped")
    options = parser.parse_args(arguments)
    try:
        losses, findings = replay(options.path)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    for name, value in losses.items():
        print(f"{name}: {value:.4f}")
    print("\n".join(findings) or "all finite here: the cause was in another process, in the precision, or in the machine")
    sys.exit(3 if findings else 0)


if __name__ == "__main__":
    main()
