"""A run on the Hugging Face hub: here a stand-in that answers as the hub does, and keeps what it is sent."""

import base64
import json
import threading
from collections import defaultdict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from modernenc.model.export import export
from support.commands import command
from support.runs import train


class Hub:
    """Repositories of a stand-in for the hub: names, whether they are private, and files by revision."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.private: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = defaultdict(dict)
        self.commits: list[str] = []

    def answer(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        """Return the status and the answer to a request."""
        if path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\nlibrary_name: transformers\n")
            return 200, {}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if asked["organization"] != "me":
                return 403, {"error": "you may not write there"}
            if name in self.private:
                return 409, {"error": "it exists", "url": f"{self.url}/me/model"}
            self.private[name] = asked.get("private") or asked.get("visibility") == "private"  # older and newer clients
            return 200, {"url": f"{self.url}/{name}"}
        *_, kind, revision = path.split("/")
        if kind == "branch":
            if revision in self.files:
                return 409, {"error": "it exists", "url": f"{self.url}/me/model"}
            self.files[revision] = {}
            return 200, {}
        if kind == "preupload":
            asked = json.loads(body)["files"]
            return 200, {"files": [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in asked]}
        assert kind == "commit"
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.files[revision][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            else:
                self.commits.append(line["value"]["summary"])
        return 200, {"commitUrl": f"{self.url}/me/model/commit/1", "commitOid": "1", "success": True}


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    """A stand-in for the hub, which commands take for the hub."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            status, answer = here.answer(self.path.partition("?")[0], self.rfile.read(int(self.headers["Content-Length"] or 0)))
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            if status >= 400:
                self.send_header("X-Error-Message", answer["error"])
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    here = Hub(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", here.url)
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    yield here
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_a_run_is_uploaded_with_a_revision_for_each_phase(small_run, tmp_path, hub):
    folder = train(small_run())
    planned = command("modernenc.push", str(folder), "me/model", "--dry-run")
    assert planned.returncode == 0, planned.stderr
    assert "me/model, revision stable: would hold end-of-stable.ckpt" in planned.stdout and not hub.private
    for again in range(2):
        result = command("modernenc.push", str(folder), "me/model")
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("me/model, revision") == 4
        assert len(hub.commits) == 4 * (again + 1)
    assert hub.private == {"me/model": True} and hub.files.keys() == {"stable", "extend", "decay", "main"}
    assert hub.files["main"]["model.safetensors"] == hub.files["decay"]["model.safetensors"]
    export([folder / "checkpoints/end-of-extend.ckpt"], tmp_path / "extend")
    for path in (tmp_path / "extend").iterdir():
        if path.name != "README.md":
            assert hub.files["extend"][path.name] == path.read_bytes(), path.name
    assert 'pipeline("fill-mask", "me/model", revision="extend")' in hub.files["extend"]["README.md"].decode()
    assert 'pipeline("fill-mask", "me/model")' in hub.files["main"]["README.md"].decode()


def test_what_keeps_a_run_from_the_hub_is_said(small_run, tmp_path, hub, monkeypatch):
    folder = train(small_run())
    refused = command("modernenc.push", str(folder), "them/model", "--public")
    assert refused.returncode == 2 and refused.stderr.startswith("error: them/model could not be written: ")
    assert "you may not write there" in refused.stderr and refused.stderr.count("\n") == 1
    name = command("modernenc.push", str(folder), "model")
    assert name.stderr == "error: model: expected OWNER/NAME of a repository on the hub\n"
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    away = command("modernenc.push", str(folder), "me/model")
    assert away.stderr.startswith("error: me/model could not be written: ") and away.stderr.count("\n") == 1
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    stranger = command("modernenc.push", str(folder), "me/model")
    assert stranger.stderr.startswith("error: nobody is logged in to the Hugging Face hub; run `hf auth login`")
