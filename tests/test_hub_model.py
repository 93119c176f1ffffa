"""A run uploaded to a hub and loaded from it, against a local server that speaks the hub's protocol."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

import clip_scratch.hub as hub
from clip_scratch import CFG, load
from clip_scratch.errors import UserError
from clip_scratch.export import Arguments, main
from clip_scratch.exporting.hub_model import model_card, push


class Handler(BaseHTTPRequestHandler):
    """As much of the hub as create_repo, create_commit and snapshot_download ask for."""

    def answer(self, content=b"{}", status=200, **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_POST(self):
        hub, body = self.server, self.rfile.read(int(self.headers["Content-Length"] or 0))
        hub.log.append(self.path)
        if self.headers["Authorization"] != "Bearer good":
            self.answer({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif self.path == "/api/repos/create":
            self.answer({"url": f"http://127.0.0.1:{hub.server_port}/me/{json.loads(body)['name']}"})
        elif "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.decode().splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            hub.files = {file["path"]: base64.b64decode(file["content"]) for file in files}
            self.answer(
                {
                    "commitUrl": f"http://127.0.0.1:{hub.server_port}/me/scenes/commit/{40 * chr(97)}",
                    "commitOid": "a" * 40,
                    "hookOutput": "",
                }
            )
        else:
            self.answer(status=404)

    def do_GET(self):
        hub = self.server
        hub.log.append(self.path)
        path, name = self.path.partition("?")[0], self.path.rpartition("/")[2].partition("?")[0]
        if path.startswith("/api/models/me/scenes/revision/"):
            self.answer({"id": "me/scenes", "sha": "a" * 40, "siblings": [{"rfilename": file} for file in hub.files]})
        elif "/tree/" in path:
            files = [{"type": "file", "path": f, "size": len(c), "oid": "0" * 40} for f, c in hub.files.items()]
            self.answer(files)
        elif path.startswith("/me/scenes/resolve/") and name in hub.files:
            content = hub.files[name]
            etag = hashlib.sha1(content).hexdigest()
            self.answer(content, **{"ETag": f'"{etag}"', "X-Repo-Commit": "a" * 40})
        else:
            self.answer({"error": "Repository not found"}, 404, **{"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


def test_no_path_of_this_machine_is_published():
    cfg = CFG(backend="hf_clip", model_name="/home/me/models/clip", image_path="/home/me/photos", head_lr=0.5)
    card = model_card("me/x", cfg, "photos", "| a table |", "")
    assert "/home/me" not in card and "model_name: clip" in card and "head_lr: 0.5" in card
    card = model_card("me/x", CFG(model_name="a+b", image_weights="package:x/a.pth+/home/me/b.pth"), "photos", "", "")
    assert "image_weights: package:x/a.pth+b.pth" in card


def test_an_encoder_of_one_s_own_is_not_uploaded(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_name": "mine:tower", "text_encoder_model": "bert-mini"}))
    with pytest.raises(UserError, match="mine:tower is code, and models on a hub come without"):
        push(tmp_path, "me/scenes", "")


@pytest.fixture
def server(monkeypatch, tmp_path):
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.log = {}, []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        for module in (constants, huggingface_hub.hf_api, huggingface_hub.file_download):
            if hasattr(module, "ENDPOINT"):
                monkeypatch.setattr(module, "ENDPOINT", address)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", address)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setenv("HF_TOKEN", "good")
        hub._hub_answers.cache_clear()
        yield server
        server.shutdown()
        hub._hub_answers.cache_clear()


def test_there_and_back(server, scene_run, monkeypatch, capsys):
    monkeypatch.chdir(scene_run.cwd)
    run = str(scene_run.folder)
    main(Arguments(run, push_to_hub="me/scenes", licence="cc-by-4.0", device="cpu"))
    assert "uploaded: " in capsys.readouterr().out
    card = server.files["README.md"].decode()
    assert 'load("hub:me/scenes")' in card and "license: cc-by-4.0" in card and "| run" in card and "i2t R@1" in card
    assert str(scene_run.cwd) not in card and str(scene_run.cwd).encode() not in server.files["config.json"]
    model, expected = load("hub:me/scenes"), load(run).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert not any(name.endswith((".py", ".bin", ".pkl")) for name in server.files)


def test_what_goes_wrong_is_one_line(server, scene_run, monkeypatch):
    monkeypatch.chdir(scene_run.cwd)
    run = str(scene_run.folder)
    with pytest.raises(UserError, match="cannot get the model 'me/other'.*hub:USER/NAME"):
        load("hub:me/other")
    with pytest.raises(UserError, match="cannot get the model 'a b/c'"):
        load("hub:a b/c")
    with pytest.raises(UserError, match="name a folder to write, or --push-to-hub"):
        main(Arguments(run))
    with pytest.raises(UserError, match="uploads the run itself: leave out --format"):
        main(Arguments(run, push_to_hub="me/scenes", format="onnx"))
    monkeypatch.setenv("HF_TOKEN", "bad")
    with pytest.raises(UserError, match="cannot get permission to write 'me/scenes'.*hf auth login") as error:
        main(Arguments(run, push_to_hub="me/scenes", device="cpu"))
    assert "\n" not in str(error.value) and not server.files


def test_no_network(scene_run):
    with pytest.raises(UserError, match="cannot get the model 'me/scenes': .* cannot be reached and nothing is cached"):
        load("hub:me/scenes")


def test_a_model_of_the_hub_names_no_code(server, scene_run):
    best = scene_run.folder.resolve() / "best"
    server.files = {file.name: file.read_bytes() for file in best.iterdir()}
    settings = json.loads(server.files["config.json"])
    server.files["config.json"] = json.dumps(settings | {"model_name": "subprocess:run"}).encode()
    with pytest.raises(UserError, match="subprocess:run would run code that a model from a hub names: refused"):
        load("hub:me/scenes")
