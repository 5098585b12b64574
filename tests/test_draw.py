"""Pictures: boxes land where geometry says, filters work, and no box, however awkward, breaks a picture."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont

from formats.kitti import read_calib, read_labels, split_projection
from metrics import kitti_files
from metrics.kitti import kitti_ap
from metrics.kitti_files import draw_curves
from scene import draw
from scene.draw import (
    OTHER,
    PREDICTION,
    TRUTH,
    WIDTH,
    balanced_score,
    best_score,
    draw_frame,
    draw_frames,
    draw_sheet,
    frame_quality,
)
from scene.frames import Frame, make_labels
from scene.geometry import box_corners, project

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


def test_images_that_are_open_already_look_as_their_files_do(tmp_path):
    """Turned as EXIF says and scaled from 16 bits, as `Detector.predict` sees them."""
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side
    Image.fromarray(np.rot90(GREY)).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(np.full((192, 640), 90 * 257, np.uint16)).save(tmp_path / "deep.png")
    for name in ("turned.png", "deep.png"):
        with Image.open(tmp_path / name) as image:
            picture = draw_frame(image, K, CAR)
        assert picture.tobytes() == draw_frame(tmp_path / name, K, CAR).tobytes() == draw_frame(GREY, K, CAR).tobytes()


def test_the_face_that_looks_forward_is_filled():
    """Of a car that comes towards the camera it is the near one, whose corners lie outside the far one."""
    for yaw, filled in ((np.pi / 2, True), (-np.pi / 2, False)):
        car = make_labels(["Car"], [[0, 0, 1, 1]], [[4, 1.5, 1.8]], [[0, 0.5, 16]], [yaw])
        inside = (
            project(np.array([[0.8, 1.15, 14.0]]), K)[0] + 0.5
        ) * WIDTH / 640 - 0.5  # near a corner of the near face
        red, _, blue = np.asarray(draw_frame(GREY, K, car))[tuple(np.round(inside[::-1]).astype(int))].astype(int)
        assert (red > blue + 20) == filled


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
    """A car at yaw 0 looks to the right, so the tick leaves its outline to the right and nothing to the left."""
    car = make_labels(["Car"], [[0, 0, 1, 1]], [[4, 1.5, 2]], [[0, 1, 20]], [0.0])
    view = np.asarray(draw_frame(GREY, K, car, None, max_range=30)).astype(int)[:, WIDTH:]
    _, columns = np.nonzero(np.abs(view[20:300] - PREDICTION).max(-1) < 60)
    middle = view.shape[1] / 2
    scale = (432 - 40) / 30
    assert middle - columns.min() == pytest.approx(2 * scale, abs=2)
    assert columns.max() - middle == pytest.approx(3.2 * scale, abs=2)


def test_the_view_from_above_shows_what_the_camera_sees():
    """At z = 21 m between the rays of the image's edges, which lie askew about a principal point off the middle."""
    picture = draw_frame(GREY, K - [[0, 0, 160], [0, 0, 0], [0, 0, 0]], None, CAR[:0], max_range=30)
    row = np.asarray(picture).astype(int)[round(432 - 20 - 21 * (432 - 40) / 30), WIDTH:]
    seen = np.flatnonzero(np.abs(row - draw.WEDGE).max(-1) < 3)
    metres = (seen[[0, -1]] - len(row) / 2) / ((432 - 40) / 30)
    assert metres == pytest.approx([21 * -160.5 / 700, 21 * 479.5 / 700], abs=0.2)


def test_sheet_places_pictures_in_reading_order():
    pictures = [(Image.new("RGB", (20 + i, height), (i * 40, 0, 0)), "") for i, height in enumerate((10, 14))]
    sheet = draw_sheet(pictures, line=6)
    assert sheet.size == (21, 36)
    assert sheet.getpixel((5, 7)) == (0, 0, 0)
    assert sheet.getpixel((5, 25)) == (40, 0, 0)
    assert draw_sheet([]).height == 22


@pytest.mark.skipif(not KITTI.is_dir(), reason="the KITTI sample frames are not there")
def test_real_frame():
    K, offset = split_projection(read_calib(KITTI / "calib/000008.txt"))
    labels = read_labels(KITTI / "label_2/000008.txt").moved(offset)
    picture = draw_frame(Image.open(KITTI / "image_2/000008.png"), K, labels, labels, classes=("Car",))
    assert picture.size == (WIDTH + 413, 435)


# ---- text


@pytest.fixture
def written(monkeypatch):
    """Texts as they are drawn: (text, (x, y), size, anchor)."""
    texts, write = [], draw.write

    def record(canvas, xy, text, size, fill, anchor):
        texts.append((text, xy, size, anchor))
        write(canvas, xy, text, size, fill, anchor)

    for module in (draw, kitti_files):
        monkeypatch.setattr(module, "write", record)
    return texts


def named(name):
    return draw_frame(GREY, K, dataclasses.replace(CAR, name=np.array([name], object)), None).tobytes()


def test_predictions_tell_class_depth_and_score_and_ground_truth_only_where_it_is_alone(written):
    draw_frame(GREY, K, CAR, CAR)
    assert [text for text, *_ in written if "Car" in text] == ["Car 14 m .80"]
    assert {text for text, *_ in written} >= {"1 predicted", "1 true", "10 m"}
    written.clear()
    draw_frame(GREY, K, None, CAR)
    assert [text for text, *_ in written if "Car" in text] == ["Car 14 m"]
    written.clear()
    draw_frame(GREY, K, CAR[:0], CAR)
    assert not any("Car" in text for text, *_ in written)


def test_text_grows_with_the_picture(written):
    sizes = []
    for width in (500, 960, 1440):
        written.clear()
        draw_frame(GREY, K, CAR, None, width=width)
        sizes.append(written[0][2] / 2)
    assert sizes == [11, 11, 16]


def test_letters_of_any_script(monkeypatch):
    """In a font of the machine that has them, else what ASCII has of them."""
    monkeypatch.setattr(draw, "FONTS", ("no such font", "DejaVuSans"))
    draw._fit.cache_clear()
    try:
        ImageFont.truetype("DejaVuSans", 12)
    except OSError:
        pass
    else:
        assert named("Fußgänger") != named("Fu?ganger")
        assert draw._fit("Fußgänger", 12)[0] == "Fußgänger"
    monkeypatch.setattr(draw, "FONTS", ())
    draw._fit.cache_clear()
    assert named("Fußgänger 交") == named("Fu?ganger ?")
    assert named("a\u0308") == named("a")
    draw._fit.cache_clear()


def test_labels_hide_no_label_and_no_other_object(written):
    rng = np.random.default_rng(0)
    z = rng.uniform(6, 60, 45)
    center = np.stack([rng.uniform(-0.4, 0.4, 45) * z, np.ones(45), z], 1)
    crowd = make_labels(
        ["Car"] * 45, np.zeros((45, 4)), np.tile([4, 1.5, 1.8], (45, 1)), center, rng.uniform(-3, 3, 45)
    )
    draw_frame(GREY, K, crowd, crowd)
    placed = [(text, xy, size) for text, xy, size, anchor in written if anchor == "mm"]
    assert 5 <= len(placed) < 45
    corners = (crowd.project(K) + 0.5) * 2 * WIDTH / 640 - 0.5
    boxes = np.concatenate([corners.min(1), corners.max(1)], 1)
    labels = []
    for text, (x, y), size in placed:
        half = draw._fit(text, size)[1].getlength(text) / 2
        labels.append((x - half, y - size / 2, x + half, y + size / 2))
    labels = np.array(labels)
    meets = lambda a, b: (a[:, None, :2] < b[None, :, 2:]).all(-1) & (b[None, :, :2] < a[:, None, 2:]).all(-1)  # noqa: E731
    assert (meets(labels, labels).sum(1) == 1).all()
    assert (meets(labels, boxes).sum(1) <= 1).all()  # its own, where the picture ends


def test_detections_with_depth_errors_are_drawn():
    found = dataclasses.replace(CAR, sigma=np.array([0.7]))
    assert draw_frame(GREY, K, found, None).tobytes() == draw_frame(GREY, K, CAR, None).tobytes()


# ---- sheets and curves


def frames_of(folder, count, content):
    """Frames whose images `content(i)` are written into a folder, all with one car, their detections and metrics."""
    frames = []
    for i in range(count):
        Image.fromarray(content(i)).save(folder / f"{i}.png")
        frames.append(Frame(f"{i}", folder / f"{i}.png", K, CAR))
    found = {frame.id: CAR.moved([0, 0, 0.1 * i]) for i, frame in enumerate(frames)}
    return frames, found, kitti_ap({frame.id: CAR for frame in frames}, found, ("Car",))


def test_a_sheet_holds_the_best_and_the_worst(tmp_path):
    frames, found, metrics = frames_of(tmp_path, 6, lambda i: GREY)
    sheet = draw_frames(frames, found, metrics, ("Car",))
    assert sheet.mode == "RGB"
    assert 1000 < sheet.width < 1300
    assert sheet.height > 6 * 270
    assert has_colour(np.asarray(sheet) // 64, np.array(PREDICTION) // 64)


def test_frames_without_a_readable_image_are_passed_over(tmp_path, written):
    frames, found, metrics = frames_of(tmp_path, 9, lambda i: GREY)
    (tmp_path / "1.png").write_bytes(b"no picture")
    (tmp_path / "8.png").unlink()
    draw_frames(frames, found, metrics, ("Car",))
    captions = [text.split("   ")[0] for text, *_ in written if "overlap" in text]
    assert captions == ["best: 0", "best: 2", "best: 3", "worst: 5", "worst: 6", "worst: 7"]
    written.clear()
    draw_frames(frames, found, metrics, ("Car",), best=0, worst=2)
    assert [text.split("   ")[0] for text, *_ in written if "overlap" in text] == ["worst: 6", "worst: 7"]
    for path in tmp_path.glob("*.png"):
        path.unlink()
    assert draw_frames(frames, found, metrics, ("Car",)).height < 50


def test_curves_name_their_overlap_and_keep_the_legend_out(written):
    truth = dataclasses.replace(
        CAR, box=np.array([[100.0, 50, 200, 150]]), truncation=np.zeros(1), occlusion=np.zeros(1, int)
    )
    metrics = kitti_ap({"0": truth}, {"0": truth[:0]}, ("Car",), own_overlap={"Car": (0.6, 0.4, 0.3)})
    curves = np.asarray(draw_curves(metrics))
    assert [text.split("> ")[1] for text, *_ in written if "overlap" in text] == ["0.6", "0.6", "0.4", "0.3"]
    legend = [(text, y) for text, (_, y), *_ in written if text.startswith(("easy", "moderate", "hard"))]
    assert len(legend) == 12
    assert max(y for _, y in legend) < 48
    panel = curves[50:250, 54:350].reshape(-1, 3)  # without detections the lines lie on the bottom
    assert {tuple(colour) for colour in np.unique(panel, axis=0).tolist()} == {(255, 255, 255), (228, 228, 228)}


def test_quality_and_score_level_of_frames():
    assert frame_quality(CAR, CAR, ("Car",)) == pytest.approx(1)
    assert frame_quality(CAR, CAR[:0], ("Car",)) == 0
    assert np.isnan(frame_quality(CAR, CAR, ("Cyclist",)))
    assert best_score(kitti_ap({"0": CAR}, {"0": CAR[:0]}, ("Car",))) == 0.3
    scores = np.array([0.2, 0.9, 0.6])
    assert balanced_score(2, scores) == 0.2  # two are above it
    assert balanced_score(0, scores) == 0.9
    assert balanced_score(9, scores) == 0.0
