"""Many commands at the price of one start: a process imports what they import once, and each command is a fork of it.

Every command has its own working directory, environment, files (or a terminal) for its output, and limits of memory and
processor time, and ends as `gptcli` would: by the code of `gptcli.cli.main`. What it imports or allocates ends with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MB = 1 << 20
HEAVY = ("torch", "transformers", "tokenizers", "numpy", "accelerate", "datasets")
EVERYTHING = (
    *("torch", "transformers", "gptcli.train.run", "gptcli.train.trainer", "gptcli.generation.text"),
    *("gptcli.data.tokenize", "gptcli.evaluation.evaluate", "gptcli.train.estimate"),
    # What transformers imports late, class by class.
    *("transformers.models.llama.modeling_llama", "transformers.models.auto.tokenization_auto"),
)

SERVER = """
import importlib, json, os, resource, sys, threading
import gptcli.cli.main
for name in sys.argv[1].split():
    importlib.import_module(name)

def size():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmSize"))

def command(task):
    os.chdir(task["cwd"])
    for number, name in enumerate(("in", "out", "err")):
        way = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        os.dup2(os.open(task[name], way | os.O_NOCTTY), number)
    sys.stdin = open(0)
    sys.stdout, sys.stderr = (open(number, "w", errors="backslashreplace", buffering=1) for number in (1, 2))
    os.environ.update(task["env"])
    resource.setrlimit(resource.RLIMIT_AS, (size() + task["memory"],) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (task["seconds"],) * 2)
    code = gptcli.cli.main.main(task["arguments"])
    sys.stdout.flush()
    sys.stderr.flush()
    with open(task["modules"], "w") as file:
        file.write(" ".join(sys.modules))
    os._exit(code)

assert threading.active_count() == 1, "a fork would lose threads"
print("ready", flush=True)
for line in sys.stdin:
    task = json.loads(line)
    if (child := os.fork()) == 0:
        try:
            command(task)
        except BaseException:
            import traceback
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(99)
    _, status, usage = os.wait4(child, 0)
    print(json.dumps({"code": os.waitstatus_to_exitcode(status), "peak": usage.ru_maxrss << 10}), flush=True)
"""


@dataclass(frozen=True)
class Ended:
    """A command that ended.

    Attributes:
        code: its exit code; negative: the signal that ended it, 9 or 24 where its processor time was used up.
        out: standard output; with a terminal all that was shown there.
        err: standard error.
        peak: the most bytes of it that were resident.
        imported: the heavy packages that had been imported at its end.
    """

    code: int
    out: str
    err: str
    peak: int
    imported: frozenset[str]

    def json(self) -> Any:
        """Standard output as the one JSON document that it must be."""
        return json.loads(self.out)


class Warm:
    """A process that commands are forked from, with `imports` done already; use as a context manager."""

    def __init__(self, environment: Mapping[str, str], folder: Path, imports: tuple[str, ...] = EVERYTHING) -> None:
        self._folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER, " ".join(imports)],
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Warm:
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def __call__(
        self,
        *arguments: str,
        cwd: Path,
        stdin: bytes = b"",
        memory: int = 1500 * MB,
        seconds: int = 20,
        terminal: bool = False,
        **variables: str,
    ) -> Ended:
        """Run one command in at most `memory` bytes beyond what was imported and `seconds` of processor time."""
        files = {name: self._folder / name for name in ("in", "out", "err", "modules")}
        files["in"].write_bytes(stdin)
        files["modules"].write_text("")
        shown = bytearray()
        with _terminal(shown) if terminal else contextlib.nullcontext() as screen:
            paths = {name: str(path) for name, path in files.items()}
            paths |= {"out": screen, "err": screen} if screen is not None else {}
            task = {"arguments": arguments, "cwd": str(cwd), "env": variables, "memory": memory, "seconds": seconds}
            assert self._process.stdin is not None and self._process.stdout is not None
            self._process.stdin.write(json.dumps(task | paths) + "\n")
            self._process.stdin.flush()
            ended = json.loads(self._process.stdout.readline())
        out, err = (bytes(shown), b"") if terminal else (files[name].read_bytes() for name in ("out", "err"))
        modules = frozenset(files["modules"].read_text().split()) & frozenset(HEAVY)
        text = (stream.decode("utf-8", "surrogateescape") for stream in (out, err))
        return Ended(ended["code"], *text, ended["peak"], modules)


@contextlib.contextmanager
def _terminal(shown: bytearray) -> Iterator[str]:
    """The path of a terminal; what is written to it is added to `shown`."""
    ours, theirs = os.openpty()

    def read() -> None:
        with contextlib.suppress(OSError):  # nobody has the other side open any more
            while part := os.read(ours, 1 << 16):
                shown.extend(part)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield os.ttyname(theirs)
    finally:
        os.close(theirs)
        reader.join()
        os.close(ours)
