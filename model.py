"""The detector: timm backbone, FPN, dense FCOS-3D head, and the one `decode` that turns its outputs into boxes.

FCOS (Tian et al., ICCV 2019) lifted to 3D as in FCOS3D (arXiv:2104.10956), with a lean head, a depth normalised by the focal length
(virtual depth: DD3D, arXiv:2108.06417, eq. 1-2; Cube R-CNN, arXiv:2207.10660) and two depth estimators with Laplace scales fused by
inverse variance (MonoFlex, arXiv:2104.02323).
"""

import contextlib
import copy
import dataclasses
import difflib
import math
import os
from collections import Counter
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard, PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image
from safetensors import SafetensorError
from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork, batched_nms, box_iou

from scene.frames import decode, make_labels, opened, place_image, reduction_of, upright, whole_view
from scene.geometry import LIMITS, MIN_DEPTH, SPEED, alpha_to_yaw, camera_problem, heading_bin, unproject


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What `Detector` needs to be built, and all that its config.json holds."""

    backbone: str = "resnet18"  # any timm model with features at these strides
    pretrained: bool = False  # start from timm's ImageNet weights (downloaded once by timm)
    drop_path: float = 0.0  # rate of stochastic depth in the backbone, where timm has it
    norm: str = "batch"  # backbone BatchNorm: 'batch', 'frozen' (statistics and affine), 'sync' (over processes, GPU)
    size: tuple[int, int] = (384, 1280)  # network input (height, width), px; images are scaled to fit and padded
    classes: tuple[str, ...] = ("Car", "Pedestrian", "Cyclist")
    size_prior: tuple[
        tuple[float, float, float], ...
    ] = ()  # mean (l, h, w) m per class; empty: measured on the training labels
    strides: tuple[int, ...] = (8, 16, 32)  # px per cell of the pyramid levels
    level_sizes: tuple[float, ...] = (
        64.0,
        128.0,
    )  # px: longest side of the visible box at which the next level takes over
    depth_mean: tuple[float, ...] = ()  # virtual metres per level; empty: measured on the training labels
    depth_std: tuple[float, ...] = ()  # virtual metres per level; empty: measured on the training labels
    virtual_focal: float = 700.0  # px: depth z counts as z * virtual_focal / fy
    projected_center: bool = (
        True  # cells are chosen around the projected 3D centre; false: around the visible box's centre
    )
    channels: int = 128  # of the FPN and the towers
    tower_convs: int = 2  # 3x3 convolutions in each of the two towers
    predict_yaw: bool = False  # a second angle output, for loss_alpha_constrain
    velocity: bool = False  # two outputs: speed along x and z of the camera, for loss_velocity
    attributes: dict[str, tuple[str, ...]] = dataclasses.field(
        default_factory=dict
    )  # class -> what it may be, such as vehicle.parked
    score_threshold: float = 0.05  # detections below are dropped
    nms_iou: float = 0.6  # of visible boxes, per class
    nms_across_classes: float = (
        0.0  # IoU of visible boxes above which the best of any class stays alone; 0: a thing may be of two classes
    )
    candidates: int = 300  # locations decoded per image, before non-maximum suppression
    max_detections: int = 100  # per image
    fuse_duplicates: bool = (
        True  # place and visible box of a detection become the mean over the duplicates that it suppresses
    )
    centerness_share: float = 0.25  # score = class^(1 - share) centerness^share P(...); 0: class alone
    depth_tolerance: float = 2.0  # m: the score holds P(|depth error| < tolerance) under the predicted sigma
    sigma_scale: tuple[
        float, ...
    ] = ()  # factor of the sigma that is told, per class; empty: 1, and best/ has it fitted to data.val

    def __post_init__(self):
        for field in dataclasses.fields(self):  # JSON has lists
            object.__setattr__(self, field.name, _tuples(getattr(self, field.name)))
        if not timm.is_model(self.backbone):
            near = difflib.get_close_matches(self.backbone.split(".")[0], timm.list_models(), n=3, cutoff=0.5)
            raise ValueError(
                f"model.backbone {self.backbone!r} is not a timm model{'; near it: ' + ', '.join(near) if near else ''}"
            )
        if self.norm not in ("batch", "frozen", "sync"):
            raise ValueError(f"model.norm is {self.norm!r}, expected 'batch', 'frozen' or 'sync'")
        if not self.strides or list(self.strides) != sorted({*self.strides}) or self.strides[0] < 1:
            raise ValueError(f"model.strides is {self.strides}, expected px per cell, ascending")
        if len(self.level_sizes) != len(self.strides) - 1:
            raise ValueError(
                f"model.level_sizes has {len(self.level_sizes)} borders for {len(self.strides)} strides, expected one fewer"
            )
        if any(side <= 0 or side % max(self.strides) for side in self.size):
            raise ValueError(
                f"model.size is {self.size}, expected (height, width) in multiples of the largest stride, {max(self.strides)}"
            )
        if self.channels < 4 or self.channels % norm_groups(self.channels):
            raise ValueError(
                f"model.channels is {self.channels}, expected a multiple of 32, or of 4 below 128: GroupNorm divides them"
            )
        if self.tower_convs < 1:
            raise ValueError(f"model.tower_convs is {self.tower_convs}, expected at least 1")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"model.drop_path is {self.drop_path}, expected 0 <= drop_path < 1")
        if not 0 <= self.nms_across_classes <= 1:
            raise ValueError(f"model.nms_across_classes is {self.nms_across_classes}, expected an IoU from 0 to 1")
        if not 0 <= self.centerness_share < 1:
            raise ValueError(f"model.centerness_share is {self.centerness_share}, expected 0 <= centerness_share < 1")
        if not self.classes or len({*self.classes}) < len(self.classes):
            raise ValueError(f"model.classes is {self.classes}, expected class names, each once")
        if stray := [name for name in self.attributes if name not in self.classes]:
            raise ValueError(
                f"model.attributes names {stray[0]!r}, which is none of model.classes: {', '.join(self.classes)}"
            )
        for owner, names in self.attributes.items():
            if not all(names) or len({*names}) < len(names):
                raise ValueError(f"model.attributes of {owner!r} is {names}, expected names, each once")
        if self.attributes and not self.attribute_names:
            raise ValueError(
                f"model.attributes names none for {', '.join(self.attributes)}, expected {{}} for a model without them"
            )
        classes, levels = len(self.classes), len(self.strides)
        for name, expected in {
            "size_prior": classes,
            "depth_mean": levels,
            "depth_std": levels,
            "sigma_scale": classes,
        }.items():
            if len(getattr(self, name)) not in (0, expected):
                raise ValueError(f"model.{name} has {len(getattr(self, name))} entries, expected {expected} or none")
        if not all(0 < factor < math.inf for factor in self.sigma_scale):
            raise ValueError(f"model.sigma_scale is {self.sigma_scale}, expected finite factors > 0")

    @property
    def attribute_names(self):
        """Every attribute of any class, sorted: the order of the head's attribute outputs, and of the indices in samples and targets."""
        return tuple(sorted({name for names in self.attributes.values() for name in names}))

    @property
    def fields(self):
        """Outputs of the box predictor in their order: {field: channels}."""
        fields = {
            "centerness": 1,
            "box": 4,
            "full_box": 4,
            "offset": 2,
            "depth": 2,
            "height": 2,
            "size": 3,
            "alpha": 2,
            "direction": 2,
        }
        optional = {"yaw": 2 * self.predict_yaw, "velocity": 2 * self.velocity, "attribute": len(self.attribute_names)}
        return fields | {name: channels for name, channels in optional.items() if channels}


@dataclasses.dataclass(frozen=True)
class Decoded:
    """What the head says at some locations, in pixels of the network input and metres of the camera frame. Leading shape S (any)."""

    box: Tensor  # (S, 4) visible box
    full_box: Tensor  # (S, 4) extent of the projected 3D box
    pixel: Tensor  # (S, 2) projected 3D centre
    center: Tensor  # (S, 3)
    size: Tensor  # (S, 3) l, h, w
    depth: Tensor  # (S, 3) m: fused, direct, geometric
    log_sigma: Tensor  # (S, 3) natural log of their Laplace scales as standard deviations, m
    double_alpha: Tensor  # (S, 2) sine and cosine of 2 alpha, of length 1 unless both outputs are 0
    direction: Tensor  # (S, 2) logits of the heading bins
    yaw_vector: Tensor | None  # (S, 2) sine and cosine of the yaw output, with predict_yaw
    centerness: Tensor  # (S,) logit
    velocity: Tensor | None = None  # (S, 2) along x and z of the camera, m/s, with velocity
    attribute: Tensor | None = (
        None  # (S, A) logits of the attributes, IMPOSSIBLE where the class has none such, with attributes
    )


IMPOSSIBLE = -1e9  # logit of an attribute that a class cannot have: a softmax gives it 0, with finite gradients


MIRRORED = {  # fields that change under a mirror image: the order that its channels take, and their signs; heading bins apart
    "box": ((2, 1, 0, 3), (1, 1, 1, 1)),
    "full_box": ((2, 1, 0, 3), (1, 1, 1, 1)),
    "offset": ((0, 1), (-1, 1)),
    "alpha": ((0, 1), (-1, 1)),  # sine and cosine of 2 (pi - alpha)
    "yaw": ((0, 1), (1, -1)),  # of pi - yaw
    "velocity": ((0, 1), (-1, 1)),
}


def bound(x, limit):
    """Smooth limit: close to x near 0, never beyond +-limit."""
    return limit * torch.tanh(x / limit)


def unit(vector):
    """Vectors (..., n) scaled to length 1; a zero vector stays zero, with a finite gradient."""
    return vector * torch.rsqrt((vector * vector).sum(-1, keepdim=True) + 1e-12)


def angle_from_double(double_alpha, bins):
    """Sine and cosine of 2 alpha (..., 2) and heading bins (...) -> alpha (...) in [-pi, pi). No gradient: for output only."""
    half = torch.atan2(double_alpha[..., 0], double_alpha[..., 1]) / 2
    other = heading_bin(half) != bins
    alpha = half + math.pi * other
    return torch.where(alpha >= math.pi, alpha - 2 * math.pi, alpha)


def mirror_bins(direction, double_alpha):
    """Logits of the heading bins (..., 2) for a mirror image -> for the image, whose sine and cosine of 2 alpha are (..., 2).

    By `heading_bin`, alpha and pi - alpha lie in the same bin where cos 2 alpha < 0, else in different ones.
    """
    return torch.where(double_alpha[..., 1:] > 0, direction.flip(-1), direction)


def average_duplicates(kept, every, overlap):
    """Means over all candidates of a class that overlap a kept one, weighted by score and overlap, place also by inverse variance.

    kept, every: dicts of one image's n kept rows and of all its S candidates, with label, score, box, pixel, depth, sigma as
    `Detector.rank` gives them. Returns visible boxes (n, 4), projected centres (n, 2) px and depths (n,) m. The sigma of a detection
    stays as it is: its duplicates err alike. Box voting (Gidaris and Komodakis, ICCV 2015) with MonoFlex's weights for the place.
    """
    shared = box_iou(kept["box"], every["box"]).nan_to_num()  # of boxes without area
    same = (kept["label"][:, None] == every["label"]) & (shared > overlap)
    weight = torch.where(same, shared * every["score"], 0.0)  # (n, S)
    weight = weight / weight.sum(1, keepdim=True)
    trusted = weight / every["sigma"] ** 2
    trusted = trusted / trusted.sum(1, keepdim=True)
    box = (weight[..., None] * every["box"]).sum(1)  # a matrix product would be rounded under autocast
    pixel, depth = (trusted[..., None] * every["pixel"]).sum(1), (trusted * every["depth"]).sum(1)
    alone = ~same.any(1)
    box, pixel = (torch.where(alone[:, None], kept[name], mean) for name, mean in (("box", box), ("pixel", pixel)))
    return box, pixel, torch.where(alone, kept["depth"], depth)


class Tower(nn.Sequential):
    """3x3 convolutions with GroupNorm and ReLU: BatchNorm in the towers halves AP (mmdetection3d issue 2482)."""

    def __init__(self, inputs, channels, convs):
        layers = []
        for width in [inputs, *[channels] * (convs - 1)]:
            convolution = nn.Conv2d(width, channels, 3, padding=1, bias=False)
            layers += [convolution, nn.GroupNorm(norm_groups(channels), channels), nn.ReLU(True)]
        super().__init__(*layers)


def norm_groups(channels):
    """Groups of the towers' GroupNorms: of four channels, at most 32 groups."""
    return min(32, channels // 4)


class Detector(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="deep3d",
    tags=["monocular-3d-detection"],
    license="apache-2.0",
    pipeline_tag="object-detection",
):
    """One image and its camera matrix in, 3D boxes out.

    `forward` gives raw outputs at every location, `decode` their meaning at chosen locations, `detect` the detections of a batch,
    `predict` those of images of any size in their own pixels. `from_pretrained(folder or hub id)`, `save_pretrained` and
    `push_to_hub` read and write config.json, model.safetensors and README.md; other sections of a run's config.json are left alone.
    """

    def __init__(self, model: ModelConfig):  # named as the section of config.json that it is read from
        super().__init__()
        self.config = model
        self.card = ""  # README.md that the weights came with
        self.frozen = ()  # names of modules and parameters that `freeze` was given
        if not (model.size_prior and model.depth_mean and model.depth_std):
            raise ValueError(
                "model.size_prior, depth_mean and depth_std are not set: fill them with targets.measure_priors(dataset, config)"
            )
        self.backbone = _build_backbone(model)
        self.fpn = FeaturePyramidNetwork(self.backbone.feature_info.channels(), model.channels)
        self.class_tower = Tower(model.channels, model.channels, model.tower_convs)
        self.box_tower = Tower(model.channels + 2, model.channels, model.tower_convs)  # and the viewing ray
        self.fields = model.fields
        if model.attributes:
            possible = [
                [name in model.attributes.get(owner, ()) for name in model.attribute_names] for owner in model.classes
            ]
            self.register_buffer("attribute_possible", torch.tensor(possible), persistent=False)  # (C, A) bool
        self.class_predictor = nn.Conv2d(model.channels, len(model.classes), 3, padding=1)
        self.box_predictor = nn.Conv2d(model.channels, sum(self.fields.values()), 3, padding=1)
        self._initialise()
        mean, std = _pixel_statistics(self.backbone)
        self.register_buffer("pixel_mean", torch.tensor(mean) * 255, persistent=False)
        self.register_buffer("pixel_std", torch.tensor(std) * 255, persistent=False)
        self.register_buffer(
            "size_prior", torch.tensor(model.size_prior, dtype=torch.float32), persistent=False
        )  # (C, 3)
        sigma_scale = model.sigma_scale or (1.0,) * len(model.classes)
        self.register_buffer("sigma_scale", torch.tensor(sigma_scale, dtype=torch.float32), persistent=False)  # (C,)
        self.register_buffer(
            "depth_mean", torch.tensor(model.depth_mean, dtype=torch.float32), persistent=False
        )  # (L,)
        self.register_buffer("depth_std", torch.tensor(model.depth_std, dtype=torch.float32), persistent=False)
        self.register_buffer(
            "limits", torch.tensor([limit for limits in LIMITS.values() for limit in limits]), persistent=False
        )
        pixel, stride, level = self.make_locations(*model.size)
        self.register_buffer("location_pixel", pixel, persistent=False)  # (N, 2)
        self.register_buffer("location_stride", stride, persistent=False)  # (N,)
        self.register_buffer("location_level", level, persistent=False)  # (N,)
        self.train()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **options):
        """The detector of a folder of weights, such as RUN/best, or of a hub id. Raises FileNotFoundError for no such folder."""
        place = Path(pretrained_model_name_or_path)
        if place.is_dir() and not (place / "model.safetensors").exists() and (place / "best").is_dir():
            raise FileNotFoundError(f"{place}: a run, whose weights are in {place / 'best'}")
        if not place.is_dir() and (place.is_absolute() or len(place.parts) != 2):
            raise FileNotFoundError(f"{place}: no such folder, and no hub id, which is owner/name")
        return super().from_pretrained(pretrained_model_name_or_path, **options)

    @classmethod
    def _from_pretrained(cls, *, model_id, model=None, strict=True, **options):
        if model is None:
            raise ValueError("config.json has no section 'model', expected one written by deep3d")
        model = dataclasses.replace(model, pretrained=False)  # the weights are here already
        detector = super()._from_pretrained(model_id=model_id, model=model, strict=strict, **options)
        detector.card = _read_card(model_id, options)
        return detector

    def generate_model_card(self, results=""):
        """README.md of a folder of weights: the one that these came with, else CARD filled in. results: Markdown."""
        about = self._hub_mixin_info.model_card_data
        return (
            ModelCard(self.card)
            if self.card
            else ModelCard.from_template(about, template_str=CARD, config=self.config, results=results)
        )

    @classmethod
    def _load_as_safetensor(cls, model, model_file, map_location, strict):
        try:
            return super()._load_as_safetensor(model, model_file, map_location, strict)
        except (RuntimeError, SafetensorError) as error:
            first = " ".join(str(error).split())[:300]
            raise ValueError(f"{model_file}: damaged, or of another architecture than config.json: {first}") from error

    def _initialise(self):
        for module in [*self.class_tower.modules(), *self.box_tower.modules()]:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        for predictor in (self.class_predictor, self.box_predictor):
            nn.init.normal_(predictor.weight, std=0.01)
            nn.init.zeros_(predictor.bias)
        nn.init.constant_(
            self.class_predictor.bias, -math.log((1 - 0.01) / 0.01)
        )  # focal loss paper (arXiv:1708.02002), section 4.1
        start = sum(list(self.fields.values())[: list(self.fields).index("full_box")])
        nn.init.constant_(self.box_predictor.bias[start : start + 4], 1.0)  # boxes start the right way out

    def train(self, mode=True):
        super().train(mode)
        still = (*self.frozen, "backbone") if self.config.norm == "frozen" else self.frozen
        for name, module in self.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and any(_lies_in(name, owner) for owner in still):
                module.eval()
        return self

    def freeze(self, names):
        """Keep modules or parameters of these names as they are while others learn, statistics of BatchNorms included.

        Raises ValueError for a name that no parameter lies in, and where nothing would be left to learn.
        """
        for owner in names:
            inside = [p for name, p in self.named_parameters() if _lies_in(name, owner)]
            if not inside:
                there = ", ".join(name for name, _ in self.named_children())
                raise ValueError(
                    f"train.freeze: no parameter lies in {owner!r}, expected one of {there}, or a module inside them"
                )
            for parameter in inside:
                parameter.requires_grad_(False)
        if not any(p.requires_grad for p in self.parameters()):
            raise ValueError(f"train.freeze is {', '.join(names)}: nothing is left to learn")
        self.frozen = tuple(names)
        self.train(self.training)

    def make_locations(self, height, width):
        """Pixel (N, 2), stride (N,) and level (N,) of every prediction: cell j of stride s lies at (j + 0.5) s - 0.5."""
        pixels, strides, levels = [], [], []
        for level, stride in enumerate(self.config.strides):
            v, u = torch.meshgrid(torch.arange(height // stride), torch.arange(width // stride), indexing="ij")
            pixels.append((torch.stack([u, v], -1).reshape(-1, 2) + 0.5) * stride - 0.5)
            strides.append(torch.full((len(pixels[-1]),), float(stride)))
            levels.append(torch.full((len(pixels[-1]),), level))
        return torch.cat(pixels), torch.cat(strides), torch.cat(levels)

    def rays(self, K):
        """Viewing ray (x / z, y / z) of every location under K (B, 3, 3), as maps (B, 2, H, W), one per level."""
        counts = [(self.config.size[0] // s) * (self.config.size[1] // s) for s in self.config.strides]
        ray = (self.location_pixel - K[:, None, :2, 2]) / torch.stack([K[:, 0, 0], K[:, 1, 1]], -1)[
            :, None
        ]  # (B, N, 2)
        parts = zip(ray.transpose(1, 2).split(counts, 2), self.config.strides, strict=True)
        return [part.unflatten(2, (self.config.size[0] // s, self.config.size[1] // s)) for part, s in parts]

    def forward(self, image, K):
        """image (B, H, W, 3) uint8 RGB of the configured size, K (B, 3, 3) -> class logits (B, N, C) and raw outputs (B, N, F).

        Finest level first. The box tower sees each location's viewing ray beside the features (CAM-Convs, arXiv:1904.02028), so that
        it can tell an object's observation angle from its heading and a place on the ground from one above it.
        """
        x = (image.permute(0, 3, 1, 2).float() - self.pixel_mean[:, None, None]) / self.pixel_std[:, None, None]
        features = self.backbone(x)
        features = [
            f if f.shape[1] == c else f.permute(0, 3, 1, 2)
            for f, c in zip(features, self.backbone.feature_info.channels(), strict=True)
        ]
        pyramid = list(self.fpn({str(i): f for i, f in enumerate(features)}).values())
        logits = [self.class_predictor(self.class_tower(p)).flatten(2) for p in pyramid]
        seen = [torch.cat([p, ray.to(p.dtype)], 1) for p, ray in zip(pyramid, self.rays(K), strict=True)]
        raw = [self.box_predictor(self.box_tower(p)).flatten(2) for p in seen]
        return torch.cat(logits, 2).transpose(1, 2), torch.cat(raw, 2).transpose(1, 2)  # (B, N, C), (B, N, F)

    def split(self, raw):
        """Raw outputs (..., F) as {field: (..., its channels)}."""
        return dict(zip(self.fields, raw.split(list(self.fields.values()), -1), strict=True))

    def decode(self, raw, location, label, K):
        """Meaning of raw outputs; the one place that knows it, used by losses, evaluation and prediction. Always in fp32.

        raw (B, S, F) outputs gathered at location (B, S) indices; label (B, S) class whose size prior and attributes apply; K (B, 3, 3).
        Returns `Decoded` with leading shape (B, S). `targets.encode` is its inverse.

        Velocity is in real metres per second, not virtual ones: one image shows no motion that a longer lens would magnify as it brings
        an object nearer; what tells a speed (class, heading, lane, brake lights) says the same number through any lens.
        """
        out = self.split(raw.float())
        pixel = self.location_pixel[location]  # (B, S, 2)
        stride = self.location_stride[location][..., None]
        level = self.location_level[location]
        K = K.float()[:, None]
        metres = K[..., 1, 1] / self.config.virtual_focal  # real metres per virtual metre (B, 1)

        bounded = bound(torch.cat([out[name] for name in LIMITS], -1), self.limits)
        out.update(zip(LIMITS, bounded.split([len(limits) for limits in LIMITS.values()], -1), strict=True))

        before, after = (stride * torch.exp(out["box"])).split(2, -1)  # distances to left and top, right and bottom
        box = torch.cat([pixel - before, pixel + after], -1)
        before, after = (stride * 4 * out["full_box"]).split(2, -1)  # signed
        a, b = pixel - before, pixel + after
        full_box = torch.cat(
            [torch.minimum(a, b), torch.maximum(a, b)], -1
        )  # crossed sides are sorted, so that a gradient remains

        size = self.size_prior[label] * torch.exp(out["size"])
        mean, std = self.depth_mean[level], self.depth_std[level]
        depth, depth_scale = out["depth"].unbind(-1)
        height, height_scale = out["height"].unbind(-1)
        direct = metres * (MIN_DEPTH + F.softplus(mean + std * depth - MIN_DEPTH))
        height_px = 4 * stride[..., 0] * torch.exp(height)
        geometric = K[..., 1, 1] * size[..., 1] / height_px
        log_sigma = torch.log(std * metres)[..., None] + torch.stack([depth_scale, height_scale], -1)
        weight = torch.softmax(-2 * log_sigma, -1)
        estimates = torch.stack([direct, geometric], -1)
        fused = (weight * estimates).sum(-1)
        fused_log_sigma = -0.5 * torch.logsumexp(-2 * log_sigma, -1, keepdim=True)

        center_pixel = pixel + stride * out["offset"]
        return Decoded(
            box=box,
            full_box=full_box,
            pixel=center_pixel,
            center=unproject(center_pixel, fused, K),
            size=size,
            depth=torch.cat([fused[..., None], estimates], -1),
            log_sigma=torch.cat([fused_log_sigma, log_sigma], -1),
            double_alpha=unit(out["alpha"]),
            direction=out["direction"],
            yaw_vector=unit(out["yaw"]) if "yaw" in out else None,
            centerness=out["centerness"].squeeze(-1),
            velocity=SPEED * out["velocity"] if "velocity" in out else None,
            attribute=torch.where(self.attribute_possible[label], out["attribute"], IMPOSSIBLE)
            if "attribute" in out
            else None,
        )

    def mirror(self, logits, raw):
        """Outputs of `forward` for a mirror image -> the same for the image, in its cells; the heading bins stay the mirror image's.

        Cell j of a row becomes cell W / stride - 1 - j: with a canvas in whole strides, cells lie on cells. Its own inverse.
        """
        order = torch.arange(len(self.location_stride), device=raw.device)
        sizes = [(self.config.size[0] // s, self.config.size[1] // s) for s in self.config.strides]
        cells = order.split([rows * columns for rows, columns in sizes])
        order = torch.cat([part.view(size).flip(1).flatten() for part, size in zip(cells, sizes, strict=True)])
        out = self.split(raw[:, order])
        for name in MIRRORED.keys() & out.keys():
            channels, signs = MIRRORED[name]
            out[name] = out[name][..., channels] * out[name].new_tensor(signs)
        return logits[:, order], torch.cat(list(out.values()), -1)

    def forward_twice(self, image, K):
        """Like `forward`, the mean of what it says of the images and of their mirror images, in fp32: test-time augmentation.

        The heading bins of the mirror image are read by the mean angle: near a border of the bins the two angles may lie on either side
        of it, while of the two logits at least one is far from its own border.
        """
        turned = K.clone()
        turned[:, 0, 2] = self.config.size[1] - 1 - K[:, 0, 2]
        logits, raw = self(image, K)
        mirrored_logits, mirrored = self.mirror(*self(image.flip(2), turned))
        own, other = self.split(raw.float()), self.split(mirrored.float())
        alpha = (own["alpha"] + other["alpha"]) / 2
        other["direction"] = mirror_bins(other["direction"], alpha)
        mean = torch.cat([(own[name] + other[name]) / 2 for name in self.fields], -1)
        return (logits.float() + mirrored_logits.float()) / 2, mean

    @torch.no_grad()
    def detect(self, image, K, flip=False):
        """Detections of a batch, in pixels of the network input and metres of each image's camera; with flip, of `forward_twice`.

        image (B, H, W, 3) uint8; K (B, 3, 3). Returns one dict per image, best score first: label (n,), score (n,), box (n, 4),
        center (n, 3), size (n, 3), yaw (n,), sigma (n,) depth standard deviation in metres; of a model that has them velocity (n, 3) m/s
        in the camera frame, 0 along y, and attribute (n,) index of the most likely one, -1 for a class without attributes.
        """
        return self.select(*(self.forward_twice if flip else self)(image, K), K)

    @torch.no_grad()
    def select(self, logits, raw, K):
        """Raw outputs of `forward` -> what `detect` returns: decoded, scored, above the threshold, without duplicates."""
        boxes = self.rank(logits.float(), raw, K)
        images, candidates = boxes["score"].shape
        box, score = (
            boxes["box"].flatten(0, 1),
            boxes["score"].flatten(),
        )  # row r of image i becomes row i * candidates + r
        image = torch.arange(images, device=raw.device).repeat_interleave(candidates)
        group = (
            image * len(self.config.classes) + boxes["label"].flatten()
        )  # boxes of one image and class suppress one another
        keep = batched_nms(box, score, group, self.config.nms_iou)
        keep = keep[score[keep] > self.config.score_threshold]
        if self.config.nms_across_classes:
            keep = keep[batched_nms(box[keep], score[keep], image[keep], self.config.nms_across_classes)]
        found = []
        for i in range(images):
            rows = keep[image[keep] == i][: self.config.max_detections] - i * candidates
            every = {name: value[i] for name, value in boxes.items()}
            own = {name: value[rows] for name, value in every.items()}
            if self.config.fuse_duplicates:
                own["box"], own["pixel"], own["depth"] = average_duplicates(own, every, self.config.nms_iou)
            center = unproject(own.pop("pixel"), own.pop("depth"), K[i].float())
            yaw = alpha_to_yaw(own.pop("alpha"), center)
            found.append({**own, "center": center, "yaw": yaw})
        return found

    def rank(self, logits, raw, K):
        """The best `candidates` (location, class) pairs of each image, decoded and scored: dict of (B, S, ...) tensors. Fixed shapes."""
        classes = logits.shape[-1]
        share = self.config.centerness_share
        seen = (
            logits.sigmoid() ** (1 - share) * raw[..., :1].float().sigmoid() ** share
        )  # centerness is the first field
        best, flat = seen.flatten(1).topk(min(self.config.candidates, seen[0].numel()))
        location, label = flat // classes, flat % classes
        decoded = self.decode(raw.gather(1, location[..., None].expand(-1, -1, raw.shape[-1])), location, label, K)
        sigma = decoded.log_sigma[..., 0].exp()
        trust = 1 - torch.exp(-math.sqrt(2) * self.config.depth_tolerance / sigma)  # Laplace: P(|error| < tolerance)
        height, width = self.config.size
        limit = torch.tensor([width - 1, height - 1, width - 1, height - 1], device=raw.device, dtype=torch.float32)
        boxes = {
            "label": label,
            "score": best * trust,
            "box": decoded.box.clamp(min=0).minimum(limit),
            "pixel": decoded.pixel,
            "depth": decoded.depth[..., 0],
            "size": decoded.size,
            "alpha": angle_from_double(decoded.double_alpha, decoded.direction.argmax(-1)),
            "sigma": sigma
            * self.sigma_scale[label],  # the score keeps the learned one: AP does not depend on the factors
        }
        if decoded.velocity is not None:
            along_x, along_z = decoded.velocity.unbind(-1)
            boxes["velocity"] = torch.stack([along_x, torch.zeros_like(along_x), along_z], -1)
        if (
            decoded.attribute is not None
        ):  # the likeliest, however unsure: a default below a probability of .5 or .7 raised the error
            boxes["attribute"] = torch.where(self.attribute_possible[label].any(-1), decoded.attribute.argmax(-1), -1)
        return boxes

    def predict(self, image, K, min_score=0.0, flip=False):
        """Detections of one image in its own pixels and its own camera; of a list of images, as one batch, a list of them.

        image: a path, PIL image or (H, W, 3) uint8 RGB array of any size; K (3, 3) in its pixels, upright where EXIF turns it; for a list
        of images one K for all, or as many. flip: see `forward_twice`.
        Returns `Labels` with sigma, best score first, scores at least min_score (and above the configured threshold).
        Raises ValueError for an implausible K or something else than an image, OSError naming the file for an unreadable image.
        """
        if not isinstance(image, list | tuple):
            return self.predict([image], np.asarray(K, dtype=np.float64)[None], min_score, flip)[0]
        cameras = np.asarray(K, dtype=np.float64)
        cameras = [cameras] * len(image) if cameras.ndim == 2 else cameras
        if len(cameras) != len(image):
            raise ValueError(
                f"{len(image)} images came with {len(cameras)} camera matrices, expected one for each or one for all"
            )
        seen = [_see(*pair, self.config.size) for pair in zip(image, cameras, strict=True)]
        if not seen:
            return []
        canvases, canvas_cameras, views = zip(*seen, strict=True)
        device, training = self.pixel_mean.device, self.training
        self.eval()
        found = self.detect(
            torch.from_numpy(np.stack(canvases)).to(device), torch.from_numpy(np.stack(canvas_cameras)).to(device), flip
        )
        self.train(training)
        classes, attributes = self.config.classes, self.config.attribute_names
        return [to_labels(one, view, classes, min_score, attributes) for one, view in zip(found, views, strict=True)]


def _lies_in(name, owner):
    return f"{name}.".startswith(f"{owner}.")


def _see(image, K, size):
    """An image as `Detector.predict` takes it -> its canvas (H, W, 3), the K of that, and the `View`."""
    own = isinstance(image, str | os.PathLike)  # decoding at a reduced size would change the caller's image
    with opened(image) if own else contextlib.nullcontext(_as_picture(image)) as file:
        file = upright(file)
        whole, pixels = file.size, np.array(decode(file, reduction_of(file, size) if own else 1))
    if problem := camera_problem(K, *whole):
        raise ValueError(f"K of the image: {problem}")
    view = whole_view(*whole, size)
    return place_image(pixels, view), view.camera(K), view


def _as_picture(image):
    """A PIL image of a PIL image or an array. Raises ValueError that says what to do with anything else."""
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, Tensor):
        raise ValueError(
            f"image is a tensor of shape {tuple(image.shape)}, expected (H, W, 3) uint8 as an array: tensor.cpu().numpy()"
        )
    if not isinstance(image, np.ndarray):
        raise ValueError(f"image is of type {type(image).__name__}, expected a path, a PIL image or an array")
    if image.dtype != np.uint8:
        raise ValueError(
            f"image holds {image.dtype}, expected uint8 from 0 to 255: (255 * image).astype(np.uint8) of pixels from 0 to 1"
        )
    if not image.size:
        raise ValueError(f"image has shape {image.shape}: it is empty")
    if image.ndim != 3 or image.shape[2] != 3:
        advice = (
            ": list(image) of a batch"
            if image.ndim == 4
            else ": image[..., :3] of RGB with alpha"
            if image.shape[2:] == (4,)
            else ""
        )
        raise ValueError(
            f"image has shape {image.shape}, expected (H, W, 3) as RGB{advice}; PIL images may be of any mode"
        )
    return Image.fromarray(image)


def to_labels(found, view, classes, min_score=0.0, attributes=()):
    """One dict of `Detector.detect` and the `View` its image was seen through -> `Labels` in the image's own pixels and camera.

    classes and attributes: the names that its indices stand for, `ModelConfig.classes` and `attribute_names`.
    """
    found = {name: value.double().cpu().numpy() for name, value in found.items()}
    keep = found["score"] >= min_score
    found = {name: value[keep] for name, value in found.items()}
    names, boxes = [classes[int(i)] for i in found["label"]], view.boxes_to_image(found["box"])
    optional = {name: found[name] for name in ("sigma", "velocity") if name in found}
    if "attribute" in found:
        optional["attribute"] = np.array([*attributes, ""], dtype=object)[
            found["attribute"].astype(int)
        ]  # -1 is the last
    return make_labels(names, boxes, found["size"], found["center"], found["yaw"], score=found["score"], **optional)


CARD = """---
{{ card_data }}
---

# Monocular 3D detection of {{ config.classes | join(", ") }}

One image and its camera matrix in, 3D boxes out: FCOS lifted to 3D on a {{ config.backbone }} backbone, for images scaled to fit
{{ config.size[1] }}x{{ config.size[0] }} pixels. Trained with deep3d.

```python
import numpy as np

from model import Detector  # deep3d's model.py, with its folder on PYTHONPATH

detector = Detector.from_pretrained(".")  # the folder of this file, or its id on the hub
K = np.array([[700.0, 0, 320.0], [0, 700.0, 96.0], [0, 0, 1]])  # of your camera, in pixels of image.png
found = detector.predict("image.png", K)
print(found.name, found.score, found.center, found.size, found.yaw)
```

## Conventions

Boxes are in metres in the camera of the image: x right, y down, z forward. `center` is the geometric centre, `size` is
(length, height, width), `yaw` the rotation about +y (KITTI's rotation_y), `sigma` the standard deviation of the depth, `box` the
visible 2D box in pixels of the image. The camera matrix is needed: depth is told relative to the focal length. Images are upright
where EXIF turns them, and so is their camera matrix.

## As measured

{{ results or "Nothing was measured yet." }}

## Licence

The code is Apache-2.0. Weights also carry the terms of the data that they were trained on, such as CC BY-NC-SA 3.0 of KITTI.
"""


def _read_card(model_id, options):
    """README.md of a folder or of a repository on the hub, "" where there is none. options: as `from_pretrained` takes them."""
    path = Path(model_id) / "README.md"
    if not Path(model_id).is_dir():
        names = ("revision", "cache_dir", "force_download", "token", "local_files_only")
        try:
            path = Path(
                hf_hub_download(model_id, path.name, **{name: options[name] for name in names if name in options})
            )
        except EntryNotFoundError:
            return ""
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _tuples(value):
    if isinstance(value, dict):
        return {key: _tuples(v) for key, v in value.items()}
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value


def _build_backbone(config):
    """timm features at the configured strides. Raises ValueError naming what there is instead, OSError when weights are out of reach."""
    if config.pretrained and not timm.models.is_model_pretrained(config.backbone):
        raise ValueError(
            f"model.backbone {config.backbone!r} has no pretrained weights in timm; set model.pretrained=false or choose another"
        )
    options = {"drop_path_rate": config.drop_path} if config.drop_path else {}
    try:
        strides, numbers, options = _probe(config, options)
    except (RuntimeError, AttributeError, TypeError, AssertionError, ValueError) as error:
        first = str(error).splitlines()[0]
        if "drop_path_rate" in first:
            first = "it has no stochastic depth: model.drop_path=0"
        raise ValueError(
            f"model.backbone {config.backbone!r} gives no features of {config.size} images in timm: {first}"
        ) from None
    missing = [s for s in config.strides if s not in strides]
    if missing:
        raise ValueError(
            f"model.backbone {config.backbone!r} has features at strides {strides}, none at {missing} of model.strides"
        )
    indices = tuple(max(i for i, s in zip(numbers, strides, strict=True) if s == stride) for stride in config.strides)
    try:
        backbone = timm.create_model(
            config.backbone, features_only=True, out_indices=indices, pretrained=config.pretrained, **options
        )
    except OSError as error:  # huggingface_hub's errors are among them
        raise OSError(
            f"model.backbone {config.backbone!r}: its pretrained weights are out of reach; model.pretrained=false starts from scratch, "
            f"or from weights that you have with load_from=FILE ({str(error).splitlines()[0]})"
        ) from None
    for parameter, used in zip(backbone.parameters(), _dry_step(backbone, config.size), strict=True):
        if not used:
            parameter.requires_grad_(False)  # a stage that nobody looks at: DDP would wait for its gradient
    if config.norm == "frozen":
        backbone = freeze_batch_norm_2d(backbone)
    elif config.norm == "sync":
        backbone = convert_sync_batchnorm(backbone)  # timm's: torch's own drops the activation inside BatchNormAct2d
    return backbone


def _probe(config, options):
    """Strides, timm's numbers of them (DLA's begin at 1), and the options with which the backbone takes images of the configured size."""
    failures = []
    for more in ({}, {"img_size": config.size}):  # those with windows or positions are built for a size
        try:
            probe = timm.create_model(config.backbone, features_only=True, pretrained=False, **options, **more)
            _dry_step(probe, config.size)
            return probe.feature_info.reduction(), probe.feature_info.out_indices, {**options, **more}
        except (RuntimeError, AttributeError, TypeError, AssertionError, ValueError) as error:
            failures.append(error)
    raise failures[0]


def _dry_step(backbone, size):
    """Forward and backward of a copy without numbers. Returns for each parameter whether it has a gradient; raises what timm raises."""
    dry = copy.deepcopy(backbone).to("meta")
    sum(feature.sum() for feature in dry(torch.empty(2, 3, *size, device="meta"))).backward()
    return [p.grad is not None for p in dry.parameters()]


def checkpoint_backbone(net, compiled=False):
    """Keep few activations of a `Detector`'s backbone, and compute the others again in backward. Raises ValueError where timm has none.

    BatchNorms see a batch twice then, and move their running statistics by half as much each time: (1 - m')^2 = 1 - m leaves the same.
    compiled: by torch.compile, which moves them once.
    """
    backbone = net.backbone
    owner = next(
        (getattr(backbone, name) for name in ("body", "model") if hasattr(backbone, name)), backbone
    )  # timm's wrappers skip these
    try:
        owner.set_grad_checkpointing(True)
    except (AttributeError, AssertionError):
        raise ValueError(
            f"model.backbone {net.config.backbone!r} has no gradient checkpointing in timm; train.checkpoint_backbone=false"
        ) from None
    norms = {
        name: m for name, m in backbone.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training
    }
    learns = any(p.requires_grad for p in backbone.parameters())  # else nothing is computed again
    for name in _computed_twice(backbone, norms, net.config.size) if norms and learns and not compiled else ():
        norms[name].momentum = 1 - math.sqrt(1 - norms[name].momentum)


def _computed_twice(backbone, names, size):
    """Those of a backbone's modules that backward computes again, found by a step of a copy without numbers."""
    dry, calls = copy.deepcopy(backbone).to("meta"), Counter()
    for name in names:
        module = dry.get_submodule(name).eval()  # so that those of several processes wait for none
        module.register_forward_pre_hook(
            lambda *_, name=name: calls.update((name,))
        )  # the last one is not left: nothing more is needed
    sum(feature.sum() for feature in dry(torch.empty(2, 3, *size, device="meta"))).backward()
    return [name for name in names if calls[name] > 1]


def _pixel_statistics(backbone):
    """Mean and standard deviation (3,) in [0, 1] that the backbone's weights were trained with."""
    config = getattr(backbone, "pretrained_cfg", None) or getattr(backbone, "default_cfg", None) or {}
    return config.get("mean", (0.485, 0.456, 0.406)), config.get("std", (0.229, 0.224, 0.225))
