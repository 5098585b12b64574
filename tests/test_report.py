"""The report of an evaluation: what it calls wrong is what the evaluators say, and the page shows it, in a browser."""

import base64
import dataclasses
import io
import itertools
import json
import shutil
from types import SimpleNamespace
from urllib.parse import urlencode

import numpy as np
import pytest
from browser import Browser, find_browser
from conftest import ROOT
from PIL import Image

import evaluate
from formats.kitti import read_labels, write_calib, write_labels
from formats.nuscenes import read_frames, read_truth
from metrics import kitti
from metrics.kitti import compute_metrics, object_errors
from metrics.nuscenes import IN_RACKS
from metrics.nuscenes_files import read_results
from scene.draw import SHEET_WIDTH, draw_frame
from scene.frames import Frame, join, make_labels
from scene.geometry import box_iou, project_boxes, wrap_angle
from tools import report
from tools.report import DUPLICATE, FALSE, LEFT_OUT, MATCHED, choose_frames, judge_kitti, judge_nuscenes

INVENTED = ROOT / "tests/data/kitti_invented"
CLASSES = ("Car", 'Fußgänger <b>&"x"', "歩行者")
K = np.array([[520.0, 0, 310], [0, 500, 90], [0, 0, 1]])
SIZE = 640, 192


@pytest.fixture(scope="module")
def invented_files():
    """Truth and results of the invented KITTI frames."""
    truth = {path.stem: read_labels(path) for path in sorted((INVENTED / "label_2").glob("*.txt"))}
    files = INVENTED / "results"
    return truth, {id: read_labels(files / f"{id}.txt", scores=True) for id in truth if (files / f"{id}.txt").is_file()}


def test_matches_are_those_of_the_errors_at_every_score(invented_files):
    """Leaving detections out by score leaves the other matches as they are, so that one judgement serves all scores."""
    truth, results = invented_files
    frames = [Frame(id, "", None, labels) for id, labels in truth.items()]
    judgement = judge_kitti(frames, results, kitti.CLASSES)
    gt, det = judgement.matched
    score = judgement.detections.score[det]
    turned = np.abs(wrap_angle(judgement.detections.yaw[det] - judgement.truth.yaw[gt])) > np.pi / 2
    for level in (-10.0, 0.3, 0.6):
        above = {id: labels[labels.score >= level] for id, labels in results.items()}
        for name, bands in object_errors(truth, above).items():
            own = (judgement.truth_class[gt] == kitti.CLASSES.index(name)) & (score >= level)
            assert own.sum() == bands["all"]["matched"] > 0
            assert turned[own].mean() == pytest.approx(bands["all"]["heading_flipped"])
    counted = [judgement.counted[judgement.truth_class == i].sum() for i in range(3)]
    assert counted == [bands["all"]["objects"] for bands in object_errors(truth, results).values()]


def test_what_is_missed_false_duplicate_and_left_out():
    box = [[100, 50, 180, 110], [300, 50, 380, 110], [420, 50, 500, 110], [10, 10, 60, 100], [550, 50, 560, 60]]
    names = ["Car", "Car", "Van", "DontCare", "Car"]
    size = [[4, 1.5, 1.7]] * 3 + [[-1] * 3] + [[4, 1.5, 1.7]]
    truth = make_labels(names, box, size, [[0, 1, 15]] * 5, [0.0] * 5, np.zeros(5), np.zeros(5))
    rows = [0, 0, 2, 3, 4, 2]
    where = [*(box[row] for row in rows[:5]), [200, 50, 280, 110]]
    found = make_labels(["car"] * 6, where, [[4, 1.5, 1.7]] * 6, [[0, 1, 15]] * 6, [0.0] * 6,
                        score=[0.5, 0.9, 0.8, 0.8, 0.8, 0.8])  # fmt: skip
    judgement = judge_kitti([Frame("a", "", None, truth)], {"a": found}, ("Car",))
    assert judgement.counted.tolist() == [True, True, False, False, False]
    assert judgement.role.tolist() == [DUPLICATE, MATCHED, LEFT_OUT, LEFT_OUT, LEFT_OUT, FALSE]
    assert judgement.partner.tolist() == [-1, 0, -1, -1, -1, -1]


def test_nuscenes_is_judged_as_its_errors_are(invented):
    """Against a plain greedy matching of some samples; each box counts in one camera, and none that no image shows."""
    truth = read_truth(invented, ("mini_val",))
    results, _ = read_results(invented / "results_noisy.json", truth.tokens)
    frames = [one for one in read_frames(invented, ("mini_val",), images=False) if one.group in truth.tokens[:6]]
    judgement = judge_nuscenes(frames, truth, results)
    matched = dict.fromkeys(judgement.classes, 0)
    for sample, name in itertools.product(range(6), judgement.classes):
        free, own = (counted_rows(boxes, truth, sample, name) for boxes in (truth.boxes, results))
        for row in sorted(own, key=lambda row: (-results.score[row], -row)):
            distance = [np.linalg.norm(truth.boxes.center[g, :2] - results.center[row, :2]) for g in free]
            if distance and min(distance) < 2:
                taken = free.pop(int(np.argmin(distance)))
                matched[name] += any(shows(frame, truth, taken, sample) for frame in frames)
    classes = judgement.detection_class[judgement.role == MATCHED]
    for number, name in enumerate(judgement.classes):
        if name not in IN_RACKS:
            assert (classes == number).sum() == matched[name]
    assert sum(matched.values()) > 50
    gt, det = judgement.matched
    assert (judgement.truth_frame[gt] == judgement.detection_frame[det]).all()
    offset = judgement.truth.center[gt] - judgement.detections.center[det]
    assert np.hypot(offset[:, 0], offset[:, 2]).max() < 2.05  # in the camera, whose tilt is small


def counted_rows(boxes, truth, sample, name):
    """Rows of a class in a sample that are in range and not without points."""
    near = np.linalg.norm(boxes.center[:, :2] - truth.vehicle[sample, :2, 3], axis=1) < truth.dialect.ranges[name]
    return np.flatnonzero((boxes.sample == sample) & (boxes.name == name) & (boxes.points != 0) & near).tolist()


def shows(frame, truth, row, sample):
    """Whether the centre of an annotation lies in the image of a camera of its sample."""
    if frame.group != truth.tokens[sample]:
        return False
    x, y, z = frame.K @ ((truth.boxes.center[row] - frame.pose[:3, 3]) @ frame.pose[:3, :3])
    return z > 0 and -0.5 < x / z < frame.size[0] - 0.5 and -0.5 < y / z < frame.size[1] - 0.5


def test_frames_are_chosen_by_class_and_evenly(invented_files):
    truth, results = invented_files
    judgement = judge_kitti([Frame(id, "", None, labels) for id, labels in truth.items()], results, kitti.CLASSES)
    chosen = choose_frames([judgement], [0.4], 30)
    assert list(chosen) == sorted(chosen)
    assert len(chosen) == 30
    words = list(chosen.values())
    assert words.count("sample") == 15
    assert {f"worst {name}" for name in kitti.CLASSES} | {f"best {name}" for name in kitti.CLASSES} <= {*words}
    assert choose_frames([judgement], [0.4], 120) == dict.fromkeys(range(120), "")


# ---- commands


@pytest.fixture(scope="module")
def kitti_folder_of_two(tmp_path_factory):
    """label_2, results, calib and image_2 of two frames, with a fourth column in P2."""
    folder, rng = tmp_path_factory.mktemp("kitti"), np.random.default_rng(0)
    for name in ("label_2", "results", "calib", "image_2"):
        (folder / name).mkdir()
    for id in ("000000", "000001"):
        labels = scene(rng, 9, ["Car", "Pedestrian", "Cyclist"])
        write_calib(folder / f"calib/{id}.txt", np.column_stack([K, [40.0, 0.2, 0.003]]))
        offset = np.linalg.solve(K, [40.0, 0.2, 0.003])
        write_labels(folder / f"label_2/{id}.txt", labels.moved(-offset))
        write_labels(folder / f"results/{id}.txt", labels.moved(-offset), scores=True)
        Image.new("RGB", SIZE, (90, 100, 110)).save(folder / f"image_2/{id}.png")
    return folder


def run_files(folder, *more):
    files = ["--labels", str(folder / "label_2"), "--results", str(folder / "results")]
    return evaluate.main([*files, *map(str, more)])


def test_any_detectors_files_have_a_report_with_and_without_pictures(kitti_folder_of_two, tmp_path, capsys):
    folder, out = kitti_folder_of_two, tmp_path / "out.html"
    assert run_files(folder, "--report", out) == 0
    data = data_of(out)
    assert data["runs"][0]["title"] == "out"
    assert not any("image" in frame for frame in data["frames"])
    assert run_files(folder, "--report", out, "--images", folder / "image_2", "--report-frames", 1) == 0
    [frame] = data_of(out)["frames"]
    assert data_of(out)["total"] == 2
    truth, seen = read_labels(folder / f"label_2/{frame['id']}.txt"), np.array([row[1:4] for row in frame["truth"]])
    offset = np.linalg.solve(K, [40.0, 0.2, 0.003])
    assert seen == pytest.approx(truth.center + offset, abs=1e-3)  # in the image's own camera
    s = SHEET_WIDTH / 640
    assert frame["K"] == pytest.approx([520 * s, 500 * s, 310.5 * s - 0.5, 90.5 * s - 0.5])


def test_what_a_report_lacks_is_one_sentence(kitti_folder_of_two, tmp_path, capsys):
    folder, out = kitti_folder_of_two, tmp_path / "out.html"
    (tmp_path / "image_2").mkdir()
    for name in ("000000.jpg", "000001.jpg"):
        shutil.copy(folder / "image_2/000000.png", tmp_path / "image_2" / name)
    for options, words in (
        (("--report", out, "--images", tmp_path), "no image of frame 000000, expected 000000.png or 000000.jpg"),
        (("--report", out, "--images", tmp_path / "image_2"), "calib/000000.txt: no such file; boxes are drawn by"),
        (("--report", tmp_path / "no/out.html"), "it cannot be written, as there is no folder"),
    ):
        assert run_files(folder, *options) == 2
        assert words in capsys.readouterr().err
    for options, words in (
        (("--images", folder), "--images and --report-frames are for --report OUT.html"),
        (("--report", out, "--report-frames", 0), "--report-frames is 0, expected 1 or more"),
    ):
        with pytest.raises(SystemExit):
            run_files(folder, *options)
        assert words in capsys.readouterr().err


# ---- the page


def scene(rng, count, classes=CLASSES):
    """Labels of some objects in front of the camera, as KITTI would label them."""
    z = rng.uniform(6, 45, count)
    center = np.stack([rng.uniform(-0.5, 0.5, count) * z, rng.uniform(0.4, 0.9, count), z], 1)
    size = np.tile([3.9, 1.5, 1.6], (count, 1))
    yaw = rng.uniform(-np.pi, np.pi, count)
    names = [classes[i] for i in rng.integers(0, 3, count)]
    box = np.clip(project_boxes(center, size, yaw, K)[0], 0, [639, 191, 639, 191])
    return make_labels(names, box, size, center, yaw, np.zeros(count), np.zeros(count))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """(file, frames, predictions in the sources' frames, level) of eight frames with all kinds of errors."""
    folder, rng = tmp_path_factory.mktemp("report"), np.random.default_rng(4)
    frames, predictions = [], {}
    for number in range(8):
        truth = scene(rng, 7)
        region = make_labels(["DontCare"], [[5, 80, 60, 130]], [[-1] * 3], [[-1000] * 3], [-10.0])
        pixels = np.array(Image.fromarray(rng.integers(60, 190, (12, 40, 3), np.uint8)).resize(SIZE))
        Image.fromarray(pixels).save(folder / f"{number}.png")
        id = f'{number}/</script><img src=x onerror="alert(1)">'
        frames.append(Frame(id, folder / f"{number}.png", K, join([truth, region]), np.array([0.06, 0, 0.003])))
        near = truth[rng.random(7) < 0.8]
        shift = np.where(rng.random(len(near)) < 0.4, rng.choice([0.8, 1.25], len(near)), 1)[:, None]
        yaw = np.where(rng.random(len(near)) < 0.3, wrap_angle(near.yaw + 3), near.yaw)
        near = dataclasses.replace(near, center=near.center * shift, yaw=yaw, score=rng.uniform(0.05, 1, len(near)))
        more = scene(rng, 2)
        more = dataclasses.replace(more, score=rng.uniform(0.05, 1, 2))
        twice = dataclasses.replace(near[:1], score=near.score[:1] / 2)
        found = dataclasses.replace(join([near, more, twice]), sigma=np.full(len(near) + 3, 0.7))
        predictions[id] = found.moved(-frames[-1].offset)
    dataset = SimpleNamespace(frames=frames, classes=CLASSES, metrics="kitti")
    truth = {frame.id: frame.labels.moved(-frame.offset) for frame in frames}
    metrics = compute_metrics(truth, predictions, CLASSES)
    report.write_run(folder / "report.html", dataset, metrics, predictions, SimpleNamespace(out="runs/<i>Größe"))
    return folder / "report.html", frames, predictions


def data_of(path):
    text = path.read_text(encoding="utf-8").split('id="data">')[1].split("</script>")[0]
    assert "<" not in text
    return json.loads(text)


def expected(page, level, wrong=0.1):
    """(class, kinds, distance) of each that is judged in a page, by loops of its own."""
    _, frames, predictions = page
    found = []
    for frame in frames:
        detections = predictions[frame.id].moved(frame.offset)
        detections = detections[detections.score >= level]
        free, met = list(range(len(detections))), set()
        for truth in frame.labels:
            if not truth.is_3d or truth.box[3] - truth.box[1] <= 25:
                met |= {i for i in range(len(detections)) if truth.is_3d and overlap(truth, detections[i]) > 0.5}
                continue
            close = [i for i in free if detections.name[i] == truth.name and overlap(truth, detections[i]) > 0.5]
            if not close:
                found.append((truth.name, ["missed"], truth.center[2]))
                continue
            best = max(close, key=lambda i: detections.score[i])
            free.remove(best)
            share = detections.center[best, 2] / truth.center[2] - 1
            kinds = ["near" if share < 0 else "far"] if abs(share) > wrong else []
            kinds += ["turned"] if abs(wrap_angle(detections.yaw[best] - truth.yaw)) > np.pi / 2 else []
            found.append((truth.name, kinds or ["right"], truth.center[2]))
        for i in free:
            one = detections[i]
            region = frame.labels.box[-1]
            inside = np.prod(
                np.clip(np.minimum(one.box[2:], region[2:]) - np.maximum(one.box[:2], region[:2]), 0, None)
            )
            if one.box[3] - one.box[1] >= 25 and i not in met and inside <= 0.5 * np.prod(one.box[2:] - one.box[:2]):
                pairs = [truth for truth in frame.labels[:-1] if truth.name == one.name and overlap(truth, one) > 0.5]
                found.append((one.name, ["duplicate" if pairs else "false"], one.center[2]))
    return found


def overlap(a, b):
    return box_iou(a.box[None], b.box[None])[0]


def test_a_file_holds_its_text_escaped_and_no_path(page, tmp_path):
    path, frames, predictions = page
    text = path.read_text(encoding="utf-8")
    assert path.stat().st_size < 8 * 150_000 + 120_000  # pictures, and the page itself
    assert str(path.parent) not in text
    assert "<i>Größe" not in text
    assert "</script><img" not in text
    data = data_of(path)
    assert data["classes"] == list(CLASSES)
    assert [frame["id"] for frame in data["frames"]] == [frame.id for frame in frames]
    assert data["runs"][0]["title"] == "<i>Größe"
    first = data["frames"][0]
    with Image.open(io.BytesIO(base64.b64decode(first["image"]))) as picture:
        assert list(picture.size) == first["size"] == [SHEET_WIDTH, 270]
        assert not picture.getexif()
    found = predictions[frames[0].id].moved(frames[0].offset)
    assert np.array([row[1:4] for row in first["detections"][0]]) == pytest.approx(found.center, abs=0.0051)


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser
        assert browser.console == []


@pytest.mark.skipif(not find_browser(), reason="no Chromium here (Debian: chromium-headless-shell)")
class TestInABrowser:
    """One browser for all: it takes a second to start."""

    def show(self, browser, page, **state):
        browser.open("about:blank")
        browser.open(f"{page[0].as_uri()}#{urlencode(state)}")

    def test_filters_change_the_count(self, browser, page):
        level = data_of(page[0])["runs"][0]["level"]
        for state in (
            {"class": CLASSES[1]},
            {"kinds": "missed"},
            {"kinds": "near,turned", "score": "0.3"},
            {"kinds": "false", "score": "0.5"},
            {"kinds": "duplicate", "score": "0"},
            {"from": "10", "to": "25", "class": "Car", "wrong": "22"},
            {"kinds": "right", "from": "20"},
        ):
            self.show(browser, page, **state)
            found = expected(page, float(state.get("score", level)), float(state.get("wrong", 10)) / 100)
            count = sum(
                ("kinds" not in state or bool({*kinds} & {*state["kinds"].split(",")}))
                and name == state.get("class", name)
                and float(state.get("from", 0)) <= distance <= float(state.get("to", 1e9))
                for name, kinds, distance in found
            )
            text = browser.run("document.getElementById('count').textContent")
            assert count > 0
            assert text.endswith(f"of 8, {count} object{'s' * bool(count != 1)}"), state

    def test_the_table_of_errors_leads_to_them(self, browser, page):
        self.show(browser, page, score="0.3")
        found = expected(page, 0.3)
        for number, name in enumerate(CLASSES):
            for kind in ("missed", "near", "turned"):
                count = sum(one[0] == name and kind in one[1] for one in found)
                cell = f"document.querySelector('[data-cell=\"{number} {kind}\"]')"
                assert browser.run(f"({cell} || {{}}).textContent || '0'") == str(count)
        browser.click('[data-cell="0 near"]')
        assert "class=Car&kinds=near&score=0.3" in browser.run("location.hash")
        browser.click('[data-kind="turned"]')
        assert "kinds=near%2Cturned" in browser.run("location.hash")

    def test_pictures_equal_those_of_draw_frame(self, browser, page):
        path, frames, predictions = page
        level = data_of(path)["runs"][0]["level"]
        for frame in frames[:2]:
            for state in ({}, {"predictions": "0"}):
                self.show(browser, page, frame=frame.id, **state)
                found = predictions[frame.id].moved(frame.offset) if not state else None
                own = draw_frame(frame.image, K, found, frame.labels, CLASSES, level, width=SHEET_WIDTH)
                seen = np.concatenate([self.pixels(browser, name) for name in ("front", "above")], 1)
                assert seen.shape == np.asarray(own).shape
                difference = np.abs(seen.astype(float) - np.asarray(own))
                assert difference[:, :SHEET_WIDTH].mean() < 3
                assert difference[:, SHEET_WIDTH:].mean() < 3  # the view from above

    def pixels(self, browser, name):
        script = f"new Promise(r => setTimeout(() => r(document.getElementById('{name}').toDataURL()), 150))"
        with Image.open(io.BytesIO(base64.b64decode(browser.run(script).split(",")[1]))) as picture:
            return np.asarray(picture.convert("RGB"))

    def test_keys_walk_through_what_the_filter_shows(self, browser, page):
        self.show(browser, page, kinds="missed", score="0.4", order="name")
        shown = browser.run("[...document.querySelectorAll('.card .faint')].map(e => e.textContent)")
        browser.click(".card")
        seen = []
        for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "p", "ArrowDown"):
            seen.append(browser.run("document.getElementById('name').textContent"))
            browser.press(key)
        assert seen == [shown[0], shown[1], shown[2], shown[1], shown[1]]
        state = browser.run("Object.fromEntries(new URLSearchParams(location.hash.slice(1)))")
        assert state["frame"] == shown[1]
        assert state["predictions"] == "0"
        assert browser.run("document.querySelectorAll('#objects .chosen').length") == 1
        self.show(browser, page, **state)  # the same address in another window
        assert browser.run("document.getElementById('name').textContent") == shown[1]
        browser.click("#close")
        assert "frame=" not in browser.run("new Promise(done => setTimeout(() => done(location.hash), 300))")

    def test_a_click_on_a_box_chooses_its_row(self, browser, page):
        self.show(browser, page, frame=page[1][0].id, score="0")
        data = data_of(page[0])["frames"][0]
        box = min((row for row in data["truth"] if row[4] > 0), key=lambda row: row[3])  # the nearest
        corner = (
            project_boxes(*(np.array([part]) for part in (box[1:4], box[4:7], box[7])), K)[0][0] * SHEET_WIDTH / 640
        )
        point = [(corner[0] + corner[2]) / 2, (corner[1] + corner[3]) / 2]
        browser.run(f"""{{const c = document.getElementById('front'), b = c.getBoundingClientRect();
            c.dispatchEvent(new MouseEvent('click', {{clientX: b.x + {point[0]} * b.width / c.width,
            clientY: b.y + {point[1]} * b.height / c.height}}))}}""")
        assert browser.run("document.querySelectorAll('#objects .chosen').length") == 1

    def test_it_fits_a_phone_and_asks_for_nothing(self, browser, page):
        browser.requests.clear()
        for width, dark in ((1280, False), (400, True)):
            browser.resize(width, 900, dark)
            self.show(browser, page)
            assert browser.run("document.documentElement.scrollWidth") <= width
            colour = browser.run("getComputedStyle(document.body).backgroundColor")
            assert colour == ("rgb(20, 22, 26)" if dark else "rgb(255, 255, 255)")
            self.show(browser, page, frame=page[1][0].id)
            assert browser.run("document.getElementById('viewer').scrollWidth") <= width
        browser.resize(1280, 900)
        outside = [url for url in browser.requests if not url.startswith((page[0].as_uri(), "data:", "about:"))]
        assert outside == []
        assert browser.run("document.querySelectorAll('img').length") == 0  # no name became an element
