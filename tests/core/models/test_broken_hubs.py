"""Hubs that cannot be reached, or that do not do what hubs do; each is a server of its own."""

import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from grating_core import ModelNotFoundError, Reranker
from grating_core.models import fetching
from tests.core.models.test_hub import FIRST, NAME, PAIRS, SECOND, TOKEN, cached
from tests.core.models.test_modules import save_modular
from tests.core.parity import load

QUICK = {"dtype": "float32", "device": "cpu", "pruning": "off"}
Answer = Callable[[BaseHTTPRequestHandler], None]


class Server(ThreadingHTTPServer):
    """A hub on this machine."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.answer: Answer = reset
        self.asked: list[str] = []

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients may go away."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.server.answer(self)

    do_HEAD = do_GET

    def log_message(self, *args: object) -> None:
        """Nothing is logged."""

    def send(self, status: int, body: bytes = b"", **headers: object) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def reset(request: BaseHTTPRequestHandler) -> None:
    request.connection.close()


def garbage(request: BaseHTTPRequestHandler) -> None:
    request.wfile.write(b"\x00\x01 this is not HTTP\r\n\r\n")


def silence(request: BaseHTTPRequestHandler) -> None:
    request.rfile.read(1)  # until the other side goes away


def sending(status: int, body: bytes = b"", **headers: object) -> Answer:
    return lambda request: request.send(status, body, **headers)  # type: ignore[attr-defined]


def in_a_circle(request: BaseHTTPRequestHandler) -> None:
    request.send(307, Location=request.path)  # type: ignore[attr-defined]


def to_a_login(request: BaseHTTPRequestHandler) -> None:
    if request.path == "/login":
        request.send(200, b"<!DOCTYPE html><title>Log in", Content_Type="text/html")  # type: ignore[attr-defined]
    else:
        request.send(302, Location="/login")  # type: ignore[attr-defined]


BROKEN: dict[str, tuple[Answer, str]] = {
    "closes": (reset, "the hub cannot be used: "),
    "garbage": (garbage, "the hub cannot be used: "),
    "silent": (silence, "timed out"),
    "circle": (in_a_circle, "redirects"),
    "login": (to_a_login, "what answers there is no hub: JSONDecodeError"),
    "empty": (sending(200), "what answers there is no hub: "),
    "a list": (sending(200, b"[]"), "what answers there is no hub: TypeError"),
    "null": (sending(200, b"null"), "what answers there is no hub: TypeError"),
    "no fields": (sending(200, b"{}"), "what answers there is no hub: KeyError"),
    "deeply nested": (sending(200, b"[" * 100_000), "the hub cannot be used: "),
    "no files": (sending(200, b'{"id": "x/y", "sha": "0"}'), "the hub has no config.json of it"),
    "not UTF-8": (sending(200, b'{"id": "\xff"}'), "what answers there is no hub: "),
    "unauthorised": (sending(401), "the hub answered with the status 401"),
    "unknown": (sending(401, X_Error_Code="RepoNotFound"), "the hub has none of that name, or it is private"),
    "gated": (sending(403, X_Error_Code="GatedRepo"), "only to those who have been granted access"),
    "busy": (sending(429, Retry_After=60), "the hub answered with the status 429"),
    "500": (sending(500, b"<html>oops"), "the hub answered with the status 500"),
    "503": (sending(503), "the hub answered with the status 503"),
}


def serve(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(fetching, "PATIENCE", 0.3)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        serve(monkeypatch, made.url)
        yield made
        made.shutdown()
        thread.join()


def check(cache: Path, caplog: pytest.LogCaptureFixture, source: Path, reason: str) -> None:
    """Without the model in the cache the reason is an error, with it a warning; once."""
    how = {"cache_dir": cache, "token": TOKEN, **QUICK}
    with pytest.raises(ModelNotFoundError, match=rf"model='someone/tiny'.*{re.escape(reason)}") as refused:
        Reranker.from_pretrained(NAME, **how)
    assert "\n" not in str(refused.value)
    snapshot = cached(cache, FIRST, source, "main")
    caplog.clear()
    with caplog.at_level(logging.WARNING, "grating"):
        for _ in range(2):
            with Reranker.from_pretrained(NAME, **how) as reranker:
                assert reranker.model_path == snapshot
                assert reranker.score(PAIRS) == load(source).score(PAIRS)
    (said,) = [record.getMessage() for record in caplog.records if record.name == "grating"]
    assert str(snapshot) in said
    assert reason in said
    assert TOKEN not in str(refused.value) + caplog.text
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match=re.escape(reason)):  # and not that something is missing here
        Reranker.from_pretrained(NAME, **how)


@pytest.mark.parametrize("kind", BROKEN)
def test_a_hub_that_is_broken(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture, tiny_bert: Path, kind: str
) -> None:
    server.answer, reason = BROKEN[kind]
    check(tmp_path, caplog, tiny_bert, reason)


def test_a_hub_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, tiny_bert: Path
) -> None:
    with socket.socket() as taken:  # not listening
        taken.bind(("127.0.0.1", 0))
        serve(monkeypatch, f"http://127.0.0.1:{taken.getsockname()[1]}")
        check(tmp_path, caplog, tiny_bert, "refused")


def test_a_hub_without_the_certificate_it_should_have(
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    tiny_bert: Path,
) -> None:
    serve(monkeypatch, server.url.replace("http:", "https:"))
    check(tmp_path, caplog, tiny_bert, "SSL")


def publishing(
    source: Path, commit: str, damage: Callable[[str, bytes], bytes] = lambda name, data: data
) -> Answer:
    """A hub that has one model; what it sends of a file may be something else."""
    paths = [path for path in source.rglob("*") if path.is_file()]
    files = {path.relative_to(source).as_posix(): path.read_bytes() for path in paths} | {"vocab.txt": b"w1\nw2\n"}

    def answer(request: BaseHTTPRequestHandler) -> None:
        send: Callable[..., None] = request.send  # type: ignore[attr-defined]
        path = request.path.partition("?")[0]
        if "/resolve/" in path:
            name = path.partition("/resolve/")[2].partition("/")[2]
            body = files[name] if request.command == "HEAD" else damage(name, files[name])
            send(200, body, ETag=f'"{name.replace("/", "-")}-{commit}"', X_Repo_Commit=commit)
        elif "/tree/" in path:
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": f"{name}-{commit}"}
                for name, data in files.items()
            ]
            send(200, json.dumps(entries).encode())
        else:
            entries = [{"rfilename": name} for name in files]
            send(200, json.dumps({"id": NAME, "sha": commit, "siblings": entries}).encode())

    return answer


def test_a_hub_is_asked_for_no_file_that_is_not_needed(server: Server, tmp_path: Path, tiny_bert: Path) -> None:
    server.answer = publishing(tiny_bert, FIRST)
    with Reranker.from_pretrained(NAME, cache_dir=tmp_path, **QUICK) as reranker:
        assert reranker.score(PAIRS) == load(tiny_bert).score(PAIRS)
        assert reranker.model_path == tmp_path / "models--someone--tiny" / "snapshots" / FIRST
    assert any(path.endswith("tokenizer.json") for path in server.asked)
    assert not any(path.endswith("vocab.txt") for path in server.asked)
    server.answer = reset
    with Reranker.from_pretrained(NAME, cache_dir=tmp_path, **QUICK) as again:
        assert again.model_path == reranker.model_path


def test_the_folders_of_modules_are_fetched_and_no_others(server: Server, tmp_path: Path) -> None:
    source = save_modular(tmp_path / "source", "modernbert-cls", "ettin")
    (source / "onnx").mkdir()
    (source / "onnx" / "config.json").write_text("{}")
    server.answer = publishing(source, FIRST)
    how = {"cache_dir": tmp_path / "cache", **QUICK}
    with Reranker.from_pretrained(NAME, **how) as reranker:
        assert reranker.score(PAIRS) == load(source).score(PAIRS)
    assert not any("onnx" in path for path in server.asked)
    server.answer = reset
    with Reranker.from_pretrained(NAME, **how) as again:
        assert again.model_path == reranker.model_path
    (reranker.model_path / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match="the hub cannot be used"):  # what is in the cache is not whole
        Reranker.from_pretrained(NAME, **how)


def test_pickled_weights_on_a_hub_are_named_with_a_command(
    server: Server, tmp_path: Path, tiny_bert: Path
) -> None:
    source = Path(shutil.copytree(tiny_bert, tmp_path / "source"))
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    server.answer = publishing(source, FIRST)
    with pytest.raises(ModelNotFoundError, match=r"never loads pickled weights: .*pytorch_model\.bin.*python -c"):
        Reranker.from_pretrained(NAME, cache_dir=tmp_path / "cache", **QUICK)
    assert not any("pytorch_model.bin" in path for path in server.asked)


def test_a_newer_version_that_does_not_arrive_whole(server: Server, tmp_path: Path, tiny_bert: Path) -> None:
    short = publishing(tiny_bert, SECOND, lambda name, data: data[:-9] if name == "model.safetensors" else data)
    server.answer = short
    how = {"cache_dir": tmp_path, **QUICK}
    with pytest.raises(ModelNotFoundError, match="Consistency check failed"):
        Reranker.from_pretrained(NAME, **how)
    shutil.rmtree(tmp_path / "models--someone--tiny")
    snapshot = cached(tmp_path, FIRST, tiny_bert, "main")
    for answer, found in [
        (short, FIRST),
        (short, FIRST),
        (publishing(tiny_bert, SECOND), SECOND),
        (reset, SECOND),
    ]:
        server.answer = answer
        with Reranker.from_pretrained(NAME, **how) as reranker:
            assert reranker.model_path == snapshot.with_name(found)


@pytest.mark.parametrize("part", ["/tree/", "/resolve/"])
@pytest.mark.parametrize("kind", ["closes", "garbage", "circle", "login", "empty", "unauthorised", "503"])
def test_a_hub_that_is_broken_in_part(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_bert: Path, kind: str, part: str
) -> None:
    good, (broken, reason) = publishing(tiny_bert, SECOND), BROKEN[kind]
    server.answer = lambda request: (broken if part in request.path or "/login" in request.path else good)(request)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # files are asked for several times
    how = {"cache_dir": tmp_path, "token": TOKEN, **QUICK}
    with pytest.raises(ModelNotFoundError, match=reason if kind in ("503", "unauthorised") else NAME) as refused:
        Reranker.from_pretrained(NAME, **how)
    assert TOKEN not in str(refused.value)
    assert "\n" not in str(refused.value)
    shutil.rmtree(tmp_path / "models--someone--tiny", ignore_errors=True)
    snapshot = cached(tmp_path, FIRST, tiny_bert, "main")
    with Reranker.from_pretrained(NAME, **how) as reranker:
        assert reranker.model_path == snapshot


def test_adapters_of_a_hub_that_is_broken(server: Server, tmp_path: Path, tiny_bert: Path) -> None:
    how = {"cache_dir": tmp_path, "token": TOKEN, "adapter": NAME, **QUICK}
    for answer, reason in BROKEN.values():
        server.answer = answer
        with pytest.raises(ModelNotFoundError, match=rf"adapter='someone/tiny'.*{re.escape(reason)}") as refused:
            Reranker.from_pretrained(tiny_bert, **how)
        assert TOKEN not in str(refused.value)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    changed = "base_model.model.bert.encoder.layer.1.attention.self.query"
    size = json.loads((tiny_bert / "config.json").read_text())["hidden_size"]
    tensors = {f"{changed}.lora_A.weight": torch.ones(2, size), f"{changed}.lora_B.weight": torch.ones(size, 2)}
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    cached(tmp_path, FIRST, tmp_path / "adapter", "main")
    with Reranker.from_pretrained(tiny_bert, **how) as reranker:
        assert reranker.score(PAIRS) == load(tiny_bert, adapter=tmp_path / "adapter").score(PAIRS)


AS_NOBODY = """
import contextlib, logging, os, sys
import grating_core
how = {"dtype": "float32", "device": "cpu", "pruning": "off"}
pairs = [("w1 w2", "w3 w4 w5"), ("w1", "w9 w10")]
# All modules are loaded now: others may not be allowed to read them.
grating_core.Reranker.from_pretrained(sys.argv[1], **how).score(pairs)
with contextlib.suppress(grating_core.ModelNotFoundError):
    grating_core.Reranker.from_pretrained("someone/tiny", cache_dir=sys.argv[2])
logging.basicConfig(format="%(levelname)s %(name)s %(message)s")
os.setgroups([]); os.setgid(65534); os.setuid(65534)
for _ in range(2):
    print(grating_core.Reranker.from_pretrained("someone/tiny", **how).score(pairs))
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="only root may become another user")
@pytest.mark.parametrize("reachable", [True, False])
def test_a_cache_that_may_only_be_read(server: Server, tiny_bert: Path, tmp_path: Path, reachable: bool) -> None:
    server.answer = publishing(tiny_bert, FIRST)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        place.chmod(0o755)
        snapshot = cached(place, FIRST, tiny_bert, "main")
        blobs = snapshot.parents[1] / "blobs"
        blobs.mkdir()
        snapshot.chmod(0o755)
        for number, file in enumerate(list(snapshot.iterdir())):
            file.chmod(0o444)
            file.rename(blobs / str(number))
            file.symlink_to(blobs / str(number))
        url = server.url if reachable else "http://127.0.0.1:9"
        environment = {
            **os.environ,
            "HF_ENDPOINT": url,
            "HF_HUB_CACHE": name,
            "HF_HOME": name,
            "HF_HUB_OFFLINE": "0",
        }
        done = subprocess.run(
            [sys.executable, "-c", AS_NOBODY, str(tiny_bert), str(tmp_path)],
            env=environment | {"GRATING_CACHE": str(place / "none")},
            cwd="/", capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == [str(load(tiny_bert).score(PAIRS))] * 2
        warnings = [line for line in done.stderr.splitlines() if line.startswith("WARNING grating model=")]
        assert len(warnings) == (0 if reachable else 1), done.stderr
        assert not (snapshot / "vocab.txt").exists()
