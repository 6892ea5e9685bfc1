"""`gptcli serve` as a process, asked by OpenAI's own client."""

from __future__ import annotations

import base64
import io
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gptcli.data.media.item import Medium, place_of
from gptcli.data.media.reader import reader_of
from gptcli.data.media.reference import Media, Samples
from gptcli.generation.chat import messages
from gptcli.generation.settings import Settings
from gptcli.generation.text import complete
from gptcli.generation.window import media_ids
from gptcli.model.load import load_model, load_tokenizer
from gptcli.processors import save_processor
from gptcli.runs.folder import RunFolder
from tests.conftest import Cli
from tests.media import TEMPLATE, needs_media, picture, png, random_built, sound
from tests.tiny import byte_tokenizer, make_model, save_model, wrapped


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/talker, whose model has a chat template and writes what a plain text can hold."""
    folder = tmp_path_factory.mktemp("serve")
    run = RunFolder(folder / "runs" / "talker")
    model = make_model(vocab_size=300, context=64, tie_word_embeddings=False)
    tokenizer = wrapped(byte_tokenizer())
    tokenizer.chat_template = TEMPLATE
    keep_to_ascii(model, tokenizer)
    model.save_pretrained(run.final)
    tokenizer.save_pretrained(str(run.final))
    run.run_json.write_text(json.dumps({"status": "done"}))
    return folder


def keep_to_ascii(model: Any, tokenizer: Any) -> None:
    """Let the head favour letters, so that random weights write no half characters."""
    import torch

    letters = [token for token in range(len(tokenizer)) if tokenizer.decode([token]).isascii()]
    others = torch.ones(model.lm_head.weight.shape[0], dtype=torch.bool)
    others[letters] = False
    with torch.no_grad():
        model.lm_head.weight[others] = 0.0
        model.lm_head.weight[0] = 0.0


@contextmanager
def serving(
    *arguments: str, cwd: Path, environment: dict[str, str]
) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """A server that answers, and what `--json` says of it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "gptcli", "serve", *arguments, "--port", "auto", "--json"],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    try:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        curl = next(line for line in process.stderr if line.startswith("curl "))
        yield process, {**json.loads(line), "curl": curl}
    finally:
        process.terminate()
        process.communicate(timeout=60)


@pytest.fixture(scope="module")
def server(runs: Path, environment: dict[str, str]) -> Iterator[dict[str, Any]]:
    pytest.importorskip("fastapi", reason="pip install 'gptcli[serve]'")
    pytest.importorskip("uvicorn", reason="pip install 'gptcli[serve]'")
    with serving("talker", cwd=runs, environment=environment) as (process, said):
        yield {**said, "parent": process}


@pytest.fixture(scope="module")
def client(server: dict[str, Any]) -> Iterator[Any]:
    openai = pytest.importorskip("openai", reason="pip install 'gptcli[serve]'")
    with openai.OpenAI(base_url=server["url"], api_key="-", max_retries=0) as opened:
        yield opened


def test_the_model_goes_by_its_runs_name_and_is_the_only_one(client: Any, server: dict[str, Any]) -> None:
    from openai import BadRequestError

    assert server["model"] == "talker" and server["url"].startswith("http://127.0.0.1:")
    assert [model.id for model in client.models.list()] == ["talker"]
    with pytest.raises(BadRequestError, match="pinned to 'talker'"):
        client.completions.create(model="gpt2", prompt="hello")


def test_what_is_streamed_is_the_whole_completion(client: Any) -> None:
    asked = {"model": "talker", "prompt": "hello ", "max_tokens": 20, "temperature": 0}
    whole = client.completions.create(**asked)
    pieces = list(client.completions.create(**asked, stream=True))
    assert len(pieces) > 5
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
    assert whole.choices[0].text.isascii() and whole.choices[0].text
    assert pieces[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 20


def test_a_completion_is_what_generate_writes(client: Any, runs: Path) -> None:
    folder = runs / "runs" / "talker" / "final"
    settings = Settings(max_new_tokens=12, greedy=True)
    written = complete(load_model(folder), load_tokenizer(folder), "hello ", settings)[0]
    served = client.completions.create(model="talker", prompt="hello ", max_tokens=12, temperature=0)
    assert served.choices[0].text == written.text


def test_the_printed_curl_line_works(server: dict[str, Any]) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    done = subprocess.run(server["curl"], shell=True, capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout)["choices"][0]["message"]["role"] == "assistant"


def test_a_chat_is_streamed_by_the_models_own_template(client: Any) -> None:
    asked = {"model": "talker", "max_tokens": 10, "temperature": 0, "messages": [{"role": "user", "content": "hello"}]}
    whole = client.chat.completions.create(**asked)
    pieces = list(client.chat.completions.create(**asked, stream=True))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole.choices[0].message.content
    rendered = client.completions.create(model="talker", prompt="user: hello\na: ", max_tokens=10, temperature=0)
    assert rendered.choices[0].text == whole.choices[0].message.content


def test_it_samples_unless_asked_not_to_and_a_seed_repeats(client: Any) -> None:
    def texts(**asked: Any) -> set[str]:
        made = (client.completions.create(model="talker", prompt="hello ", max_tokens=20, **asked) for _ in range(3))
        return {one.choices[0].text for one in made}

    assert len(texts()) > 1
    assert len(texts(seed=3)) == 1


def test_a_completion_ends_where_the_context_does_and_a_longer_prompt_is_told(client: Any) -> None:
    from openai import BadRequestError

    assert client.completions.create(model="talker", prompt="hello ").usage.total_tokens == 64
    with pytest.raises(BadRequestError, match="the model's context of 64"):
        client.completions.create(model="talker", prompt="hello " * 100)
    for wrong, says in (({"prompt": ""}, "the prompt is empty"), ({"prompt": "a", "max_tokens": -1}, "greater than 0")):
        with pytest.raises(BadRequestError, match=says):
            client.completions.create(model="talker", **wrong)


@pytest.mark.parametrize(
    ("path", "host", "code"),
    [("load_model", None, 404), ("reset", None, 404), ("docs", None, 404), ("v1/models", "evil.example", 400)],
)
def test_nothing_else_is_served_and_no_other_name_is_answered(
    server: dict[str, Any], path: str, host: str | None, code: int
) -> None:
    url = server["url"].removesuffix("/v1") + "/" + path
    request = urllib.request.Request(url, b'{"model": "gpt2"}', {"Host": host} if host else {})
    with pytest.raises(urllib.error.HTTPError) as raised:
        urllib.request.urlopen(request)
    assert raised.value.code == code
    raised.value.close()


def test_a_stop_in_the_middle_of_an_answer_leaves_no_process(runs: Path, environment: dict[str, str]) -> None:
    openai = pytest.importorskip("openai", reason="pip install 'gptcli[serve]'")
    with serving("runs/talker/final", cwd=runs, environment=environment) as (process, said):
        with (
            openai.OpenAI(base_url=said["url"], api_key="-", max_retries=0) as client,
            client.completions.create(model="talker", prompt="hello ", stream=True) as pieces,
        ):
            next(iter(pieces))
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
        with pytest.raises(ProcessLookupError):
            os.kill(said["pid"], 0)


def test_a_taken_port_and_a_foreign_address_are_told_at_once(runs: Path, run_cli: Cli) -> None:
    pytest.importorskip("fastapi", reason="pip install 'gptcli[serve]'")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run_cli("serve", "talker", "--port", port, cwd=runs)
    assert (done.code, done.out) == (2, "")
    assert f"port {port} of 127.0.0.1 is taken" in done.err and "--port auto" in done.err
    done = run_cli("serve", "talker", "--host", "192.0.2.1", cwd=runs)
    assert done.code == 2 and "no address of this machine" in done.err
    done = run_cli("serve", "talker", "--port", "http", cwd=runs)
    assert done.code == 2 and "--port http is no port" in done.err


def test_a_pickle_is_refused_before_anything_starts(tmp_path: Path, run_cli: Cli) -> None:
    pytest.importorskip("fastapi", reason="pip install 'gptcli[serve]'")
    folder = save_model(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    done = run_cli("serve", str(folder), cwd=tmp_path)
    assert (done.code, done.out) == (7, "")
    assert "pickle" in done.err


def test_damaged_weights_are_told_by_the_servers_process_and_an_open_door_before(tmp_path: Path, run_cli: Cli) -> None:
    pytest.importorskip("fastapi", reason="pip install 'gptcli[serve]'")
    folder = save_model(tmp_path / "m")
    os.truncate(folder / "model.safetensors", 1000)
    done = run_cli("serve", str(folder), "--host", "0.0.0.0", "--port", "auto", cwd=tmp_path)
    assert (done.code, "answers" in done.out) == (4, False)
    assert done.err.splitlines()[0].endswith("can use this model: there is no authentication")
    assert f"error: {folder}: " in done.err


@pytest.mark.parametrize(
    ("engine", "lacking", "install"),
    [("transformers", "fastapi", "pip install 'gptcli[serve]'"), ("vllm", "vllm", "pip install vllm")],
)
def test_a_missing_package_is_code_7_with_the_command(
    tmp_path: Path, run_cli: Cli, engine: str, lacking: str, install: str
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        f"u.find_spec = lambda name, package=None: None if name == {lacking!r} else find(name, package)\n"
    )
    path = os.pathsep.join((str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")))
    done = run_cli("serve", "x", "--engine", engine, cwd=tmp_path, PYTHONPATH=path)
    assert done.code == 7
    assert lacking in done.err and install in done.err
    if engine == "vllm":
        done = run_cli("generate", "x", "--engine", engine, "--prompt", "a", cwd=tmp_path, PYTHONPATH=path)
        assert done.code == 7


def test_a_picture_for_a_model_of_text_is_a_bad_request(client: Any) -> None:
    from openai import BadRequestError

    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    with pytest.raises(BadRequestError, match="this model reads no images"):
        client.chat.completions.create(model="talker", messages=[{"role": "user", "content": [part]}])


def test_it_dies_with_a_parent_that_is_killed(server: dict[str, Any]) -> None:  # the last that uses this server
    watched = os.pidfd_open(server["pid"])
    server["parent"].kill()
    ended, _, _ = select.select([watched], [], [], 60)
    os.close(watched)
    assert ended


def seen(seed: int) -> tuple[dict[str, Any], Medium]:
    """A picture as a part of a request, and as a medium."""
    data = base64.b64encode(png(seed)).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}, picture(seed)


def heard(seed: int) -> tuple[dict[str, Any], Medium]:
    """A sound as a part of a request, and as a medium."""
    import soundfile

    medium = sound(seed)
    assert isinstance(medium.value, Media) and isinstance(medium.value.source, Samples)
    file = io.BytesIO()
    soundfile.write(file, medium.value.source.values, medium.value.source.rate, format="WAV", subtype="FLOAT")
    data = base64.b64encode(file.getvalue()).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}, medium


@needs_media
@pytest.mark.parametrize(
    ("kind", "part", "refused"),
    [
        ("llava", seen, "files of the server are not read"),
        pytest.param("qwen2_audio", heard, "this model reads no images", marks=pytest.mark.slow_fault),
    ],
)
def test_a_model_of_media_answers_about_those_of_a_request(
    client: Any, tmp_path: Path, environment: dict[str, str], kind: str, part: Any, refused: str
) -> None:
    del client  # openai is installed
    from openai import BadRequestError, OpenAI

    model, processor = random_built(tmp_path, kind, template=TEMPLATE)
    keep_to_ascii(model, processor.tokenizer)
    folder = tmp_path / "sees"
    model.save_pretrained(folder)
    save_processor(processor, folder)
    reader = reader_of(processor)

    def asked(made: dict[str, Any]) -> dict[str, Any]:
        parts = [made, {"type": "text", "text": "what?"}]
        return {"model": "sees", "max_tokens": 8, "temperature": 0, "messages": [{"role": "user", "content": parts}]}

    with (
        serving("sees", cwd=tmp_path, environment=environment) as (_, said),
        OpenAI(base_url=said["url"], api_key="-", max_retries=0) as sees,
    ):
        for seed in (1, 2):
            made, medium = part(seed)
            served = sees.chat.completions.create(**asked(made)).choices[0].message.content
            pieces = sees.chat.completions.create(**asked(made), stream=True)
            assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == served
            chat = messages("", [], f"{place_of(medium.modality)}what?")
            ids = media_ids(processor.tokenizer, chat, reader, [medium])
            settings = Settings(max_new_tokens=8, greedy=True)
            assert complete(model, processor.tokenizer, ids, settings, reader=reader)[0].text == served
        with pytest.raises(BadRequestError, match=refused):
            sees.chat.completions.create(**asked({"type": "image_url", "image_url": {"url": "/etc/hosts"}}))
