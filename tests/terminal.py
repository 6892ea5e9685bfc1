"""A command in a terminal of its own, whose foreground it is: what is typed there is what a person types."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import subprocess
import sys
import termios
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from tests.runs import Forks

PATIENCE = 120.0


class Process(Protocol):
    """A running command, as `subprocess.Popen` is one."""

    pid: int

    def kill(self) -> None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def send_signal(self, sig: int) -> None: ...


class Terminal:
    """A running `python -m gptcli` in a terminal; use as a context manager, which ends it."""

    def __init__(
        self, arguments: Sequence[str], cwd: Path, environment: Mapping[str, str], forks: Forks | None = None
    ) -> None:
        """Start the command, or let `forks` do it, which takes a fifth of the time."""
        self._ours, self._theirs = os.openpty()
        termios.tcsetwinsize(self._ours, (50, 160))
        self._shown = bytearray()
        self._seen = 0
        self._news = threading.Condition()
        self._wake, self._awake = os.pipe()
        variables = {**environment, "TERM": "xterm-256color", "COLUMNS": "160"}
        if forks is not None:
            self.process: Process = forks.start(*arguments, cwd=cwd, terminal=os.ttyname(self._theirs), **variables)
        else:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gptcli", *arguments],
                cwd=cwd,
                env=variables,
                stdin=self._theirs,
                stdout=self._theirs,
                stderr=self._theirs,
                start_new_session=True,
                preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # its session's leader: its terminal
            )
            self._leave()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def __enter__(self) -> Terminal:
        return self

    def _leave(self) -> None:
        """Close the side of the command, who has it open by now: what it shows ends with it."""
        if self._theirs >= 0:
            os.close(self._theirs)
            self._theirs = -1

    def __exit__(self, *_: object) -> None:
        self._leave()
        self.process.kill()
        self.process.wait()
        self._reader.join(PATIENCE)
        for descriptor in (self._ours, self._wake, self._awake):
            os.close(descriptor)

    def _read(self) -> None:
        try:
            self._read_all()
        finally:
            with self._news:
                self._news.notify_all()

    def _read_all(self) -> None:
        with contextlib.suppress(OSError):  # nobody has the other side open any more
            # Not in `read` when the window is closed, which would hold it open.
            while self._wake not in select.select([self._ours, self._wake], [], [])[0]:
                if not (part := os.read(self._ours, 1 << 16)):
                    return
                with self._news:
                    self._shown.extend(part)
                    self._news.notify_all()

    def until(self, text: str) -> str:
        """Wait for a text behind those waited for before; what is shown from there to its end."""

        def found() -> bool:
            if self._shown:
                self._leave()
            return self._shown.find(text.encode(), self._seen) >= 0

        with self._news:
            here = self._news.wait_for(lambda: found() or not self._reader.is_alive(), PATIENCE)
            assert here and found(), f"{text!r} is not in {self._shown[self._seen :].decode(errors='replace')!r}"
            begin, self._seen = self._seen, self._shown.find(text.encode(), self._seen) + len(text.encode())
            return self._shown[begin : self._seen].decode(errors="replace")

    def type(self, keys: bytes) -> None:
        """Press keys; `\\x03` is Ctrl+C."""
        os.write(self._ours, keys)

    def echoes(self) -> bool:
        """Whether the terminal shows what is typed and takes it line by line, as it did at first."""
        flags: int = termios.tcgetattr(self._ours)[3]
        return bool(flags & termios.ECHO) and bool(flags & termios.ICANON) and bool(flags & termios.ISIG)

    def close(self) -> None:
        """Close the window."""
        os.write(self._awake, b"x")
        self._reader.join(PATIENCE)
        os.close(self._ours)
        self._ours = os.open(os.devnull, os.O_RDWR)

    def finish(self) -> tuple[int, str]:
        """Wait for the end; the exit code, and all that was shown."""
        code = self.process.wait(PATIENCE)
        self._leave()
        self._reader.join(PATIENCE)
        return code, self._shown.decode(errors="replace")
