#!/usr/bin/env bash
# thop 0.1.1.post2209072238 and ptflops 0.7.5 (its backend "pytorch") on timm 1.0.31's normalizer-free ResNet-26, torch 2.14.1.
#
# Guess: a counter of multiplications counts a convolution, of whatever class it is.
# What it does: both look a module's exact type up. timm's ScaledStdConv2d is a subclass of nn.Conv2d, so every convolution of the network
# counts 0: thop reports 2.2 of 766 million multiplications (only the classifier and pooling are left), ptflops 7.0 (classifier and
# activations). Nothing is printed unless verbose is asked for. torch's own FlopCounterMode and ptflops with backend="aten" are right. The same
# happens, in part, to timm's Conv2dSame: 120.9 of 126.6 million for tf_efficientnet_lite0, too near to the truth to be noticed.
# What it means here: "GFLOPs" of a detector's backbone are believed only from torch.utils.flop_counter.
#
# Seen (2 CPU cores, Python 3.11):
#   nf_resnet26            torch 766.2  thop   2.2  ptflops   7.0  ptflops aten 768.6
#   tf_efficientnet_lite0  torch 126.6  thop 120.9  ptflops 122.9  ptflops aten 126.6
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 timm==1.0.31 thop==0.1.1.post2209072238 ptflops==0.7.5
"$folder/venv/bin/python" - <<'PY'
import warnings

warnings.filterwarnings("ignore")
import ptflops
import thop
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode


def count(name):
    """Millions of multiplications for one image of 128 x 128, by four counters."""
    net, image = timm.create_model(name).eval(), torch.randn(1, 3, 128, 128)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(image)
    options = dict(as_strings=False, print_per_layer_stat=False, verbose=False)
    by_type, by_operator = (
        ptflops.get_model_complexity_info(net, (3, 128, 128), backend=backend, **options)[0] for backend in ("pytorch", "aten")
    )
    return [
        number / 1e6
        for number in (counter.get_total_flops() / 2, thop.profile(net, (image,), verbose=False)[0], by_type, by_operator)
    ]


for name, expected in {
    "nf_resnet26": (766.2, 2.2, 7.0, 768.6),
    "tf_efficientnet_lite0": (126.6, 120.9, 122.9, 126.6),
}.items():
    counts = count(name)
    print("{:22} torch {:.1f}  thop {:.1f}  ptflops {:.1f}  ptflops aten {:.1f}".format(name, *counts))
    assert all(abs(a - b) < 0.06 for a, b in zip(counts, expected)), f"changed: expected {expected}"
PY
echo "as stated"
