"""Cameras, boxes and overlaps, in numpy or torch: no configuration, no files.

Conventions, kept by every module (stated here once):

* Camera frame: that of the image's own camera, x right, y down, z forward, metres, with a pure 3x3 `K` in pixels.
* Pixels: integer coordinates are pixel centres. Resizing by s moves u to (u + 0.5) s - 0.5; a flip to W - 1 - u. `K` always
  belongs to the image it travels with.
* Box: `center` (x, y, z) is the geometric centre; `size` (l, h, w) are the extents along the box's own x, y, z axes; `yaw` is the
  rotation about +y (KITTI's rotation_y) in [-pi, pi). The observation angle is alpha = yaw - ray, with ray = atan2(x, z).
* `box` (x1, y1, x2, y2) is the visible 2D box clipped to the image; `full_box` the extent of the projected 3D box, free to leave it.

Functions named in the singular work on any leading shape; those that say "numpy or torch" follow the type of their first argument.
"""

import math

import numpy as np
import torch
from torch import Tensor

NEAR = 0.1  # metres: edges that cross this plane are cut there before projection
MIN_DEPTH = 0.5  # metres, of virtual depth in the head's direct estimate: nothing nearer is estimated or has a usable projected centre
SPEED = 5.0  # m/s of a velocity output of 1: usual speeds are outputs of order 1
DIRECTION_BORDER = math.pi / 4  # alpha where the two heading bins meet: away from the common 0, +-pi/2 and pi
LIMITS = {
    "box": (5.0,) * 4,
    "depth": (10.0, 5.0),
    "height": (4.0, 5.0),
    "size": (2.0,) * 3,
}  # of the head's outputs, kept smoothly

# Corner order: four at the bottom (+y), then four at the top; x forward, z left of a box at yaw 0 seen from above.
CORNER_SIGNS = np.array([[+1, +1, +1], [+1, +1, -1], [-1, +1, -1], [-1, +1, +1],
                         [+1, -1, +1], [+1, -1, -1], [-1, -1, -1], [-1, -1, +1]], dtype=np.float64) / 2  # fmt: skip
FACES = np.array([[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 5, 4], [1, 2, 6, 5], [2, 3, 7, 6], [3, 0, 4, 7]])
EDGES = np.array([[0, 1], [1, 2], [2, 3], [3, 0], [4, 5], [5, 6], [6, 7], [7, 4], [0, 4], [1, 5], [2, 6], [3, 7]])


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
    """Observation angle (radians) -> bin 1 in [border, border + pi), else 0, as in FCOS3D's direction classifier. Torch, long."""
    return (torch.sin(alpha - DIRECTION_BORDER) >= 0).long()


def project(points, K):
    """Points (..., 3) in metres, K (..., 3, 3) of the same leading shape or one for all -> pixels (..., 2). Numpy or torch.

    Points at or behind the camera plane give meaningless pixels: clip first (`project_boxes` does).
    """
    image = (K @ points[..., None])[..., 0]
    return image[..., :2] / image[..., 2:]


def unproject(pixels, depth, K):
    """Lift pixels (..., 2) at depth (...) metres along z (not range) to points (..., 3), K (..., 3, 3). Numpy or torch.

    Inverse of `project` for a K with zero skew; K's leading shape must broadcast with the pixels'.
    """
    lib = _library(pixels)
    focal = lib.stack([K[..., 0, 0], K[..., 1, 1]], -1)
    return lib.concatenate([(pixels - K[..., :2, 2]) / focal * depth[..., None], depth[..., None]], -1)


def corners_from_axes(center, size, sine, cosine):
    """Like `box_corners`, from the sine and cosine of the yaw (...): differentiable without an angle. Numpy or torch."""
    lib = _library(center)
    signs = CORNER_SIGNS if lib is np else torch.as_tensor(CORNER_SIGNS, dtype=center.dtype, device=center.device)
    x, y, z = lib.moveaxis(size[..., None, :] * signs, -1, 0)  # (..., 8) each
    sine, cosine = sine[..., None], cosine[..., None]
    return lib.stack([cosine * x + sine * z, y, cosine * z - sine * x], -1) + center[..., None, :]


def box_corners(center, size, yaw):
    """Centre (..., 3), size (..., 3) as l, h, w, yaw (...) -> corners (..., 8, 3), bottom four first. Numpy or torch."""
    return corners_from_axes(center, size, _library(center).sin(yaw), _library(center).cos(yaw))


def clip_edges(corners, near=NEAR):
    """The twelve edges of boxes, cut at the plane z = near.

    corners: (n, 8, 3) metres, numpy. Returns edges (n, 12, 2, 3) and visible (n, 12), False where an edge lies wholly
    behind the plane (its points are then meaningless).
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

    center (n, 3), size (n, 3) as l, h, w, yaw (n,), K (3, 3) or (n, 3, 3). Returns full_box (n, 4), possibly far outside the image and
    NaN for boxes wholly behind the camera, and crosses (n,), True where the box reaches behind the plane.
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


def visible_boxes(corners, K, width, height):
    """Extent of what an image of that size shows of boxes: the `box` of those that nothing hides. Numpy.

    corners (n, 8, 3) m in the order of `box_corners`; K (3, 3). Returns (n, 4) px within [0, width - 1] x [0, height - 1], NaN where
    nothing shows. Tighter than a clipped `full_box` where the border cuts a box: each face is cut there, in homogeneous pixels.
    """
    sides = np.array([[1, 0, 0], [-1, 0, width - 1], [0, 1, 0], [0, -1, height - 1]], float)
    homogeneous = corners @ np.asarray(K, float).T
    outside = (
        np.concatenate([homogeneous @ sides.T < 0, homogeneous[..., 2:] < NEAR], -1).all(1).any(-1)
    )  # wholly beyond one border
    box, rows = np.full((len(corners), 4), np.nan), np.flatnonzero(~outside)
    if not len(rows):
        return box
    polygon = homogeneous[rows][:, FACES].reshape(-1, 4, 3)
    polygon = _clip_polygons(polygon, polygon[..., 2] - NEAR)
    for side in sides:
        polygon = _clip_polygons(polygon, polygon @ side)
    shown = polygon[..., 2:] > 0  # what is cut away wholly is all zero
    pixels = polygon[..., :2] / np.where(shown, polygon[..., 2:], 1.0)
    low, high = (np.where(shown, pixels, blank).reshape(len(rows), -1, 2) for blank in (np.inf, -np.inf))
    extent = np.concatenate([low.min(1, initial=np.inf), high.max(1, initial=-np.inf)], -1)
    box[rows] = np.where(np.isfinite(extent), np.clip(extent, 0, [width - 1, height - 1] * 2), np.nan)
    return box


def camera_problem(K, width=None, height=None):
    """What is wrong with K (3, 3), for an image of that size where it is known, in words; None when nothing is."""
    if K.shape != (3, 3):
        advice = "; formats.kitti.split_projection splits a projection matrix" if K.shape == (3, 4) else ""
        return f"expected 3x3 numbers, got shape {K.shape}{advice}"
    if not np.isfinite(K).all():
        return f"expected finite numbers, got {K.tolist()}"
    fx, fy, cx, cy = K[0, 0], K[1, 1], K[0, 2], K[1, 2]
    if abs(K[0, 1]) > 1e-6 * abs(fx) or abs(K[1, 0]) > 0 or np.abs(K[2] - [0, 0, 1]).max() > 1e-6:
        return f"expected [[fx, 0, cx], [0, fy, cy], [0, 0, 1]], got {K.tolist()}"
    if not (fx > 0 and fy > 0):
        return f"focal lengths {fx:g}, {fy:g} px are not both > 0"
    if width and not (0.1 * width < fx < 50 * width and 0.1 * height < fy < 50 * max(width, height)):
        return f"focal lengths {fx:g}, {fy:g} px are implausible for an image of {width}x{height}"
    if width and not (-width < cx < 2 * width and -height < cy < 2 * height):
        return f"principal point ({cx:g}, {cy:g}) px is far outside an image of {width}x{height}"
    return None


def clip_boxes(boxes, width, height):
    """2D boxes (..., 4) cut to the image: x in [0, width - 1], y in [0, height - 1] as in KITTI's labels. Numpy or torch."""
    lib, limits = _library(boxes), (width - 1, height - 1, width - 1, height - 1)
    return lib.stack([lib.clip(boxes[..., i], 0, limit) for i, limit in enumerate(limits)], -1)


def flip_boxes(boxes, width):
    """2D boxes (..., 4) mirrored left to right in an image of that width. Numpy or torch."""
    return _library(boxes).stack(
        [width - 1 - boxes[..., 2], boxes[..., 1], width - 1 - boxes[..., 0], boxes[..., 3]], -1
    )


def box_iou(a, b):
    """Overlap of 2D boxes, a (..., 4) with b (..., 4) elementwise -> (...) in [0, 1]. Numpy or torch."""
    lib = _library(a)
    width = lib.clip(lib.minimum(a[..., 2], b[..., 2]) - lib.maximum(a[..., 0], b[..., 0]), 0, None)
    height = lib.clip(lib.minimum(a[..., 3], b[..., 3]) - lib.maximum(a[..., 1], b[..., 1]), 0, None)
    both = width * height
    union = (a[..., 2] - a[..., 0]) * (a[..., 3] - a[..., 1]) + (b[..., 2] - b[..., 0]) * (b[..., 3] - b[..., 1]) - both
    return both / lib.clip(union, 1e-12, None)


def generalized_iou(a, b, eps=1e-7):
    """GIoU of 2D boxes (..., 4) elementwise, in (-1, 1] (Rezatofighi et al., CVPR 2019). Torch.

    Unlike torchvision's loss it indexes with no mask, so it never waits for the device.
    """
    (a_low, a_high), (b_low, b_high) = a.split(2, -1), b.split(2, -1)
    extent_a, extent_b = a_high - a_low, b_high - b_low
    overlap = torch.minimum(a_high, b_high) - torch.maximum(a_low, b_low)  # negative where they are apart
    width, height = torch.stack([extent_a, extent_b, overlap.clamp(min=0), extent_a + extent_b - overlap]).unbind(-1)
    area_a, area_b, both, hull = (width * height).unbind()  # at once: each operator calls several backward
    union = area_a + area_b - both + eps
    return (both + eps) / union + union / (hull + eps) - 1


PAIRS_AT_ONCE = 10_000  # rotated overlaps are computed in slices of this many pairs: about 10 MB, which caches hold


def bev_intersection(a, b):
    """Common area of rotated rectangles seen from above, pair by pair. Numpy float64.

    a, b: (n, 5) as x, z (metres, of the centre), l, w (metres, >= 0), yaw (radians about +y). Returns (n,) square metres.
    Each `a` is expressed in the axes of its `b` and cut at b's four sides (Sutherland and Hodgman, Reentrant polygon clipping,
    CACM 1974), so coordinates stay small and touching, nested and identical boxes need no special case.
    """
    a, b = np.asarray(a, np.float64).reshape(-1, 5), np.asarray(b, np.float64).reshape(-1, 5)
    area = np.zeros(len(a))
    near = (
        np.hypot(a[:, 0] - b[:, 0], a[:, 1] - b[:, 1]) < (np.hypot(a[:, 2], a[:, 3]) + np.hypot(b[:, 2], b[:, 3])) / 2
    )
    rows = np.flatnonzero(near)
    for start in range(0, len(rows), PAIRS_AT_ONCE):
        part = rows[start : start + PAIRS_AT_ONCE]
        area[part] = _clipped_area(a[part], b[part])
    return area


def _clipped_area(a, b):
    """`bev_intersection` of (n, 5) with (n, 5), all at once."""
    sine, cosine = np.sin(b[:, 4]), np.cos(b[:, 4])
    x, z = a[:, 0] - b[:, 0], a[:, 1] - b[:, 1]
    x, z = cosine * x - sine * z, sine * x + cosine * z  # centre of a in the axes of b
    turn = a[:, 4] - b[:, 4]
    sine, cosine = np.sin(turn)[:, None], np.cos(turn)[:, None]
    local_x, local_z = a[:, 2:3] * CORNER_SIGNS[:4, 0], a[:, 3:4] * CORNER_SIGNS[:4, 2]
    polygon = np.stack(
        [x[:, None] + cosine * local_x + sine * local_z, z[:, None] + cosine * local_z - sine * local_x], -1
    )
    for axis, half in ((0, b[:, 2:3] / 2), (1, b[:, 3:4] / 2)):
        polygon = _clip_polygons(polygon, half - polygon[..., axis])
        polygon = _clip_polygons(polygon, half + polygon[..., axis])
    following = np.roll(polygon, -1, 1)
    area = np.abs((polygon[..., 0] * following[..., 1] - polygon[..., 1] * following[..., 0]).sum(1)) / 2
    return np.minimum(
        area, np.minimum(a[:, 2] * a[:, 3], b[:, 2] * b[:, 3])
    )  # rounding must not make it larger than either


def _clip_polygons(polygon, inside):
    """Keep the part of polygons (n, v, 2 or 3) where inside (n, v), a signed distance at each vertex, is not negative.

    Returns (n, u, 2 or 3): u is the largest vertex count, shorter polygons repeat their last vertex, empty ones are all zero.
    """
    after, after_inside = np.roll(polygon, -1, 1), np.roll(inside, -1, 1)
    crosses = (inside >= 0) != (after_inside >= 0)
    t = inside / np.where(crosses, inside - after_inside, 1.0)
    cut = polygon + t[..., None] * (after - polygon)
    points = np.stack([polygon, cut], 2).reshape(len(polygon), -1, polygon.shape[2])  # (n, 2v, 2 or 3)
    kept = np.stack([inside >= 0, crosses], 2).reshape(len(polygon), -1)
    count, place = kept.sum(1), np.cumsum(kept, 1) - 1
    clipped = np.zeros((len(polygon), count.max(), polygon.shape[2]))
    row, column = np.nonzero(kept)
    clipped[row, place[row, column]] = points[row, column]
    last = np.minimum(np.arange(clipped.shape[1]), np.maximum(count - 1, 0)[:, None])
    return np.take_along_axis(clipped, last[..., None], 1)


def bev_iou(a, b):
    """Overlap of rotated rectangles seen from above, pair by pair: a, b (n, 5) x, z, l, w, yaw -> (n,) in [0, 1]. Numpy float64."""
    a, b = np.asarray(a, np.float64).reshape(-1, 5), np.asarray(b, np.float64).reshape(-1, 5)
    return _share(bev_intersection(a, b), a[:, 2] * a[:, 3], b[:, 2] * b[:, 3])


def bev_and_box3d_iou(a, b):
    """Overlaps of upright 3D boxes from above and in space, pair by pair; the ground intersection is computed once. Numpy float64.

    a, b: (n, 7) as x, y, z of the geometric centre, l, h, w (metres), yaw (radians). Returns two (n,) arrays in [0, 1].
    """
    a, b = np.asarray(a, np.float64).reshape(-1, 7), np.asarray(b, np.float64).reshape(-1, 7)
    ground = bev_intersection(a[:, [0, 2, 3, 5, 6]], b[:, [0, 2, 3, 5, 6]])
    bottom = np.minimum(a[:, 1] + a[:, 4] / 2, b[:, 1] + b[:, 4] / 2)  # y points down
    top = np.maximum(a[:, 1] - a[:, 4] / 2, b[:, 1] - b[:, 4] / 2)
    common = ground * np.maximum(bottom - top, 0.0)
    return _share(ground, a[:, 3] * a[:, 5], b[:, 3] * b[:, 5]), _share(common, a[:, 3:6].prod(1), b[:, 3:6].prod(1))


def box3d_iou(a, b):
    """Overlap of upright 3D boxes, pair by pair: a, b (n, 7) x, y, z of the centre, l, h, w, yaw -> (n,) in [0, 1]. Numpy float64."""
    return bev_and_box3d_iou(a, b)[1]


def _share(common, a, b):
    """Intersection over union from the intersection and the two contents, 0 where there is no union."""
    union = a + b - common
    return np.divide(common, union, out=np.zeros(len(common)), where=union > 0)
