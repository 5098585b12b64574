"""Cameras, boxes and overlaps, in numpy or torch: no configuration, no files.

Conventions, kept by every module (stated here once):

* Camera frame: that of the image's own camera, x right, y down, z forward, metres, with a pure 3x3 `K` in pixels.
* Pixels: integer coordinates are pixel centres. Resizing by s moves u to (u + 0.5) s - 0.5; a flip to W - 1 - u. `K`
  always belongs to the image it travels with.
* Box: `center` (x, y, z) is the geometric centre; `size` (l, h, w) are the extents along the box's own x, y, z axes;
  `yaw` is the rotation about +y (KITTI's rotation_y) in [-pi, pi). The observation angle is alpha = yaw - atan2(x, z).
* `box` (x1, y1, x2, y2) is the visible 2D box clipped to the image; `full_box` the extent of the projected 3D box, free
  to leave it.

What says "numpy or torch" follows the type of its first argument.
"""

import dataclasses
import math

import numpy as np
import torch
from torch import Tensor

NEAR = 0.1  # metres: edges that cross this plane are cut there before projection
MIN_DEPTH = 0.5  # metres, virtual ones where depth is estimated: nothing nearer is, or has a usable projected centre
SKEW = 0.5  # px of a K, up to which it is passed over
SPEED = 5.0  # m/s of a velocity output of 1: usual speeds are outputs of order 1
DIRECTION_BORDER = math.pi / 4  # alpha where the two heading bins meet: away from the common 0, +-pi/2 and pi
LIMITS = {"box": (5.0,) * 4, "depth": (10.0, 5.0), "height": (4.0, 5.0), "size": (2.0,) * 3}  # smooth, of raw outputs

PAIRS_AT_ONCE = 10_000  # rotated overlaps that are computed together: about 10 MB, which caches hold

# Corner order: four at the bottom (+y), then four at the top; x forward, z left of a box at yaw 0 seen from above.
CORNER_SIGNS = np.array([[+1, +1, +1], [+1, +1, -1], [-1, +1, -1], [-1, +1, +1],
                         [+1, -1, +1], [+1, -1, -1], [-1, -1, -1], [-1, -1, +1]], dtype=np.float64) / 2  # fmt: skip
EDGES = np.array([[0, 1], [1, 2], [2, 3], [3, 0], [4, 5], [5, 6], [6, 7], [7, 4], [0, 4], [1, 5], [2, 6], [3, 7]])


@dataclasses.dataclass(frozen=True)
class Pyramid:
    """The cells that predict, numbered level after level, finest first, each level in rows.

    Cell j of stride s lies at pixel (j + 0.5) s - 0.5.
    """

    size: tuple[int, int]  # (height, width) of the image, px, in multiples of every stride
    strides: tuple[int, ...]  # px per cell of each level

    @property
    def shapes(self):
        """(rows, columns) of each level."""
        return [(self.size[0] // stride, self.size[1] // stride) for stride in self.strides]

    @property
    def counts(self):
        """Cells of each level."""
        return [rows * columns for rows, columns in self.shapes]

    @property
    def starts(self):
        """Number of the first cell of each level."""
        return [sum(self.counts[:level]) for level in range(len(self.strides))]

    def locations(self):
        """Pixel (N, 2), stride (N,) and level (N,) of every cell."""
        pixels = []
        for (rows, columns), stride in zip(self.shapes, self.strides, strict=True):
            v, u = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
            pixels.append((torch.stack([u, v], -1).reshape(-1, 2) + 0.5) * stride - 0.5)
        counts = torch.tensor(self.counts)
        strides = torch.tensor(self.strides, dtype=torch.float32).repeat_interleave(counts)
        return torch.cat(pixels), strides, torch.arange(len(counts)).repeat_interleave(counts)

    def mirror(self):
        """Indices (N,) of the cells that take their places in a mirror image: of a row, the last comes first."""
        levels = torch.arange(sum(self.counts)).split(self.counts)
        pairs = zip(levels, self.shapes, strict=True)
        return torch.cat([cells.view(shape).flip(1).flatten() for cells, shape in pairs])


def _library(array):
    return torch if isinstance(array, Tensor) else np


def wrap_angle(angle):
    """Radians, any shape, numpy or torch -> the same angle in [-pi, pi)."""
    wrapped = (angle + math.pi) % (2 * math.pi) - math.pi
    return _library(angle).where(wrapped >= math.pi, -math.pi + 0 * wrapped, wrapped)  # % may round up to 2 pi itself


def ray_angle(center):
    """Viewing direction of points (..., 3) in the horizontal plane: atan2(x, z), radians (...). Numpy or torch."""
    return _library(center).arctan2(center[..., 0], center[..., 2])


def yaw_to_alpha(yaw, center):
    """Rotation about +y (...) and centre (..., 3) -> observation angle (...) in [-pi, pi). Numpy or torch."""
    return wrap_angle(yaw - ray_angle(center))


def alpha_to_yaw(alpha, center):
    """Inverse of `yaw_to_alpha`."""
    return wrap_angle(alpha + ray_angle(center))


def heading_bin(alpha):
    """Observation angle, radians -> bin 1 in [border, border + pi), else 0, as FCOS3D's direction classifier. Torch."""
    return (torch.sin(alpha - DIRECTION_BORDER) >= 0).long()


def unit(vector):
    """Vectors (..., n) scaled to length 1; a zero vector stays zero, with a finite gradient. Torch."""
    return vector * torch.rsqrt((vector * vector).sum(-1, keepdim=True) + 1e-12)


def angle_from_double(double_alpha, bins):
    """Sine and cosine of 2 alpha (..., 2), heading bins (...) -> alpha (...) in [-pi, pi). Torch, without gradient."""
    half = torch.atan2(double_alpha[..., 0], double_alpha[..., 1]) / 2
    other = heading_bin(half) != bins
    alpha = half + math.pi * other
    return torch.where(alpha >= math.pi, alpha - 2 * math.pi, alpha)


def mirror_bins(direction, double_alpha):
    """Logits of heading bins (..., 2) for a mirror image -> for the image, whose sine, cosine of 2 alpha are (..., 2).

    By `heading_bin`, alpha and pi - alpha lie in the same bin where cos 2 alpha < 0, else in different ones.
    """
    return torch.where(double_alpha[..., 1:] > 0, direction.flip(-1), direction)


def project(points, K):
    """Points (..., 3) m, K (..., 3, 3) of the same leading shape or one for all -> pixels (..., 2). Numpy or torch.

    Pixels of points at or behind the camera plane mean nothing.
    """
    image = (K @ points[..., None])[..., 0]
    return image[..., :2] / image[..., 2:]


def unproject(pixels, depth, K):
    """Lift pixels (..., 2) at depth (...) metres along z (not range) to points (..., 3), K (..., 3, 3). Numpy or torch.

    Inverse of `project` for a K without skew.
    """
    lib = _library(pixels)
    focal = lib.stack([K[..., 0, 0], K[..., 1, 1]], -1)
    return lib.concatenate([(pixels - K[..., :2, 2]) / focal * depth[..., None], depth[..., None]], -1)


def box_corners(center, size, yaw):
    """Centre (..., 3), size (..., 3) l, h, w, yaw (...) -> corners (..., 8, 3), bottom four first. Numpy or torch."""
    lib = _library(center)
    signs = CORNER_SIGNS if lib is np else torch.as_tensor(CORNER_SIGNS, dtype=center.dtype, device=center.device)
    x, y, z = lib.moveaxis(size[..., None, :] * signs, -1, 0)  # (..., 8) each
    sine, cosine = lib.sin(yaw)[..., None], lib.cos(yaw)[..., None]
    return lib.stack([cosine * x + sine * z, y, cosine * z - sine * x], -1) + center[..., None, :]


def clip_edges(corners, near=NEAR):
    """The twelve edges of boxes of corners (n, 8, 3), cut at the plane z = near. Numpy.

    Returns edges (n, 12, 2, 3) and visible (n, 12), False where an edge lies wholly behind: its points mean nothing.
    """
    a, b = corners[:, EDGES[:, 0]], corners[:, EDGES[:, 1]]
    step = b[..., 2] - a[..., 2]
    t = np.clip((near - a[..., 2]) / np.where(np.abs(step) < 1e-12, 1.0, step), 0.0, 1.0)[..., None]
    cut = a + t * (b - a)
    cut[..., 2] = near
    front_a, front_b = a[..., 2:] >= near, b[..., 2:] >= near
    edges = np.stack([np.where(front_a, a, cut), np.where(front_b, b, cut)], 2)
    return edges, (front_a | front_b)[..., 0]


def project_boxes(center, size, yaw, K):
    """Extent of projected 3D boxes, edges cut at z = 0.1 m: the `full_box`. Numpy.

    center (n, 3), size (n, 3) as l, h, w, yaw (n,), K (3, 3) or (n, 3, 3). Returns full_box (n, 4), NaN for boxes
    wholly behind the camera, and crosses (n,), True where the box reaches behind the plane.
    """
    corners = box_corners(np.asarray(center, float), np.asarray(size, float), np.asarray(yaw, float))
    edges, visible = clip_edges(corners)
    shown = visible[..., None, None]
    K = np.asarray(K, float)
    pixels = project(np.where(shown, edges, [0.0, 0.0, 1.0]), K if K.ndim == 2 else K[:, None, None])
    low = np.where(shown, pixels, np.inf).min((1, 2), initial=np.inf)
    high = np.where(shown, pixels, -np.inf).max((1, 2), initial=-np.inf)
    full_box = np.concatenate([low, high], -1)
    full_box[~visible.any(-1)] = np.nan
    return full_box, (corners[..., 2] < NEAR).any(-1)


def camera_problem(K, width=None, height=None):
    """What is wrong with K (3, 3), for an image of that size where it is known, in words; None when nothing is."""
    if K.shape != (3, 3):
        advice = "; formats.kitti.split_projection splits a projection matrix" if K.shape == (3, 4) else ""
        return f"expected 3x3 numbers, got shape {K.shape}{advice}"
    fx, fy, cx, cy = K[0, 0], K[1, 1], K[0, 2], K[1, 2]
    if K[1, 0] != 0 or not np.abs(K[2] - [0, 0, 1]).max() <= 1e-6 or not np.isfinite(K).all():
        return f"expected [[fx, 0, cx], [0, fy, cy], [0, 0, 1]] of finite numbers, got {K.tolist()}"
    if abs(skew := K[0, 1]) > SKEW:
        return f"skew {skew:g} px, expected [[fx, 0, cx], [0, fy, cy], [0, 0, 1]], {SKEW} beside fx at most: rectify it"
    if not (fx > 0 and fy > 0):
        return f"focal lengths {fx:g}, {fy:g} px are not both > 0"
    if width and not (0.1 * width < fx < 50 * width and 0.1 * height < fy < 50 * max(width, height)):
        return f"focal lengths {fx:g}, {fy:g} px are implausible for an image of {width}x{height}"
    if width and not (-width < cx < 2 * width and -height < cy < 2 * height):
        return f"principal point ({cx:g}, {cy:g}) px is far outside an image of {width}x{height}"
    return None


def clip_boxes(boxes, width, height):
    """2D boxes (n, 4) cut to x in [0, width - 1], y in [0, height - 1], as in KITTI's labels. Numpy.

    width, height: of one image, or of the image of each box (n,).
    """
    return np.clip(boxes, 0, np.stack([width, height, width, height], -1) - 1)


def flip_boxes(boxes, width):
    """2D boxes (..., 4) mirrored left to right in an image of that width. Numpy."""
    x1, y1, x2, y2 = np.moveaxis(boxes, -1, 0)
    return np.stack([width - 1 - x2, y1, width - 1 - x1, y2], -1)


def box_iou(a, b):
    """Overlap of 2D boxes, a (..., 4) with b (..., 4) elementwise -> (...) in [0, 1]. Numpy or torch."""
    lib = _library(a)
    width = lib.clip(lib.minimum(a[..., 2], b[..., 2]) - lib.maximum(a[..., 0], b[..., 0]), 0, None)
    height = lib.clip(lib.minimum(a[..., 3], b[..., 3]) - lib.maximum(a[..., 1], b[..., 1]), 0, None)
    both = width * height
    union = (a[..., 2] - a[..., 0]) * (a[..., 3] - a[..., 1]) + (b[..., 2] - b[..., 0]) * (b[..., 3] - b[..., 1]) - both
    return both / lib.clip(union, 1e-12, None)


def average_duplicates(detections, candidates, overlap):
    """Means over the candidates of a class that overlap a detection, by score and overlap, place also by 1 / sigma^2.

    Dicts of one image's n detections and of all its S candidates, with label, score, box, pixel, depth, sigma as
    `Detector.rank` gives them. Torch. Returns visible boxes (n, 4), projected centres (n, 2) px and depths (n,) m.
    Box voting (Gidaris and Komodakis, ICCV 2015) with MonoFlex's weights for the place.
    """
    shared = box_iou(detections["box"][:, None], candidates["box"]).nan_to_num()  # of boxes that are not finite
    same = (detections["label"][:, None] == candidates["label"]) & (shared > overlap)
    weight = torch.where(same, shared * candidates["score"], 0.0)  # (n, S)
    weight = weight / weight.sum(1, keepdim=True)
    trusted = weight / candidates["sigma"] ** 2
    trusted = trusted / trusted.sum(1, keepdim=True)
    box = (weight[..., None] * candidates["box"]).sum(1)  # a matrix product would be rounded under autocast
    pixel = (trusted[..., None] * candidates["pixel"]).sum(1)
    depth = (trusted * candidates["depth"]).sum(1)
    alone = ~same.any(1)
    box = torch.where(alone[:, None], detections["box"], box)
    pixel = torch.where(alone[:, None], detections["pixel"], pixel)
    return box, pixel, torch.where(alone, detections["depth"], depth)


def generalized_iou(a, b, eps=1e-7):
    """GIoU of 2D boxes (..., 4) elementwise, in (-1, 1] (Rezatofighi et al., CVPR 2019). Torch."""
    (a_low, a_high), (b_low, b_high) = a.split(2, -1), b.split(2, -1)
    extent_a, extent_b = a_high - a_low, b_high - b_low
    overlap = torch.minimum(a_high, b_high) - torch.maximum(a_low, b_low)  # negative where they are apart
    width, height = torch.stack([extent_a, extent_b, overlap.clamp(min=0), extent_a + extent_b - overlap]).unbind(-1)
    area_a, area_b, both, hull = (width * height).unbind()  # at once: each operator calls several backward
    union = area_a + area_b - both + eps
    return (both + eps) / union + union / (hull + eps) - 1


def bev_intersection(a, b):
    """Common area of rotated rectangles seen from above, pair by pair. Numpy float64.

    a, b: (n, 5) as x, z (metres, of the centre), l, w (metres, >= 0), yaw (radians about +y). Returns (n,) m^2. Each
    `a` is cut at the four sides of its `b` (Sutherland and Hodgman, Reentrant polygon clipping, CACM 1974).
    """
    a, b = np.asarray(a, np.float64).reshape(-1, 5), np.asarray(b, np.float64).reshape(-1, 5)
    area = np.zeros(len(a))
    distance = np.hypot(a[:, 0] - b[:, 0], a[:, 1] - b[:, 1])
    reach = (np.hypot(a[:, 2], a[:, 3]) + np.hypot(b[:, 2], b[:, 3])) / 2
    rows = np.flatnonzero(distance < reach)
    for start in range(0, len(rows), PAIRS_AT_ONCE):
        part = rows[start : start + PAIRS_AT_ONCE]
        area[part] = _clipped_area(a[part], b[part])
    return area


def _clipped_area(a, b):
    """`bev_intersection` of (n, 5) with (n, 5), all at once, in the axes of each b."""
    sine, cosine = np.sin(b[:, 4]), np.cos(b[:, 4])
    x, z = a[:, 0] - b[:, 0], a[:, 1] - b[:, 1]
    x, z = (cosine * x - sine * z)[:, None], (sine * x + cosine * z)[:, None]  # centre of a
    turn = a[:, 4:] - b[:, 4:]
    sine, cosine = np.sin(turn), np.cos(turn)
    local_x, local_z = a[:, 2:3] * CORNER_SIGNS[:4, 0], a[:, 3:4] * CORNER_SIGNS[:4, 2]
    polygon = np.stack([x + cosine * local_x + sine * local_z, z + cosine * local_z - sine * local_x], -1)
    for axis, half in ((0, b[:, 2:3] / 2), (1, b[:, 3:4] / 2)):
        polygon = clip_polygons(polygon, half - polygon[..., axis])
        polygon = clip_polygons(polygon, half + polygon[..., axis])
    following = np.roll(polygon, -1, 1)
    area = np.abs((polygon[..., 0] * following[..., 1] - polygon[..., 1] * following[..., 0]).sum(1)) / 2
    smaller = np.minimum(a[:, 2] * a[:, 3], b[:, 2] * b[:, 3])
    return np.minimum(area, smaller)  # rounding must not make it larger than either


def clip_polygons(polygon, inside):
    """Keep the part of polygons (n, v, 2 or 3) where inside (n, v), a signed distance at each vertex, is not negative.

    Returns (n, u, 2 or 3), u the largest vertex count; shorter polygons repeat their last vertex, empty ones are 0.
    """
    after, after_inside = np.roll(polygon, -1, 1), np.roll(inside, -1, 1)
    crosses = (inside >= 0) != (after_inside >= 0)
    t = inside / np.where(crosses, inside - after_inside, 1.0)
    cut = polygon + t[..., None] * (after - polygon)
    points = np.stack([polygon, cut], 2).reshape(len(polygon), -1, polygon.shape[2])  # (n, 2v, 2 or 3)
    stays = np.stack([inside >= 0, crosses], 2).reshape(len(polygon), -1)
    count, place = stays.sum(1), np.cumsum(stays, 1) - 1
    clipped = np.zeros((len(polygon), count.max(), polygon.shape[2]))
    row, column = np.nonzero(stays)
    clipped[row, place[row, column]] = points[row, column]
    last = np.minimum(np.arange(clipped.shape[1]), np.maximum(count - 1, 0)[:, None])
    return np.take_along_axis(clipped, last[..., None], 1)


def bev_and_box3d_iou(a, b):
    """Overlaps of upright 3D boxes from above and in space, pair by pair. Numpy.

    a, b: (n, 7) as x, y, z of the geometric centre, l, h, w (metres), yaw (radians). Returns two (n,) arrays in [0, 1].
    """
    a, b = np.asarray(a, np.float64).reshape(-1, 7), np.asarray(b, np.float64).reshape(-1, 7)
    ground = bev_intersection(a[:, [0, 2, 3, 5, 6]], b[:, [0, 2, 3, 5, 6]])
    bottom = np.minimum(a[:, 1] + a[:, 4] / 2, b[:, 1] + b[:, 4] / 2)  # y points down
    top = np.maximum(a[:, 1] - a[:, 4] / 2, b[:, 1] - b[:, 4] / 2)
    common = ground * np.maximum(bottom - top, 0.0)
    return _share(ground, a[:, 3] * a[:, 5], b[:, 3] * b[:, 5]), _share(common, a[:, 3:6].prod(1), b[:, 3:6].prod(1))


def box3d_iou(a, b):
    """Overlap of upright 3D boxes in space, pair by pair: a, b (n, 7) as `bev_and_box3d_iou` takes -> (n,). Numpy."""
    return bev_and_box3d_iou(a, b)[1]


def _share(common, a, b):
    """Intersection over union from the intersection and the two contents, 0 where there is no union."""
    union = a + b - common
    return np.divide(common, union, out=np.zeros(len(common)), where=union > 0)
