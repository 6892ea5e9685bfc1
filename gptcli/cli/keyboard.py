"""What is typed: lines of a terminal, edited by prompt_toolkit, or of a pipe; and what a terminal does meanwhile."""

from __future__ import annotations

import contextlib
import os
import sys
import termios
from collections.abc import Callable, Iterator

from gptcli.errors import DataError

MOST_LINE_BYTES = 64 << 20
NOTHING_TYPED = "nothing typed"


def keyboard() -> Callable[[], str]:
    """A function that reads a message from the terminal; Enter ends it, a paste may hold several lines."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output.vt100 import Vt100_Output
    from prompt_toolkit.utils import is_dumb_terminal

    if is_dumb_terminal():
        return lambda: input("> ")
    keys = KeyBindings()

    @keys.add("enter")
    def _end(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    screen = Vt100_Output.from_pty(sys.stdout, term=os.environ.get("TERM"), enable_bell=False)
    # Where the cursor is needs no answer of the terminal here, and one that comes late would be shown as text.
    screen.enable_cpr = False
    session: PromptSession[str] = PromptSession(
        "> ", multiline=True, key_bindings=keys, output=screen, reserve_space_for_menu=0, prompt_continuation="  "
    )

    def read() -> str:
        try:
            return session.prompt(handle_sigint=False)  # Ctrl+C is a key here; the signal has its own handler
        except KeyboardInterrupt as interrupt:
            screen.disable_bracketed_paste()  # SIGTERM comes from outside of the session, which leaves it on
            screen.flush()
            if not session.default_buffer.text:
                interrupt.args = (NOTHING_TYPED,)
            raise

    return read


def line() -> str:
    """A line of standard input, without its end. Raises `EOFError` where there is no more."""
    raw = sys.stdin.buffer.readline(MOST_LINE_BYTES)
    if not raw:
        raise EOFError
    if len(raw) == MOST_LINE_BYTES:
        raise DataError(f"a line of standard input has more than {MOST_LINE_BYTES >> 20} MiB")
    return raw.decode("utf-8", "replace").removesuffix("\n").removesuffix("\r")


@contextlib.contextmanager
def _terminal_with(local: Callable[[int], int]) -> Iterator[None]:
    """A terminal whose local modes (termios' `lflag`) are changed; left as it was, however this ends."""
    before = termios.tcgetattr(sys.stdin)
    changed = [*before]
    changed[3] = local(before[3])
    termios.tcsetattr(sys.stdin, termios.TCSANOW, changed)
    try:
        yield
    finally:
        with contextlib.suppress(termios.error):  # it is gone
            termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


def nothing_lost() -> contextlib.AbstractContextManager[None]:
    """Ctrl+C throws nothing away: by itself it takes back what was written and has not been shown yet."""
    return _terminal_with(lambda modes: modes | termios.NOFLSH)


def unseen_typing() -> contextlib.AbstractContextManager[None]:
    """Keys that are pressed while an answer is shown wait for the next prompt, and are not shown in its middle."""
    return _terminal_with(lambda modes: modes & ~termios.ECHO)
