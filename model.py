"""The detector: timm backbone, FPN, dense FCOS-3D head, and the one `decode` that turns its outputs into boxes.

FCOS (Tian et al., ICCV 2019) lifted to 3D as in FCOS3D (arXiv:2104.10956), with a lean head, a depth normalised by the
focal length (virtual depth: DD3D, arXiv:2108.06417, eq. 1-2; Cube R-CNN, arXiv:2207.10660) and two depth estimators
with Laplace scales fused by inverse variance (MonoFlex, arXiv:2104.02323).
"""

import copy
import dataclasses
import difflib
import math
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from huggingface_hub.hub_mixin import DEFAULT_MODEL_CARD
from safetensors import SafetensorError
from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork, batched_nms, nms

from scene import geometry
from scene.frames import UserError, make_labels, to_canvas
from scene.geometry import LIMITS, MIN_DEPTH, SPEED, Pyramid, unproject

IMPOSSIBLE = -1e9  # logit of an attribute that a class cannot have: a softmax gives it 0, with finite gradients
TEMPLATE = Path(__file__).parent / "docs" / "model_card.md"  # of README.md beside weights
CARD = TEMPLATE.read_text(encoding="utf-8") if TEMPLATE.is_file() else DEFAULT_MODEL_CARD  # or huggingface_hub's


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What `Detector` needs to be built, and all that its config.json holds."""

    backbone: str = "resnet18"  # any timm model with features at these strides
    pretrained: bool = False  # start from timm's ImageNet weights (downloaded once by timm)
    drop_path: float = 0.0  # rate of stochastic depth in the backbone, where timm has it
    norm: str = "batch"  # backbone BatchNorm: 'batch', 'frozen' (statistics and affine), 'sync' (over processes, GPU)
    size: tuple[int, int] = (384, 1280)  # network input (height, width), px; images are scaled to fit and padded
    classes: tuple[str, ...] = ("Car", "Pedestrian", "Cyclist")
    size_prior: tuple[tuple[float, float, float], ...] = ()  # mean (l, h, w) m per class; empty: measured on data.train
    strides: tuple[int, ...] = (8, 16, 32)  # px per cell of the pyramid levels
    level_sizes: tuple[float, ...] = (64.0, 128.0)  # px: longest side of the visible box where the next level begins
    depth_mean: tuple[float, ...] = ()  # virtual metres per level; empty: measured on data.train
    depth_std: tuple[float, ...] = ()  # virtual metres per level; empty: measured on data.train
    virtual_focal: float = 700.0  # px: depth z counts as z * virtual_focal / fy
    projected_center: bool = True  # cells lie around the projected 3D centre; false: around the visible box's centre
    channels: int = 128  # of the FPN and the towers
    tower_convs: int = 2  # 3x3 convolutions in each of the two towers
    predict_yaw: bool = False  # a second angle output, for loss_alpha_constrain
    velocity: bool = False  # two outputs: speed along x and z of the camera, for loss_velocity
    attributes: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)  # class -> such as vehicle.parked
    score_threshold: float = 0.05  # detections below are dropped
    nms_iou: float = 0.6  # of visible boxes, per class
    nms_across_classes: float = 0.0  # IoU of visible boxes of which only the best of any class stays; 0: all stay
    candidates: int = 300  # locations decoded per image, before non-maximum suppression
    max_detections: int = 100  # per image
    fuse_duplicates: bool = True  # place and visible box become the mean over the duplicates that are suppressed
    centerness_share: float = 0.25  # score = class^(1 - share) centerness^share P(...); 0: class alone
    depth_tolerance: float = 2.0  # m: the score holds P(|depth error| < tolerance) under the predicted sigma
    sigma_scale: tuple[float, ...] = ()  # factor of sigma per class; empty: 1, and best/ has it fitted to data.val

    def __post_init__(self):
        for field in dataclasses.fields(self):  # JSON has lists
            object.__setattr__(self, field.name, _tuples(getattr(self, field.name)))
        if not timm.is_model(self.backbone):
            names = difflib.get_close_matches(self.backbone.split(".")[0], timm.list_models(), n=3, cutoff=0.5)
            near = ", ".join(names) or "nothing"
            raise UserError(f"model.backbone {self.backbone!r} is not a timm model; near it: {near}")
        classes, levels, coarsest = len(self.classes), len(self.strides), max((1, *self.strides))
        counts = {"size_prior": classes, "depth_mean": levels, "depth_std": levels, "sigma_scale": classes}
        positive = ("virtual_focal", "candidates", "max_detections", "depth_tolerance")
        named = {*self.attributes} <= {*self.classes} and bool(self.attribute_names) == bool(self.attributes)
        distinct = all(all(names) and len({*names}) == len(names) for names in self.attributes.values())
        checks = (
            ("norm", self.norm in ("batch", "frozen", "sync"), "'batch', 'frozen' or 'sync'"),
            ("strides", levels and [0, *self.strides] == sorted({0, *self.strides}), "px per cell, ascending"),
            ("level_sizes", len(self.level_sizes) == levels - 1, f"borders, one fewer than the {levels} strides"),
            ("size", all(side > 0 and side % coarsest == 0 for side in self.size),
             f"(height, width) in multiples of the largest stride, {coarsest}"),
            ("channels", self.channels > 0 and self.channels % (4 if self.channels < 128 else 32) == 0,
             "a multiple of 32, or of 4 below 128: GroupNorm divides them"),
            ("tower_convs", self.tower_convs >= 1, "at least 1"),
            ("drop_path", 0 <= self.drop_path < 1, "0 <= drop_path < 1"),
            ("nms_iou", 0 < self.nms_iou <= 1, "an IoU above 0, at most 1"),
            ("nms_across_classes", 0 <= self.nms_across_classes <= 1, "an IoU from 0 to 1"),
            ("centerness_share", 0 <= self.centerness_share < 1, "0 <= centerness_share < 1"),
            ("classes", classes and len({*self.classes}) == classes, "class names, each once"),
            ("attributes", named and distinct, f"names, once each, of {', '.join(self.classes)}; {{}}: none"),
            *((name, getattr(self, name) > 0, "more than 0") for name in positive),
            *((name, len(getattr(self, name)) in (0, n), f"{n} entries or none") for name, n in counts.items()),
            *((name, all(0 < value < math.inf for value in np.ravel(getattr(self, name))), "finite numbers > 0")
              for name in counts),
        )  # fmt: skip
        for name, fine, expected in checks:
            if not fine:
                raise UserError(f"model.{name} is {getattr(self, name)!r}, expected {expected}")

    @property
    def attribute_names(self):
        """Attributes of all classes, sorted: the order of the head's outputs, and of indices in samples and targets."""
        return tuple(sorted({name for names in self.attributes.values() for name in names}))

    @property
    def pyramid(self):
        """`Pyramid` of the network input."""
        return Pyramid(self.size, self.strides)

    @property
    def fields(self):
        """Outputs of the box predictor in their order: {field: channels}."""
        fields = dict(centerness=1, box=4, full_box=4, offset=2, depth=2, height=2, size=3, alpha=2, direction=2)
        optional = {"yaw": 2 * self.predict_yaw, "velocity": 2 * self.velocity, "attribute": len(self.attribute_names)}
        return fields | {name: channels for name, channels in optional.items() if channels}


@dataclasses.dataclass(frozen=True)
class Decoded:
    """What the head says at locations of any shape S, in pixels of the network input and metres of the camera."""

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
    attribute: Tensor | None = None  # (S, A) logits with attributes, IMPOSSIBLE where the class has none such


class Tower(nn.Sequential):
    """3x3 convolutions with GroupNorm and ReLU: one BatchNorm for all levels halves AP (mmdetection3d issue 2482)."""

    def __init__(self, inputs, channels, convs):
        layers = []
        for width in [inputs, *[channels] * (convs - 1)]:
            convolution = nn.Conv2d(width, channels, 3, padding=1, bias=False)
            layers += [convolution, nn.GroupNorm(min(32, channels // 4), channels), nn.ReLU(True)]
        super().__init__(*layers)


class Detector(
    nn.Module, PyTorchModelHubMixin, library_name="deep3d", tags=["monocular-3d-detection"], license="apache-2.0",
    pipeline_tag="object-detection", model_card_template=CARD,
):  # fmt: skip
    """One image and its camera matrix in, 3D boxes out.

    `forward` gives raw outputs at every location, `decode` their meaning at chosen ones, `detect` the detections of a
    batch, `predict` those of images of any size in their own pixels. `from_pretrained`, `save_pretrained` and
    `push_to_hub` read and write the section `model` of config.json, model.safetensors and README.md.
    """

    def __init__(self, model: ModelConfig):  # named as the section of config.json that it is read from
        super().__init__()
        self.config = model
        self.card = ""  # README.md that the weights came with
        self.frozen = ()  # names of modules and parameters that `freeze` was given
        if not (model.size_prior and model.depth_mean and model.depth_std):
            raise UserError("model.size_prior, depth_mean and depth_std are not set: targets.measure_priors fills them")
        self.backbone = _build_backbone(model)
        self.fpn = FeaturePyramidNetwork(self.backbone.feature_info.channels(), model.channels)
        self.class_tower = Tower(model.channels, model.channels, model.tower_convs)
        self.box_tower = Tower(model.channels + 2, model.channels, model.tower_convs)  # and the viewing ray
        self.channels_last = getattr(self.backbone, "output_fmt", "") == "NHWC"  # its features are (B, H, W, C)
        self.fields = model.fields
        self.class_predictor = nn.Conv2d(model.channels, len(model.classes), 3, padding=1)
        self.box_predictor = nn.Conv2d(model.channels, sum(self.fields.values()), 3, padding=1)
        self._initialise()
        about = self.backbone.pretrained_cfg
        pixel, stride, level = model.pyramid.locations()
        constants = {
            "pixel_mean": torch.tensor(about["mean"]) * 255,  # (3,) that the backbone's weights were trained with
            "pixel_std": torch.tensor(about["std"]) * 255,
            "size_prior": torch.tensor(model.size_prior, dtype=torch.float32),  # (C, 3)
            "sigma_scale": torch.tensor(model.sigma_scale or (1.0,) * len(model.classes), dtype=torch.float32),  # (C,)
            "depth_mean": torch.tensor(model.depth_mean, dtype=torch.float32),  # (L,)
            "depth_std": torch.tensor(model.depth_std, dtype=torch.float32),
            "limits": torch.tensor([limit for limits in LIMITS.values() for limit in limits]),
            "location_pixel": pixel,  # (N, 2)
            "location_stride": stride,  # (N,)
            "location_level": level,  # (N,)
        }
        if model.attributes:
            families = [model.attributes.get(name, ()) for name in model.classes]
            possible = [[attribute in family for attribute in model.attribute_names] for family in families]
            constants["attribute_possible"] = torch.tensor(possible).long()  # (C, A); OpenCV gathers no booleans
        for name, value in constants.items():
            self.register_buffer(name, value, persistent=False)
        self.train()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **options):
        """The detector of a folder of weights, of a run its best/, or of a hub id. Raises FileNotFoundError."""
        place = Path(pretrained_model_name_or_path)
        if (place / "best").is_dir():
            place = place / "best"
        elif not place.is_dir() and (place.is_absolute() or len(place.parts) != 2):
            raise FileNotFoundError(f"{place}: no such folder, and no hub id, which is owner/name")
        return super().from_pretrained(str(place), **options)

    @classmethod
    def _from_pretrained(cls, *, model_id, model=None, strict=True, **options):
        if model is None:
            raise UserError("config.json has no section 'model', expected one written by deep3d")
        model = dataclasses.replace(model, pretrained=False)  # the weights are here already
        try:
            detector = super()._from_pretrained(model_id=model_id, model=model, strict=strict, **options)
        except (RuntimeError, SafetensorError) as error:
            file, reason = Path(model_id, "model.safetensors"), " ".join(str(error).split())[:300]
            raise UserError(f"{file}: damaged, or of another architecture than config.json: {reason}") from error
        card = Path(model_id, "README.md")
        detector.card = card.read_text(encoding="utf-8") if card.is_file() else ""
        return detector

    def generate_model_card(self, results=""):
        """README.md of a folder of weights: the one that their folder had, else a new one with results in Markdown."""
        if self.card:
            return ModelCard(self.card)
        return super().generate_model_card(config=self.config, results=results)

    def _initialise(self):
        for module in [*self.class_tower.modules(), *self.box_tower.modules()]:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        for predictor in (self.class_predictor, self.box_predictor):
            nn.init.normal_(predictor.weight, std=0.01)
            nn.init.zeros_(predictor.bias)
        nn.init.constant_(self.class_predictor.bias, -math.log(99))  # 1 %: focal loss (arXiv:1708.02002), section 4.1
        nn.init.constant_(self.split(self.box_predictor.bias.data)["full_box"], 1.0)  # boxes start the right way out

    def train(self, mode=True):
        super().train(mode)
        still = (*self.frozen, "backbone") if self.config.norm == "frozen" else self.frozen
        inside = tuple(f"{owner}." for owner in still)
        for name, module in self.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and f"{name}.".startswith(inside):
                module.eval()
        return self

    def freeze(self, names):
        """Keep modules or parameters of these names as they are, BatchNorm statistics included. Raises UserError."""
        for owner in names:
            inside = [p for name, p in self.named_parameters() if f"{name}.".startswith(f"{owner}.")]
            if not inside:
                modules = ", ".join(name for name, _ in self.named_children())
                raise UserError(f"train.freeze: no parameter lies in {owner!r}, expected {modules} or a module in them")
            for parameter in inside:
                parameter.requires_grad_(False)
        if not any(p.requires_grad for p in self.parameters()):
            raise UserError(f"train.freeze is {', '.join(names)}: nothing is left to learn")
        self.frozen = tuple(names)
        self.train(self.training)

    def forward(self, image, K):
        """Image (B, H, W, 3) uint8 RGB of the configured size, K (B, 3, 3) -> logits (B, N, C), raw outputs (B, N, F).

        Locations are those of `Pyramid`. The box tower has each one's viewing ray beside the features (CAM-Convs,
        arXiv:1904.02028).
        """
        x = (image.permute(0, 3, 1, 2).float() - self.pixel_mean[:, None, None]) / self.pixel_std[:, None, None]
        first = [f.permute(0, 3, 1, 2) if self.channels_last else f for f in self.backbone(x)]
        levels = list(self.fpn({str(i): f for i, f in enumerate(first)}).values())
        logits = [self.class_predictor(self.class_tower(level)).flatten(2) for level in levels]

        focal = torch.stack([K[:, 0, 0], K[:, 1, 1]], -1)
        ray = (self.location_pixel - K[:, None, :2, 2]) / focal[:, None]  # x / z and y / z (B, N, 2)
        rays = ray.transpose(1, 2).split(self.config.pyramid.counts, 2)
        rays = [ray.unflatten(2, level.shape[2:]).to(level.dtype) for ray, level in zip(rays, levels, strict=True)]
        with_rays = [torch.cat(pair, 1) for pair in zip(levels, rays, strict=True)]
        raw = [self.box_predictor(self.box_tower(level)).flatten(2) for level in with_rays]
        return torch.cat(logits, 2).transpose(1, 2), torch.cat(raw, 2).transpose(1, 2)  # (B, N, C), (B, N, F)

    def split(self, raw):
        """Raw outputs (..., F) as {field: (..., its channels)}."""
        return dict(zip(self.fields, raw.split(list(self.fields.values()), -1), strict=True))

    def decode(self, raw, location, label, K):
        """Meaning of raw outputs; the one place that knows it, for losses, evaluation and prediction. Always in fp32.

        raw (B, S, F) gathered at location (B, S) indices; label (B, S) class whose size prior and attributes apply;
        K (B, 3, 3). Returns `Decoded` of shape (B, S). Velocity is not virtual: no lens changes what tells a speed.
        """
        out = self.split(raw.float())
        pixel = self.location_pixel[location]  # (B, S, 2)
        stride = self.location_stride[location][..., None]
        level = self.location_level[location]
        K = K.float()[:, None]
        metres = K[..., 1, 1] / self.config.virtual_focal  # real metres per virtual metre (B, 1)

        free = torch.cat([out[name] for name in LIMITS], -1)
        bounded = self.limits * torch.tanh(free / self.limits)  # close to it near 0, never beyond the limit
        out.update(zip(LIMITS, bounded.split([len(limits) for limits in LIMITS.values()], -1), strict=True))

        before, after = (stride * torch.exp(out["box"])).split(2, -1)  # distances to left and top, right and bottom
        box = torch.cat([pixel - before, pixel + after], -1)
        before, after = (stride * 4 * out["full_box"]).split(2, -1)  # signed
        a, b = pixel - before, pixel + after
        full_box = torch.cat([torch.minimum(a, b), torch.maximum(a, b)], -1)  # crossed sides sorted: a gradient remains

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
        attribute = out.get("attribute")
        if attribute is not None:
            attribute = torch.where(self.attribute_possible[label] > 0, attribute, IMPOSSIBLE)
        return Decoded(
            box=box,
            full_box=full_box,
            pixel=center_pixel,
            center=unproject(center_pixel, fused, K),
            size=size,
            depth=torch.cat([fused[..., None], estimates], -1),
            log_sigma=torch.cat([fused_log_sigma, log_sigma], -1),
            double_alpha=geometry.unit(out["alpha"]),
            direction=out["direction"],
            yaw_vector=geometry.unit(out["yaw"]) if "yaw" in out else None,
            centerness=out["centerness"].squeeze(-1),
            velocity=SPEED * out["velocity"] if "velocity" in out else None,
            attribute=attribute,
        )

    @torch.no_grad()
    def detect(self, image, K):
        """Detections of a batch, in pixels of the network input and metres of each image's camera.

        image (B, H, W, 3) uint8; K (B, 3, 3). Returns one dict per image, best score first: label (n,), score (n,), box
        (n, 4), center (n, 3), size (n, 3), yaw (n,), sigma (n,) m of depth; where the model has them velocity (n, 3)
        m/s, 0 along y, and attribute (n,) index, -1 for a class without attributes.
        """
        return self.select(*self(image, K), K)

    @torch.no_grad()
    def select(self, logits, raw, K):
        """Outputs of `forward` -> what `detect` returns."""
        return self.suppress(self.rank(logits.float(), raw, K), K)

    def suppress(self, boxes, K):
        """What `rank` gives -> what `detect` returns; of `self` the config alone is read."""
        config, results = self.config, []
        for i in range(len(K)):  # one by one: `batched_nms` moves groups apart, and large numbers would round the boxes
            candidates = {name: value[i] for name, value in boxes.items()}
            box, score, label = (candidates[name] for name in ("box", "score", "label"))
            rows = batched_nms(box, score, label, config.nms_iou)
            rows = rows[score[rows] > config.score_threshold]
            if config.nms_across_classes:
                rows = rows[nms(box[rows], score[rows], config.nms_across_classes)]
            detections = {name: value[rows[: config.max_detections]] for name, value in candidates.items()}
            if config.fuse_duplicates:
                averages = geometry.average_duplicates(detections, candidates, config.nms_iou)
                detections.update(zip(("box", "pixel", "depth"), averages, strict=True))
            center = unproject(detections.pop("pixel"), detections.pop("depth"), K[i].float())
            yaw = geometry.alpha_to_yaw(detections.pop("alpha"), center)
            results.append({**detections, "center": center, "yaw": yaw})
        return results

    def rank(self, logits, raw, K):
        """The best `candidates` (location, class) pairs of each image, decoded and scored: (B, S, ...) by name."""
        classes, share = logits.shape[-1], self.config.centerness_share
        centerness = raw[..., :1].float()  # the first field
        score = logits.sigmoid() ** (1 - share) * centerness.sigmoid() ** share
        best, flat = score.flatten(1).topk(min(self.config.candidates, score[0].numel()))
        location, label = flat.div(classes, rounding_mode="floor"), flat % classes  # `//` is exported with booleans
        decoded = self.decode(raw.gather(1, location[..., None].expand(-1, -1, raw.shape[-1])), location, label, K)
        sigma = decoded.log_sigma[..., 0].exp()
        trust = 1 - torch.exp(-math.sqrt(2) * self.config.depth_tolerance / sigma)  # Laplace: P(|error| < tolerance)
        limit = torch.tensor([side - 1 for side in self.config.size[::-1]] * 2, device=raw.device, dtype=torch.float32)
        boxes = {
            "label": label,
            "score": best * trust,  # under the learned sigma: AP does not depend on the factors
            "box": decoded.box.clamp(min=0).minimum(limit),
            "pixel": decoded.pixel,
            "depth": decoded.depth[..., 0],
            "size": decoded.size,
            "alpha": geometry.angle_from_double(decoded.double_alpha, decoded.direction.argmax(-1)),
            "sigma": sigma * self.sigma_scale[label],
        }
        if decoded.velocity is not None:
            along_x, along_z = decoded.velocity.unbind(-1)
            boxes["velocity"] = torch.stack([along_x, torch.zeros_like(along_x), along_z], -1)
        if decoded.attribute is not None:  # however unsure: a default below a probability of .5 or .7 raised the error
            boxes["attribute"] = decoded.attribute.argmax(-1).where(self.attribute_possible[label].sum(-1) > 0, -1)
        return boxes

    def predict(self, image, K, min_score=0.0):
        """`Labels` of one image in its own pixels and camera, best score first; of a list of images, a list of them.

        image: a path, PIL image or (H, W, 3) uint8 RGB array of any size; K (3, 3) in its pixels, upright where EXIF
        turns it; for a list of images one K for all, or as many. Raises what `to_canvas` raises.
        """
        cameras = np.asarray(K, dtype=np.float64)
        if not isinstance(image, list | tuple):
            return self.predict([image], cameras[None], min_score)[0]
        cameras = [cameras] * len(image) if cameras.ndim == 2 else cameras
        if len(cameras) != len(image):
            raise UserError(f"{len(image)} images came with {len(cameras)} camera matrices, expected 1 or as many")
        if not image:
            return []
        placed = [to_canvas(*pair, self.config.size) for pair in zip(image, cameras, strict=True)]
        canvases, canvas_cameras, views = zip(*placed, strict=True)
        device, training = next(self.parameters()).device, self.training
        pixels, K = (torch.from_numpy(np.stack(arrays)).to(device) for arrays in (canvases, canvas_cameras))
        self.eval()
        batch = self.detect(pixels, K)
        self.train(training)
        classes, attributes = self.config.classes, self.config.attribute_names
        return [to_labels(one, view, classes, min_score, attributes) for one, view in zip(batch, views, strict=True)]


def to_labels(detections, view, classes, min_score=0.0, attributes=()):
    """One dict of `Detector.detect` and the `View` of its image -> `Labels` in the image's own pixels and camera.

    classes and attributes: the names that its indices stand for, `ModelConfig.classes` and `attribute_names`.
    """
    columns = {name: value.double().cpu().numpy() for name, value in detections.items()}
    columns = {name: value[columns["score"] >= min_score] for name, value in columns.items()}
    names, boxes = [classes[int(i)] for i in columns["label"]], view.boxes_to_image(columns["box"])
    optional = {name: columns[name] for name in ("score", "sigma", "velocity") if name in columns}
    if "attribute" in columns:
        words = np.array([*attributes, ""], dtype=object)  # -1 is the last
        optional["attribute"] = words[columns["attribute"].astype(int)]
    return make_labels(names, boxes, columns["size"], columns["center"], columns["yaw"], **optional)


def _tuples(value):
    if isinstance(value, dict):
        return {key: _tuples(v) for key, v in value.items()}
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value


def _build_backbone(config):
    """timm features at the configured strides. Raises UserError, with timm's reason, where there are none."""
    name, options = f"model.backbone {config.backbone!r}", {"features_only": True}
    if config.drop_path:
        options["drop_path_rate"] = config.drop_path
    if timm.get_pretrained_cfg(config.backbone).fixed_input_size:  # windows or positions are built for a size
        options["img_size"] = config.size
    try:
        every = timm.create_model(config.backbone, **options).feature_info
        strides = every.reduction()
        if missing := [stride for stride in config.strides if stride not in strides]:
            raise UserError(f"{name} has features at strides {strides}, none at {missing} of model.strides")
        last = dict(zip(strides, every.out_indices, strict=True))  # of equal strides; timm's numbers of DLA begin at 1
        options["out_indices"] = tuple(last[stride] for stride in config.strides)
        backbone = timm.create_model(config.backbone, pretrained=config.pretrained, **options)
        dry = copy.deepcopy(backbone).to("meta")
        features = dry(torch.empty(2, 3, *config.size, device="meta"))
        sum(feature.sum() for feature in features).backward()
        for feature, cells in zip(features, config.pyramid.shapes, strict=True):
            shape = feature.shape[1:3] if getattr(backbone, "output_fmt", "") == "NHWC" else feature.shape[2:]
            if cells != shape:
                shape = " x ".join(map(str, feature.shape[1:]))
                raise UserError(f"{name} gives features of {shape}, and {cells} cells are needed: choose another one")
    except (AssertionError, OSError, RuntimeError, TypeError) as error:  # huggingface_hub's are OSErrors
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        problem = f"gives no features of {config.size} images in timm: {reason}"
        if isinstance(error, OSError):
            advice = "model.pretrained=false starts without, load_from=FILE from weights that you have"
            problem = f"has weights out of reach; {advice} ({reason})"
        raise UserError(f"{name} {problem}") from None
    for parameter, tried in zip(backbone.parameters(), dry.parameters(), strict=True):
        parameter.requires_grad_(tried.grad is not None)  # DDP would wait for the gradient of stages that nobody reads
    if config.norm == "frozen":
        backbone = freeze_batch_norm_2d(backbone)
    elif config.norm == "sync":
        backbone = convert_sync_batchnorm(backbone)  # timm's: torch's own drops the activation inside BatchNormAct2d
    return backbone


def checkpoint_backbone(net):
    """Keep few activations of a `Detector`'s backbone, compute the others again. UserError where that cannot be."""
    backbone, name = net.backbone, f"model.backbone {net.config.backbone!r}"
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training for module in backbone.modules()):
        raise UserError(f"train.checkpoint_backbone: BatchNorms of {name} would count a batch twice; model.norm=frozen")
    parts = [getattr(backbone, part) for part in ("body", "model") if hasattr(backbone, part)]  # in timm's wrappers
    try:
        [*parts, backbone][0].set_grad_checkpointing(True)
    except (AttributeError, AssertionError):
        raise UserError(f"{name} has no gradient checkpointing in timm; train.checkpoint_backbone=false") from None
