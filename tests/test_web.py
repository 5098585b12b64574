"""examples/web in a browser: the boxes and pictures that Python gives, on a frame of the world; sentences; keyboard."""

import base64
import functools
import http.server
import io
import json
import shutil
import threading

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from test_export import make_detector, write_run, written

from data import Source
from formats.kitti import read_calib, split_projection
from formats.synthetic import render
from predict import ONE_THING
from scene.draw import draw_frame
from scene.frames import make_labels

PAGE = ROOT / "examples/web"
BROWSER = shutil.which("chromium")
CAMERA = ("focal", "fy", "cx", "cy")  # inputs of the page


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """(address of the page, its folder, the Python runtime beside the model, a frame's picture and K)."""
    if not (PAGE / "node_modules/onnxruntime-web").is_dir():
        pytest.skip("needs npm install --prefix examples/web onnxruntime-web")
    root = tmp_path_factory.mktemp("web")
    world = render(root / "world", "val", Source(kind="synthetic", world_frames=1), None) / "training"
    image = next((world / "image_2").iterdir())
    K, _ = split_projection(read_calib(world / "calib" / f"{image.stem}.txt"))
    _, runtime = written(write_run(root / "run", make_detector()), root / "site")
    runtime.config["nms_across_classes"] = ONE_THING
    shutil.copy(PAGE / "index.html", root / "site")
    (root / "site/node_modules").symlink_to(PAGE / "node_modules")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=root / "site")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/", root / "site", runtime, image, K
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not BROWSER:
        pytest.skip("chromium is not installed")
    with api.sync_playwright() as engine:
        yield engine.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])


@pytest.fixture
def page(browser, site):
    """The page as it opens, 1280 pixels wide; it must not have thrown."""
    page, problems = browser.new_page(viewport={"width": 1280, "height": 800}), []
    page.on("pageerror", lambda error: problems.append(error))
    page.goto(site[0])
    yield page
    page.close()
    assert not problems


def status(page, text):
    """The status line once it holds the text."""
    page.wait_for_function(f"element('status').textContent.includes({json.dumps(text)})", timeout=60_000)
    return page.inner_text("#status")


def choose(page, path, K):
    """Give it a picture and the camera, and wait for the boxes."""
    page.set_input_files("#picture", path)
    status(page, "Give the focal length fx in pixels, or the field of view in degrees.")
    page.locator("summary").click()
    for name, value in zip(CAMERA, (K[0, 0], K[1, 1], K[0, 2], K[1, 2]), strict=True):
        page.fill(f"#{name}", repr(float(value)))
    page.press("#cy", "Enter")
    status(page, " ms")


def drop(page, name, content):
    """Let go of a file over the page."""
    code = """([name, text]) => {
      const transfer = new DataTransfer();
      transfer.items.add(new File([Uint8Array.from(atob(text), (c) => c.charCodeAt(0))], name));
      document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true }));
    }"""
    page.evaluate(code, [name, base64.b64encode(content).decode()])


def test_boxes_and_picture_are_those_of_python(site, page):
    _, _, runtime, image, K = site
    choose(page, image, K)
    boxes, expected = page.evaluate("detections"), runtime.predict(image, K)
    assert [box["name"] for box in boxes] == [*expected["name"]]
    assert len(boxes) > 20
    for key in ("score", "box", "center", "size", "yaw", "sigma"):
        ours = np.array([box[key] for box in boxes])
        assert np.abs(ours - expected[key]).max() < 1e-3, key
        assert np.allclose(ours, expected[key], rtol=1e-4, atol=1e-4), key
    columns = [expected[key] for key in ("box", "size", "center", "yaw")]
    labels = make_labels(expected["name"], *columns, score=expected["score"])
    drawn = page.evaluate("['front', 'above'].map((id) => element(id).toDataURL().split(',')[1])")
    front, above = (Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB") for text in drawn)
    picture = draw_frame(image, K, labels, width=front.width)
    halves = picture.crop((0, 0, front.width, picture.height)), picture.crop((front.width, 0, *picture.size))
    for ours, theirs in zip((front, above), halves, strict=True):
        difference = np.asarray(ours.resize(theirs.size), float) - np.asarray(theirs, float)
        assert np.abs(difference).mean() < 8
        orange = [(np.asarray(p.resize(theirs.size), float) @ [1, 0, -1] > 100).mean() for p in (ours, theirs)]
        assert orange[0] == pytest.approx(orange[1], rel=0.25)


def test_a_photo_is_turned_as_its_exif_says(site, page, tmp_path):
    _, _, runtime, image, _ = site
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned right
    Image.open(image).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    page.set_input_files("#picture", tmp_path / "turned.jpg")
    page.fill("#focal", "370")
    page.press("#focal", "Enter")
    status(page, "turned.jpg: 192 x 640")
    expected = runtime.predict(tmp_path / "turned.jpg", [[370, 0, 95.5], [0, 370, 319.5], [0, 0, 1]])
    scores = [box["score"] for box in page.evaluate("detections")]
    assert np.abs(np.array(scores[:20]) - expected["score"][:20]).max() < 0.02  # decoders differ by grey levels


def test_files_are_dropped_and_the_score_is_moved_by_the_keyboard(site, page):
    _, folder, _, image, _ = site
    drop(page, "mine.onnx", (folder / "model.onnx").read_bytes())
    drop(page, "frame.png", image.read_bytes())
    status(page, "Give the focal length")
    page.focus("#focal")
    page.keyboard.type("90")
    page.keyboard.press("Tab")
    status(page, "frame.png: 640 x 192")
    assert page.evaluate("camera.fx") == 90
    page.select_option("#unit", "degrees")
    page.wait_for_function("camera?.fx > 319.9 && camera.fx < 320.1")
    status(page, " ms")
    assert page.inner_text("#model-name") == "mine.onnx"
    before = page.locator("tbody tr").count()
    page.focus("#least")
    for _ in range(6):
        page.keyboard.press("ArrowRight")
    scores = [float(text) for text in page.locator("tbody td:nth-child(2)").all_inner_texts()]
    assert len(scores) < before
    assert all(score >= 0.55 for score in scores)


def test_mistakes_are_one_sentence(site, page):
    address, folder, _, image, _ = site
    drop(page, "notes.txt", b"no picture")
    assert status(page, "notes.txt") == "notes.txt is not a picture that this browser can read."
    page.set_input_files("#picture", image)
    status(page, "Give the focal length fx in pixels, or the field of view in degrees.")
    assert [page.locator(canvas).is_visible() for canvas in ("#front", "#above")] == [True, False]
    page.fill("#focal", "5")
    page.press("#focal", "Enter")
    assert status(page, "implausible") == "A focal length of 5 px is implausible for a picture of 640 x 192."
    page.select_option("#unit", "degrees")
    page.fill("#focal", "400")
    page.press("#focal", "Enter")
    assert status(page, "400") == "A field of view of 400 degrees is implausible for a picture of 640 x 192."
    drop(page, "other.onnx", b"\x08\x09none")
    assert status(page, "layout") == "other.onnx is not a model.onnx of layout 1, as export.py writes it."
    page.route("**/model.onnx", lambda route: route.fulfill(status=404))
    page.reload()
    page.set_input_files("#picture", image)
    page.fill("#focal", "370")
    page.press("#focal", "Enter")
    assert (
        status(page, "beside")
        == "There is no model.onnx beside this page: choose or drop the one that export.py wrote."
    )
    drop(page, "model.onnx", (folder / "model.onnx").read_bytes())
    status(page, " ms")
    page.route("**/ort.wasm.min.js", lambda route: route.fulfill(status=404))
    page.goto(address)
    assert "npm install --prefix examples/web onnxruntime-web" in status(
        page, "onnxruntime-web is not beside this page"
    )
    page.goto(f"file://{folder}/index.html")
    assert "python -m http.server --directory examples/web" in status(page, "This page must come from a server")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen_holds_it_in_light_and_dark(site, browser, scheme):
    address, _, _, image, K = site
    page = browser.new_page(viewport={"width": 400, "height": 800}, device_scale_factor=2, color_scheme=scheme)
    page.goto(address)
    choose(page, image, K)
    assert page.evaluate("document.documentElement.scrollWidth") == 400
    colours = page.evaluate("['color', 'backgroundColor'].map((name) => getComputedStyle(document.body)[name])")
    text, ground = (np.mean([float(v) for v in colour[4:-1].split(",")]) for colour in colours)
    assert (text < ground) == (scheme == "light")
    assert abs(text - ground) > 150
    assert page.evaluate("element('front').width") == 2 * page.evaluate("element('front').clientWidth")
    page.close()
