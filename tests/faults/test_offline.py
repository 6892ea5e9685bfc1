"""Without a network, everything works from local files, and nothing that is local asks for one.

The process that commands are forked from has a `sitecustomize` whose audit hook sees every connection and every
look-up of a name that Python makes: it is written down and refused. (Native code of hf_xet fetches files only after
Python asked the Hub about them.)
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gptcli.errors import MissingError
from tests.conftest import make_project
from tests.warm import Warm

WATCH = """
import os, sys

EVENTS = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.sendto"}

def watch(event, arguments):
    if event in EVENTS:
        address = arguments[1] if event in ("socket.connect", "socket.sendto") else arguments[0]
        if not isinstance(address, (str, bytes)) or event.startswith("socket.get"):  # those are files of this machine
            with open(os.environ["ATTEMPTS"], "a") as file:
                file.write(f"{event} {address}\\n")
            raise OSError(101, "Network is unreachable")

sys.addaudithook(watch)
"""
LOCAL = (
    ("tokenize", "tiny.yaml"),
    ("pretrain", "tiny.yaml", "train.max_steps=4", "--quiet"),
    ("pretrain", "tiny.yaml", "train.max_steps=6", "--quiet"),
    ("finetune", "tiny.yaml", "model={from: runs/tiny/final}", "name=tuned", "train.max_steps=2", "--quiet"),
    ("eval",),
    ("eval", "runs/tiny/final", "--data", "text.txt"),
    ("generate", "--prompt", "The ", "--greedy"),
    ("generate", "tiny", "--prompt", "The ", "--json"),
    ("tokenize", "tiny.yaml", "tokenizer={from: runs/tiny/final}"),
    ("plan", "tiny.yaml"),
    ("recipes", "validate", "quickstart"),
    ("runs", "report", "tiny"),
)


@pytest.fixture(params=["offline", pytest.param("online", marks=pytest.mark.slow_fault)], scope="module")
def watched(
    request: pytest.FixtureRequest, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Warm, Path, Path]]:
    """(commands, their folder, the file of what they tried), with HF_HUB_OFFLINE=1 and without."""
    folder = make_project(tmp_path_factory.mktemp(request.param))
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(WATCH)
    attempts = folder / "attempts"
    attempts.touch()
    path = [str(folder / "site"), *environment.get("PYTHONPATH", "").split(":")]
    variables = {**environment, "PYTHONPATH": ":".join(path), "ATTEMPTS": str(attempts), "HF_HOME": str(folder / "hf")}
    variables["GPTCLI_CACHE"] = str(folder / "cache")
    if request.param == "online":
        del variables["HF_HUB_OFFLINE"]
    with Warm(variables, folder) as warm:
        yield warm, folder, attempts


def test_local_files_need_no_network_and_ask_for_none(watched: tuple[Warm, Path, Path]) -> None:
    warm, folder, attempts = watched
    for arguments in LOCAL:
        done = warm(*arguments, cwd=folder, seconds=60)
        assert done.code == 0, (arguments, done.err)
        assert attempts.read_text() == "", arguments


def test_the_network_is_asked_for_a_hub_name_unless_that_is_forbidden(watched: tuple[Warm, Path, Path]) -> None:
    """The control: what watches does see an attempt, and its failure is an error of a few lines."""
    warm, folder, attempts = watched
    done = warm("tokenize", "tiny.yaml", "tokenizer={from: nobody/nothing}", cwd=folder, seconds=60)
    assert done.code == MissingError.exit_code, done.err
    assert "nobody/nothing" in done.err and "Traceback" not in done.err and len(done.err.splitlines()) <= 8
    tried = attempts.read_text()
    attempts.write_text("")
    assert ("huggingface.co" in tried) == ("online" in folder.name)
