"""Projection, angles, corners, clipping at the camera plane and 2D overlaps: hand-worked cases and properties."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.nuscenes import visible_boxes
from scene.geometry import (
    NEAR,
    Pyramid,
    alpha_to_yaw,
    angle_from_double,
    average_duplicates,
    box_corners,
    box_iou,
    camera_problem,
    clip_boxes,
    clip_edges,
    flip_boxes,
    generalized_iou,
    heading_bin,
    mirror_bins,
    project,
    project_boxes,
    ray_angle,
    unit,
    unproject,
    wrap_angle,
    yaw_to_alpha,
)

K = np.array([[700.0, 0, 600], [0, 710, 180], [0, 0, 1]])
angles = st.floats(-30, 30)


def tensors(*arrays):
    return [torch.tensor(np.asarray(array), dtype=torch.float64) for array in arrays]


def test_project_by_hand():
    assert project(np.array([2.0, -1, 10]), K).tolist() == [740.0, 109.0]
    assert unproject(np.array([740.0, 109]), np.array(10.0), K).tolist() == [2.0, -1.0, 10.0]


@given(st.floats(-50, 50), st.floats(-5, 5), st.floats(0.2, 150))
def test_unproject_inverts_project(x, y, z):
    point = np.array([x, y, z])
    np.testing.assert_allclose(unproject(project(point, K), point[2], K), point, atol=1e-9, rtol=1e-9)
    torch_point, torch_K = tensors(point, K)
    np.testing.assert_allclose(project(torch_point, torch_K).numpy(), project(point, K), rtol=1e-12, atol=1e-9)


def test_project_takes_one_camera_per_point_or_one_for_all():
    points = np.random.default_rng(0).uniform([-5, -2, 3], [5, 2, 40], (4, 6, 3))
    cameras = K * np.array([1.0, 2, 0.5, 3])[:, None, None]
    cameras[:, 2, 2] = 1
    pixels = project(points, cameras[:, None])
    assert pixels.shape == (4, 6, 2)
    for i in range(4):
        np.testing.assert_allclose(pixels[i], project(points[i], cameras[i]))
    np.testing.assert_allclose(unproject(pixels, points[..., 2], cameras[:, None]), points)


def test_wrap_angle_is_half_open():
    assert wrap_angle(np.array([math.pi, -math.pi, 3 * math.pi])).tolist() == [-math.pi] * 3
    assert wrap_angle(np.array([0.5, 2 * math.pi + 0.5]))[1] == pytest.approx(0.5)
    just_below = np.nextafter(-math.pi, -4)  # % rounds this up to 2 pi itself
    assert wrap_angle(np.array(just_below)) == -math.pi


@given(angles)
def test_wrap_angle_keeps_the_direction_and_the_range(angle):
    for wrapped in (float(wrap_angle(np.array(angle))), float(wrap_angle(torch.tensor(angle, dtype=torch.float32)))):
        assert -math.pi <= wrapped < math.pi
        assert math.cos(wrapped - angle) > 1 - 1e-9


@given(angles, st.floats(-40, 40), st.floats(0.5, 80))
def test_alpha_and_yaw_are_inverse(yaw, x, z):
    center = np.array([x, 1.0, z])
    alpha = yaw_to_alpha(np.array(yaw), center)
    assert -math.pi <= alpha < math.pi
    assert math.cos(alpha_to_yaw(alpha, center) - yaw) == pytest.approx(1, abs=1e-12)


def test_a_car_seen_from_behind_on_the_right():
    """At 45 degrees to the right, heading along the ray: the camera sees its back, alpha = -pi / 2."""
    center = np.array([10.0, 1, 10])
    assert ray_angle(center) == pytest.approx(math.pi / 4)
    heading = box_corners(center, np.array([4.0, 1.5, 2]), np.array(-math.pi / 4))[:2].mean(0) - center
    assert heading[0] > 0  # yaw -45 degrees points right and away
    assert heading[2] > 0
    assert yaw_to_alpha(np.array(-math.pi / 4), center) == pytest.approx(-math.pi / 2)


def test_corners_take_length_height_width_along_x_y_z():
    center, size = np.array([1.0, 2, 10]), np.array([4.0, 1.5, 2])
    corners = box_corners(center, size, np.array(0.0))
    np.testing.assert_allclose(np.ptp(corners, axis=0), [4, 1.5, 2])
    np.testing.assert_allclose(corners[0], [3, 2.75, 11])  # front, bottom (+y), far
    assert (corners[:4, 1] == 2.75).all()
    assert (corners[4:, 1] == 1.25).all()
    np.testing.assert_allclose(
        np.ptp(box_corners(center, size, np.array(math.pi / 2)), axis=0), [2, 1.5, 4], atol=1e-12
    )
    quarter = box_corners(center, size, np.array(math.pi / 2))[:2].mean(0)
    np.testing.assert_allclose(
        quarter, [1, 2.75, 8], atol=1e-12
    )  # +yaw turns the front towards the camera, KITTI's rotation_y


def test_corners_agree_between_libraries():
    rng = np.random.default_rng(1)
    center, size, yaw = rng.normal(size=(5, 3)), rng.uniform(1, 4, (5, 3)), rng.uniform(-4, 4, 5)
    expected = box_corners(center, size, yaw)
    c, s, y = tensors(center, size, yaw)
    np.testing.assert_allclose(box_corners(c, s, y).numpy(), expected, atol=1e-12)


def test_edges_are_cut_at_the_near_plane():
    corners = box_corners(np.array([[0.0, 0, 1]]), np.array([[4.0, 2, 2]]), np.array([math.pi / 2]))  # z from -1 to 3
    edges, visible = clip_edges(corners)
    assert edges.shape == (1, 12, 2, 3)
    assert visible.sum() == 8  # the four edges of the end behind the camera are gone
    kept = edges[0][visible[0]]
    assert kept[..., 2].min() == NEAR == 0.1
    assert kept[..., 2].max() == pytest.approx(3)
    assert np.abs(kept[..., 0]).max() == pytest.approx(1)  # cutting moves points along their edge only
    assert np.isfinite(edges).all()


def test_project_boxes_by_hand():
    full, crosses = project_boxes([[0, 0, 10]], [[4, 2, 2]], [0.0], K)
    near, half = 9.0, np.array([2.0, 1])
    expected = [
        600 - 700 * half[0] / near,
        180 - 710 * half[1] / near,
        600 + 700 * half[0] / near,
        180 + 710 * half[1] / near,
    ]
    np.testing.assert_allclose(full, [expected])
    assert crosses.tolist() == [False]


def test_project_boxes_behind_and_across_the_camera():
    center = [[0, 0, -10], [1.5, 0, 1], [0, 0, 10], [0, 0, 1.05]]
    size = [[4, 2, 2], [1, 2, 4], [4, 2, 2], [1, 2, 1.9]]
    full, crosses = project_boxes(center, size, [0.0] * 4, K)
    assert np.isnan(full[0]).all()
    assert crosses.tolist() == [True, True, False, False]
    assert np.isfinite(full[1:]).all()
    x1, y1, x2, y2 = full[1]  # x from 1 to 2, z from .1 to 3
    np.testing.assert_allclose([x1, x2], [600 + 700 * 1 / 3, 600 + 700 * 2 / 0.1])
    np.testing.assert_allclose([y1, y2], [180 - 710 / 0.1, 180 + 710 / 0.1])


def test_visible_boxes_by_hand():
    wall = box_corners(
        np.array([[-6.0, 0, 12.5]]), np.array([[15, 2, 1e-9]]), np.array([-np.pi / 2])
    )  # along z, 5 to 20 m ahead
    border = 6 * 700 / 600  # m: where it leaves the image at u = 0
    expected = [[0, 180 - 710 / border, 600 - 6 * 700 / 20, 180 + 710 / border]]
    np.testing.assert_allclose(
        visible_boxes(wall, K, 1200, 360), expected, atol=1e-5
    )  # the full box is 142 px high either side of 180


def test_visible_boxes_hold_what_the_image_shows_of_a_box_and_no_more():
    rng = np.random.default_rng(1)
    n, width, height = 60, 1200, 360
    center, size, yaw = (
        rng.uniform([-12, -2, -3], [12, 2, 25], (n, 3)),
        rng.uniform(0.5, 8, (n, 3)),
        rng.uniform(-4, 4, n),
    )
    box = visible_boxes(box_corners(center, size, yaw), K, width, height)
    full, crosses = project_boxes(center, size, yaw, K)
    whole = ~crosses & (clip_boxes(full, width, height) == full).all(1)
    np.testing.assert_allclose(box[whole], full[whole], atol=1e-9)
    assert whole.sum() > 5
    share = np.linspace(-0.5, 0.5, 25)  # a lattice through each solid box; what the image shows of it
    inside = np.stack(np.meshgrid(share, share, share), -1).reshape(-1, 3)
    seen = 0
    for i in range(n):
        cosine, sine = np.cos(yaw[i]), np.sin(yaw[i])
        points = center[i] + inside * size[i] @ [[cosine, 0, -sine], [0, 1, 0], [sine, 0, cosine]]
        pixels = project(points[points[:, 2] >= NEAR], K)
        pixels = pixels[((pixels >= 0) & (pixels <= [width - 1, height - 1])).all(1)]
        if np.isnan(box[i]).any():
            assert not len(pixels)
        elif len(pixels) > 200:
            seen += 1
            extent = np.concatenate([pixels.min(0), pixels.max(0)])
            assert (extent[:2] >= box[i, :2] - 1e-9).all()
            assert (extent[2:] <= box[i, 2:] + 1e-9).all()
            near = 700 / max(points[:, 2].min(), 1) * size[i].max() / 24  # px between points of the lattice
            assert np.abs(extent - box[i]).max() < 3 * near
    assert seen > 20
    assert visible_boxes(np.zeros((0, 8, 3)), K, width, height).shape == (0, 4)


def test_project_boxes_without_boxes():
    full, crosses = project_boxes(np.zeros((0, 3)), np.zeros((0, 3)), np.zeros(0), K)
    assert full.shape == (0, 4)
    assert crosses.shape == (0,)


@given(st.integers(0, 1000))
@settings(max_examples=30)
def test_full_box_is_the_extent_of_the_corners_in_front(seed):
    rng = np.random.default_rng(seed)
    center = rng.uniform([-10, -1, 8], [10, 2, 60], (3, 3))
    size, yaw = rng.uniform(0.5, 5, (3, 3)), rng.uniform(-4, 4, 3)
    full, crosses = project_boxes(center, size, yaw, K)
    pixels = project(box_corners(center, size, yaw), K)
    np.testing.assert_allclose(full, np.concatenate([pixels.min(1), pixels.max(1)], 1))
    assert not crosses.any()


def test_flip_twice_is_nothing_and_once_mirrors_pixels():
    boxes = np.array([[3.0, 4, 10, 12], [-5, 0, 99, 9]])
    assert flip_boxes(boxes, 100).tolist() == [[89, 4, 96, 12], [0, 0, 104, 9]]
    np.testing.assert_array_equal(flip_boxes(flip_boxes(boxes, 100), 100), boxes)


def test_clip_boxes_ends_at_the_last_pixel_centre_of_one_image_or_of_each():
    assert clip_boxes(np.array([[-5.0, 2, 200, 80]]), 100, 50).tolist() == [[0, 2, 99, 49]]
    assert clip_boxes(np.full((2, 4), 200.0), *np.array([[100, 50], [90, 60]]).T).tolist() == [
        [99, 49] * 2,
        [89, 59] * 2,
    ]


def test_box_iou_by_hand_and_degenerate():
    a = np.array([[0.0, 0, 10, 10], [0, 0, 10, 10], [5, 5, 5, 5], [0, 0, 10, 10]])
    b = np.array([[0.0, 0, 10, 20], [20, 0, 30, 10], [5, 5, 5, 5], [0, 0, 10, 10]])
    expected = [0.5, 0, 0, 1]
    np.testing.assert_allclose(box_iou(a, b), expected)
    np.testing.assert_allclose(box_iou(b, a), expected)
    np.testing.assert_allclose(box_iou(*tensors(a, b)).numpy(), expected)


def test_generalized_iou_by_hand():
    a = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 10]])
    b = torch.tensor([[0.0, 0, 10, 20], [20, 0, 30, 10], [0, 0, 10, 10]])
    torch.testing.assert_close(generalized_iou(a, b), torch.tensor([0.5, -1 / 3, 1.0]))


@given(st.integers(0, 1000))
@settings(max_examples=30)
def test_generalized_iou_is_symmetric_bounded_and_below_iou(seed):
    corners = torch.from_numpy(np.random.default_rng(seed).uniform(0, 100, (2, 20, 2, 2)))
    a, b = torch.cat([corners.amin(2), corners.amax(2)], -1)
    value = generalized_iou(a, b)
    torch.testing.assert_close(value, generalized_iou(b, a))
    assert (value <= box_iou(a, b) + 1e-9).all()
    assert (value > -1).all()


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([5.0, 5, 5, 5], [5.0, 5, 5, 5]),  # both empty, at one place: the hull has no area
        ([5.0, 5, 5, 5], [0.0, 0, 10, 10]),
        ([5.0, 5, 5, 9], [50.0, 5, 50, 9]),
        ([0.0, 0, 1e5, 1e5], [0.0, 0, 1e-3, 1e-3]),
    ],
)
def test_generalized_iou_of_degenerate_boxes_has_value_and_gradient(a, b):
    a, b = torch.tensor(a, requires_grad=True), torch.tensor(b)
    value = generalized_iou(a, b)
    value.backward()
    assert -1.001 <= value.item() <= 1.001
    assert torch.isfinite(a.grad).all()


def test_inputs_stay_as_they_were():
    center, size, yaw = np.array([[1.5, 0, 1]]), np.array([[1.0, 2, 4]]), np.array([0.3])
    before = [x.copy() for x in (center, size, yaw, K)]
    project_boxes(center, size, yaw, K)
    box_corners(center, size, yaw)
    for array, old in zip((center, size, yaw, K), before, strict=True):
        np.testing.assert_array_equal(array, old)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({(0, 0): 5.0}, "focal lengths 5, 710 px are implausible for an image of 1242x375"),
        ({(0, 0): -700.0}, "focal lengths -700, 710"),
        ({(0, 2): 5000.0}, r"principal point \(5000, 180\) px is far outside"),
        ({(0, 1): 3.0}, r"expected \[\[fx, 0, cx\]"),
        ({(1, 1): math.nan}, "of finite numbers"),
    ],
)
def test_implausible_cameras_are_named(change, words):
    wrong = K.copy()
    for place, value in change.items():
        wrong[place] = value
    assert camera_problem(K, 1242, 375) is None
    assert re.search(words, camera_problem(wrong, 1242, 375))


def test_a_projection_matrix_is_not_a_camera_matrix():
    assert "shape (3, 4)" in camera_problem(np.zeros((3, 4)), 1242, 375)


@pytest.mark.parametrize("alpha", [*np.linspace(-math.pi, math.pi - 1e-3, 17), 0.7, -2.4])
def test_two_bins_and_the_double_angle_give_the_angle(alpha):
    alpha = torch.tensor(alpha)
    double = torch.stack([torch.sin(2 * alpha), torch.cos(2 * alpha)])
    if abs(math.sin(alpha - math.pi / 4)) > 1e-3:
        again = angle_from_double(double, heading_bin(alpha))
        assert -math.pi <= again < math.pi
        assert math.cos(again - alpha) == pytest.approx(1, abs=1e-6)


def test_unit_of_zero_has_a_gradient():
    vector = torch.zeros(3, 2, requires_grad=True)
    unit(vector).sum().backward()
    assert torch.isfinite(vector.grad).all()
    torch.testing.assert_close(unit(torch.tensor([[3.0, 4]])), torch.tensor([[0.6, 0.8]]))


@pytest.mark.parametrize("autocast", [False, True])
def test_duplicates_are_averaged(autocast):
    """By score and overlap, the place also by inverse variance; not over other classes or places, nor without area."""
    box = torch.tensor(
        [[10.0, 10, 50, 30], [10, 10, 50, 34], [12, 10, 52, 30], [10, 10, 50, 30], [200, 10, 240, 30], [80, 5, 80, 9]]
    )
    every = {
        "label": torch.tensor([0, 0, 0, 1, 0, 0]),
        "score": torch.tensor([0.9, 0.6, 0.3, 0.8, 0.7, 0.5]),
        "box": box,
        "pixel": torch.tensor([[30.0, 20], [32, 21], [29, 20], [99, 99], [220, 20], [80, 7]]),
        "depth": torch.tensor([20.0, 22, 26, 50, 60, 5]),
        "sigma": torch.tensor([1.0, 2, 1, 0.1, 0.1, 1]),
    }
    kept = {name: value[[0, 4, 5]] for name, value in every.items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        averaged, pixel, depth = average_duplicates(kept, every, 0.6)
    weight = torch.tensor([0.9, 0.6 * 800 / 960, 0.3 * 760 / 840])  # times overlap
    torch.testing.assert_close(averaged[0], (weight[:, None] * box[:3]).sum(0) / weight.sum())
    trusted = weight / torch.tensor([1.0, 4, 1])
    torch.testing.assert_close(depth[0], (trusted * torch.tensor([20.0, 22, 26])).sum() / trusted.sum())
    torch.testing.assert_close(pixel[0], (trusted[:, None] * every["pixel"][:3]).sum(0) / trusted.sum())
    torch.testing.assert_close(averaged[1:], box[4:])
    torch.testing.assert_close(pixel[1:], every["pixel"][4:])
    assert depth[1:].tolist() == [60, 5]


def test_angles_on_either_side_of_a_border_of_the_bins_agree():
    """44 degrees here and 46 in the mirror image are 45, not 225: the bins of one have their border elsewhere."""
    for degrees in (44.2, 44.9, 45.1, 45.8, 224.2, 225.1):
        true = math.radians(degrees)
        for mine, theirs in ((-1, 1), (1, -1), (1, 2), (-2, -1)):
            own, other = (true + math.radians(error) for error in (mine, theirs))
            bins = heading_bin(torch.tensor(math.pi - true))
            sure = torch.where(bins == torch.arange(2), 5.0, -5.0)
            mean = torch.tensor(
                [(math.sin(2 * own) + math.sin(2 * other)) / 2, (math.cos(2 * own) + math.cos(2 * other)) / 2]
            )
            alpha = angle_from_double(mean, mirror_bins(sure, mean).argmax(-1))
            assert math.cos(float(alpha) - true) > 0.99, (degrees, mine, theirs)


def test_cells_of_a_pyramid_by_hand():
    pyramid = Pyramid((32, 64), (8, 16))
    assert pyramid.shapes == [(4, 8), (2, 4)]
    assert pyramid.counts == [32, 8]
    assert pyramid.starts == [0, 32]
    pixel, stride, level = pyramid.locations()
    assert pixel[[0, 1, 8, 31, 32, 39]].tolist() == [
        [3.5, 3.5],
        [11.5, 3.5],
        [3.5, 11.5],
        [59.5, 27.5],
        [7.5, 7.5],
        [55.5, 23.5],
    ]
    assert stride.tolist() == [8] * 32 + [16] * 8
    assert level.tolist() == [0] * 32 + [1] * 8
    mirrored = pixel[pyramid.mirror()]
    assert torch.equal(mirrored[:, 0], 63 - pixel[:, 0])
    assert torch.equal(mirrored[:, 1], pixel[:, 1])
