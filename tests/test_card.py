"""The model card: written with the weights, kept on their way to a hub and back, and its snippet runs."""

import base64
import dataclasses
import http.server
import importlib.util
import json
import re
import shutil
import sys
import threading

import numpy as np
import pytest
import torch
from conftest import ROOT
from huggingface_hub import ModelCard, constants
from PIL import Image
from scenes import MODEL

from config import Config
from data import DataConfig, Source
from engine.checkpoint import describe_source, save_weights
from metrics.kitti import kitti_ap, table
from model import Detector
from scene.frames import make_labels


@pytest.fixture(scope="module")
def best(tmp_path_factory):
    """best/ of a run, with a table that was measured on two frames."""
    folder = tmp_path_factory.mktemp("run") / "best"
    torch.manual_seed(0)
    labels = make_labels(
        ["Car"], [[50, 50, 150, 120]], [[4, 1.5, 1.8]], [[1, 1, 20]], [0.3], truncation=[0], occlusion=[0]
    )
    metrics = kitti_ap({"a": labels, "b": labels}, {"a": labels, "b": labels}, MODEL.classes)
    model = dataclasses.replace(MODEL, score_threshold=0.001)
    config = Config(model=model, data=DataConfig(val=(Source(kind="jsonl", root="frames/my_val.jsonl"),)))
    save_weights(folder, Detector(model), config, metrics, {"step": 7}, table(metrics))
    return folder


def test_the_card_tells_what_was_measured_on_what(best):
    text = (best / "README.md").read_text()
    data = ModelCard(text).data.to_dict()
    assert data == {
        "library_name": "deep3d",
        "license": "apache-2.0",
        "pipeline_tag": "object-detection",
        "tags": ["model_hub_mixin", "monocular-3d-detection", "pytorch_model_hub_mixin"],
    }
    assert "Monocular 3D detection of Car, Pedestrian, Cyclist" in text
    assert "On jsonl my_val.jsonl, after 7 steps:" in text
    assert describe_source(Source(split=("val",)), "data/kitti") == "kitti kitti (val)"
    assert "AP_R40, per cent: 2 frames, 2 detections" in text
    assert "{{" not in text
    assert Detector(MODEL).generate_model_card().content.count("Nothing was measured yet.") == 1


def test_a_copied_model_without_the_template_still_writes_a_card(tmp_path, monkeypatch):
    shutil.copy(ROOT / "model.py", tmp_path)
    spec = importlib.util.spec_from_file_location("model_alone", tmp_path / "model.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "model_alone", module)  # where its dataclasses look for themselves
    spec.loader.exec_module(module)
    module.Detector(MODEL).save_pretrained(tmp_path / "saved")
    assert ModelCard((tmp_path / "saved/README.md").read_text()).data.library_name == "deep3d"


def test_an_edited_card_does_not_damage_the_weights_and_is_kept(best, tmp_path):
    detector = Detector.from_pretrained(best)
    detector.card += "\nBy me.\n"
    detector.save_pretrained(tmp_path / "mine")
    again = Detector.from_pretrained(tmp_path / "mine")
    assert again.card.endswith("By me.\n")
    assert "AP_R40, per cent: 2 frames" in again.card


def test_the_snippet_runs(best, monkeypatch, capsys):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (192, 640, 3), np.uint8)).save(best / "image.png")
    [snippet] = re.findall(r"```python\n(.*?)```", (best / "README.md").read_text(), re.S)
    monkeypatch.chdir(best)
    exec(compile(snippet, "README.md", "exec"), {})
    assert re.search(r"\['(Car|Pedestrian|Cyclist)'", capsys.readouterr().out)


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's HTTP interface as creating, uploading and downloading a repository asks for."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, body, code=200, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.path == "/api/repos/create":
            return self.answer({"url": f"{self.server.address}/me/mine", "id": "1"})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            return self.answer(
                {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
            )
        if "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            return self.answer(
                {
                    "commitUrl": f"{self.server.address}/me/mine/commit/{'0' * 40}",
                    "commitOid": "0" * 40,
                    "success": True,
                }
            )
        return self.answer({"error": self.path}, 404)

    def do_GET(self):
        name = self.path.partition("/resolve/main/")[2]
        if name in self.server.files:
            return self.answer(self.server.files[name], ETag=f'"{name}"', X_Repo_Commit="0" * 40)
        return self.answer({"error": self.path}, 404, X_Error_Code="EntryNotFound" if name else "RepoNotFound")

    do_HEAD = do_GET


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub in this process: {path: content} of the one repository that it holds."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.address = {}, f"http://127.0.0.1:{server.server_port}"
    for name, value in {
        "ENDPOINT": server.address,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(constants, name, value)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.files
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_hub_takes_the_weights_with_their_card_and_gives_them_back(best, hub, tmp_path):
    detector = Detector.from_pretrained(best)
    detector.push_to_hub("me/mine", token="hf_none")
    assert {"README.md", "config.json", "model.safetensors"} <= {*hub}
    assert hub["README.md"].decode() == (best / "README.md").read_text()
    again = Detector.from_pretrained("me/mine", cache_dir=tmp_path / "cache", token=False)
    for name, value in again.state_dict().items():
        assert torch.equal(value, detector.state_dict()[name]), name
    hub["config.json"] = b"{}"
    with pytest.raises(ValueError, match=r"config\.json has no section 'model'"):
        Detector.from_pretrained("me/mine", cache_dir=tmp_path / "third", token=False)
