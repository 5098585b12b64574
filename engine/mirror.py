"""The mean of what a detector says of an image and of its mirror image: an extra that `--flip` asks for."""

import torch
from torch import nn

from model import Detector
from scene import geometry
from scene.frames import UserError

SIGNS = {"offset": (-1, 1), "alpha": (-1, 1), "yaw": (1, -1), "velocity": (-1, 1)}  # of outputs in a mirror image


class Mirrored(nn.Module):
    """A detector that says the mean of its outputs for an image and its mirror image: half as fast.

    Heading bins of the mirror image are read by the mean angle: the two angles may lie on either side of a border of
    the bins, while of the two logits at least one is far from its own border.
    """

    def __init__(self, detector: Detector):
        super().__init__()
        if not isinstance(detector, Detector):
            raise UserError("--flip needs a run: a file gives no raw outputs, of which it takes the mean")
        self.detector, self.config = detector, detector.config
        self.train(detector.training)  # a new module trains

    detect = Detector.detect  # of which only `forward` differs
    predict = Detector.predict

    def select(self, logits, raw, K):
        return self.detector.select(logits, raw, K)

    def forward(self, image, K):
        """As `Detector.forward`, in fp32."""
        turned = K.clone()
        turned[:, 0, 2] = self.config.size[1] - 1 - K[:, 0, 2]
        logits, raw = self.detector(image, K)
        mirror_logits, mirror_raw = mirror(self.detector, *self.detector(image.flip(2), turned))
        out, mirror_out = self.detector.split(raw.float()), self.detector.split(mirror_raw.float())
        alpha = (out["alpha"] + mirror_out["alpha"]) / 2
        mirror_out["direction"] = geometry.mirror_bins(mirror_out["direction"], alpha)
        mean = torch.cat([(out[name] + mirror_out[name]) / 2 for name in out], -1)
        return (logits.float() + mirror_logits.float()) / 2, mean


def mirror(detector, logits, raw):
    """Outputs of a `Detector` for a mirror image -> for the image, in its cells; but not the heading bins.

    With a canvas in whole strides, cells lie on cells. Its own inverse.
    """
    order = detector.config.pyramid.mirror().to(raw.device)
    out = detector.split(raw[:, order])
    for name in ("box", "full_box"):
        out[name] = out[name][..., [2, 1, 0, 3]]
    for name in SIGNS.keys() & out.keys():
        out[name] = out[name] * out[name].new_tensor(SIGNS[name])
    return logits[:, order], torch.cat(list(out.values()), -1)
