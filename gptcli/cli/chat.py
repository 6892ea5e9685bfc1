"""`gptcli generate --chat`: a chat in a terminal, and from a pipe one message a line.

The answers are all that goes to standard output; everything else goes to standard error. What was typed is read by
prompt_toolkit: it edits lines of any script, and keeps a paste of several lines together. In a terminal an error is
told and the chat goes on; in a script it ends the command.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import termios
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from gptcli.cli.console import Console, print_error
from gptcli.cli.keyboard import NOTHING_TYPED, keyboard, line, nothing_lost, unseen_typing
from gptcli.data.media.item import MODALITIES, Medium, Modality, media_in, place_of, shown_media
from gptcli.data.media.reference import Reach
from gptcli.errors import GptcliError, UsageError
from gptcli.generation import chat as chats
from gptcli.generation import window as windows
from gptcli.generation.media_prompt import check_reads, media_errors, shown_prompt, size_of
from gptcli.reporting import visible

if TYPE_CHECKING:
    from gptcli.data.media.reader import MediaReader
    from gptcli.generation.ready import Asked, Ready
    from gptcli.generation.settings import Settings

REMEDY = "Try a smaller max_new_tokens, /reset, or --precision bf16."


def talk(
    folder: Path,
    settings: Settings,
    system: str,
    asked: Asked,
    *,
    media: Sequence[Medium] = (),
    allow_urls: bool = False,
    quiet: bool,
) -> None:
    """Talk with the model of a folder until the user ends it; `media` belong to the first message."""
    from gptcli.generation.carried import stop_at_end_of_turn
    from gptcli.generation.media_prompt import model_reader
    from gptcli.generation.ready import ready
    from gptcli.model.load import load_tokenizer, memory_errors

    if sys.stdin is None:
        raise UsageError("standard input is closed, so there is nobody to talk with")
    out = Console(json_output=True, quiet=quiet)
    tokenizer = load_tokenizer(folder)
    reader = model_reader(folder)
    if reader is not None and not tokenizer.chat_template:  # processors may have it in a file of their own
        tokenizer.chat_template = getattr(reader.processor, "chat_template", None)
    windows.check_system(tokenizer, system, str(folder), reader)
    with memory_errors(REMEDY):
        it = ready(folder, asked, out.say, tokenizer=tokenizer)
    stop_at_end_of_turn(it.model, it.tokenizer, None if reader is None else reader.tokens)
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    out.say(f"{folder}, {it.made_on}, {settings.how}")
    if not windows.has_template(it.tokenizer):
        out.say("this model has no chat template: it continues the text so far (an empty message: it goes on)")
    if terminal:
        out.say("/help shows the commands; Ctrl+C stops an answer, Ctrl+D ends the chat")
    session = _Session(
        it, chats.Chat(settings, chats.message_of(f" {system}")[1:]), folder, terminal, reader, allow_urls
    )
    for medium in media:
        session.attach(medium)
    session.run()


class _Session:
    """The chat while it runs: what it has come to, and where it is read from and shown."""

    def __init__(
        self,
        it: Ready,
        chat: chats.Chat,
        folder: Path,
        terminal: bool,
        reader: MediaReader | None = None,
        allow_urls: bool = False,
    ) -> None:
        self._model, self._tokenizer, self._beside = it.model, it.tokenizer, it.beside
        self._chat = chat
        self._folder = str(folder)
        self._terminal = terminal
        self._reader, self._allow_urls = reader, allow_urls
        self._attached: list[Medium] = []  # of the next message
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
            with nothing_lost() if self._terminal else contextlib.nullcontext():
                self._loop(keyboard() if self._terminal else line)
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
        if said.strip() or self._attached or (base and self._terminal):
            chat, between = self._chat, "\n" if base else ""
            places = "".join(place_of(medium.modality) + between for medium in self._attached)
            try:
                self._answer(places + said, chat, tuple(self._attached))
            finally:
                if self._chat is not chat:
                    self._attached = []
        return True

    def _answer(self, said: str, before: chats.Chat, media: tuple[Medium, ...]) -> None:
        """Answer a message with its media after the chat `before` it; what is said until Ctrl+C is part of the chat.

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
            unseen = unseen_typing() if self._terminal else contextlib.nullcontext()
            with memory_errors(REMEDY), media_errors(), unseen:
                with_media: dict[str, Any] = {"media": media, "reader": self._reader}
                context = context_length(self._model)
                seen = windows.window(self._tokenizer, before, said, context, self._folder, **with_media)
                self._tell_left_out(seen)
                done = complete(
                    self._model,
                    self._tokenizer,
                    seen.ids,
                    settings,
                    on_text=show,
                    on_warning=self._out.warn,
                    reader=self._reader,
                    **self._beside,
                )[0]
            # The last token may be a part of a character: shown as such, and no text to go on from.
            whole = done.text.rstrip("\ufffd") if done.finish_reason == "length" else done.text
            self._chat = drawn.answered(said, whole, media)
        except BaseException as error:
            if pieces:
                self._chat = drawn.answered(said, "".join(pieces), media)
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
            self._chat, self._attached = replace(self._chat, turns=()), []
            self._out.say("[all messages are forgotten]")
        elif name == "undo":
            self._undo()
        elif name in MODALITIES:
            self._attach(name, argument)
        elif name == "retry":
            before = self._chat.undone()
            self._answer(self._chat.turns[-1].said, before, self._chat.turns[-1].media)
        elif name == "save":
            self._save(argument)
        elif name == "load":
            self._load(argument)
        return name != "quit"

    def _undo(self) -> None:
        """Take back what came last: media that no message was written to yet, else the last message."""
        if self._attached:
            self._out.say(f"[taken back: {shown_media(self._attached)}]")
            self._attached = []
            return
        last = self._chat.turns[-1:]
        self._chat = self._chat.undone()
        self._out.say(f"[taken back: {''.join(_short(shown_prompt(turn.said, turn.media)) for turn in last)}]")

    def _attach(self, kind: Modality, argument: str) -> None:
        name = str(_path(f"/{kind}", argument)) if "://" not in argument else argument
        reach = Reach(Path.cwd(), allow_outside=True, allow_urls=self._allow_urls, urls_by=chats.BY)
        with media_errors():
            for medium in media_in(name, kind, reach):
                self.attach(medium)

    def attach(self, medium: Medium) -> None:
        """Let the next message have a medium; it is read at once, so that what is wrong is told now."""
        reader = check_reads(self._reader, self._folder, medium.modality)
        with media_errors():
            shown = size_of(reader, medium)
        self._attached.append(medium)
        self._out.say(f"[{shown_media([medium])}, {shown}]")

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
            windows.check_system(self._tokenizer, system, self._folder, self._reader)
            self._chat = replace(self._chat, system=system)
        system = self._chat.system
        self._out.say(f"system prompt: {system}" if system else "there is no system prompt")

    def _save(self, argument: str) -> None:
        from gptcli.errors import writing
        from gptcli.files import write_json

        path = _path("/save", argument)
        if path.exists():
            try:
                chats.read_saved(path, self._chat.settings, allow_urls=True)
            except GptcliError:
                raise UsageError("exists and is no saved chat, so it is not written over", where=str(path)) from None
        with writing(path, "the chat", "Nothing of it is lost."):
            write_json(path, chats.saved(self._chat, self._folder))
        self._out.say(f"saved {len(self._chat.turns)} messages and their answers to {path}")

    def _load(self, argument: str) -> None:
        path = _path("/load", argument)
        found = chats.read_saved(path, self._chat.settings, allow_urls=self._allow_urls)
        for medium in (medium for turn in found.turns for medium in turn.media):
            check_reads(self._reader, self._folder, medium.modality)
        windows.check_system(self._tokenizer, found.system, self._folder, self._reader)
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
