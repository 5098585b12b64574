"""Images where they lie: in tars, turned on their side, and their sizes from headers."""

import gzip
import json
import os
import pickle
import sys
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from formats import jsonl
from formats import tar as tars
from scene.frames import UserError, image_size, load_image

LINE = {"K": [[700.0, 0, 320], [0, 710.0, 96], [0, 0, 1]], "objects": []}


@pytest.fixture
def tar(tmp_path):
    """A tar of two images, one of them in it twice, and a JSON-lines file that names them."""
    for name, colour in (("a.png", (1, 2, 3)), ("b.jpg", (200, 10, 10))):
        Image.new("RGB", (640, 192), colour).save(tmp_path / name)
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        archive.add(tmp_path / "b.jpg", "x/a.png")  # which the one added later replaces
        archive.add(tmp_path / "a.png", "./x/a.png")
        archive.add(tmp_path / "b.jpg", "x/b.jpg")
    write(tmp_path, "s.tar/x/a.png", "s.tar/x/b.jpg")
    return tmp_path / "s.tar"


def write(folder, *images):
    (folder / "data.jsonl").write_text("".join(json.dumps({**LINE, "image": image}) + "\n" for image in images))


def frames_of(folder, index=""):
    source = SimpleNamespace(root=str(folder / "data.jsonl"), limit=0)
    return jsonl.frames(source, SimpleNamespace(root="", index=index))


def pixels(image):
    return np.asarray(load_image(image)).tobytes()


@pytest.mark.parametrize("index", ["", "none"])
def test_images_in_a_tar_are_read_where_they_lie(tar, monkeypatch, index):
    frames = frames_of(tar.parent, index)
    assert [frame.id for frame in frames] == ["s.tar/x/a", "s.tar/x/b"]
    assert [frame.size for frame in frames] == [(640, 192)] * 2
    monkeypatch.setattr(tars, "list_tar", None)  # the frames know the places
    members = [frame.image for frame in pickle.loads(pickle.dumps(frames))]
    for member, name in zip(members, ("a.png", "b.jpg"), strict=True):
        assert pixels(member) == pixels(tar.parent / name)
        assert str(member) == f"{tar}/x/{name}"
        assert member.stat().st_size == tar.stat().st_size
    assert len(set(members)) == 2


def test_a_changed_tar_is_read_anew(tar):
    before = frames_of(tar.parent)[0].image
    with tarfile.open(tar, "a") as archive:
        archive.add(tar.parent / "b.jpg", "x/a.png")
    os.utime(tar, ns=(1, 1))
    after = frames_of(tar.parent)[0].image
    assert after.first != before.first
    assert pixels(after) == pixels(tar.parent / "b.jpg")


def test_tars_that_cannot_be_read_are_named(tar, monkeypatch):
    whole = tar.read_bytes()
    write(tar.parent, "s.tar/x/c.png")
    with pytest.raises(UserError, match=r"data\.jsonl:1: image is 's\.tar/x/c\.png'.*: the tar of 2 files has no such"):
        frames_of(tar.parent)
    for content in (whole[:3000], gzip.compress(whole)):
        tar.write_bytes(content)
        with pytest.raises(UserError, match=r"data\.jsonl:1: image is .*s\.tar: not a whole"):
            frames_of(tar.parent)
    monkeypatch.setitem(sys.modules, "formats.tar", None)
    with pytest.raises(UserError, match=r"data\.jsonl:1: image is .*formats\.tar"):
        frames_of(tar.parent)


def test_a_tiff_on_its_side_is_refused(tmp_path):
    """Pillow 13 garbles uncompressed ones."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (70, 30)).save(tmp_path / "a.tif", exif=exif)
    with pytest.raises(
        OSError, match=r"a\.tif: cannot read the image: it is a TIFF on its side, which Pillow may garble"
    ):
        image_size(tmp_path / "a.tif")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tif"])
@pytest.mark.parametrize("orientation", [None, 1, 3, 6])
def test_sizes_are_those_of_what_is_read(tmp_path, suffix, orientation):
    exif = Image.Exif()
    if orientation and (suffix, orientation) != ("tif", 6):
        exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.new("RGB", (70, 30)).save(path, exif=exif)
    assert image_size(path) == load_image(path).size
    if suffix in ("png", "jpg") and orientation == 6:
        assert image_size(path) == (30, 70)
    path.write_bytes(path.read_bytes()[:5])
    with pytest.raises(OSError, match="cannot read the image"):
        image_size(path)
