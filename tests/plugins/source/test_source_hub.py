"""The hub source, with the real huggingface_hub library in a child process and a small hub on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CHECKPOINT = {
    "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"template",
    "README.md": b"# text",
    "model.safetensors": b"weights" * 1000,
    "consolidated.safetensors": b"the same again",
    "pytorch_model.bin": b"pickle",
    "onnx/model.onnx": b"other",
}
SHARDED = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "model-00001-of-00002.safetensors": b"one",
    "model-00002-of-00002.safetensors": b"two",
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    ).encode(),
}
REPOSITORIES: dict[str, dict[str, bytes]] = {
    "org/whole": CHECKPOINT,
    "org/sharded": SHARDED,
    "org/gated": {**CHECKPOINT},
    "org/one-gguf": {"model.gguf": b"GGUF one", "config.json": b"{}"},
    "org/two-ggufs": {"a.Q4.gguf": b"GGUF a", "sub/b.Q8.gguf": b"GGUF b"},
    "org/pickles": {"config.json": b"{}", "pytorch_model.bin": b"pickle"},
}


@dataclass
class Hub:
    """What the server was asked for, and how it should misbehave."""

    url: str = ""
    requests: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    fail_with: int | None = None
    cut_files: set[str] = field(default_factory=set)


class Handler(BaseHTTPRequestHandler):
    """The few routes of the hub's API that downloading a model needs."""

    hub: Hub

    def log_message(self, *args: Any) -> None:
        return None

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        self.hub.tokens.add(self.headers.get("Authorization", ""))
        if self.hub.fail_with:
            return self.reply(self.hub.fail_with, b"broken")
        if path.startswith("/api/models/"):
            return self.answer_api(path.removeprefix("/api/models/").split("/"))
        parts = path.strip("/").split("/")
        if len(parts) < 5 or parts[2] != "resolve":
            return self.reply(404, b"")
        return self.answer_file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))

    def answer_api(self, parts: list[str]) -> None:
        repository = "/".join(parts[:2])
        files = REPOSITORIES.get(repository)
        if files is None:
            return self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if len(parts) > 3 and parts[3] not in ("main", COMMIT):
            return self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if len(parts) > 2 and parts[2] == "tree":
            entries = [
                {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for path, data in files.items()
            ]
            return self.reply(200, json.dumps(entries).encode())
        siblings = [{"rfilename": path} for path in files]
        return self.reply(200, json.dumps({"id": repository, "sha": COMMIT, "siblings": siblings}).encode())

    def answer_file(self, repository: str, revision: str, file: str) -> None:
        if repository not in REPOSITORIES:
            return self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})
        if repository == "org/gated":
            return self.reply(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
        data = REPOSITORIES[repository].get(file)
        if data is None:
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        if file in self.hub.cut_files and self.command == "GET":
            return self.reply(500, b"")
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        return self.reply(200, data, headers)

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture
def hub() -> Iterator[Hub]:
    state = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": state}))
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


CHILD = """
import json, sys
from drivetrain.errors import DrivetrainError
from drivetrain.plugins.source.hub import HubSource
source = HubSource(HubSource.Config())
reports = []
for call, name in json.loads(sys.argv[1]):
    try:
        if call == "locate":
            path = source.locate(name)
        else:
            path = source.fetch(name, lambda *report: reports.append(report))
        print(json.dumps({"path": path and str(path)}))
    except DrivetrainError as error:
        print(json.dumps({"error": type(error).__name__, "text": str(error)}))
print(json.dumps({"reports": reports}))
"""


@dataclass
class Child:
    """Runs calls of the source in a process of their own, as the library reads its settings when it is imported."""

    home: Path
    hub: Hub

    def run(self, *calls: tuple[str, str], **environment: str) -> list[dict[str, Any]]:
        base = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        base |= {
            "HF_HOME": str(self.home),
            "HF_ENDPOINT": self.hub.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_ETAG_TIMEOUT": "3",
        }
        process = subprocess.run(
            [sys.executable, "-c", CHILD, json.dumps(calls)],
            capture_output=True,
            text=True,
            timeout=120,
            env={**base, "no_proxy": "127.0.0.1", **environment},
        )
        assert process.returncode == 0, process.stderr
        return [json.loads(line) for line in process.stdout.splitlines()]


@pytest.fixture
def child(hub: Hub, tmp_path: Path) -> Child:
    return Child(tmp_path / "hf", hub)


def files_of(path: str) -> set[str]:
    return {str(file.relative_to(path)) for file in Path(path).rglob("*") if file.is_file()}


def test_a_checkpoint_is_fetched_without_what_no_loader_reads(child: Child, hub: Hub) -> None:
    before, fetched, after, again, said = child.run(
        ("locate", "org/whole"), ("fetch", "org/whole"), ("locate", "org/whole"), ("fetch", "org/whole")
    )
    assert before == {"path": None}
    assert files_of(fetched["path"]) == {"config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"}
    assert Path(fetched["path"], "model.safetensors").read_bytes() == CHECKPOINT["model.safetensors"]
    assert after == again == fetched
    assert said["reports"]
    hub.requests.clear()
    offline, *_ = child.run(("fetch", "org/whole"), HF_HUB_OFFLINE="1")
    assert offline == fetched
    assert hub.requests == []


def test_sharded_by_revision_and_with_the_token_of_the_environment(child: Child, hub: Hub) -> None:
    fetched, located, *_ = child.run(
        ("fetch", f"org/sharded@{COMMIT}"), ("locate", f"org/sharded@{COMMIT}"), HF_TOKEN="hf_secret"
    )
    assert files_of(fetched["path"]) == set(SHARDED)
    assert located == fetched
    assert "Bearer hf_secret" in hub.tokens


def test_an_interrupted_download_is_not_taken_as_whole(child: Child, hub: Hub) -> None:
    hub.cut_files = {"model-00002-of-00002.safetensors"}
    failed, located, *_ = child.run(("fetch", "org/sharded"), ("locate", "org/sharded"))
    assert failed["error"] == "SourceError"
    assert located == {"path": None}
    hub.cut_files = set()
    fetched, *_ = child.run(("fetch", "org/sharded"))
    assert files_of(fetched["path"]) == set(SHARDED)


def test_gguf_files_alone_or_by_name(child: Child) -> None:
    only, located, several, one, one_located, *_ = child.run(
        ("fetch", "org/one-gguf"),
        ("locate", "org/one-gguf"),
        ("fetch", "org/two-ggufs"),
        ("fetch", "org/two-ggufs/sub/b.Q8.gguf"),
        ("locate", "org/two-ggufs/sub/b.Q8.gguf"),
    )
    assert Path(only["path"]).read_bytes() == b"GGUF one"
    assert located == only
    assert several["error"] == "SourceError"
    assert "org/two-ggufs/a.Q4.gguf" in several["text"]
    assert Path(one["path"]).read_bytes() == b"GGUF b"
    assert one_located == one


def test_what_is_not_there_is_told_with_a_next_step(child: Child) -> None:
    no_repository, no_revision, no_file, pickles, gated, *_ = child.run(
        ("fetch", "org/absent"),
        ("fetch", "org/whole@v9"),
        ("fetch", "org/whole/x.gguf"),
        ("fetch", "org/pickles"),
        ("fetch", "org/gated"),
    )
    assert no_repository["error"] == no_revision["error"] == no_file["error"] == "ModelNotFoundError"
    assert "org/absent: the hub has no such model" in no_repository["text"]
    assert "'v9'" in no_revision["text"]
    assert "'x.gguf'" in no_file["text"]
    assert pickles["error"] == gated["error"] == "SourceError"
    assert "pickle" in pickles["text"]
    assert "https://huggingface.co/org/gated" in gated["text"]
    assert "HF_TOKEN" in gated["text"]


def test_offline_and_not_cached_is_told(child: Child, hub: Hub) -> None:
    whole, file, *_ = child.run(("fetch", "org/whole"), ("fetch", "org/whole/x.gguf"), HF_HUB_OFFLINE="1")
    for answer in (whole, file):
        assert answer["error"] == "ModelNotFoundError"
        assert "HF_HUB_OFFLINE" in answer["text"]
        assert "drivetrain pull org/whole" in answer["text"]
    assert hub.requests == []


def test_a_hub_out_of_reach_or_broken_is_told(child: Child, hub: Hub) -> None:
    hub.fail_with = 418
    broken, *_ = child.run(("fetch", "org/whole"))
    assert broken["error"] == "SourceError"
    assert "418" in broken["text"]
    whole, file, *_ = child.run(
        ("fetch", "org/whole"), ("fetch", "org/one-gguf/model.gguf"), HF_ENDPOINT="http://127.0.0.1:9"
    )
    for answer in (whole, file):
        assert answer["error"] == "SourceError"
        assert "can't be reached" in answer["text"]


def test_a_disk_that_cannot_be_written_is_told(child: Child, tmp_path: Path) -> None:
    (tmp_path / "hf").write_text("a file where the cache should be")
    answer, *_ = child.run(("fetch", "org/whole"))
    assert answer["error"] == "SourceError"
    assert "HF_HOME" in answer["text"]
