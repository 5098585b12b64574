"""The built-in world: procedurally rendered driving scenes, written once in KITTI format and read back by formats/kitti.py.

A frame is a pure function of (seed, index, size). Camera frame: x right, y down, z forward, metres. The camera is pitched, rolled and
raised at random, so the ground is the plane normal . X = height; boxes stand on it but stay upright in the camera frame, as KITTI's do.
"""

import contextlib
import itertools
import math
import os
import shutil
import time
import zlib
from collections import namedtuple
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from formats.kitti import write_calib, write_labels
from formats.pool import lock, processes
from scene.frames import make_labels
from scene.geometry import NEAR, box_corners, clip_boxes, project_boxes, wrap_angle

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

WORLD_VERSION = 1  # part of the folder's name: raise it whenever a picture or a label changes
FIRST_INDEX = {
    "train": 0,
    "val": 500_000,
}  # of the ids of a split: held-out frames do not depend on how many are trained on
MAX_DEPTH = (
    60.0  # m, objects farther away become DontCare, as do those below MIN_HEIGHT px or MIN_VISIBLE of their pixels
)
MIN_HEIGHT, MIN_VISIBLE = 10.0, 0.1
VISIBLE_LEVELS = (0.8, 0.5, 0.25)  # least visible share of occlusion 0, 1 and 2; less is 3
FOCAL_LENGTHS = (0.578, 0.734)  # of the image width: 370 and 470 px at 640
CROSSING_WIDTH = 7.5  # m, of side streets
CAMERA_SHIFT = np.array(
    [0.06, -0.0003, 0.0027]
)  # m from camera 0 to this camera, about KITTI's: gives P2 its fourth column

SIZES = {  # mean l, h, w in metres; see draw_objects for the spread
    "sedan": (4.45, 1.45, 1.76), "hatchback": (3.75, 1.5, 1.66), "suv": (4.4, 1.7, 1.82), "van": (4.9, 2.1, 1.92),
    "truck": (8.2, 3.2, 2.5), "pedestrian": (0.75, 1.75, 0.62), "cyclist": (1.76, 1.74, 0.6),
    "pole": (0.16, 5.5, 0.16), "tree": (2.6, 5.5, 2.6), "bin": (0.6, 1.1, 0.6),
    "bus": (11.2, 3.4, 2.85), "trailer": (10.5, 3.6, 2.6), "bicycle": (1.76, 1.02, 0.6), "motorcyclist": (2.1, 1.7, 0.8),
    "cone": (0.4, 0.9, 0.4), "barrier": (0.5, 1.0, 2.4),
}  # fmt: skip
CLASSES = {
    "sedan": "Car", "hatchback": "Car", "suv": "Car", "van": "Van", "truck": "Truck", "pedestrian": "Pedestrian", "cyclist": "Cyclist",
}  # fmt: skip
PAINT, GLASS, RUBBER, METAL, DARK, LAMP, TAIL, PLATE, SKIN, HAIR, SHIRT, TROUSERS, LEAF, WOOD = range(14)
TEXTURE = np.float32(
    [0.05, 0.06, 0.1, 0.1, 0.1, 0.03, 0.03, 0.1, 0.04, 0.15, 0.14, 0.12, 0.45, 0.2]
)  # noise amplitude by material
GLOSS = np.float32([0.18, 0.5, 0, 0.2, 0.05] + [0] * 9)  # share of mirrored light by material


# Shapes: convex flat faces in a unit box (x to the front, y down, z to the side, each within +-0.5) that they touch on all six sides.
# A part is (ring (V, 3), inside (3,), material, layer); layer > 0 lies on top of a face, like a window on a cabin.


def prism(profile, half, material, z=0.0):
    """A convex (x, y) outline swept across z; half: half widths at its top and at its bottom. The first two faces are its sides."""
    x, y = np.array(profile, float).T
    width = np.interp(y, (y.min(), y.max()), half)
    left, right = np.stack([x, y, z + width], 1), np.stack([x, y, z - width], 1)
    rings = [left, right, *np.stack([left, np.roll(left, -1, 0), np.roll(right, -1, 0), right], 1)]
    inside = np.array([x.mean(), y.mean(), z])
    return [(ring, inside, material, 0) for ring in rings]


def bar(start, end, thick, half, material, z=0.0):
    """A tube between two (x, y) points; thick: (dx, dy) of half its cross section."""
    (x1, y1), (x2, y2), (dx, dy) = start, end, thick
    return prism(
        [(x1 - dx, y1 - dy), (x2 - dx, y2 - dy), (x2 + dx, y2 + dy), (x1 + dx, y1 + dy)], (half, half), material, z
    )


def disc(x, y, rx, ry, sides=10):
    turn = (np.arange(sides) + 0.5 * (sides % 4 == 0)) * 2 * np.pi / sides + np.pi / 2
    return np.stack([x + rx * np.cos(turn), y + ry * np.sin(turn)], 1)


def patches(face, u, spans, material):
    """Rectangles drawn on a four-cornered face: the range u in [0, 1] along its first edge, each range of spans along its second."""
    (a, b, c, d), inside, _, layer = face
    at = lambda s, t: (1 - s) * ((1 - t) * a + t * d) + s * ((1 - t) * b + t * c)  # noqa: E731
    rings = [np.stack([at(u[0], v[0]), at(u[1], v[0]), at(u[1], v[1]), at(u[0], v[1])]) for v in spans]
    return [(ring, inside, material, layer + 1) for ring in rings]


def wheels(x, radius, ratio, half=0.07):
    """Wheels at +-x standing on the box's floor; radius: of the height; ratio: height / length, so that they look round."""
    parts = []
    for cx, z in itertools.product((-x, x), (half - 0.5, 0.5 - half)):
        tyre = prism(disc(cx, 0.5 - radius, radius * ratio, radius), (half, half), RUBBER, z)
        hub = disc(cx, 0.5 - radius, 0.6 * radius * ratio, 0.6 * radius)
        outer = np.column_stack([hub, np.full(len(hub), np.sign(z) * 0.5)])
        parts += [*tyre, (outer, tyre[0][1], METAL, 1)]
    return parts


OUTER, INNER, WHOLE, PAIR = ((0.02, 0.25), (0.75, 0.98)), ((0.37, 0.63),), ((0.06, 0.94),), ((0.08, 0.47), (0.53, 0.92))


def car_parts(rear, roof_rear, roof_front, screen, belt, ratio):
    """x of the cabin's rear foot, of both ends of the roof and of the windscreen's foot; y of the bonnet's rear edge; height / length."""
    outline = [
        (-0.5, 0.3),
        (-0.5, belt + 0.1),
        (-0.47, belt),
        (0.2, belt),
        (0.44, belt + 0.09),
        (0.5, belt + 0.2),
        (0.5, 0.3),
    ]
    _, _, back, _, _, _, tip, front, *_ = body = prism([*outline, (0.46, 0.38), (-0.46, 0.38)], (0.46, 0.5), PAINT)
    foot = belt + 0.04
    cabin = prism([(rear, foot), (roof_rear, -0.5), (roof_front, -0.5), (screen, foot)], (0.37, 0.46), PAINT)
    parts = body + cabin + wheels(0.31, 0.21, ratio)
    for side in cabin[:2]:
        parts += patches(side, (0.12, 0.86), PAIR, GLASS)
    parts += patches(cabin[2], (0.15, 0.88), WHOLE, GLASS) + patches(cabin[4], (0.1, 0.95), WHOLE, GLASS)
    parts += (
        patches(back, (0.5, 0.95), OUTER, TAIL)
        + patches(back, (0.3, 0.6), INNER, PLATE)
        + patches(back, (0.0, 0.2), WHOLE, DARK)
    )
    parts += patches(tip, (0.05, 0.95), OUTER, LAMP) + patches(front, (0.1, 0.75), ((0.14, 0.86),), DARK)
    return parts + patches(front, (0.55, 0.9), INNER, PLATE)


def van_parts():
    box = prism(
        [(-0.5, 0.42), (-0.5, -0.44), (-0.46, -0.5), (0.16, -0.5), (0.36, -0.06), (0.36, 0.42)], (0.44, 0.5), PAINT
    )
    nose = prism([(0.3, -0.06), (0.36, -0.08), (0.47, 0.03), (0.5, 0.12), (0.5, 0.42), (0.3, 0.42)], (0.46, 0.5), PAINT)
    parts = box + nose + wheels(0.31, 0.16, 0.43) + patches(box[5], (0.08, 0.95), WHOLE, GLASS)
    window = prism(
        [(0.0, -0.1), (0.0, -0.42), (0.15, -0.42), (0.29, -0.1)],
        np.interp((-0.42, -0.1), (-0.5, 0.42), (0.44, 0.5)),
        GLASS,
    )
    parts += [(ring, inside, GLASS, 1) for ring, inside, _, _ in window[:2]]
    parts += patches(box[2], (0.55, 0.92), PAIR, GLASS) + patches(box[2], (0.15, 0.5), ((0.01, 0.1), (0.9, 0.99)), TAIL)
    parts += patches(box[2], (0.2, 0.32), INNER, PLATE) + patches(nose[4], (0.1, 0.95), OUTER, LAMP)
    return parts + patches(nose[5], (0.05, 0.6), ((0.2, 0.8),), DARK)


def truck_parts():
    cab = prism([(0.29, 0.4), (0.29, -0.4), (0.46, -0.4), (0.5, -0.02), (0.5, 0.4)], (0.44, 0.46), PAINT)
    cargo = prism([(-0.5, 0.28), (-0.5, -0.5), (0.27, -0.5), (0.27, 0.28)], (0.5, 0.5), PLATE)
    chassis = prism([(-0.48, 0.4), (-0.48, 0.28), (0.3, 0.28), (0.3, 0.4)], (0.36, 0.36), DARK)
    width = np.interp((-0.34, -0.02), (-0.4, 0.4), (0.44, 0.46))
    window = prism([(0.33, -0.02), (0.33, -0.34), (0.44, -0.34), (0.47, -0.02)], width, GLASS)
    parts = (
        cab
        + cargo
        + chassis
        + wheels(0.36, 0.15, 0.39, 0.08)
        + [(ring, inside, GLASS, 1) for ring, inside, _, _ in window[:2]]
    )
    parts += patches(cab[4], (0.1, 0.95), WHOLE, GLASS) + patches(cab[5], (0.55, 0.75), OUTER, LAMP)
    parts += patches(cab[5], (0.1, 0.5), PAIR, DARK)
    parts += patches(cargo[2], (0.0, 0.08), OUTER, TAIL) + patches(cargo[2], (0.05, 0.97), ((0.49, 0.51),), DARK)
    return parts + [part for face in cargo[:2] for part in patches(face, (0.3, 0.75), ((0.12, 0.85),), PAINT)]


def head_parts(x, y, rx, ry, half):
    """A head with hair above and behind and a face in front."""
    faces = prism(disc(x, y, rx, ry, 8), (half, half), HAIR)
    skin = [ring[:, 0].mean() > x - 0.2 * rx and ring[:, 1].mean() > y - 0.6 * ry for ring, *_ in faces]
    return [(ring, inside, SKIN if bare else HAIR, 0) for (ring, inside, _, _), bare in zip(faces, skin, strict=True)]


def pedestrian_parts():
    parts = prism(
        [(-0.2, 0.05), (-0.22, -0.28), (-0.14, -0.35), (0.12, -0.35), (0.2, -0.28), (0.18, 0.05)], (0.3, 0.25), SHIRT
    )
    for step in (1, -1):  # a leg and the opposite arm swing to the front
        z, foot = 0.15 * step, 0.31 if step > 0 else -0.38
        parts += bar((0.02 * step, 0.0), (0.32 * step, 0.47), (0.11, 0), 0.12, TROUSERS, z)
        parts += bar((0.0, -0.31), (-0.28 * step, 0.04), (0.08, 0), 0.07, SHIRT, 2.86 * z)
        parts += bar((-0.28 * step, 0.03), (-0.31 * step, 0.08), (0.08, 0), 0.06, SKIN, 2.86 * z)
        shoe = [(foot - 0.12, 0.5), (foot - 0.12, 0.46), (foot + 0.05, 0.44), (foot + 0.19, 0.48), (foot + 0.19, 0.5)]
        parts += prism(shoe, (0.1, 0.1), DARK, z)
    return parts + bar((0.0, -0.37), (0.0, -0.33), (0.07, 0), 0.1, SKIN) + head_parts(0.02, -0.43, 0.16, 0.07, 0.16)


def bus_parts():
    body = prism(
        [(-0.5, 0.4), (-0.5, -0.46), (-0.48, -0.5), (0.48, -0.5), (0.5, -0.44), (0.5, 0.4)], (0.48, 0.5), PAINT
    )
    panes = tuple((0.05 + 0.13 * i, 0.16 + 0.13 * i) for i in range(7))
    window = prism(
        [(-0.47, 0.05), (-0.47, -0.34), (0.47, -0.34), (0.47, 0.05)],
        np.interp((-0.34, 0.05), (-0.5, 0.4), (0.48, 0.5)),
        PAINT,
    )
    parts = body + wheels(0.32, 0.13, 0.3, 0.06)
    for side in window[:2]:
        parts += patches(side, (0.02, 0.98), panes, GLASS)
    parts += patches(body[2], (0.1, 0.3), OUTER, TAIL) + patches(body[2], (0.55, 0.92), WHOLE, GLASS)
    return parts + patches(body[6], (0.1, 0.65), WHOLE, GLASS) + patches(body[6], (0.8, 0.92), OUTER, LAMP)


def trailer_parts():
    cargo = prism([(-0.5, 0.22), (-0.5, -0.5), (0.5, -0.5), (0.5, 0.22)], (0.5, 0.5), PLATE)
    chassis = prism([(-0.48, 0.36), (-0.48, 0.22), (0.48, 0.22), (0.48, 0.36)], (0.3, 0.3), DARK)
    parts = cargo + chassis + wheels(0.36, 0.14, 0.34, 0.08) + patches(cargo[2], (0.0, 0.08), OUTER, TAIL)
    return parts + [part for face in cargo[:2] for part in patches(face, (0.3, 0.75), ((0.12, 0.85),), PAINT)]


def cone_parts():
    outline = [(-0.34, 0.42), (-0.06, -0.5), (0.06, -0.5), (0.34, 0.42)]
    parts = prism([(-0.5, 0.5), (-0.5, 0.42), (0.5, 0.42), (0.5, 0.5)], (0.5, 0.5), DARK) + prism(
        outline, (0.06, 0.34), TAIL
    )
    ring = prism([(-0.24, 0.1), (-0.15, -0.2), (0.15, -0.2), (0.24, 0.1)], (0.15, 0.24), LAMP)
    return parts + [(face, inside, LAMP, 1) for face, inside, _, _ in ring]


def barrier_parts():
    body = prism([(-0.5, 0.5), (-0.5, 0.3), (-0.18, -0.5), (0.18, -0.5), (0.5, 0.3), (0.5, 0.5)], (0.5, 0.5), TAIL)
    stripes = ((0.1, 0.3), (0.4, 0.6), (0.7, 0.9))
    return body + [part for face in (body[3], body[5]) for part in patches(face, (0.15, 0.85), stripes, LAMP)]


def bicycle_parts():
    """A bicycle below y = -0.085, as a cyclist rides it."""
    parts, hub, pedals, saddle, steer = [], (-0.307, 0.3), (-0.05, 0.28), (-0.12, 0.0), (0.2, 0.03)
    for x in (-0.307, 0.307):  # rings, so that one sees through the wheels
        outer, inner = disc(x, 0.303, 0.193, 0.197, 12), disc(x, 0.303, 0.165, 0.168, 12)
        for i in range(12):
            parts += prism([outer[i - 1], outer[i], inner[i], inner[i - 1]], (0.045, 0.045), RUBBER)
    for start, end in ((hub, pedals), (pedals, saddle), (saddle, steer), (pedals, steer), (hub, saddle)):
        parts += bar(start, end, (0.008, 0.014), 0.03, PAINT)
    parts += bar((0.2, -0.06), (0.307, 0.3), (0.014, 0), 0.04, PAINT) + bar(
        (0.2, -0.07), (0.24, -0.07), (0, 0.015), 0.5, DARK
    )
    return (
        parts
        + bar((-0.2, -0.01), (-0.06, -0.01), (0, 0.015), 0.12, DARK)
        + bar((-0.5, 0.22), (-0.47, 0.22), (0, 0.02), 0.06, TAIL)
    )


def stretched(parts, top):
    """Parts that reach from y = top to the floor, as tall as the unit box."""
    place = lambda p: np.stack([p[..., 0], 0.5 - (0.5 - p[..., 1]) / (0.5 - top), p[..., 2]], -1)  # noqa: E731
    return [(place(ring), place(inside), material, layer) for ring, inside, material, layer in parts]


def motorcycle_parts():
    parts = bar((0.2, -0.06), (0.307, 0.3), (0.02, 0), 0.1, METAL) + bar(
        (0.2, -0.07), (0.24, -0.07), (0, 0.015), 0.5, DARK
    )
    for x in (-0.307, 0.307):
        parts += prism(disc(x, 0.303, 0.193, 0.197), (0.09, 0.09), RUBBER)
    parts += prism(
        [(-0.3, 0.2), (-0.42, -0.02), (-0.1, 0.0), (0.2, -0.08), (0.22, 0.1), (0.1, 0.4), (-0.15, 0.4)],
        (0.14, 0.18),
        PAINT,
    )
    return (
        parts
        + bar((0.21, -0.04), (0.25, 0.02), (0.02, 0), 0.12, LAMP)
        + bar((-0.45, 0.0), (-0.41, 0.0), (0, 0.03), 0.1, TAIL)
    )


def rider_parts():
    parts = []
    for knee, foot, z in (((0.09, 0.11), (0.0, 0.36), 0.2), ((0.05, 0.03), (-0.08, 0.27), -0.2)):
        parts += bar((-0.12, -0.03), knee, (0.02, 0.035), 0.12, TROUSERS, z) + bar(
            knee, foot, (0.035, 0), 0.1, TROUSERS, z
        )
        parts += bar((foot[0] - 0.03, foot[1]), (foot[0] + 0.09, foot[1]), (0, 0.018), 0.09, DARK, z)
        parts += bar((0.07, -0.3), (0.2, -0.09), (0.025, 0.02), 0.08, SHIRT, 1.6 * z)
    parts += prism(
        [(-0.2, 0.02), (-0.19, -0.1), (-0.01, -0.35), (0.1, -0.33), (0.1, -0.24), (-0.05, 0.03)], (0.38, 0.28), SHIRT
    )
    return parts + head_parts(0.12, -0.425, 0.068, 0.075, 0.17)


def tree_parts():
    crown = [(-0.3, 0.08), (-0.5, -0.1), (-0.42, -0.36), (-0.1, -0.5), (0.2, -0.48), (0.5, -0.2), (0.36, 0.04)]
    parts = prism(crown, (0.3, 0.36), LEAF) + prism(
        [(-0.34, 0), (-0.2, -0.42), (0.24, -0.42), (0.3, 0)], (0.4, 0.5), LEAF
    )
    return parts + prism([(-0.05, 0.5), (-0.04, 0), (0.04, 0), (0.05, 0.5)], (0.05, 0.05), WOOD)


POST = partial(prism, [(-0.5, 0.5), (-0.5, -0.5), (0.5, -0.5), (0.5, 0.5)], (0.5, 0.5))
SHAPES = {
    "sedan": partial(car_parts, -0.42, -0.25, 0.05, 0.26, -0.11, 0.33),
    "hatchback": partial(car_parts, -0.49, -0.39, 0.08, 0.29, -0.1, 0.4),
    "suv": partial(car_parts, -0.49, -0.43, 0.1, 0.28, -0.08, 0.38),
    "van": van_parts, "truck": truck_parts, "pedestrian": pedestrian_parts, "tree": tree_parts,
    "bus": bus_parts, "trailer": trailer_parts, "cone": cone_parts, "barrier": barrier_parts,
    "bicycle": lambda: stretched(bicycle_parts(), -0.085),
    "cyclist": lambda: bicycle_parts() + rider_parts(), "motorcyclist": lambda: motorcycle_parts() + rider_parts(),
    "pole": partial(POST, METAL), "bin": partial(POST, PAINT),
}  # fmt: skip


@cache
def shape(kind):
    """(rings (3, 10, P) counter-clockwise seen from outside and padded by their last corner, material (P,), layer (P,)) in the unit box."""
    parts, rings = SHAPES[kind](), []
    for ring, inside, _, _ in parts:
        normal = np.cross(ring[1] - ring[0], ring[2] - ring[0])
        ring = ring if normal @ (ring.mean(0) - inside) > 0 else ring[::-1]
        rings.append(np.concatenate([ring, np.repeat(ring[-1:], 10 - len(ring), 0)]).T)
    return np.stack(rings, 2), np.array([part[2] for part in parts]), np.array([part[3] for part in parts])


# Drawing: half planes instead of clipped polygons, so that a face may pass behind the camera (Olano and Greer 1997).


def rasterise(rings, bias, K, size):
    """Every pixel that each face covers, hidden or not, in the order of the faces.

    rings (3, V, P): corners in camera metres, counter-clockwise seen from outside; faces seen from behind give nothing.
    bias (P,): factor on inverse depth that lifts layers off the face below.
    Returns face (F,), pixel (F,) = row * width + column, inverse depth (F,).
    """
    width, height = size
    normal = face_normals(rings)
    offset = (normal * rings[:, 0]).sum(0)
    seen = np.flatnonzero((offset < -1e-9) & (rings[2].max(0) > NEAR))
    rings, normal, offset = rings[..., seen], normal[:, seen], offset[seen]
    edges = np.cross(rings, np.roll(rings, -1, 1), axis=0)  # (3, V, P): planes through the camera and one edge each
    inverse = np.linalg.inv(K)
    plane = np.einsum(
        "ij,ip->jp", inverse, normal / offset
    )  # inverse depth of (u, v, 1); not by BLAS, which may round by thread count
    edge_u, edge_v, edge_1 = np.einsum("ij,ivp->jvp", inverse, edges)  # inside where their sum is <= 0
    _, y, z = rings
    rows = K[1, 1] * y / np.maximum(z, NEAR) + K[1, 2]
    crosses = z.min(0) < NEAR
    first = np.where(crosses, 0, np.clip(np.ceil(rows.min(0)), 0, height)).astype(int)
    last = np.where(crosses, height - 1, np.clip(np.floor(rows.max(0)), -1, height - 1)).astype(int)
    face, v = spans(first, last)
    slope, rest = edge_u.take(face, 1), edge_v.take(face, 1) * v + edge_1.take(face, 1)  # (V, R)
    with np.errstate(divide="ignore", invalid="ignore"):
        bound = -rest / slope
    lower = np.where(slope < 0, bound, np.where((slope == 0) & (rest > 0), np.inf, 0)).max(0)
    upper = np.where(slope > 0, bound, width - 1).min(0)
    row, u = spans(np.clip(np.ceil(lower), 0, width).astype(int), np.clip(np.floor(upper), -1, width - 1).astype(int))
    a, b, c = (plane * bias[seen]).take(face, 1)
    return seen.take(face).take(row), (v * width).take(row) + u, a.take(row) * u + (b * v + c).take(row)


def face_normals(rings):
    """Outward normals (3, P), not of unit length, of rings (3, V, P)."""
    return np.cross(rings[:, 1] - rings[:, 0], rings[:, 2] - rings[:, 0], axis=0)


def spans(first, last):
    """All integers first..last of every span: (index of the span, the integer), both (sum of lengths,)."""
    count = np.maximum(last - first + 1, 0)
    index = np.repeat(np.arange(len(count)), count)
    return index, np.arange(len(index)) - np.repeat(np.cumsum(count) - count - first, count)


def resolve(fragments, owner_object, objects, size):
    """Front-most face of each pixel, its inverse depth, and the visible share (objects,) of each object's own pixels in the image."""
    face, pixel, inverse_depth = fragments
    depth = np.zeros(size[0] * size[1])
    np.maximum.at(depth, pixel, inverse_depth)
    front = np.flatnonzero(inverse_depth == depth.take(pixel))
    owner = np.full(len(depth), -1)
    owner[pixel.take(front)] = face.take(front)
    visible = np.bincount(owner_object.take(owner[owner >= 0]), minlength=objects)
    covers = np.zeros((objects, len(depth)), bool)
    covers[owner_object.take(face), pixel] = True
    return owner, depth, visible / np.maximum(np.count_nonzero(covers, 1), 1), visible


@cache
def noise_tile(octave):
    """(256, 256) float32 in [-1, 1], periodic: value noise with cells of 2 ** octave texels."""
    cells = 256 >> octave
    grid = np.random.default_rng((7, octave)).uniform(-1, 1, (cells, cells))
    x = np.arange(256) / (1 << octave)
    i, f = x.astype(int), x % 1
    f = f * f * (3 - 2 * f)
    rows = grid[i] * (1 - f)[:, None] + grid[(i + 1) % cells] * f[:, None]
    return (rows[:, i] * (1 - f) + rows[:, (i + 1) % cells] * f).astype(np.float32)


def texture(octave, s, t):
    """Noise at texel coordinates s, t of any shape."""
    return noise_tile(octave).take(
        ((np.asarray(s).astype(np.int32) & 255) << 8) | (np.asarray(t).astype(np.int32) & 255)
    )


# A scene and its picture


class Objects(namedtuple("Objects", "kind size center yaw colour")):
    """n objects in the camera frame: kind (n,), keys of SIZES; size (n, 3) l, h, w; center (n, 3); yaw (n,); colour (n, 14, 3), 0-1."""


class View(
    namedtuple(
        "View",
        "K size normal height heading offset half_road lane pavement wall crossing sunlight haze_range sun ambient haze start",
        defaults=(0.0,),
    )
):
    """Camera, road and light of one frame; all but arrays and size (width, height) are plain floats.

    Ground: normal . X = height in the camera frame. Road frame: s metres along the road, t to the right of its middle; the camera is at
    s = start, t = offset; heading: of the road, radians from z towards x. Half road, pavement and wall end at these |t|; a side street
    starts at s = crossing. sun: unit vector towards it, sunlight its strength; ambient, haze: (3, 1, 1) colours; haze_range: metres.
    """


def draw_view(rng, size):
    """The View of one frame; size: (width, height)."""
    width, height = size
    focal = width * FOCAL_LENGTHS[rng.integers(2)]
    K = np.array([[focal, 0, width * rng.normal(0.5, 0.01)], [0, focal, height * rng.normal(0.46, 0.015)], [0, 0, 1]])
    pitch, roll = np.radians(np.clip(rng.normal(0, (1.0, 0.5)), (-2.5, -1.5), (2.5, 1.5)))
    normal = np.array([np.sin(roll) * np.cos(pitch), np.cos(roll) * np.cos(pitch), np.sin(pitch)])
    heading = np.radians(rng.normal(0, 2.5) if rng.random() < 0.85 else rng.uniform(-14, 14))
    lanes, lane = rng.choice([1, 1, 2]), rng.uniform(2.9, 3.7)
    half_road = lanes * lane + 2.3 * (rng.random() < 0.6)
    pavement = half_road + rng.uniform(1.8, 4.0)
    crossing = rng.uniform(8, 35) if rng.random() < 0.4 else 1e6
    azimuth, elevation = rng.uniform(0, 2 * np.pi), np.radians(rng.uniform(28, 65))
    sun = np.array(
        [np.cos(azimuth) * np.cos(elevation), -np.sin(elevation), np.sin(azimuth) * np.cos(elevation)], np.float32
    )
    sunlight = rng.uniform(0.3, 0.8) if rng.random() < 0.6 else 0.0
    exposure, tint = rng.uniform(0.7, 1.25), rng.uniform(0.93, 1.07, (3, 1, 1)).astype(np.float32)
    offset = lane * (rng.integers(lanes) + 0.5) + rng.normal(0, 0.25)
    scalars = (
        rng.uniform(1.3, 1.9),
        heading,
        offset,
        half_road,
        lane,
        pavement,
        pavement + rng.uniform(0.5, 7),
        crossing,
    )
    scalars = (*scalars, exposure * sunlight, rng.uniform(70, 300))
    ambient = np.float32(exposure * (0.8 - 0.4 * sunlight)) * tint
    haze = np.float32(min(exposure, 1.1) * rng.uniform(0.75, 0.95)) * tint
    return View(
        K, size, normal, *map(float, scalars), sun, ambient, haze
    )  # plain floats keep single precision arrays single


def footprint(center, size, yaw):
    """Corners (n, 4, 2) of boxes on the x-z plane."""
    return box_corners(center, size, yaw)[..., :4, ::2]


def overlaps(rectangles):
    """(n, n) bool: which of rectangles (n, 4, 2) meet, by separating axes."""
    axes = rectangles[:, 1:3] - rectangles[:, :2]  # (n, 2, 2)
    shadows = np.einsum("nij,mkj->nimk", axes, rectangles)  # of m on the axes of n
    low, high = shadows.min(3), shadows.max(3)
    own = np.arange(len(rectangles))
    apart = ((high < low[own, :, own][:, :, None]) | (low > high[own, :, own][:, :, None])).any(1)
    return ~(apart | apart.T)


def draw_candidates(rng, view):
    """(kind, s, t, direction) of all that might stand in the scene, sparser with distance; direction: radians right of the road's."""
    crowd = rng.choice([0, 0.4, 1, 1.8], p=[0.05, 0.2, 0.5, 0.25])
    found = []

    def line(kinds, share, t, spread, gap, direction, turn=0.03):
        s = rng.uniform(-4, 2 + gap)
        while s < 75 and crowd:
            kind = rng.choice(kinds, p=share)
            found.append((kind, s + SIZES[kind][0] / 2, t + rng.normal(0, spread), direction + rng.normal(0, turn)))
            s += SIZES[kind][0] + 0.7 + rng.exponential(gap / crowd) * (1 + max(s, 0) / 25)

    vehicles = ["sedan", "hatchback", "suv", "van", "truck", "cyclist"]
    lanes = int(view.half_road // view.lane)
    ways = ((-1, np.pi), (1, 0))  # side of the road, direction of its traffic
    for i in range(lanes):
        for side, ahead in ways:
            line(vehicles, [0.3, 0.26, 0.2, 0.09, 0.06, 0.09], side * (i + 0.5) * view.lane, 0.25, 11, ahead)
    for side, ahead in ways:
        if view.half_road - lanes * view.lane > 2 and rng.random() < 0.8:
            turn = rng.choice([0, 0, 0, np.pi / 2])
            line(
                vehicles[:4],
                [0.35, 0.32, 0.23, 0.1],
                side * (view.half_road - 1.1 + 1.2 * (turn > 0)),
                0.12,
                6,
                ahead + turn,
            )
        line(["cyclist", "pedestrian"], [0.85, 0.15], side * (lanes * view.lane - 0.5), 0.4, 30, ahead, 0.15)
        walk = side * (view.half_road + view.pavement) / 2
        line(["pedestrian", "cyclist", "bin"], [0.82, 0.12, 0.06], walk, 0.5, 12, rng.choice([0, np.pi]), 0.7)
        line(
            ["pole", "tree"],
            [0.7, 0.3],
            side * (view.half_road + 0.4 if rng.random() < 0.4 else view.wall - 0.3),
            0.1,
            14,
            0,
        )
    for _ in range(rng.poisson(2.5 * crowd)):
        kind = rng.choice(["pedestrian", "cyclist", *vehicles[:4]], p=[0.45, 0.25, 0.1, 0.08, 0.08, 0.04])
        found.append((kind, 4 + rng.gamma(2, 8), rng.uniform(-1, 1) * view.half_road, rng.uniform(-np.pi, np.pi)))
    for _ in range(rng.poisson(2.5 * crowd) if view.crossing < 50 else 0):
        kind, side = rng.choice(vehicles, p=[0.25, 0.22, 0.18, 0.08, 0.05, 0.22]), rng.choice([-1, 1])
        s, t = view.crossing + CROSSING_WIDTH / 2 + 1.7 * side, rng.uniform(-20, 20)
        found.append((kind, s, t, -side * np.pi / 2 + rng.normal(0, 0.06)))
    return found


def draw_colours(rng, n):
    """(n, 14, 3) colour of each material, 0-1."""
    grey = lambda low, high: np.repeat(rng.uniform(low, high, (n, 1)), 3, 1)  # noqa: E731
    vivid = rng.uniform(0.05, 0.7, (n, 3)) * grey(0.3, 1)
    colours = np.zeros((n, 14, 3))
    colours[:, PAINT] = np.where(rng.random((n, 1)) < 0.6, grey(0.04, 0.85), vivid)
    colours[:, GLASS], colours[:, RUBBER], colours[:, METAL], colours[:, DARK] = (
        (0.1, 0.13, 0.16),
        0.05,
        grey(0.25, 0.6),
        0.07,
    )
    colours[:, LAMP], colours[:, TAIL], colours[:, PLATE] = (0.95, 0.95, 0.88), (0.62, 0.04, 0.03), grey(0.55, 0.85)
    colours[:, SKIN], colours[:, HAIR] = grey(0.3, 0.8) * (1, 0.75, 0.6), grey(0.04, 0.35) * (1, 0.85, 0.7)
    colours[:, SHIRT], colours[:, TROUSERS] = (
        rng.uniform(0.05, 0.85, (n, 3)),
        rng.uniform(0.05, 0.3, (n, 3)) + grey(0, 0.2),
    )
    colours[:, LEAF], colours[:, WOOD] = rng.uniform((0.12, 0.2, 0.05), (0.25, 0.36, 0.12), (n, 3)), (0.25, 0.19, 0.14)
    return colours


def draw_objects(rng, view):
    """Candidates that meet neither each other in the bird's-eye view nor the camera's own car, in random order of precedence."""
    candidates = [("sedan", -1.0, view.offset, 0.0), *draw_candidates(rng, view)]  # the first is the camera's own car
    candidates = [candidates[i] for i in (0, *rng.permutation(len(candidates) - 1) + 1)]
    kind, s, t, direction = (np.array(column) for column in zip(*candidates, strict=True))
    n, sin, cos = len(kind), np.sin(view.heading), np.cos(view.heading)
    factor = np.clip(
        rng.normal(1, 0.05, (n, 1)) * rng.normal(1, 0.04, (n, 3)), 0.86, 1.14
    )  # of the whole object, and of each side
    child = (kind == "pedestrian") & (rng.random(n) < 0.12)
    size = np.array([SIZES[k] for k in kind]) * factor * np.where(child, rng.uniform(0.65, 0.85, n), 1)[:, None]
    x, z = s * sin + (t - view.offset) * cos, s * cos - (t - view.offset) * sin
    ground = (view.height - view.normal[0] * x - view.normal[2] * z) / view.normal[1]
    center = np.stack([x, ground - size[:, 1] / 2, z], -1)
    yaw = wrap_angle(view.heading + direction - np.pi / 2)
    corners = footprint(center, size + 0.2, yaw)
    farthest = corners[..., 1].max(1)
    in_view = (farthest > 1) & (np.abs(corners[..., 0]).min(1) < 0.55 * farthest * view.size[0] / view.K[0, 0])
    clash, kept = overlaps(corners), [0]
    for i in np.flatnonzero(in_view[1:]) + 1:
        if not clash[i, kept].any():
            kept.append(i)
    kept = np.array(kept[1:], int)
    return Objects(kind[kept], size[kept], center[kept], yaw[kept], draw_colours(rng, len(kept)))


def paint_background(rng, view, objects):
    """Sky, ground with markings and shadows, then house fronts and hedges along the road: (3, H, W) float32, 0-1."""
    width, height = view.size
    u = ((np.arange(width) - view.K[0, 2]) / view.K[0, 0]).astype(np.float32)
    v = ((np.arange(height) - view.K[1, 2]) / view.K[1, 1]).astype(np.float32)[:, None]
    a, b, c = view.normal.tolist()
    down = a * u + b * v + c  # (H, W): normal . ray
    sin, cos = math.sin(view.heading), math.cos(view.heading)
    across, along = u * cos - sin, u * sin + cos  # metres in t and in s per metre of depth
    image = np.empty((3, height, width), np.float32)
    top, bottom = int(np.argmax((down > 0.003).any(1))), int(np.argmax((down > 0.003).all(1)))
    image[:, :bottom] = paint_sky(rng, view, u, down[:bottom])
    z = view.height / np.maximum(down[top:], 0.003)
    np.copyto(image[:, top:], paint_ground(rng, view, objects, top, z, u, across, along), where=down[top:] > 0.003)
    paint_walls(rng, view, across, along, down, image)
    return image


def paint_sky(rng, view, u, down):
    """Gradient, clouds and far hills (3, h, W); u (W,), down (h, W): the ray's x and its part along the ground's normal, at depth 1."""
    elevation = np.maximum(-down, 0)
    zenith = view.haze * rng.uniform((0.55, 0.7, 0.85), (0.95, 1.0, 1.1)).astype(np.float32)[:, None, None]
    flat = 25 / (elevation + 0.12)
    clouds = texture(5, 2.4 * flat + rng.integers(256), u * flat) * float(rng.uniform(0, 0.12))
    image = view.haze + np.minimum(elevation * 2.5, 1) * (zenith - view.haze) + clouds
    hills = 0.015 + float(rng.uniform(0, 0.05)) * (
        1 + texture(5, u * 120 + rng.integers(256), 0) + 0.2 * texture(1, u * 300, 0)
    )
    np.copyto(
        image, 0.55 * view.haze + view.ambient * np.float32([[[0.14]], [[0.16]], [[0.11]]]), where=elevation < hills
    )
    return image


def paint_ground(rng, view, objects, top, z, u, across, along):
    """Asphalt, markings, kerb, pavement and verge (3, h, W); z (h, W): depth of the ground in the rows from top on."""
    s, t = z * along + view.start, z * across + view.offset
    beside = np.abs(t)
    crossing = (s > view.crossing) & (s < view.crossing + CROSSING_WIDTH)
    band = (
        (beside > view.half_road).astype(np.int8) + (beside > view.half_road + 0.2) + (beside > view.pavement)
    ) * ~crossing
    asphalt, paving = (
        rng.uniform(0.16, 0.42) * rng.uniform(0.95, 1.05, 3),
        rng.uniform(0.35, 0.6) * rng.uniform(0.92, 1.05, 3),
    )
    verge = (
        rng.uniform((0.15, 0.24, 0.06), (0.4, 0.42, 0.22)) if rng.random() < 0.7 else rng.uniform(0.3, 0.5) * np.ones(3)
    )
    palette = np.array([asphalt, paving * 1.15, paving, verge], np.float32)
    strength = np.array([rng.uniform(0.05, 0.2), 0.08, 0.15, 0.4], np.float32)
    far = 1 / z
    grain = texture(0, s * 30, t * 30) * np.minimum(7 * far, 1) + 0.7 * texture(3, s * 5, t * 9) * np.minimum(
        25 * far, 1
    )
    grain += 0.6 * texture(4, s * 3 + 91, t * 16)
    lanes, pixel = int(view.half_road // view.lane), z * float(1 / view.K[0, 0])  # metres a pixel
    line = np.clip(np.round(t / view.lane), -lanes, lanes)
    paint = np.clip((0.07 + pixel / 2 - np.abs(t - line * view.lane)) / pixel, 0, 1) * np.minimum(0.14 / pixel, 1)
    solid = (np.abs(line) == lanes) | ((line == 0) & (lanes > 1))
    paint *= (solid | (fraction(s / 9 + float(rng.random())) < 0.45)) & ~crossing
    colour = palette.T.take(band, 1) * (1 + strength.take(band) * grain)
    colour += float(rng.choice([0, 0.5, 0.8])) * paint * (0.8 + 0.4 * grain) * (0.85 - colour)
    diffuse, sunlit = cast_shadows(view, objects, top, z, u)
    colour *= view.ambient * diffuse + view.sunlight * float(-view.sun[1]) * sunlit
    return add_haze(view, colour, z)


def cast_shadows(view, objects, top, z, u):
    """Shares (h, W) of sky light and of sunlight that reach the ground: dark below objects, and where the way to the sun meets a box."""
    diffuse, sunlit = np.ones_like(z), np.ones_like(z)
    slope = view.sun[[0, 2]] / -view.sun[1]  # metres sideways on the way to the sun, per metre up
    corners = footprint(objects.center, objects.size + 0.6, objects.yaw)
    if view.sunlight > 0:
        corners = np.concatenate([corners, corners - slope * objects.size[:, 1, None, None]], 1)
    x, depth = corners[..., 0], np.maximum(corners[..., 1], 0.5)
    columns = view.K[0, 0] * x / depth + view.K[0, 2]
    rows = view.K[1, 1] * (view.height - view.normal[0] * x - view.normal[2] * depth) / depth + view.K[1, 2] - top
    limits = (
        np.stack([rows.min(1) - 1, rows.max(1) + 2, columns.min(1), columns.max(1) + 2], 1)
        .clip(0, view.size[0])
        .astype(int)
    )
    slope, cosines, sines = slope.tolist(), np.cos(objects.yaw).tolist(), np.sin(objects.yaw).tolist()
    rows = zip(limits.tolist(), objects.size.tolist(), objects.center.tolist(), cosines, sines, strict=True)
    for (row1, row2, column1, column2), (length, tall, wide), center, cos, sin in rows:
        if row1 >= row2 or column1 >= column2:
            continue
        region = slice(row1, row2), slice(column1, column2)
        X, Z = z[region] * u[region[1]] - center[0], z[region] - center[2]
        x, y = X * cos - Z * sin, X * sin + Z * cos
        gap = np.maximum(np.abs(x) - 0.5 * length, np.abs(y) - 0.5 * wide)
        diffuse[region] *= 1 - np.clip(0.62 - 1.6 * gap, 0, 0.62)
        if view.sunlight > 0:
            enter, leave = 0, 0.9 * tall
            for at, half, step in (
                (x, 0.42 * length, slope[0] * cos - slope[1] * sin),
                (y, 0.42 * wide, slope[0] * sin + slope[1] * cos),
            ):
                middle, reach = at * (-1 / (step or 1e-3)), abs(half / (step or 1e-3))
                enter, leave = np.maximum(enter, middle - reach), np.minimum(leave, middle + reach)
            sunlit[region] *= 1 - np.clip((leave - enter) / 0.12, 0, 1)
    return diffuse, sunlit


def paint_walls(rng, view, across, along, down, image):
    """House fronts and hedges, in lots along both sides of the road, drawn over image where they stand."""
    across = np.where(np.abs(across) < 1e-3, np.float32(1e-3), across)
    right = across > 0
    z = np.where(right, view.wall - view.offset, -view.wall - view.offset).astype(np.float32) / across
    s = z * along + view.start
    count, length = 40, float(rng.uniform(8, 18))
    lot = (np.clip(s / length + 4, 0, count - 1)).astype(int) + count * right
    kind = rng.choice(3, 2 * count, p=rng.dirichlet([2, 2, 1]))  # house, hedge, open
    tall = np.where(kind == 0, rng.uniform(4, 13, 2 * count), rng.uniform(0.8, 6, 2 * count)) * (kind < 2)
    plaster = rng.uniform(0.2, 0.75, (2 * count, 1)) * rng.uniform(0.75, 1.1, (2 * count, 3))
    green = rng.uniform((0.1, 0.17, 0.04), (0.25, 0.34, 0.13), (2 * count, 3))
    colours = np.where((kind == 0)[:, None], plaster, green).astype(np.float32)
    hedge = kind[lot] == 1
    rough = np.where(hedge, 1 + 0.35 * texture(4, s * 14, 3) + 0.15 * texture(1, s * 9, 50), np.float32(1))
    limit = tall.astype(np.float32)[lot] * rough
    limit[(s > view.crossing) & (s < view.crossing + CROSSING_WIDTH) | (z > 250) | (s < -50)] = 0
    up = view.height - down * z  # (H, W): metres above the ground where the ray meets the wall
    rows, columns = np.nonzero((up > 0) & (up < limit))
    up, s, z, hedge = up[rows, columns], s[columns], z[columns], hedge[columns]
    fade = np.minimum(12 / z, 1)
    leaves = 0.45 * texture(1, s * 12, up * 12) * fade + 0.4 * texture(4, s * 12, up * 12)
    pane = (np.abs(fraction(s / 2.7) - 0.55) < 0.2) & (np.abs(fraction(up / 3) - 0.52) < 0.22)
    front = 0.1 * texture(0, s * 20, up * 20) * fade - pane * np.minimum(40 / z, 1) * float(rng.uniform(0.3, 0.7))
    facing = float(view.sun[0] * math.cos(view.heading) - view.sun[2] * math.sin(view.heading))  # of walls on the left
    sun = view.sunlight * np.where(right[columns], max(-facing, 0), max(facing, 0)).astype(np.float32)
    shade = (1 + np.where(hedge, leaves, front)) * np.where(hedge, 0.6 + 0.4 * np.minimum(up / 2, 1), np.float32(1))
    colour = colours.T.take(lot[columns], 1) * (0.8 * view.ambient[:, 0] + sun) * shade
    image[:, rows, columns] = add_haze(view, colour, z)


def fraction(x):
    return x - np.floor(x)


def add_haze(view, colour, z):
    """colour (3, ...) seen through z (...) metres of air."""
    haze = view.haze.reshape(3, *[1] * z.ndim)
    return haze + np.exp(z * (-1 / view.haze_range)) * (colour - haze)


def paint_objects(view, objects, faces, owner, inverse_depth, image):
    """Shade the visible face of each pixel: sky light, sunlight, reflection on paint and glass, and texture. Changes image (3, H * W)."""
    rings, material, thing = faces
    pixel = np.flatnonzero(owner >= 0)
    face = owner.take(pixel)
    normal = face_normals(rings)
    normal = (normal / np.linalg.norm(normal, axis=0)).astype(np.float32)
    sun = view.sunlight * np.maximum(np.einsum("i,ip->p", view.sun, normal), 0)
    light = view.ambient[:, 0] * (0.72 - 0.28 * normal[1]) + sun  # (3, P): sky above, less from below
    colour = (objects.colour[thing, material].T.astype(np.float32) * light).take(face, 1)
    z = (1 / inverse_depth.take(pixel)).astype(np.float32)
    row, column = np.divmod(pixel, view.size[0])
    ray = np.stack([(column - view.K[0, 2]) / view.K[0, 0], (row - view.K[1, 2]) / view.K[1, 1]]).astype(np.float32)
    owner = thing.take(face)
    center, yaw = objects.center.T.astype(np.float32).take(owner, 1), objects.yaw.astype(np.float32)
    x, y, depth = ray[0] * z - center[0], ray[1] * z - center[1], z - center[2]
    skew = 0.6  # texture varies along both horizontal axes of the object
    side = x * (np.cos(yaw) + skew * np.sin(yaw)).take(owner) + depth * (skew * np.cos(yaw) - np.sin(yaw)).take(owner)
    side += (0.9 * np.arange(len(yaw), dtype=np.float32)).take(owner)
    grain = 0.9 * texture(3, side * 60, y * 60) + 0.6 * texture(0, side * 60, y * 60) * np.minimum(10 / z, 1)
    colour *= 1 + TEXTURE[material].take(face) * grain
    gloss = GLOSS[material].take(face)
    a, b, c = normal.take(face, 1)
    mirrored = ray[1] - 2 * (a * ray[0] + b * ray[1] + c) * b
    sky = np.clip(0.5 - 2.2 * mirrored + 0.03 * grain, 0.12, 1) * view.haze[:, 0]
    image[:, pixel] = add_haze(view, colour + gloss * (sky - 0.6 * colour), z)


# Frames and folders


def render_objects(view, objects):
    """Returns faces, owner (H * W,) face or -1, inverse depth (H * W,), visible share (n,), visible pixels (n,).

    faces: rings (3, 10, P) in camera metres, material (P,), object (P,).
    """
    shapes = [shape(kind) for kind in objects.kind]
    if not shapes:
        blank = np.zeros(view.size[0] * view.size[1])
        return None, blank.astype(int) - 1, blank, np.zeros(0), np.zeros(0, int)
    thing = np.repeat(np.arange(len(shapes)), [len(material) for _, material, _ in shapes])
    rings, material, layer = (np.concatenate(parts, -1) for parts in zip(*shapes, strict=True))
    x, y, z = rings * objects.size.T[:, None, thing]
    cos, sin = np.cos(objects.yaw)[thing], np.sin(objects.yaw)[thing]
    rings = np.stack([x * cos + z * sin, y, z * cos - x * sin]) + objects.center.T[:, None, thing]
    fragments = rasterise(rings, 1 + 1e-4 * layer, view.K, view.size)
    return (rings, material, thing), *resolve(fragments, thing, len(shapes), view.size)


def label_objects(view, objects, share, pixels):
    """Labels of all objects of which a pixel shows, in camera 0; DontCare for those too far, small or hidden."""
    full, _ = project_boxes(objects.center, objects.size, objects.yaw, view.K)
    box = clip_boxes(full, *view.size)
    area, full_area = (np.prod(b[:, 2:] - b[:, :2], 1) for b in (box, full))
    name = np.array([CLASSES.get(kind, "") for kind in objects.kind], dtype="U16")
    keep = (name != "") & (pixels > 0) & (area > 0)
    care = (
        (box[:, 3] - box[:, 1] >= MIN_HEIGHT)
        & (share >= MIN_VISIBLE)
        & (pixels >= 20)
        & (objects.center[:, 2] <= MAX_DEPTH)
    )
    rows = np.concatenate([np.flatnonzero(keep & care), np.flatnonzero(keep & ~care)])
    name, box, share, truncation = name[rows], box[rows], share[rows], 1 - area[rows] / full_area[rows]
    center, occlusion = objects.center[rows] - CAMERA_SHIFT, (share[:, None] < VISIBLE_LEVELS).sum(1)
    labels = make_labels(name, box, objects.size[rows], center, objects.yaw[rows], truncation, occlusion)
    fill = {
        "name": "DontCare",
        "truncation": -1.0,
        "occlusion": -1,
        "alpha": -10.0,
        "size": -1.0,
        "center": -1000.0,
        "yaw": -10.0,
    }
    for column, value in fill.items():
        getattr(labels, column)[(keep & care).sum() :] = value
    return labels


def develop(rng, image):
    """What lens and sensor do to a picture (3, H, W), 0-1: slight blur, noise, 8 bits. Returns (H, W, 3) uint8."""
    result = np.empty((*image.shape[1:], 3), np.uint8)
    strength = float(rng.uniform(0.01, 0.035))
    for channel, plane in enumerate(image):
        plane = np.pad(255 * plane, 1, mode="edge")
        plane = 0.74 * plane[1:-1] + 0.13 * (plane[:-2] + plane[2:])
        plane = 0.74 * plane[:, 1:-1] + 0.13 * (plane[:, :-2] + plane[:, 2:])
        noise = rng.integers(0, 256, plane.shape, dtype=np.uint8)
        result[..., channel] = np.clip(plane + strength * noise + (0.5 - 127.5 * strength), 0, 255)
    return result


def render_frame(seed, index, size=(640, 192)):
    """One frame: (image (H, W, 3) uint8, P2 (3, 4), Labels). size: (width, height). The same bytes for the same arguments."""
    rng = np.random.default_rng((WORLD_VERSION, seed, index))
    view = draw_view(rng, size)
    objects = draw_objects(rng, view)
    faces, owner, inverse_depth, share, pixels = render_objects(view, objects)
    image = paint_background(rng, view, objects)
    if faces is not None:
        paint_objects(view, objects, faces, owner, inverse_depth, image.reshape(3, -1))
    P2 = np.column_stack([view.K, view.K @ CAMERA_SHIFT])
    return develop(rng, image), P2, label_objects(view, objects, share, pixels)


def write_frame(job):
    """Render one frame into a folder; job: (folder, seed, index, size)."""
    folder, seed, index, size = job
    image, P2, labels = render_frame(seed, index, size)
    path = folder / f"training/image_2/{index:06d}.png"
    Image.fromarray(image).save(path, compress_level=1, compress_type=zlib.Z_HUFFMAN_ONLY)  # of noise: fast
    write_calib(folder / f"training/calib/{index:06d}.txt", P2)
    write_labels(folder / f"training/label_2/{index:06d}.txt", labels)


def build_world(root, split, frames, seed=0, size=(640, 192), workers=1):
    """Folder with the first frames of a split in KITTI format, rendered only if it is not there yet. Returns its Path.

    root: cache folder; split: 'train' or 'val'; size: (width, height); workers: processes. See `build_folder`.
    """
    if split not in FIRST_INDEX or frames < 1:
        raise ValueError(
            f"the built-in world has {' and '.join(FIRST_INDEX)}, of at least one frame, got {split!r} of {frames}"
        )

    def fill(folder):
        for name in ("training/image_2", "training/label_2", "training/calib", "ImageSets"):
            (folder / name).mkdir(parents=True)
        indices = range(FIRST_INDEX[split], FIRST_INDEX[split] + frames)
        (folder / "ImageSets" / f"{split}.txt").write_text("".join(f"{index:06d}\n" for index in indices))
        render_all([(folder, seed, index, tuple(size)) for index in indices], workers, f"rendering {split}")

    return build_folder(world_folder(root, split, frames, seed, size), fill)


def world_folder(root, split, frames, seed=0, size=(640, 192)):
    """Where `build_world` puts a split."""
    return Path(root) / f"world{WORLD_VERSION}-seed{seed}-{size[0]}x{size[1]}-{split}{frames}"


def build_folder(folder, fill):
    """A folder that `fill(folder)` fills, only if it is not there yet. Returns its path.

    It is filled under another name and renamed when complete: a killed or a simultaneous run leaves no half world behind.
    """
    if folder.is_dir():
        return folder
    remove_leftovers(folder.parent)
    unfinished = folder.with_name(f"{folder.name}.partial-{os.getpid()}-{time.time_ns()}")
    unfinished.mkdir(parents=True)
    try:
        with contextlib.ExitStack() as held:
            with contextlib.suppress(
                OSError
            ):  # some file systems have no locks, and then nothing is removed there either
                held.enter_context(lock(unfinished / ".lock"))
            fill(unfinished)
            os.rename(unfinished, folder)
            (folder / ".lock").unlink(missing_ok=True)
    except OSError:
        if not folder.is_dir():  # else another process was faster, and its frames are the same
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def remove_leftovers(root):
    """Remove what killed processes left half rendered under root; without file locks (Windows), what is a day old."""
    for path in Path(root).glob("world*.partial-*"):
        with contextlib.suppress(OSError), lock(path / ".lock"):
            if fcntl or time.time() - path.stat().st_ctime > 86400:
                shutil.rmtree(path, ignore_errors=True)


def render_all(jobs, workers, title, write=write_frame):
    """[write(job), ...] by processes that import nothing again where they can be forked."""
    with processes(workers) as pool:
        return list(tqdm(pool.map(write, jobs), title, len(jobs), unit=" frames", disable=None))
