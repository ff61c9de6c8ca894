"""`fedspallm push` against a small hub of this file: what leaves is the model folder, private unless asked."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import ModelCard

from fedspallm_appfl import cli
from helpers.tiny import save_tiny

CARD = "---\nlicense: mit\n---\n# A model\n"


class Hub(BaseHTTPRequestHandler):
    """Takes repositories and commits of small files."""

    def answer(self, said, code=200):
        body = json.dumps(said).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        name = self.path.removeprefix("/api/models/").partition("?")[0].removesuffix("/revision/main")
        self.answer({"id": name, "sha": "0" * 40, "private": self.server.repositories[name], "siblings": []})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != "Bearer hf_right":
            return self.answer({"error": "wrong token"}, 401)
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            there = name in self.server.repositories
            visible = asked.get("visibility") or ("private" if asked.get("private") else "public")
            self.server.repositories.setdefault(name, visible == "private")
            return self.answer({"url": f"{self.server.address}/{name}", "id": name}, 409 if there else 200)
        if "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        assert "/commit/main" in self.path, self.path
        lines = [json.loads(line) for line in body.splitlines()]
        self.server.files.update(
            (line["value"]["path"], base64.b64decode(line["value"]["content"]))
            for line in lines
            if line["key"] == "file"
        )
        return self.answer(
            {"commitUrl": f"{self.server.address}/org/x/commit/1", "commitOid": "1" * 40, "hookOutput": ""}
        )

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repositories, server.files = {"org/open": False}, {}
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    server.address = address
    for place in ("constants.ENDPOINT", "hf_api.constants.ENDPOINT"):
        monkeypatch.setattr(f"huggingface_hub.{place}", address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    yield server
    server.shutdown()
    thread.join(10)
    server.server_close()


@pytest.fixture
def run_dir(tmp_path):
    save_tiny(tmp_path / "run" / "model")
    (tmp_path / "run" / "model" / "README.md").write_text(CARD)
    (tmp_path / "run" / "report.md").write_text("names of clients")
    (tmp_path / "run" / "model" / ".env").write_text("KEY=1")
    (tmp_path / "run" / "model" / "secret.txt").symlink_to(tmp_path / "run" / "report.md")
    return tmp_path / "run"


def push(capsys, *words):
    code = cli.main(["push", *map(str, words)])
    return code, *capsys.readouterr()


def test_the_model_folder_alone_is_sent_and_is_private(hub, run_dir, capsys):
    code, out, _ = push(capsys, run_dir, "org/small", "--base-model", "org/dense")
    assert code == 0 and "org/small, private:" in out
    assert hub.repositories["org/small"] is True
    card = ModelCard(hub.files.pop("README.md").decode())
    assert card.data.base_model == "org/dense" and card.data.license == "mit"
    model = run_dir / "model"
    assert (model / "README.md").read_text() == CARD  # what was sent says more than what lies there
    assert hub.files == {
        name: (model / name).read_bytes()
        for name in (
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        )
    }
    assert ".env" not in out and "secret" not in out


def test_nothing_is_sent_where_everybody_would_read_it_unasked(hub, run_dir, capsys):
    code, _, err = push(capsys, run_dir, "org/open")
    assert code == 2 and "org/open is there already and public; give --public" in err and not hub.files
    code, out, _ = push(capsys, run_dir, "org/open", "--public", "--dry-run")
    assert code == 0 and "nothing was sent" in out and "report.md" not in out and not hub.files
    assert push(capsys, run_dir, "org/open", "--public")[0] == 0 and "config.json" in hub.files


def test_what_is_wrong_is_said(hub, run_dir, capsys, monkeypatch):
    assert "or the run_dir of a finished run, in RUN_DIR_OR_MODEL" in push(capsys, run_dir.parent, "org/small")[2]
    assert "is no name for the hub" in push(capsys, run_dir, "org/sm all", "--dry-run")[2]
    hub.repositories["org/mine"] = True
    assert "is there already and private; leave --public out" in push(capsys, run_dir, "org/mine", "--public")[2]
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "log in with `hf auth login`" in push(capsys, run_dir, "org/small")[2]
    (run_dir / "model" / "README.md").write_text("# no front matter\n")
    assert "names no licence" in push(capsys, run_dir, "org/small", "--dry-run")[1]
    (run_dir / "model" / "README.md").write_text("---\na: [1\n---\n")
    assert "cannot be read" in push(capsys, run_dir, "org/small", "--dry-run")[2]
    (run_dir / "model" / "README.md").unlink()
    assert "has no card" in push(capsys, run_dir, "org/small", "--dry-run")[2]
    apart = run_dir / "models" / "a" / "model"
    save_tiny(apart)
    (run_dir / "model").rename(run_dir / "gone")
    assert f"one for each client: name one of them, such as {apart}" in push(capsys, run_dir, "org/small")[2]
    assert not hub.files
