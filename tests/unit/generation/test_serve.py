"""Names, addresses and what a server lets through, without a server."""

from __future__ import annotations

import asyncio
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from gptcli.errors import UsageError
from gptcli.generation.serve import Server, check_engine, has_chat_template, served_name
from gptcli.runs.folder import RunFolder


def test_a_model_goes_by_its_run_its_checkpoint_its_folder_or_its_hub_id(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "my run")
    for folder in (run.final, run.checkpoint(5), tmp_path / "else@where: x.gguf"):
        folder.mkdir(parents=True)
    run.run_json.write_text("{}")
    assert served_name(run.final) == "my-run"
    assert served_name(run.checkpoint(5)) == "my-run/checkpoint-5"
    assert served_name(tmp_path / "else@where: x.gguf") == "else-where-x.gguf"
    assert served_name(Path("owner/name")) == "owner/name"


@pytest.mark.parametrize(
    ("host", "url", "exposed"),
    [
        ("127.0.0.1", "http://127.0.0.1:80/v1", False),
        ("localhost", "http://localhost:80/v1", False),
        ("::1", "http://[::1]:80/v1", False),
        ("0.0.0.0", "http://127.0.0.1:80/v1", True),
        ("::", "http://[::1]:80/v1", True),
        ("192.0.2.1", "http://192.0.2.1:80/v1", True),
    ],
)
def test_the_url_is_one_that_this_machine_can_use(host: str, url: str, exposed: bool) -> None:
    server = Server("m", host, 80, chats=False)
    assert (server.url, server.is_exposed) == (url, exposed)


def test_a_name_with_quotes_stays_one_argument_of_the_curl_line() -> None:
    words = shlex.split(Server("it's $HOME", "127.0.0.1", 80, chats=True).curl())
    assert words[:2] == ["curl", "http://127.0.0.1:80/v1/chat/completions"]
    assert json.loads(words[-1])["model"] == "it's $HOME"


def test_a_chat_template_is_found_in_either_place(tmp_path: Path) -> None:
    config = tmp_path / "tokenizer_config.json"
    assert not has_chat_template(tmp_path)
    config.write_text("[]")
    assert not has_chat_template(tmp_path)
    config.write_text('{"chat_template": "x"}')
    assert has_chat_template(tmp_path)
    config.unlink()
    (tmp_path / "chat_template.jinja").write_text("x")
    assert has_chat_template(tmp_path)


def test_an_unknown_engine_is_named() -> None:
    with pytest.raises(UsageError, match="--engine llama is not one of transformers, vllm"):
        check_engine("llama", "serve")


@pytest.mark.parametrize(
    ("path", "chats", "code", "says"),
    [
        ("/v1/completions", False, 200, "passed on"),
        ("/v1/chat/completions", True, 200, "passed on"),
        ("/v1/chat/completions", False, 400, "no chat template"),
        ("/v1/models", False, 200, '"id":"m"'),
        ("/v1/responses", True, 404, "there is no /v1/responses here"),
        ("/load_model", True, 404, "there is no /load_model here"),
    ],
)
def test_a_server_lets_through_what_one_model_can_do(path: str, chats: bool, code: int, says: str) -> None:
    responses = pytest.importorskip("starlette.responses", reason="pip install 'gptcli[serve]'")
    from gptcli.generation.pinned import only

    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def ask() -> None:
        app = only(responses.PlainTextResponse("passed on"), Server("m", "127.0.0.1", 80, chats), chats=chats)
        await app({"type": "http", "method": "POST", "path": path, "headers": [(b"host", b"localhost:80")]}, None, send)

    asyncio.run(ask())
    assert (sent[0]["status"], says in sent[1]["body"].decode()) == (code, True)
