"""The built-in world: driving scenes in KITTI format, rendered once. A frame is a function of seed, index, size.

Camera frame: x right, y down, z forward, metres. The camera is pitched, rolled and raised at random, so the ground is
the plane normal . X = height; boxes stand on it but stay upright in the camera frame, as KITTI's do.
"""

import itertools
import math
import zlib
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from formats.files import lock, processes, replacing
from formats.kitti import write_calib, write_labels
from scene.frames import UserError, make_labels
from scene.geometry import NEAR, box_corners, clip_boxes, project_boxes, wrap_angle
from world.shapes import GLOSS, SIZES, TEXTURE, draw_colours, draw_sizes, shape

WORLD_VERSION = 1  # part of the folder's name: raise it whenever a picture or a label changes
FIRST_INDEX = {"train": 0, "val": 500_000}  # ids: held-out frames do not depend on how many are trained on
MAX_DEPTH, MIN_HEIGHT, MIN_VISIBLE = 60.0, 10.0, 0.1  # m, px, share of its pixels: beyond them it is DontCare
VISIBLE_LEVELS = (0.8, 0.5, 0.25)  # least visible share of occlusion 0, 1 and 2; less is 3
FOCAL_LENGTHS = (0.578, 0.734)  # of the image width: 370 and 470 px at 640
CROSSING_WIDTH = 7.5  # m, of side streets
CAMERA_SHIFT = np.array([0.06, -0.0003, 0.0027])  # m from camera 0 to this one, about KITTI's: P2's fourth column
CLASSES = {"sedan": "Car", "hatchback": "Car", "suv": "Car", "van": "Van", "truck": "Truck",
           "pedestrian": "Pedestrian", "cyclist": "Cyclist"}  # fmt: skip


def rasterise(rings, bias, K, size):
    """Every pixel that each face covers, hidden or not: face (F,), row * width + column (F,), inverse depth (F,).

    By half planes instead of clipped polygons, so that a face may pass behind the camera (Olano and Greer 1997).

    rings (3, V, P): corners in camera metres, counter-clockwise from outside; faces seen from behind give nothing.
    bias (P,): factor on inverse depth that lifts layers off the face below.
    """
    width, height = size
    normal = face_normals(rings)
    offset = (normal * rings[:, 0]).sum(0)
    seen = np.flatnonzero((offset < -1e-9) & (rings[2].max(0) > NEAR))
    rings, normal, offset = rings[..., seen], normal[:, seen], offset[seen]
    edges = np.cross(rings, np.roll(rings, -1, 1), axis=0)  # (3, V, P): planes through the camera and one edge each
    inverse = np.linalg.inv(K)
    # Inverse depth of (u, v, 1) is plane . (u, v, 1). Not by BLAS, which may round by thread count.
    plane = np.einsum("ij,ip->jp", inverse, normal / offset)
    edge_u, edge_v, edge_1 = np.einsum("ij,ivp->jvp", inverse, edges)  # inside where their sum is <= 0
    rows = K[1, 1] * rings[1] / np.maximum(rings[2], NEAR) + K[1, 2]
    crosses = rings[2].min(0) < NEAR
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
    row, column = np.asarray(s).astype(np.int32) & 255, np.asarray(t).astype(np.int32) & 255
    return noise_tile(octave).take((row << 8) | column)


class Objects(NamedTuple):
    """n objects in the camera frame."""

    kind: np.ndarray  # (n,) keys of SIZES
    size: np.ndarray  # (n, 3) l, h, w, m
    center: np.ndarray  # (n, 3) m
    yaw: np.ndarray  # (n,) radians
    colour: np.ndarray  # (n, 14, 3) of each material, 0-1


class View(NamedTuple):
    """Camera, road and light of one frame.

    Road frame: s metres along the road, t to the right of its middle. Half road, pavement and wall end at these |t|.
    """

    K: np.ndarray  # (3, 3) px
    size: tuple[int, int]  # width, height, px
    normal: np.ndarray  # (3,) of the ground: normal . X = height in the camera frame
    height: float  # m
    heading: float  # of the road, radians from z towards x
    offset: float  # the camera's t
    half_road: float
    lane: float  # width, m
    pavement: float
    wall: float
    crossing: float  # s at which a side street starts
    sunlight: float  # strength
    haze_range: float  # m
    sun: np.ndarray  # (3,) unit vector towards it
    ambient: np.ndarray  # (3, 1, 1) colour
    haze: np.ndarray  # (3, 1, 1) colour
    start: float = 0.0  # the camera's s
    # What the first world has not: its pictures stay as they are.
    curve: float = 0.0  # of the ground, normal . X = height + curve z^2, 1/m: above 0 the road falls away
    hedge: float = 6.0  # m, the tallest
    gloss: float = 1.0  # factor on mirrored light
    detail: float = 1.0  # factor on the textures of ground, fronts and hedges


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
    level = np.cos(elevation)
    sun = np.array([np.cos(azimuth) * level, -np.sin(elevation), np.sin(azimuth) * level], np.float32)
    sunlight = rng.uniform(0.3, 0.8) if rng.random() < 0.6 else 0.0
    exposure, tint = rng.uniform(0.7, 1.25), rng.uniform(0.93, 1.07, (3, 1, 1)).astype(np.float32)
    offset = lane * (rng.integers(lanes) + 0.5) + rng.normal(0, 0.25)
    camera = (rng.uniform(1.3, 1.9), heading, offset)
    road = (half_road, lane, pavement, pavement + rng.uniform(0.5, 7), crossing)
    scalars = (*camera, *road, exposure * sunlight, rng.uniform(70, 300))
    ambient = np.float32(exposure * (0.8 - 0.4 * sunlight)) * tint
    haze = np.float32(min(exposure, 1.1) * rng.uniform(0.75, 0.95)) * tint
    scalars = map(float, scalars)  # plain floats keep single precision arrays single
    return View(K, size, normal, *scalars, sun, ambient, haze)


def render_objects(view, objects):
    """Returns faces, owner (H * W,) face or -1, inverse depth (H * W,), visible share (n,), visible pixels (n,).

    faces: rings (3, 10, P) in camera metres, material (P,), object (P,).
    """
    blank = np.zeros((3, 10, 0)), np.zeros(0, int), np.zeros(0, int)
    shapes = [shape(kind) for kind in objects.kind]
    thing = np.repeat(np.arange(len(shapes)), np.array([len(material) for _, material, _ in shapes], int))
    rings, material, layer = (np.concatenate(parts, -1) for parts in zip(blank, *shapes, strict=True))
    x, y, z = rings * objects.size.T[:, None, thing]
    cos, sin = np.cos(objects.yaw)[thing], np.sin(objects.yaw)[thing]
    rings = np.stack([x * cos + z * sin, y, z * cos - x * sin]) + objects.center.T[:, None, thing]
    face, pixel, inverse_depth = rasterise(rings, 1 + 1e-4 * layer, view.K, view.size)
    depth = np.zeros(view.size[0] * view.size[1])
    np.maximum.at(depth, pixel, inverse_depth)
    front = np.flatnonzero(inverse_depth == depth.take(pixel))
    owner = np.full(len(depth), -1)
    owner[pixel.take(front)] = face.take(front)
    visible = np.bincount(thing[owner[owner >= 0]], minlength=len(shapes))
    covers = np.zeros((len(shapes), len(depth)), bool)
    covers[thing[face], pixel] = True
    share = visible / np.maximum(np.count_nonzero(covers, 1), 1)
    return (rings, material, thing), owner, depth, share, visible


def draw_picture(rng, view, objects):
    """Image (3, H, W) float32, 0-1, object of each pixel (H, W) or -1, visible share and pixels of each object (n,)."""
    faces, owner, inverse_depth, share, pixels = render_objects(view, objects)
    image = paint_background(rng, view, objects)
    paint_objects(view, objects, faces, owner, inverse_depth, image.reshape(3, -1))
    shown = np.append(faces[2], -1)[owner]
    return image, shown.reshape(view.size[::-1]), share, pixels


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


def choose_apart(clash, candidates, chosen):
    """The rows `chosen` and, in their order, those candidates that clash (n, n) with none chosen before."""
    for i in candidates:
        if not clash[i, chosen].any():
            chosen = [*chosen, i]
    return chosen


def draw_candidates(rng, view):
    """[(kind, s, t, radians right of the road's direction)] of all that might stand there, sparser with distance."""
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
    for i, (side, ahead) in itertools.product(range(lanes), ways):
        line(vehicles, [0.3, 0.26, 0.2, 0.09, 0.06, 0.09], side * (i + 0.5) * view.lane, 0.25, 11, ahead)
    for side, ahead in ways:
        if view.half_road - lanes * view.lane > 2 and rng.random() < 0.8:
            turn = rng.choice([0, 0, 0, np.pi / 2])
            kerb = side * (view.half_road - 1.1 + 1.2 * (turn > 0))
            line(vehicles[:4], [0.35, 0.32, 0.23, 0.1], kerb, 0.12, 6, ahead + turn)
        line(["cyclist", "pedestrian"], [0.85, 0.15], side * (lanes * view.lane - 0.5), 0.4, 30, ahead, 0.15)
        walk = side * (view.half_road + view.pavement) / 2
        line(["pedestrian", "cyclist", "bin"], [0.82, 0.12, 0.06], walk, 0.5, 12, rng.choice([0, np.pi]), 0.7)
        edge = view.half_road + 0.4 if rng.random() < 0.4 else view.wall - 0.3
        line(["pole", "tree"], [0.7, 0.3], side * edge, 0.1, 14, 0)
    for _ in range(rng.poisson(2.5 * crowd)):
        kind = rng.choice(["pedestrian", "cyclist", *vehicles[:4]], p=[0.45, 0.25, 0.1, 0.08, 0.08, 0.04])
        found.append((kind, 4 + rng.gamma(2, 8), rng.uniform(-1, 1) * view.half_road, rng.uniform(-np.pi, np.pi)))
    for _ in range(rng.poisson(2.5 * crowd) if view.crossing < 50 else 0):
        kind, side = rng.choice(vehicles, p=[0.25, 0.22, 0.18, 0.08, 0.05, 0.22]), rng.choice([-1, 1])
        s, t = view.crossing + CROSSING_WIDTH / 2 + 1.7 * side, rng.uniform(-20, 20)
        found.append((kind, s, t, -side * np.pi / 2 + rng.normal(0, 0.06)))
    return found


def draw_objects(rng, view, draw=draw_candidates, factors=None):
    """Candidates that meet neither each other, seen from above, nor the camera's own car, in random precedence.

    draw: what lists them; factors: {kind: factors on l, h, w}, of kinds whose sizes are others.
    """
    candidates = [("sedan", -1.0, view.offset, 0.0), *draw(rng, view)]  # the first is the camera's own car
    candidates = [candidates[i] for i in (0, *rng.permutation(len(candidates) - 1) + 1)]
    kind, s, t, direction = (np.array(column) for column in zip(*candidates, strict=True))
    n, sin, cos = len(kind), np.sin(view.heading), np.cos(view.heading)
    size = draw_sizes(rng, kind, 0.04)
    child = (kind == "pedestrian") & (rng.random(n) < 0.12)
    size *= np.where(child, rng.uniform(0.65, 0.85, n), 1)[:, None]
    if factors:
        size *= [factors.get(name, (1, 1, 1)) for name in kind]
    x, z = s * sin + (t - view.offset) * cos, s * cos - (t - view.offset) * sin
    ground = (view.height + view.curve * z * z - view.normal[0] * x - view.normal[2] * z) / view.normal[1]
    center = np.stack([x, ground - size[:, 1] / 2, z], -1)
    yaw = wrap_angle(view.heading + direction - np.pi / 2)
    corners = footprint(center, size + 0.2, yaw)
    farthest = corners[..., 1].max(1)
    in_view = (farthest > 1) & (np.abs(corners[..., 0]).min(1) < 0.55 * farthest * view.size[0] / view.K[0, 0])
    rows = np.array(choose_apart(overlaps(corners), np.flatnonzero(in_view[1:]) + 1, [0])[1:], int)
    return Objects(kind[rows], size[rows], center[rows], yaw[rows], draw_colours(rng, len(rows)))


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
    z = ground_depth(view, down[top:])
    np.copyto(image[:, top:], paint_ground(rng, view, objects, top, z, u, across, along), where=down[top:] > 0.003)
    paint_walls(rng, view, across, along, down, image)
    return image


def ground_depth(view, down):
    """Depth, m, at which rays meet the ground; down: normal . ray. Beyond a brow, that of the brow and more."""
    z = view.height / np.maximum(down, 0.003)
    if not view.curve:
        return z
    return 2 * z / (1 + np.sqrt(np.maximum(1 - 4 * view.curve / view.height * z * z, 0)))


def paint_sky(rng, view, u, down):
    """Gradient, clouds and far hills (3, h, W) along rays (u (W,), ., 1), of which down (h, W) is normal . ray."""
    elevation = np.maximum(-down, 0)
    zenith = view.haze * rng.uniform((0.55, 0.7, 0.85), (0.95, 1.0, 1.1)).astype(np.float32)[:, None, None]
    flat = 25 / (elevation + 0.12)
    clouds = texture(5, 2.4 * flat + rng.integers(256), u * flat) * float(rng.uniform(0, 0.12))
    image = view.haze + np.minimum(elevation * 2.5, 1) * (zenith - view.haze) + clouds
    tall = float(rng.uniform(0, 0.05))
    hills = 0.015 + tall * (1 + texture(5, u * 120 + rng.integers(256), 0) + 0.2 * texture(1, u * 300, 0))
    green = view.ambient * np.float32([[[0.14]], [[0.16]], [[0.11]]])
    np.copyto(image, 0.55 * view.haze + green, where=elevation < hills)
    return image


def paint_ground(rng, view, objects, top, z, u, across, along):
    """Asphalt, markings, kerb, pavement and verge (3, h, W); z (h, W): depth of the ground in the rows from top on."""
    s, t = z * along + view.start, z * across + view.offset
    beside = np.abs(t)
    crossing = (s > view.crossing) & (s < view.crossing + CROSSING_WIDTH)
    band = (beside > view.half_road).astype(np.int8) + (beside > view.half_road + 0.2) + (beside > view.pavement)
    band = band * ~crossing
    asphalt = rng.uniform(0.16, 0.42) * rng.uniform(0.95, 1.05, 3)
    paving = rng.uniform(0.35, 0.6) * rng.uniform(0.92, 1.05, 3)
    grass = rng.random() < 0.7
    verge = rng.uniform((0.15, 0.24, 0.06), (0.4, 0.42, 0.22)) if grass else rng.uniform(0.3, 0.5) * np.ones(3)
    palette = np.array([asphalt, paving * 1.15, paving, verge], np.float32)
    strength = np.array([rng.uniform(0.05, 0.2), 0.08, 0.15, 0.4], np.float32)
    far = 1 / z
    grain = texture(0, s * 30, t * 30) * np.minimum(7 * far, 1)
    grain = grain + 0.7 * texture(3, s * 5, t * 9) * np.minimum(25 * far, 1)
    grain += 0.6 * texture(4, s * 3 + 91, t * 16)
    lanes, pixel = int(view.half_road // view.lane), z * float(1 / view.K[0, 0])  # metres a pixel
    line = np.clip(np.round(t / view.lane), -lanes, lanes)
    paint = np.clip((0.07 + pixel / 2 - np.abs(t - line * view.lane)) / pixel, 0, 1) * np.minimum(0.14 / pixel, 1)
    solid = (np.abs(line) == lanes) | ((line == 0) & (lanes > 1))
    paint *= (solid | (fraction(s / 9 + float(rng.random())) < 0.45)) & ~crossing
    colour = palette.T.take(band, 1) * (1 + view.detail * strength.take(band) * grain)
    colour += float(rng.choice([0, 0.5, 0.8])) * paint * (0.8 + 0.4 * grain) * (0.85 - colour)
    diffuse, sunlit = cast_shadows(view, objects, top, z, u)
    colour *= view.ambient * diffuse + view.sunlight * float(-view.sun[1]) * sunlit
    return add_haze(view, colour, z)


def cast_shadows(view, objects, top, z, u):
    """Shares (h, W) of sky light and sunlight on the ground: dark below objects and where one stands before the sun."""
    diffuse, sunlit = np.ones_like(z), np.ones_like(z)
    slope = view.sun[[0, 2]] / -view.sun[1]  # metres sideways on the way to the sun, per metre up
    corners = footprint(objects.center, objects.size + 0.6, objects.yaw)
    if view.sunlight > 0:
        corners = np.concatenate([corners, corners - slope * objects.size[:, 1, None, None]], 1)
    x, depth = corners[..., 0], np.maximum(corners[..., 1], 0.5)
    columns = view.K[0, 0] * x / depth + view.K[0, 2]
    ground = view.height + view.curve * depth * depth - view.normal[0] * x - view.normal[2] * depth
    rows = view.K[1, 1] * ground / depth + view.K[1, 2] - top
    limits = np.stack([rows.min(1) - 1, rows.max(1) + 2, columns.min(1), columns.max(1) + 2], 1)
    limits = limits.clip(0, view.size[0]).astype(int)
    slope, cosines, sines = slope.tolist(), np.cos(objects.yaw).tolist(), np.sin(objects.yaw).tolist()
    rows = zip(limits.tolist(), objects.size.tolist(), objects.center.tolist(), cosines, sines, strict=True)
    for (row1, row2, column1, column2), (length, tall, wide), center, cos, sin in rows:
        region = slice(row1, row2), slice(column1, column2)
        X, Z = z[region] * u[region[1]] - center[0], z[region] - center[2]
        x, y = X * cos - Z * sin, X * sin + Z * cos
        gap = np.maximum(np.abs(x) - 0.5 * length, np.abs(y) - 0.5 * wide)
        diffuse[region] *= 1 - np.clip(0.62 - 1.6 * gap, 0, 0.62)
        if view.sunlight > 0:
            enter, leave = 0, 0.9 * tall
            ahead, aside = slope[0] * cos - slope[1] * sin or 1e-3, slope[0] * sin + slope[1] * cos or 1e-3
            for at, half, step in ((x, 0.42 * length, ahead), (y, 0.42 * wide, aside)):
                middle, reach = at * (-1 / step), abs(half / step)
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
    tall = np.where(kind == 0, rng.uniform(4, 13, 2 * count), rng.uniform(0.8, view.hedge, 2 * count)) * (kind < 2)
    plaster = rng.uniform(0.2, 0.75, (2 * count, 1)) * rng.uniform(0.75, 1.1, (2 * count, 3))
    green = rng.uniform((0.1, 0.17, 0.04), (0.25, 0.34, 0.13), (2 * count, 3))
    colours = np.where((kind == 0)[:, None], plaster, green).astype(np.float32)
    hedge = kind[lot] == 1
    rough = np.where(hedge, 1 + 0.35 * texture(4, s * 14, 3) + 0.15 * texture(1, s * 9, 50), np.float32(1))
    limit = tall.astype(np.float32)[lot] * rough
    limit[(s > view.crossing) & (s < view.crossing + CROSSING_WIDTH) | (z > 250) | (s < -50)] = 0
    up = view.height + view.curve * z * z - down * z  # (H, W): metres above the ground where the ray meets the wall
    rows, columns = np.nonzero((up > 0) & (up < limit))
    up, s, z, hedge = up[rows, columns], s[columns], z[columns], hedge[columns]
    fade = np.minimum(12 / z, 1)
    leaves = 0.45 * texture(1, s * 12, up * 12) * fade + 0.4 * texture(4, s * 12, up * 12)
    pane = (np.abs(fraction(s / 2.7) - 0.55) < 0.2) & (np.abs(fraction(up / 3) - 0.52) < 0.22)
    front = 0.1 * texture(0, s * 20, up * 20) * fade - pane * np.minimum(40 / z, 1) * float(rng.uniform(0.3, 0.7))
    facing = float(view.sun[0] * math.cos(view.heading) - view.sun[2] * math.sin(view.heading))  # of walls on the left
    sun = view.sunlight * np.where(right[columns], max(-facing, 0), max(facing, 0)).astype(np.float32)
    rough = view.detail * np.where(hedge, leaves, front)
    shade = (1 + rough) * np.where(hedge, 0.6 + 0.4 * np.minimum(up / 2, 1), np.float32(1))
    colour = colours.T.take(lot[columns], 1) * (0.8 * view.ambient[:, 0] + sun) * shade
    image[:, rows, columns] = add_haze(view, colour, z)


def fraction(x):
    return x - np.floor(x)


def add_haze(view, colour, z):
    """colour (3, ...) seen through z (...) metres of air."""
    haze = view.haze.reshape(3, *[1] * z.ndim)
    return haze + np.exp(z * (-1 / view.haze_range)) * (colour - haze)


def paint_objects(view, objects, faces, owner, inverse_depth, image):
    """Shade the visible face of each pixel: sky light, sunlight, reflection, and texture. Changes image (3, H * W)."""
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
    gloss = view.gloss * GLOSS[material].take(face)
    a, b, c = normal.take(face, 1)
    mirrored = ray[1] - 2 * (a * ray[0] + b * ray[1] + c) * b
    sky = np.clip(0.5 - 2.2 * mirrored + 0.03 * grain, 0.12, 1) * view.haze[:, 0]
    image[:, pixel] = add_haze(view, colour + gloss * (sky - 0.6 * colour), z)


def label_objects(view, objects, share, pixels):
    """Labels of all objects of which a pixel shows, in camera 0; DontCare for those too far, small or hidden."""
    full, _ = project_boxes(objects.center, objects.size, objects.yaw, view.K)
    box = clip_boxes(full, *view.size)
    area, full_area = (np.prod(b[:, 2:] - b[:, :2], 1) for b in (box, full))
    name = np.array([CLASSES.get(kind, "") for kind in objects.kind], dtype="U16")
    keep = (name != "") & (pixels > 0) & (area > 0)
    care = (box[:, 3] - box[:, 1] >= MIN_HEIGHT) & (share >= MIN_VISIBLE)
    care &= (pixels >= 20) & (objects.center[:, 2] <= MAX_DEPTH)
    rows = np.concatenate([np.flatnonzero(keep & care), np.flatnonzero(keep & ~care)])
    name, box, share, truncation = name[rows], box[rows], share[rows], 1 - area[rows] / full_area[rows]
    center, occlusion = objects.center[rows] - CAMERA_SHIFT, (share[:, None] < VISIBLE_LEVELS).sum(1)
    labels = make_labels(name, box, objects.size[rows], center, objects.yaw[rows], truncation, occlusion)
    fill = {"name": "DontCare", "truncation": -1.0, "occlusion": -1, "alpha": -10.0, "size": -1.0, "center": -1000.0,
            "yaw": -10.0}  # fmt: skip
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
    """One frame: (image (H, W, 3) uint8, P2 (3, 4), Labels), the same bytes each time. size: (width, height)."""
    rng = np.random.default_rng((WORLD_VERSION, seed, index))
    view = draw_view(rng, size)
    objects = draw_objects(rng, view)
    image, _, share, pixels = draw_picture(rng, view, objects)
    P2 = np.column_stack([view.K, view.K @ CAMERA_SHIFT])
    return develop(rng, image), P2, label_objects(view, objects, share, pixels)


def write_png(path, image):
    """image (H, W, 3) uint8; noise does not compress well, so this is fast and hardly larger."""
    Image.fromarray(image).save(path, compress_level=1, compress_type=zlib.Z_HUFFMAN_ONLY)


def write_frame(job):
    """Render one frame into a folder; job: (folder, seed, index, size)."""
    folder, seed, index, size = job
    image, P2, labels = render_frame(seed, index, size)
    write_png(folder / f"training/image_2/{index:06d}.png", image)
    write_calib(folder / f"training/calib/{index:06d}.txt", P2)
    write_labels(folder / f"training/label_2/{index:06d}.txt", labels)


def build_world(root, split, frames, seed=0, size=(640, 192), workers=1):
    """Folder with the first frames of a split in KITTI format, rendered only if it is not there yet. Returns its Path.

    root: cache folder; split: 'train' or 'val'; size: (width, height); workers: processes. Raises UserError.
    """
    if split not in FIRST_INDEX or frames < 1:
        splits = " and ".join(FIRST_INDEX)
        raise UserError(f"the built-in world has {splits}, of at least one frame, got {split!r} of {frames}")

    def fill(folder):
        jobs = [(folder, seed, index, tuple(size)) for index in make_split(folder, split, frames)]
        render_all(jobs, workers, f"rendering {split}")

    return build_folder(Path(root) / f"world{WORLD_VERSION}-seed{seed}-{size[0]}x{size[1]}-{split}{frames}", fill)


def make_split(folder, split, frames):
    """Make the folders and the split file of a KITTI folder without frames. Returns the range of their indices."""
    for name in ("training/image_2", "training/label_2", "training/calib", "ImageSets"):
        (folder / name).mkdir(parents=True)
    indices = range(FIRST_INDEX[split], FIRST_INDEX[split] + frames)
    (folder / "ImageSets" / f"{split}.txt").write_text("".join(f"{index:06d}\n" for index in indices))
    return indices


def build_folder(folder, fill):
    """A folder that `fill(folder)` fills, only if it is not there yet; it takes its name when it is complete."""
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with lock(folder.with_name(f".{folder.name}.lock")) as held:
            if not folder.is_dir():
                with replacing(folder, alone=held) as unfinished:
                    unfinished.mkdir()
                    fill(unfinished)
    return folder


def render_all(jobs, workers, title, write=write_frame):
    """[write(job), ...] by processes that import nothing again where they can be forked."""
    with processes(workers) as pool:
        return list(tqdm(pool.map(write, jobs), title, len(jobs), unit=" frames", disable=None))
