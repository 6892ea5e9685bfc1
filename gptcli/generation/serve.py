"""A model behind an OpenAI-compatible server, which is another process: `transformers serve`, or vLLM's.

What can be known of the folder, the packages and the port is said before that process starts. It has a session of its
own: a terminal's Ctrl+C reaches this process alone, which asks the server to end and then ends whatever is left of it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from gptcli.endings import WorkersError, on_stop_signals, read_report
from gptcli.environment import LOOPBACK
from gptcli.errors import AbortedError, GptcliError, MissingError, OutOfMemoryError, UsageError
from gptcli.launch import rank, this_program
from gptcli.model.folder import check_weights, is_adapter, read_config
from gptcli.model.load import check_tokenizer_files, model_home, tokenizer_home
from gptcli.reporting import one_line
from gptcli.runs.folder import owner

# What each engine imports, and how to get it.
PACKAGES = {
    "transformers": (("fastapi", "uvicorn", "openai"), "pip install 'gptcli[serve]'"),
    "vllm": (("vllm",), "pip install vllm"),
}
EVERY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}
POLL_SECONDS = 0.2
ANSWER_SECONDS = 2.0
# For requests that are being answered, after which the server is killed.
KILL_SECONDS = 10.0
LAST_LINES = 6


@dataclass(frozen=True)
class Server:
    """Where a model is served, and under which name.

    Attributes:
        name: the model's for clients, who may ask for no other.
        host: the address that is listened at.
        port: not 0.
        chats: whether the model has a chat template.
    """

    name: str
    host: str
    port: int
    chats: bool

    @property
    def url(self) -> str:
        """The base URL for a client on this machine."""
        host = EVERY_ADDRESS.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}/v1"

    @property
    def is_exposed(self) -> bool:
        """Whether other machines may reach it."""
        return self.host not in LOOPBACK and not self.host.startswith("127.")

    def curl(self) -> str:
        """A command for a shell that asks the server for a text."""
        asked: dict[str, object] = {"model": self.name, "max_tokens": 50}
        if self.chats:
            path, asked = "chat/completions", {**asked, "messages": [{"role": "user", "content": "Hello"}]}
        else:
            path, asked = "completions", {**asked, "prompt": "Once upon a time"}
        body = shlex.quote(json.dumps(asked, ensure_ascii=False))
        return f"curl {self.url}/{path} -H 'Content-Type: application/json' -d {body}"


def check_engine(engine: str, what: str) -> None:
    """Raise `MissingError` with the command that installs it when an engine's packages are not here.

    `what` needs it: a command. Raises `UsageError` for no engine's name.
    """
    if engine not in PACKAGES:
        raise UsageError(f"--engine {engine} is not one of {', '.join(PACKAGES)}")
    packages, install = PACKAGES[engine]
    if lacking := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise MissingError(f"{what} needs the package {', '.join(lacking)}", remedy=install)


def check_folder(folder: Path, engine: str) -> None:
    """Look at a local folder's config, weights and tokenizer files, without opening the weights; errors as there.

    Of an adapter it is its base's that is looked at.
    """
    tokenizers, _ = tokenizer_home(folder)
    if engine == "vllm" and is_adapter(folder):
        raise UsageError(
            f"--engine vllm takes no adapter: {folder}", remedy=f"gptcli export {folder} --merge --output FOLDER"
        )
    folder, _ = model_home(folder)
    if folder.is_dir():
        check_weights(folder, read_config(folder))
    if tokenizers.is_dir():
        check_tokenizer_files(tokenizers)


def served_name(folder: Path) -> str:
    """What clients call the model: its run's name, with the checkpoint's unless it is the final one; else the folder's.

    The server takes `@` and `:` in a name for a revision and a file, so that these become a dash.
    """
    name = str(folder)
    if folder.is_dir():
        run, resolved = owner(folder), folder.resolve()
        name = resolved.name
        if run is not None:
            name = run.name if resolved in (run.final.resolve(), run.path.resolve()) else f"{run.name}/{name}"
    return re.sub(r"[^\w./+-]+", "-", name) or "model"


def has_chat_template(folder: Path) -> bool:
    """Whether a local folder's tokenizer has a chat template."""
    if any((folder / name).exists() for name in ("chat_template.jinja", "additional_chat_templates")):
        return True
    with contextlib.suppress(OSError, ValueError, RecursionError, AttributeError):
        return bool(json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template"))
    return False


def run_server(
    arguments: Sequence[str],
    server: Server,
    *,
    on_ready: Callable[[int], None],
    on_line: Callable[[str], None],
) -> None:
    """Run a server until a signal ends it.

    Args:
        arguments: of gptcli, which make that process the server.
        server: where it will answer.
        on_ready: called once with its process id, when it has answered.
        on_line: gets each line that it prints after that.

    Raises:
        AbortedError: a signal came before it answered.
        GptcliError: it ended by itself; with its own error and exit code where it gave one, else its last lines.
    """
    with tempfile.TemporaryDirectory(prefix="gptcli-") as reports:
        watched = _Watched(on_line)
        with on_stop_signals(watched.stop):
            watched.start([sys.executable, *this_program(), *arguments], Path(reports))
            try:
                if watched.until_answered(server):
                    on_ready(watched.pid)
                    watched.talks = True
                watched.wait()
            finally:
                watched.end()
        if watched.stopped:
            if not watched.talks:
                raise AbortedError("the server had not answered yet")
            return
        raise watched.error(Path(reports))


class _Watched:
    """The server's process and all that it starts."""

    def __init__(self, on_line: Callable[[str], None]) -> None:
        self._on_line = on_line
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self._killer: threading.Timer | None = None
        self._last: deque[str] = deque(maxlen=LAST_LINES)
        self.talks = False
        self.stopped = False

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self, command: list[str], reports: Path) -> None:
        self._process = subprocess.Popen(
            command,
            env={
                **os.environ,
                "PYTHONUNBUFFERED": "1",
                "GPTCLI_LAUNCHER_PID": str(os.getpid()),
                "GPTCLI_REPORTS": str(reports),
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        assert self._process.stdout is not None
        self._reader = threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True)
        self._reader.start()
        if self.stopped:  # while it was being started
            self._signal(signal.SIGTERM)

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: ask the server to end; asked again, or after a while, kill it."""
        del number, frame
        self._signal(signal.SIGKILL if self.stopped else signal.SIGTERM)
        if not self.stopped:
            self.stopped = True
            self._killer = threading.Timer(KILL_SECONDS, self._signal, [signal.SIGKILL])
            self._killer.daemon = True
            self._killer.start()

    def until_answered(self, server: Server) -> bool:
        """Wait until the server names its model; False: it ended, or was asked to."""
        assert self._process is not None
        while self._process.poll() is None and not self.stopped:
            if _answers(server):
                return self._process.poll() is None
            time.sleep(POLL_SECONDS)
        return False

    def wait(self) -> None:
        assert self._process is not None
        self._process.wait()

    def end(self) -> None:
        """Leave no process behind."""
        self._signal(signal.SIGKILL)
        self.wait()
        if self._killer is not None:
            self._killer.cancel()
        if self._reader is not None:
            self._reader.join(ANSWER_SECONDS)

    def error(self, reports: Path) -> GptcliError:
        """What it ended with."""
        assert self._process is not None
        if (report := read_report(reports, rank())) is not None:
            return WorkersError(report.code, report.label, report.lines, report.traceback)
        code = self._process.returncode
        if code == -signal.SIGKILL:
            return OutOfMemoryError(
                "the server was killed (SIGKILL): probably out of memory", remedy="Try --precision bf16."
            )
        ended = f"died by signal {-code}" if code < 0 else f"ended with code {code}"
        return GptcliError(f"the server {ended}", remedy="\n".join(self._last) or None)

    def _read(self, pipe: IO[str]) -> None:
        for line in pipe:
            text = one_line(line.rstrip())
            if text:
                self._last.append(text)
                if self.talks and not self.stopped:
                    self._on_line(text)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)


def _answers(server: Server) -> bool:
    """Whether the server names its model now."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"{server.url}/models", timeout=ANSWER_SECONDS) as answer:
            models = json.load(answer)["data"]
        return any(model["id"] == server.name for model in models)
    except (OSError, ValueError, KeyError, TypeError):
        return False
