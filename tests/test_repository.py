"""Repository ids: a server on this machine speaks the Hub's protocol to the real client, and counts what it is asked for."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from conftest import make_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """One model, ``someone/tiny``, from ``folder``; bytes of each file that were sent are in ``sent``."""

    folder: Path
    sent: dict[str, int]

    def log_message(self, *args):
        pass

    def reply(self, status, body=b"", **headers):
        self.send_response(status)
        for key, value in {"Content_Length": str(len(body)), "X_Repo_Commit": COMMIT, **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/someone/tiny"):
            files = [p for p in sorted(self.folder.iterdir()) if p.is_file()]
            if "/tree/" in path:
                listed = [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": "0" * 40} for p in files]
                return self.reply(200, json.dumps(listed).encode(), Content_Type="application/json")
            info = {"id": "someone/tiny", "sha": COMMIT, "siblings": [{"rfilename": p.name} for p in files]}
            return self.reply(200, json.dumps(info).encode(), Content_Type="application/json")
        file = self.folder / path.rsplit("/", 1)[-1]
        if not path.startswith("/someone/tiny/resolve/"):
            return self.reply(404, b"", X_Error_Code="RepoNotFound")
        if not file.exists():
            return self.reply(404, b"", X_Error_Code="EntryNotFound")
        data = file.read_bytes()
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        start, stop = 0, len(data)
        if asked := self.headers.get("Range", ""):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(len(data), int(last) + 1 if last else len(data))
        if self.command == "HEAD":
            return self.reply(200, ETag=etag, Content_Length=str(len(data)))
        self.sent[file.name] = self.sent.get(file.name, 0) + stop - start
        extra = {"Content_Range": f"bytes {start}-{stop - 1}/{len(data)}"} if asked else {}
        return self.reply(206 if asked else 200, data[start:stop], ETag=etag, **extra)

    do_HEAD = do_GET


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = make_model(tmp_path_factory.mktemp("hub") / "m", hidden_size=128, intermediate_size=256, num_hidden_layers=3)
    handler = type("Handler", (Hub,), {"folder": folder, "sent": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield handler, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def qplug(endpoint, home, *arguments, **more):
    env = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        **more,
    }
    return subprocess.run(
        [sys.executable, "-m", "qplug_core", *arguments], capture_output=True, text=True, env=env, check=False, timeout=120
    )


def test_explain_reads_headers_and_no_weights(hub, tmp_path):
    handler, endpoint = hub
    handler.sent.clear()
    done = qplug(endpoint, tmp_path, "explain", "someone/tiny", "--quantize", "W8A16", "--json")
    assert json.loads(done.stdout)["layers"][2]["segments"][0]["scheme"] == "W8A16", done.stderr
    size = (handler.folder / "model.safetensors").stat().st_size
    assert 0 < handler.sent["model.safetensors"] < size / 4


def test_generate_downloads_once_and_then_needs_no_hub(hub, tmp_path):
    handler, endpoint = hub
    done = qplug(endpoint, tmp_path, "generate", "someone/tiny", "--prompt", "a", "--max-new-tokens", "3")
    assert done.returncode == 0, done.stderr
    handler.sent.clear()
    again = qplug(
        endpoint, tmp_path, "generate", "someone/tiny", "--prompt", "a", "--max-new-tokens", "3", HF_HUB_OFFLINE="1"
    )
    assert (again.returncode, again.stdout) == (0, done.stdout)
    explained = qplug(endpoint, tmp_path, "explain", "someone/tiny", HF_HUB_OFFLINE="1")
    assert explained.returncode == 0, explained.stderr
    assert not handler.sent


@pytest.mark.parametrize("command", [["explain", "{}"], ["generate", "{}", "--prompt", "a"]])
def test_what_is_not_there_is_one_sentence(hub, tmp_path, command):
    _, endpoint = hub
    for name, more, reason in [
        ("someone/other", {}, "no public repository"),
        ("someone/tiny", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "did not give it"),
        ("someone/tiny", {"HF_HUB_OFFLINE": "1"}, "did not give it"),
    ]:
        done = qplug(endpoint, tmp_path / "empty", *[part.format(name) for part in command], **more)
        assert done.returncode == 4
        assert reason in done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
