"""`gptcli generate --chat`: a chat in a terminal, and from a pipe one message a line.

The answers are all that goes to standard output; everything else goes to standard error. What was typed is read by
prompt_toolkit: it edits lines of any script, and keeps a paste of several lines together. In a terminal an error is
told and the chat goes on; in a script it ends the command.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import termios
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from gptcli.cli.console import Console, print_error
from gptcli.errors import DataError, GptcliError, UsageError
from gptcli.generation import chat as chats
from gptcli.generation import window as windows
from gptcli.reporting import visible

if TYPE_CHECKING:
    from gptcli.generation.ready import Asked, Ready
    from gptcli.generation.settings import Settings

MOST_LINE_BYTES = 64 << 20
NOTHING_TYPED = "nothing typed"
REMEDY = "Try a smaller max_new_tokens, /reset, or --precision bf16."


def talk(folder: Path, settings: Settings, system: str, asked: Asked, *, quiet: bool) -> None:
    """Talk with the model of a folder until the user ends it."""
    from gptcli.generation.carried import stop_at_end_of_turn
    from gptcli.generation.ready import ready
    from gptcli.model.load import load_tokenizer, memory_errors

    if sys.stdin is None:
        raise UsageError("standard input is closed, so there is nobody to talk with")
    out = Console(json_output=True, quiet=quiet)
    tokenizer = load_tokenizer(folder)
    windows.check_system(tokenizer, system, str(folder))
    with memory_errors(REMEDY):
        it = ready(folder, asked, out.say, tokenizer=tokenizer)
    stop_at_end_of_turn(it.model, it.tokenizer)
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    out.say(f"{folder}, {it.made_on}, {settings.how}")
    if not windows.has_template(it.tokenizer):
        out.say("this model has no chat template: it continues the text so far (an empty message: it goes on)")
    if terminal:
        out.say("/help shows the commands; Ctrl+C stops an answer, Ctrl+D ends the chat")
    _Session(it, chats.Chat(settings, chats.message_of(f" {system}")[1:]), folder, terminal).run()


class _Session:
    """The chat while it runs: what it has come to, and where it is read from and shown."""

    def __init__(
        self,
        it: Ready,
        chat: chats.Chat,
        folder: Path,
        terminal: bool,
    ) -> None:
        self._model, self._tokenizer, self._beside = it.model, it.tokenizer, it.beside
        self._chat = chat
        self._folder = str(folder)
        self._terminal = terminal
        self._out = Console(json_output=True, quiet=False)  # what was asked for is shown with --quiet too
        self._left_out = windows.Window([])
        self._terminated = False
        self._armed = False

    def run(self) -> None:
        """Read and answer until the end of the input, or /quit."""
        before = {signal.SIGTERM: signal.signal(signal.SIGTERM, self._terminate)}
        if self._terminal:
            before[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
        try:
            with _nothing_lost() if self._terminal else contextlib.nullcontext():
                self._loop(_keyboard() if self._terminal else _line)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _terminate(self, number: int, frame: object) -> NoReturn:
        """SIGTERM ends the chat, also in the middle of an answer, where Ctrl+C ends that alone."""
        del number, frame
        self._terminated = True
        raise KeyboardInterrupt

    def _interrupt(self, number: int, frame: object) -> None:
        """Ctrl+C ends what is being done, once, however often it is pressed; at the prompt it is a key of its own.

        Between the two it is nothing: an interrupt where the terminal changes hands would end the program.
        """
        del number, frame
        if self._armed:
            self._armed = False
            raise KeyboardInterrupt

    def _loop(self, read: Callable[[], str]) -> None:
        while True:
            try:
                text = read()
                self._armed = True
                goes_on = self._take(text)
                self._armed = False
                if not goes_on:
                    return
            except EOFError:
                return
            except GptcliError as error:
                self._armed = False
                if not self._terminal:
                    raise
                print_error(error)
            except KeyboardInterrupt as interrupt:
                if self._terminated or not self._terminal:
                    raise
                if interrupt.args == (NOTHING_TYPED,):
                    self._out.say("Ctrl+D or /quit ends the chat")

    def _take(self, text: str) -> bool:
        """Do a command or answer a message; whether the chat goes on."""
        command = chats.command_of(text)
        if command is not None:
            return self._command(*command)
        said = chats.message_of(text)
        base = not windows.has_template(self._tokenizer)
        if said.strip() or (base and self._terminal):
            self._answer(said, self._chat)
        return True

    def _answer(self, said: str, before: chats.Chat) -> None:
        """Answer a message after the chat `before` it; what is said until Ctrl+C is part of the chat.

        Where nothing was said, the chat stays as it was.
        """
        from gptcli.generation.text import complete
        from gptcli.model.load import context_length, memory_errors

        drawn, settings = before.drawn()
        pieces: list[str] = []

        def show(piece: str) -> None:
            if self._terminal and not self._armed:
                raise KeyboardInterrupt  # again: what was raised was lost on its way
            pieces.append(piece)
            self._out.write(visible(piece) if self._terminal else piece)

        try:
            with memory_errors(REMEDY), _unseen_typing() if self._terminal else contextlib.nullcontext():
                seen = windows.window(self._tokenizer, before, said, context_length(self._model), self._folder)
                self._tell_left_out(seen)
                done = complete(
                    self._model,
                    self._tokenizer,
                    seen.ids,
                    settings,
                    on_text=show,
                    on_warning=self._out.warn,
                    **self._beside,
                )[0]
            # The last token may be a part of a character: shown as such, and no text to go on from.
            whole = done.text.rstrip("\ufffd") if done.finish_reason == "length" else done.text
            self._chat = drawn.answered(said, whole)
        except BaseException as error:
            if pieces:
                self._chat = drawn.answered(said, "".join(pieces))
                self._out.write("\n")
            if isinstance(error, KeyboardInterrupt) and self._terminal and not self._terminated:
                with contextlib.suppress(termios.error):  # the terminal is gone
                    termios.tcflush(sys.stdin, termios.TCIFLUSH)  # what was typed for later goes, as at any Ctrl+C
                self._out.say(f"[interrupted{'' if pieces else ' before the answer began: the chat is as it was'}]")
            raise
        self._out.write("\n")
        if done.finish_reason == "length":
            more = "" if windows.has_template(self._tokenizer) or not self._terminal else "Enter: go on; "
            self._out.say(f"[cut at {done.tokens} tokens; {more}/set max_new_tokens={2 * settings.max_new_tokens}]")

    def _tell_left_out(self, seen: windows.Window) -> None:
        """Say what the model does not see, when that has changed."""
        last, self._left_out = self._left_out, seen
        if seen.turns_left_out and seen.turns_left_out != last.turns_left_out:
            self._out.say(f"[the model's context is full: it does not see the oldest {seen.turns_left_out} turns]")
        if seen.tokens_left_out:
            self._out.say(f"[the model's context is full: it sees only the last {len(seen.ids)} tokens of the text]")

    def _command(self, name: str, argument: str) -> bool:
        if name == "help":
            width = max(len(f"/{key} {wanted}") for key, (wanted, _) in chats.COMMANDS.items())
            for key, (wanted, what) in chats.COMMANDS.items():
                self._out.say(f"{f'/{key} {wanted}':<{width}}  {what}")
            self._out.say("Alt+Enter begins a new line; a paste may hold several.")
        elif name == "set":
            self._set(argument)
        elif name == "system":
            self._system(argument)
        elif name == "reset":
            self._chat = replace(self._chat, turns=())
            self._out.say("[all messages are forgotten]")
        elif name == "undo":
            said = self._chat.turns[-1].said if self._chat.turns else ""
            self._chat = self._chat.undone()
            self._out.say(f"[taken back: {_short(said)}]")
        elif name == "retry":
            before = self._chat.undone()
            self._answer(self._chat.turns[-1].said, before)
        elif name == "save":
            self._save(argument)
        elif name == "load":
            self._load(argument)
        return name != "quit"

    def _set(self, argument: str) -> None:
        if argument:
            self._chat = replace(self._chat, settings=chats.with_setting(self._chat.settings, argument))
        shown = chats.shown_settings(self._chat.settings)
        key = argument.partition("=")[0].strip()
        for name in [key] if argument else shown:
            self._out.say(f"{name}={_yaml(shown[name])}")

    def _system(self, argument: str) -> None:
        if argument:
            text = chats.message_of(f" {argument}")[1:]
            system = "" if text in ('""', "''") else text
            windows.check_system(self._tokenizer, system, self._folder)
            self._chat = replace(self._chat, system=system)
        system = self._chat.system
        self._out.say(f"system prompt: {system}" if system else "there is no system prompt")

    def _save(self, argument: str) -> None:
        from gptcli.errors import writing
        from gptcli.files import write_json

        path = _path("/save", argument)
        if path.exists():
            try:
                chats.read_saved(path, self._chat.settings)
            except GptcliError:
                raise UsageError("exists and is no saved chat, so it is not written over", where=str(path)) from None
        with writing(path, "the chat", "Nothing of it is lost."):
            write_json(path, chats.saved(self._chat, self._folder))
        self._out.say(f"saved {len(self._chat.turns)} messages and their answers to {path}")

    def _load(self, argument: str) -> None:
        path = _path("/load", argument)
        found = chats.read_saved(path, self._chat.settings)
        windows.check_system(self._tokenizer, found.system, self._folder)
        self._chat = replace(found, answers=max(found.answers, self._chat.answers))
        self._out.say(f"loaded {len(found.turns)} messages and their answers from {path}")


def _path(command: str, argument: str) -> Path:
    if not argument:
        raise UsageError(f"{command} needs a file", remedy=f"for example {command} chat.json")
    try:
        return Path(argument).expanduser()
    except RuntimeError as error:  # ~nobody
        raise UsageError(str(error)) from None


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:59]}\u2026"


def _yaml(value: object) -> str:
    import json

    return json.dumps(value, ensure_ascii=False)


def _keyboard() -> Callable[[], str]:
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


def _line() -> str:
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


def _nothing_lost() -> contextlib.AbstractContextManager[None]:
    """Ctrl+C throws nothing away: by itself it takes back what was written and has not been shown yet."""
    return _terminal_with(lambda modes: modes | termios.NOFLSH)


def _unseen_typing() -> contextlib.AbstractContextManager[None]:
    """Keys that are pressed while an answer is shown wait for the next prompt, and are not shown in its middle."""
    return _terminal_with(lambda modes: modes & ~termios.ECHO)
