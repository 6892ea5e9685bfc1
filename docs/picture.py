"""Make docs/run.svg, the README's picture, from a real run in a real (pseudo-)terminal.

    make install && .venv/bin/pip install pyte && .venv/bin/python docs/picture.py

The commands of `make demo` run one after the other; what the terminal shows half way through training and at the end is
drawn by rich. Takes as long as the demo.
"""

from __future__ import annotations

import io
import os
import pty
import select
import subprocess
import sys
import tempfile
from pathlib import Path

import pyte
from rich.console import Console
from rich.style import Style
from rich.text import Text

COLUMNS, LINES = 104, 60
COMMANDS = (
    ["gptcli", "pretrain", "quickstart"],
    ["gptcli", "eval"],
    ["gptcli", "generate", "--prompt", "The str.join() method", "--seed", "1"],
)
TARGET = Path(__file__).parent / "run.svg"


def main() -> None:
    """Run the commands, write the picture."""
    screen = pyte.Screen(COLUMNS, LINES)
    stream = pyte.ByteStream(screen)
    with tempfile.TemporaryDirectory() as folder:
        for command in COMMANDS:
            stream.feed(b"\x1b[1;32m$\x1b[0m " + " ".join(map(quoted, command)).encode() + b"\r\n")
            run(command, Path(folder), stream)
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    rows = [row(screen, number) for number in range(LINES)]
    while rows and not rows[-1].plain.strip():
        rows.pop()
    for text in rows:
        console.print(text, no_wrap=True, crop=True)
    console.save_svg(str(TARGET), title="gptcli")
    print(TARGET)


def run(command: list[str], folder: Path, stream: pyte.ByteStream) -> None:
    """Run a command in a pseudo-terminal and feed what it prints to the screen."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "LINES": str(LINES), "TERM": "xterm-256color"}
    program = [str(Path(sys.executable).parent / command[0]), *command[1:]]
    process = subprocess.Popen(
        program, cwd=folder, stdin=follower, stdout=follower, stderr=follower, env=environment, close_fds=True
    )
    os.close(follower)
    while True:
        ready, _, _ = select.select([leader], [], [], 0.2)
        if ready:
            try:
                data = os.read(leader, 65536)
            except OSError:
                break
            if not data:
                break
            stream.feed(data)
        elif process.poll() is not None:
            break
    os.close(leader)
    if process.wait() != 0:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")


def quoted(argument: str) -> str:
    """An argument as it would be typed."""
    return f'"{argument}"' if " " in argument else argument


def row(screen: pyte.Screen, number: int) -> Text:
    """A line of the screen with its colours."""
    text = Text()
    for column in range(COLUMNS):
        cell = screen.buffer[number][column]
        colour = (
            None if cell.fg == "default" else f"#{cell.fg}" if len(cell.fg) == 6 else cell.fg.replace("brown", "yellow")
        )
        text.append(cell.data, Style(color=colour, bold=cell.bold, reverse=cell.reverse))
    text.rstrip()
    return text


if __name__ == "__main__":
    main()
