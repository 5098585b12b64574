"""The things of the built-in world as convex flat faces: usual sizes, materials, a shape for each kind in a unit box.

Faces lie in a box of x to the front, y down and z to the side, each within +-0.5, and touch it on all six sides. A part
is (ring (V, 3), inside (3,), material, layer); layer > 0 lies on top of a face, like a window on a cabin.
"""

import itertools
from functools import cache

import numpy as np

SIZES = {  # mean l, h, w in metres; see draw_objects of world/street.py for the spread
    "sedan": (4.45, 1.45, 1.76), "hatchback": (3.75, 1.5, 1.66), "suv": (4.4, 1.7, 1.82), "van": (4.9, 2.1, 1.92),
    "truck": (8.2, 3.2, 2.5), "pedestrian": (0.75, 1.75, 0.62), "cyclist": (1.76, 1.74, 0.6),
    "pole": (0.16, 5.5, 0.16), "tree": (2.6, 5.5, 2.6), "bin": (0.6, 1.1, 0.6),
    "bus": (11.2, 3.4, 2.85), "trailer": (10.5, 3.6, 2.6), "bicycle": (1.76, 1.02, 0.6),
    "motorcyclist": (2.1, 1.7, 0.8), "cone": (0.4, 0.9, 0.4), "barrier": (0.5, 1.0, 2.4),
}  # fmt: skip
PAINT, GLASS, RUBBER, METAL, DARK, LAMP, TAIL, PLATE, SKIN, HAIR, SHIRT, TROUSERS, LEAF, WOOD = range(14)
# By material: amplitude of its noise, and share of mirrored light.
TEXTURE = np.float32([0.05, 0.06, 0.1, 0.1, 0.1, 0.03, 0.03, 0.1, 0.04, 0.15, 0.14, 0.12, 0.45, 0.2])
GLOSS = np.float32([0.18, 0.5, 0, 0.2, 0.05] + [0] * 9)
# Ranges along an edge that `patches` draws.
OUTER, INNER, WHOLE, PAIR = ((0.02, 0.25), (0.75, 0.98)), ((0.37, 0.63),), ((0.06, 0.94),), ((0.08, 0.47), (0.53, 0.92))
CROWN = [(-0.3, 0.08), (-0.5, -0.1), (-0.42, -0.36), (-0.1, -0.5), (0.2, -0.48), (0.5, -0.2), (0.36, 0.04)]  # of a tree
STRIPE = ((0.3, 0.75), ((0.12, 0.85),), PAINT)  # of a cargo box


def prism(outline, half, material, z=0.0, layer=0):
    """A convex (x, y) outline swept across z; half: half width, or those at its top and at its bottom.

    The first two faces are its sides, the others follow the outline.
    """
    x, y = np.array(outline, float).T
    width = np.interp(y, (y.min(), y.max()), np.broadcast_to(half, 2))
    left = np.stack([x, y, z + width], 1)
    right = np.stack([x, y, z - width], 1)
    rings = [left, right, *np.stack([left, np.roll(left, -1, 0), np.roll(right, -1, 0), right], 1)]
    inside = np.array([x.mean(), y.mean(), z])
    return [(ring, inside, material, layer) for ring in rings]


def block(left, right, top, bottom, half, material):
    """A rectangle in x and y as a `prism`."""
    return prism([(left, bottom), (left, top), (right, top), (right, bottom)], half, material)


def bar(start, end, thick, half, material, z=0.0):
    """A tube between two (x, y) points; thick: (dx, dy) of half its cross section."""
    (x1, y1), (x2, y2), (dx, dy) = start, end, thick
    outline = [(x1 - dx, y1 - dy), (x2 - dx, y2 - dy), (x2 + dx, y2 + dy), (x1 + dx, y1 + dy)]
    return prism(outline, half, material, z)


def disc(x, y, rx, ry, sides=10):
    turn = (np.arange(sides) + 0.5 * (sides % 4 == 0)) * 2 * np.pi / sides + np.pi / 2
    return np.stack([x + rx * np.cos(turn), y + ry * np.sin(turn)], 1)


def patches(face, *rows):
    """Rectangles on a face of four corners; rows: (range in [0, 1] along an edge, those along another, material)."""
    (a, b, c, d), inside, _, layer = face
    parts = []
    for (s1, s2), spans, material in rows:
        for t1, t2 in spans:
            corners = ((s1, t1), (s2, t1), (s2, t2), (s1, t2))
            ring = np.stack([(1 - s) * ((1 - t) * a + t * d) + s * ((1 - t) * b + t * c) for s, t in corners])
            parts.append((ring, inside, material, layer + 1))
    return parts


def wheels(x, radius, ratio, half=0.07):
    """Wheels at +-x that stand on the floor; radius: of the height; ratio: height / length, so that they look round."""
    parts = []
    for cx, z in itertools.product((-x, x), (half - 0.5, 0.5 - half)):
        tyre = prism(disc(cx, 0.5 - radius, radius * ratio, radius), half, RUBBER, z)
        hub = disc(cx, 0.5 - radius, 0.6 * radius * ratio, 0.6 * radius)
        outer = np.column_stack([hub, np.full(len(hub), np.sign(z) * 0.5)])
        parts += [*tyre, (outer, tyre[0][1], METAL, 1)]
    return parts


def car_parts(rear, roof_rear, roof_front, screen, belt, ratio):
    """x of the cabin's rear foot, both ends of the roof, and the windscreen's foot; y of the bonnet's rear edge.

    ratio: height / length.
    """
    tail = [(-0.5, 0.3), (-0.5, belt + 0.1), (-0.47, belt)]
    bonnet = [(0.2, belt), (0.44, belt + 0.09), (0.5, belt + 0.2), (0.5, 0.3)]
    body = prism([*tail, *bonnet, (0.46, 0.38), (-0.46, 0.38)], (0.46, 0.5), PAINT)
    _, _, back, _, _, _, tip, front, *_ = body
    foot = belt + 0.04
    cabin = prism([(rear, foot), (roof_rear, -0.5), (roof_front, -0.5), (screen, foot)], (0.37, 0.46), PAINT)
    left, right, window, _, windscreen, _ = cabin
    parts = body + cabin + wheels(0.31, 0.21, ratio)
    for side in (left, right):
        parts += patches(side, ((0.12, 0.86), PAIR, GLASS))
    parts += patches(window, ((0.15, 0.88), WHOLE, GLASS)) + patches(windscreen, ((0.1, 0.95), WHOLE, GLASS))
    parts += patches(back, ((0.5, 0.95), OUTER, TAIL), ((0.3, 0.6), INNER, PLATE), ((0.0, 0.2), WHOLE, DARK))
    parts += patches(tip, ((0.05, 0.95), OUTER, LAMP))
    return parts + patches(front, ((0.1, 0.75), ((0.14, 0.86),), DARK), ((0.55, 0.9), INNER, PLATE))


def van_parts():
    outline = [(-0.5, 0.42), (-0.5, -0.44), (-0.46, -0.5), (0.16, -0.5), (0.36, -0.06), (0.36, 0.42)]
    box = prism(outline, (0.44, 0.5), PAINT)
    nose = prism([(0.3, -0.06), (0.36, -0.08), (0.47, 0.03), (0.5, 0.12), (0.5, 0.42), (0.3, 0.42)], (0.46, 0.5), PAINT)
    parts = box + nose + wheels(0.31, 0.16, 0.43) + patches(box[5], ((0.08, 0.95), WHOLE, GLASS))
    width = np.interp((-0.42, -0.1), (-0.5, 0.42), (0.44, 0.5))
    parts += prism([(0.0, -0.1), (0.0, -0.42), (0.15, -0.42), (0.29, -0.1)], width, GLASS, layer=1)[:2]
    lights = ((0.01, 0.1), (0.9, 0.99))
    parts += patches(box[2], ((0.55, 0.92), PAIR, GLASS), ((0.15, 0.5), lights, TAIL), ((0.2, 0.32), INNER, PLATE))
    return parts + patches(nose[4], ((0.1, 0.95), OUTER, LAMP)) + patches(nose[5], ((0.05, 0.6), ((0.2, 0.8),), DARK))


def truck_parts():
    cab = prism([(0.29, 0.4), (0.29, -0.4), (0.46, -0.4), (0.5, -0.02), (0.5, 0.4)], (0.44, 0.46), PAINT)
    cargo = block(-0.5, 0.27, -0.5, 0.28, 0.5, PLATE)
    parts = cab + cargo + block(-0.48, 0.3, 0.28, 0.4, 0.36, DARK) + wheels(0.36, 0.15, 0.39, 0.08)
    width = np.interp((-0.34, -0.02), (-0.4, 0.4), (0.44, 0.46))
    parts += prism([(0.33, -0.02), (0.33, -0.34), (0.44, -0.34), (0.47, -0.02)], width, GLASS, layer=1)[:2]
    parts += patches(cab[4], ((0.1, 0.95), WHOLE, GLASS))
    parts += patches(cab[5], ((0.55, 0.75), OUTER, LAMP), ((0.1, 0.5), PAIR, DARK))
    parts += patches(cargo[2], ((0.0, 0.08), OUTER, TAIL), ((0.05, 0.97), ((0.49, 0.51),), DARK))
    return parts + patches(cargo[0], STRIPE) + patches(cargo[1], STRIPE)


def head_parts(x, y, rx, ry, half):
    """A head with hair above and behind and a face in front."""
    parts = []
    for ring, inside, _, layer in prism(disc(x, y, rx, ry, 8), half, HAIR):
        bare = ring[:, 0].mean() > x - 0.2 * rx and ring[:, 1].mean() > y - 0.6 * ry
        parts.append((ring, inside, SKIN if bare else HAIR, layer))
    return parts


def pedestrian_parts():
    outline = [(-0.2, 0.05), (-0.22, -0.28), (-0.14, -0.35), (0.12, -0.35), (0.2, -0.28), (0.18, 0.05)]
    parts = prism(outline, (0.3, 0.25), SHIRT)
    for step in (1, -1):  # a leg and the opposite arm swing to the front
        z, foot = 0.15 * step, 0.31 if step > 0 else -0.38
        parts += bar((0.02 * step, 0.0), (0.32 * step, 0.47), (0.11, 0), 0.12, TROUSERS, z)
        parts += bar((0.0, -0.31), (-0.28 * step, 0.04), (0.08, 0), 0.07, SHIRT, 2.86 * z)
        parts += bar((-0.28 * step, 0.03), (-0.31 * step, 0.08), (0.08, 0), 0.06, SKIN, 2.86 * z)
        shoe = [(foot - 0.12, 0.5), (foot - 0.12, 0.46), (foot + 0.05, 0.44), (foot + 0.19, 0.48), (foot + 0.19, 0.5)]
        parts += prism(shoe, 0.1, DARK, z)
    return parts + bar((0.0, -0.37), (0.0, -0.33), (0.07, 0), 0.1, SKIN) + head_parts(0.02, -0.43, 0.16, 0.07, 0.16)


def bus_parts():
    outline = [(-0.5, 0.4), (-0.5, -0.46), (-0.48, -0.5), (0.48, -0.5), (0.5, -0.44), (0.5, 0.4)]
    body = prism(outline, (0.48, 0.5), PAINT)
    panes = tuple((0.05 + 0.13 * i, 0.16 + 0.13 * i) for i in range(7))
    width = np.interp((-0.34, 0.05), (-0.5, 0.4), (0.48, 0.5))
    parts = body + wheels(0.32, 0.13, 0.3, 0.06)
    for side in block(-0.47, 0.47, -0.34, 0.05, width, PAINT)[:2]:
        parts += patches(side, ((0.02, 0.98), panes, GLASS))
    parts += patches(body[2], ((0.1, 0.3), OUTER, TAIL), ((0.55, 0.92), WHOLE, GLASS))
    return parts + patches(body[6], ((0.1, 0.65), WHOLE, GLASS), ((0.8, 0.92), OUTER, LAMP))


def trailer_parts():
    cargo = block(-0.5, 0.5, -0.5, 0.22, 0.5, PLATE)
    parts = cargo + block(-0.48, 0.48, 0.22, 0.36, 0.3, DARK) + wheels(0.36, 0.14, 0.34, 0.08)
    return parts + patches(cargo[2], ((0.0, 0.08), OUTER, TAIL)) + patches(cargo[0], STRIPE) + patches(cargo[1], STRIPE)


def barrier_parts():
    body = prism([(-0.5, 0.5), (-0.5, 0.3), (-0.18, -0.5), (0.18, -0.5), (0.5, 0.3), (0.5, 0.5)], 0.5, TAIL)
    row = ((0.15, 0.85), ((0.1, 0.3), (0.4, 0.6), (0.7, 0.9)), LAMP)
    return body + patches(body[3], row) + patches(body[5], row)


def bicycle_parts():
    """A bicycle below y = -0.085, as a cyclist rides it."""
    parts, hub, pedals, saddle, steer = [], (-0.307, 0.3), (-0.05, 0.28), (-0.12, 0.0), (0.2, 0.03)
    for x in (-0.307, 0.307):  # rings, so that one sees through the wheels
        outer, inner = disc(x, 0.303, 0.193, 0.197, 12), disc(x, 0.303, 0.165, 0.168, 12)
        for i in range(12):
            parts += prism([outer[i - 1], outer[i], inner[i], inner[i - 1]], 0.045, RUBBER)
    for start, end in ((hub, pedals), (pedals, saddle), (saddle, steer), (pedals, steer), (hub, saddle)):
        parts += bar(start, end, (0.008, 0.014), 0.03, PAINT)
    parts += bar((0.2, -0.06), (0.307, 0.3), (0.014, 0), 0.04, PAINT)
    parts += bar((0.2, -0.07), (0.24, -0.07), (0, 0.015), 0.5, DARK)
    parts += bar((-0.2, -0.01), (-0.06, -0.01), (0, 0.015), 0.12, DARK)
    return parts + bar((-0.5, 0.22), (-0.47, 0.22), (0, 0.02), 0.06, TAIL)


def parked_bicycle_parts():
    """A bicycle alone, as tall as the unit box."""

    def stretched(points):
        return np.stack([points[..., 0], 0.5 - (0.5 - points[..., 1]) / (0.5 + 0.085), points[..., 2]], -1)

    return [(stretched(ring), stretched(inside), material, layer) for ring, inside, material, layer in bicycle_parts()]


def motorcycle_parts():
    parts = bar((0.2, -0.06), (0.307, 0.3), (0.02, 0), 0.1, METAL)
    parts += bar((0.2, -0.07), (0.24, -0.07), (0, 0.015), 0.5, DARK)
    for x in (-0.307, 0.307):
        parts += prism(disc(x, 0.303, 0.193, 0.197), 0.09, RUBBER)
    outline = [(-0.3, 0.2), (-0.42, -0.02), (-0.1, 0.0), (0.2, -0.08), (0.22, 0.1), (0.1, 0.4), (-0.15, 0.4)]
    parts += prism(outline, (0.14, 0.18), PAINT) + bar((0.21, -0.04), (0.25, 0.02), (0.02, 0), 0.12, LAMP)
    return parts + bar((-0.45, 0.0), (-0.41, 0.0), (0, 0.03), 0.1, TAIL)


def rider_parts():
    parts = []
    for knee, foot, z in (((0.09, 0.11), (0.0, 0.36), 0.2), ((0.05, 0.03), (-0.08, 0.27), -0.2)):
        parts += bar((-0.12, -0.03), knee, (0.02, 0.035), 0.12, TROUSERS, z)
        parts += bar(knee, foot, (0.035, 0), 0.1, TROUSERS, z)
        parts += bar((foot[0] - 0.03, foot[1]), (foot[0] + 0.09, foot[1]), (0, 0.018), 0.09, DARK, z)
        parts += bar((0.07, -0.3), (0.2, -0.09), (0.025, 0.02), 0.08, SHIRT, 1.6 * z)
    outline = [(-0.2, 0.02), (-0.19, -0.1), (-0.01, -0.35), (0.1, -0.33), (0.1, -0.24), (-0.05, 0.03)]
    return parts + prism(outline, (0.38, 0.28), SHIRT) + head_parts(0.12, -0.425, 0.068, 0.075, 0.17)


SHAPES = {  # parts of each kind
    "sedan": car_parts(-0.42, -0.25, 0.05, 0.26, -0.11, 0.33),
    "hatchback": car_parts(-0.49, -0.39, 0.08, 0.29, -0.1, 0.4),
    "suv": car_parts(-0.49, -0.43, 0.1, 0.28, -0.08, 0.38),
    "van": van_parts(), "truck": truck_parts(), "bus": bus_parts(), "trailer": trailer_parts(),
    "pedestrian": pedestrian_parts(), "barrier": barrier_parts(), "bicycle": parked_bicycle_parts(),
    "cyclist": bicycle_parts() + rider_parts(), "motorcyclist": motorcycle_parts() + rider_parts(),
    "pole": block(-0.5, 0.5, -0.5, 0.5, 0.5, METAL), "bin": block(-0.5, 0.5, -0.5, 0.5, 0.5, PAINT),
    "cone": block(-0.5, 0.5, 0.42, 0.5, 0.5, DARK)
    + prism([(-0.34, 0.42), (-0.06, -0.5), (0.06, -0.5), (0.34, 0.42)], (0.06, 0.34), TAIL)
    + prism([(-0.24, 0.1), (-0.15, -0.2), (0.15, -0.2), (0.24, 0.1)], (0.15, 0.24), LAMP, layer=1),
    "tree": prism(CROWN, (0.3, 0.36), LEAF)
    + prism([(-0.34, 0), (-0.2, -0.42), (0.24, -0.42), (0.3, 0)], (0.4, 0.5), LEAF)
    + prism([(-0.05, 0.5), (-0.04, 0), (0.04, 0), (0.05, 0.5)], 0.05, WOOD),
}  # fmt: skip


@cache
def shape(kind):
    """(rings (3, 10, P), material (P,), layer (P,)) of a kind in the unit box.

    Rings are counter-clockwise seen from outside and padded by their last corner.
    """
    parts, rings = SHAPES[kind], []
    for ring, inside, _, _ in parts:
        normal = np.cross(ring[1] - ring[0], ring[2] - ring[0])
        ring = ring if normal @ (ring.mean(0) - inside) > 0 else ring[::-1]
        rings.append(np.concatenate([ring, np.repeat(ring[-1:], 10 - len(ring), 0)]).T)
    return np.stack(rings, 2), np.array([part[2] for part in parts]), np.array([part[3] for part in parts])


def draw_sizes(rng, kind, spread):
    """(n, 3) l, h, w in metres of objects of kinds (n,); spread: deviation of each side beside that of all three."""
    factor = rng.normal(1, 0.05, (len(kind), 1)) * rng.normal(1, spread, (len(kind), 3))
    return np.array([SIZES[k] for k in kind]) * np.clip(factor, 0.86, 1.14)


def draw_colours(rng, n):
    """(n, 14, 3) colour of each material, 0-1."""

    def grey(low, high):
        return np.repeat(rng.uniform(low, high, (n, 1)), 3, 1)

    vivid = rng.uniform(0.05, 0.7, (n, 3)) * grey(0.3, 1)
    colours = {
        PAINT: np.where(rng.random((n, 1)) < 0.6, grey(0.04, 0.85), vivid),
        GLASS: (0.1, 0.13, 0.16), RUBBER: 0.05, METAL: grey(0.25, 0.6), DARK: 0.07, LAMP: (0.95, 0.95, 0.88),
        TAIL: (0.62, 0.04, 0.03), PLATE: grey(0.55, 0.85),
        SKIN: grey(0.3, 0.8) * (1, 0.75, 0.6),
        HAIR: grey(0.04, 0.35) * (1, 0.85, 0.7),
        SHIRT: rng.uniform(0.05, 0.85, (n, 3)),
        TROUSERS: rng.uniform(0.05, 0.3, (n, 3)) + grey(0, 0.2),
        LEAF: rng.uniform((0.12, 0.2, 0.05), (0.25, 0.36, 0.12), (n, 3)),
        WOOD: (0.25, 0.19, 0.14),
    }  # fmt: skip
    return np.stack([np.broadcast_to(colour, (n, 3)) for colour in colours.values()], 1)
