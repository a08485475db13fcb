"""`--push` uploads the folder by the protocol of the Hugging Face hub, here to a stand-in on this machine."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tessella import UserError
from tessella.formats.export import export
from tessella.formats.model import Model
from tessella.weights.resolve import resolve_backbone

pytest.importorskip("huggingface_hub")

NARROW = "random:resnet10?width=4&stem=small&size=32"
TOKEN = "hf_of_this_test"


class Hub(ThreadingHTTPServer):
    """The parts of the hub's interface that an upload needs. Every file is sent within the commit."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict] = {}  # name -> what it was created with
        self.files: dict[str, bytes] = {}
        self.card = ""


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid username or password."}, 401)
        if self.path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given['organization']}/{given['name']}"
            self.server.repositories[name] = given
            return self.answer({"url": f"http://{self.headers['Host']}/{name}"})
        if self.path == "/api/validate-yaml":
            self.server.card = json.loads(body)["content"]
            return self.answer({"errors": [], "warnings": []})
        if self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            return self.answer(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        if self.path == "/api/models/me/mine/commit/main":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            page = f"http://{self.headers['Host']}/me/mine/commit/1"
            return self.answer({"commitUrl": page, "commitOid": "1" * 40})
        return self.answer({"error": f"{self.path} is not known here"}, 404)

    def answer(self, content: dict, code: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *given: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def push(hub: Hub, out: Path, token: str) -> subprocess.CompletedProcess[str]:
    """The command with huggingface-hub's own settings, which are read when it is imported."""
    own = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_TOKEN": token, "HF_HOME": str(out.parent / "home")}
    words = [sys.executable, "-m", "tessella", "export", NARROW, "--to", "safetensors", "--out", str(out)]
    return subprocess.run([*words, "--push", "me/mine"], env=os.environ | own, capture_output=True, text=True)


def test_the_folder_arrives_whole_in_a_private_repository(hub: Hub, tmp_path: Path):
    done = push(hub, tmp_path / "out", TOKEN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"On the hub: http://127.0.0.1:{hub.server_port}/me/mine"
    assert hub.repositories["me/mine"]["visibility"] == "private"
    assert hub.files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert hub.card == (tmp_path / "out" / "README.md").read_text()  # whose head the hub has looked at


def test_a_refused_upload_is_one_line_and_leaves_the_folder(hub: Hub, tmp_path: Path):
    done = push(hub, tmp_path / "out", "hf_of_somebody_else")
    assert done.returncode == 2 and hub.files == {}
    last = done.stderr.splitlines()[-1]
    assert "is written, and could not be uploaded to me/mine" in last and "401" in last and "hf auth login" in last
    assert (tmp_path / "out" / "check.json").is_file() and "Traceback" not in done.stderr
    assert "hf_of_somebody_else" not in done.stderr


@pytest.mark.parametrize("name", ["mine", "me/", "../etc/x", "me/mine/more", ""])
def test_a_name_that_the_hub_cannot_have_is_refused_before_anything_is_written(name: str, tmp_path: Path):
    with pytest.raises(UserError, match="give OWNER/NAME of a repository on the hub"):
        export(Model.of(resolve_backbone(NARROW)), tmp_path / "out", ["safetensors"], push=name)
    assert not list(tmp_path.iterdir())
