"""Pictures: boxes land where geometry says, filters work, and no box, however awkward, breaks a picture."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from formats.kitti import make_labels, read_calib, read_labels, split_projection
from draw import OTHER, PREDICTION, TRUTH, WIDTH, draw_frame, draw_sheet
from geometry import box_corners, project

K = np.array([[700.0, 0, 320], [0, 700, 96], [0, 0, 1]])
GREY = np.full((192, 640, 3), 90, np.uint8)
CAR = make_labels(["Car"], [[0, 0, 1, 1]], [[4, 1.5, 1.8]], [[1, 0.6, 14]], [0.6], score=[0.8])
KITTI = Path(__file__).parents[2] / "shared/data/kitti_mini/training"


def near_colour(picture, pixel, colour, radius=3):
    """Whether a pixel within `radius` of (x, y) has about that colour."""
    x, y = np.round(pixel).astype(int)
    patch = np.asarray(picture)[max(y - radius, 0) : y + radius + 1, max(x - radius, 0) : x + radius + 1].reshape(-1, 3)
    return np.abs(patch.astype(int) - colour).max(-1).min() < 40


def has_colour(picture, colour):
    return (np.abs(np.asarray(picture).astype(int) - colour).max(-1) < 30).any()


@pytest.mark.parametrize(("predictions", "truth", "colour"), [(CAR, None, PREDICTION), (None, CAR, TRUTH)])
def test_corners_are_drawn_where_they_project(predictions, truth, colour):
    picture = draw_frame(GREY, K, predictions, truth)
    corners = (project(box_corners(CAR.center, CAR.size, CAR.yaw), K)[0] + 0.5) * WIDTH / 640 - 0.5
    assert all(near_colour(picture, corner, colour) for corner in corners)
    assert not near_colour(picture, corners.mean(0) + np.array([300, 0]), colour)


def test_small_images_are_enlarged_and_a_view_is_added():
    picture = draw_frame(GREY, K, CAR, CAR)
    assert picture.mode == "RGB"
    assert picture.height == 192 * WIDTH // 640
    assert picture.width > WIDTH + 300
    assert draw_frame(GREY, K, CAR, CAR).tobytes() == draw_frame(Image.fromarray(GREY), K, CAR, CAR).tobytes()


def test_score_and_class_filters():
    assert has_colour(draw_frame(GREY, K, CAR, None, min_score=0.8), PREDICTION)
    assert not has_colour(draw_frame(GREY, K, CAR, None, min_score=0.81).crop((0, 0, WIDTH, 432)), PREDICTION)
    assert not has_colour(draw_frame(GREY, K, CAR, None, classes=["Cyclist"]).crop((0, 0, WIDTH, 432)), PREDICTION)
    neighbour = draw_frame(GREY, K, None, CAR, classes=["Cyclist"]).crop((0, 0, WIDTH, 432))
    assert has_colour(neighbour, OTHER)
    assert not has_colour(neighbour, TRUTH)


def test_dontcare_is_a_grey_region_in_the_image_only():
    region = make_labels(["DontCare"], [[100, 50, 200, 120]], [[-1, -1, -1]], [[-1000, -1000, -1000]], [-10])
    with_region, without = (np.asarray(draw_frame(GREY, K, None, labels))[:, :WIDTH] for labels in (region, region[:0]))
    rows, columns = np.nonzero((with_region != without).any(-1))
    assert abs(columns.min() - 225) <= 2
    assert abs(columns.max() - 451) <= 2
    assert abs(rows.min() - 112.5) <= 2
    assert abs(rows.max() - 271) <= 2


@pytest.mark.parametrize("center", [(0, 1, 0), (0.5, 1, 0.11), (-3, 1, -20), (500, 1, 0.2), (0, 0, 5000)])
def test_awkward_boxes_do_not_break_the_picture(center):
    box = make_labels(["Car"], [[0, 0, 1, 1]], [[4, 1.5, 1.8]], [center], [0.3])
    assert draw_frame(GREY, K, box, box).height == 432


def test_heading_in_the_view_from_above():
    """A car at yaw 0 looks to the right, so the tick leaves its outline to the right and nothing leaves it to the left."""
    car = make_labels(["Car"], [[0, 0, 1, 1]], [[4, 1.5, 2]], [[0, 1, 20]], [0.0])
    view = np.asarray(draw_frame(GREY, K, car, None, max_range=30)).astype(int)[:, WIDTH:]
    _, columns = np.nonzero(np.abs(view[:300] - PREDICTION).max(-1) < 60)
    middle = view.shape[1] / 2
    scale = (432 - 40) / 30
    assert middle - columns.min() == pytest.approx(2 * scale, abs=2)
    assert columns.max() - middle == pytest.approx(3.2 * scale, abs=2)


def test_sheet_places_pictures_in_reading_order():
    pictures = [Image.new("RGB", (20, height), (i * 40, 0, 0)) for i, height in enumerate((10, 14, 8))]
    sheet = draw_sheet(pictures, columns=2, gap=6)
    assert sheet.size == (46, 28)
    assert sheet.getpixel((30, 5)) == (40, 0, 0)
    assert sheet.getpixel((5, 22)) == (80, 0, 0)
    with pytest.raises(ValueError, match="at least one picture"):
        draw_sheet([])


@pytest.mark.skipif(not KITTI.is_dir(), reason="the KITTI sample frames are not there")
def test_real_frame():
    K, offset = split_projection(read_calib(KITTI / "calib/000008.txt"))
    labels = read_labels(KITTI / "label_2/000008.txt").moved(offset)
    picture = draw_frame(Image.open(KITTI / "image_2/000008.png"), K, labels, labels, classes=("Car",))
    assert picture.size == (WIDTH + 413, 435)
