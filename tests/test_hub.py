"""Where weights come from: local paths, packages, and a hub that does not answer."""

import http.server
import socket
import threading
import time

import pytest
from huggingface_hub import constants

from clip_scratch import hub
from clip_scratch.config import CFG
from clip_scratch.data.tokenizer import build_tokenizer
from clip_scratch.errors import UserError
from clip_scratch.hub import hub_access, hub_name, local_path
from clip_scratch.models.encoders import ImageEncoder, TextEncoder


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    hub._hub_answers.cache_clear()
    yield
    hub._hub_answers.cache_clear()


# ---- local paths


def test_a_path_that_exists_is_itself(tmp_path, monkeypatch):
    (tmp_path / "weights.pth").touch()
    (tmp_path / "bert").mkdir()
    assert local_path(str(tmp_path / "weights.pth"), "x") == tmp_path / "weights.pth"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_path("bert", "x").samefile(tmp_path / "bert")
    assert local_path("~/bert", "x") == tmp_path / "bert"


@pytest.mark.parametrize("name", ["resnet50", "google/bert_uncased_L-2_H-128_A-2", "some-user/model.v2"])
def test_a_name_is_the_hub_s(name):
    assert local_path(name, "x") is None


@pytest.mark.parametrize(
    "name", ["./bert", "/no/such/folder", "~/no-such-model", "x.safetensors", "runs/w.pth", "w.bin"]
)
def test_what_looks_like_a_path_must_exist(name):
    with pytest.raises(UserError, match=r"^image_weights: there is no "):
        local_path(name, "image_weights")


def test_a_path_in_a_package():
    assert local_path("package:json/decoder.py", "x").is_file()
    assert local_path("package:json", "x").is_dir()


@pytest.mark.parametrize("name", ["package:no_such_package/x", "package:no.such/x", "package:", "package:/etc/passwd"])
def test_a_package_that_is_not_installed_says_what_to_install(name):
    with pytest.raises(UserError, match=f"text_encoder_model '{name}' needs the Python package .*install"):
        local_path(name, "text_encoder_model")


def test_a_path_that_a_package_lacks():
    with pytest.raises(UserError, match="image_weights: there is no .*json/weights.pth"):
        local_path("package:json/weights.pth", "image_weights")


def test_names_by_size():
    assert hub_name("bert-mini") == "google/bert_uncased_L-4_H-256_A-4"
    assert hub_name("bert-base-uncased") == "bert-base-uncased"


# ---- no hub

PRETRAINED = {
    "tokenizer": (lambda: build_tokenizer(CFG(), ["a dog"]), "the tokenizer 'distilbert-base-uncased'"),
    "tokenizer by size": (
        lambda: build_tokenizer(CFG(text_encoder_model="bert-tiny")),
        "the tokenizer 'google/bert_uncased_L-2_H-128_A-2'",
    ),
    "own tokenizer": (
        lambda: build_tokenizer(CFG(text_tokenizer="me/mine", pretrained=False), ["a"]),
        "the tokenizer 'me/mine'",
    ),
    "image tower": (lambda: ImageEncoder("resnet18"), "the weights of 'resnet18'"),
    "text tower": (lambda: TextEncoder("distilbert-base-uncased"), "the text encoder 'distilbert-base-uncased'"),
    "text tower by size": (lambda: TextEncoder("bert-tiny"), "the text encoder 'google/bert_uncased_L-2_H-128_A-2'"),
    "unknown random text tower": (lambda: TextEncoder("me/mine", pretrained=False), "the text encoder 'me/mine'"),
}


@pytest.mark.parametrize("what", PRETRAINED)
def test_without_a_hub_one_line_says_what_is_missing_and_how_to_go_on(what):
    build, named = PRETRAINED[what]
    began = time.monotonic()
    with pytest.raises(UserError) as error:
        build()
    said = str(error.value)
    assert time.monotonic() - began < 30
    assert said.startswith(f"cannot get {named}: http://127.0.0.1:9 cannot be reached and nothing is cached")
    assert "local" in said and "\n" not in said
    assert "--no-pretrained" in said or what in ("unknown random text tower", "own tokenizer")  # they have it
    assert constants.HF_HUB_OFFLINE is False


def test_a_misspelt_text_encoder_suggests_near_ones():
    with pytest.raises(UserError, match="Did you mean distilbert-base-uncased"):
        TextEncoder("distilbert-base-uncase")
    with pytest.raises(UserError) as error:
        TextEncoder("bert-base-uncased")
    assert "Did you mean" not in str(error.value)  # the name was right


def test_a_hub_that_accepts_and_says_nothing_is_given_up(monkeypatch):
    monkeypatch.setattr(hub, "_TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        with pytest.raises(UserError, match="cannot be reached"):
            TextEncoder("distilbert-base-uncased")
        assert time.monotonic() - began < 30


def test_a_hub_that_answers_is_asked_and_its_answer_passed_on(monkeypatch):
    class NotFound(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_error(404)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), NotFound)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    with (
        pytest.raises(UserError, match="cannot get the thing: no such repository. Do this"),
        hub_access("the thing", "Do this"),
    ):
        assert constants.HF_HUB_OFFLINE is False
        raise OSError("no such repository\nand a page of advice")
    server.shutdown()
    server.server_close()


def test_hub_access_restores_and_lets_bugs_through():
    with hub_access("x", "y"):
        assert constants.HF_HUB_OFFLINE is True
    assert constants.HF_HUB_OFFLINE is False
    with pytest.raises(ZeroDivisionError), hub_access("x", "y"):
        raise ZeroDivisionError
    assert constants.HF_HUB_OFFLINE is False
