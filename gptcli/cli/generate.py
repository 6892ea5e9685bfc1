"""`gptcli generate`: texts that go on from prompts, shown while they are made."""

from __future__ import annotations

import os
import stat
import sys
from typing import TYPE_CHECKING, Any

from gptcli.cli import generate_file as of_file
from gptcli.cli import generate_media as of_media
from gptcli.cli import generate_options as options
from gptcli.cli.arguments import Debug, Quiet
from gptcli.reporting import visible

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from gptcli.cli.console import Console
    from gptcli.data.media.item import Medium
    from gptcli.generation.ready import Asked
    from gptcli.generation.row import Completion
    from gptcli.generation.settings import Settings

DIM, RESET = "\033[2m", "\033[0m"


def generate(
    model: options.Model = None,
    prompt: options.Prompt = None,
    image: of_media.Image = None,
    audio: of_media.Audio = None,
    video: of_media.Video = None,
    allow_urls: of_media.AllowUrls = False,
    file: of_file.File = None,
    output: of_file.Output = None,
    prompt_column: of_file.PromptColumn = None,
    template: of_file.Template = None,
    image_column: of_file.ImageColumn = None,
    audio_column: of_file.AudioColumn = None,
    save_every: of_file.SaveEvery = None,
    processes: of_file.Processes = None,
    overwrite: of_file.Overwrite = False,
    chat: options.Chat = False,
    system: options.System = None,
    max_new_tokens: options.MaxNewTokens = None,
    min_new_tokens: options.MinNewTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    no_repeat_ngram_size: options.NoRepeatNgramSize = None,
    num_beams: options.NumBeams = None,
    num_return_sequences: options.NumReturnSequences = None,
    stop: options.Stop = None,
    bad_word: options.BadWord = None,
    seed: options.Seed = None,
    greedy: options.Greedy = False,
    logprobs: options.Logprobs = None,
    draft: options.Draft = None,
    prompt_lookup: options.PromptLookup = None,
    json_schema: options.JsonSchema = None,
    regex: options.Regex = None,
    precision: options.Precision = "auto",
    quantize: options.Quantize = None,
    engine: options.Engine = "transformers",
    json: options.Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Continue prompts with a model; the newest run's when none is named."""
    del debug
    from gptcli.cli.console import console
    from gptcli.errors import UsageError
    from gptcli.generation.given import recipe_section
    from gptcli.generation.settings import settings as make_settings
    from gptcli.runs.folder import resolve_model

    with_file: dict[str, Any] = {"save_every": save_every, "processes": processes, "overwrite": overwrite}
    with_columns: dict[str, Any] = {"image_column": image_column, "audio_column": audio_column, "template": template}
    rest = with_file | with_columns | {"prompt_column": prompt_column}
    of_file.check_options(file=file, output=output, prompts=bool(prompt), **rest)
    others = {"--json": json, "--prompt": bool(prompt), "-n": num_return_sequences not in (None, 1)}
    _check_chat(chat, others | {"--file": file is not None, "--logprobs": logprobs is not None}, system)
    if logprobs is not None and not json and file is None:
        raise UsageError("--logprobs shows in --json alone", remedy="Add --json.")
    if (image or audio or video) and (file is not None or engine != "transformers"):
        other, remedy = ("--file", "There a column has them.") if file is not None else (f"--engine {engine}", None)
        raise UsageError(f"--image, --audio and --video do not go with {other}", remedy=remedy)
    if engine != "transformers" and (chat or file is not None):
        raise UsageError(f"--engine {engine} is for --prompt", remedy="For a chat: gptcli serve --engine vllm.")
    asked = _asked(precision, quantize, draft, prompt_lookup, json_schema, regex)
    folder = resolve_model(model)
    out = console(json=file is None or json, quiet=quiet)  # standard output holds the texts and nothing else
    given = recipe_section(folder, out.warn)
    media = of_media.given_media(image, audio, video, allow_urls=allow_urls)
    prompts = [] if chat or file is not None else prompt or _piped() or given.get("prompts", []) or [""] * bool(media)
    if not prompts and not chat and file is None:
        raise UsageError(
            "no prompt", remedy='Give one: gptcli generate --prompt "Once upon a time", or pipe a text in.'
        )
    chosen = {
        "max_new_tokens": max_new_tokens,
        "min_new_tokens": min_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "no_repeat_ngram_size": no_repeat_ngram_size,
        "num_beams": num_beams,
        "num_return_sequences": 1 if chat else num_return_sequences,
        "stop": stop or None,
        "bad_words": bad_word or None,
        "logprobs": logprobs,
    }
    settings = make_settings(given, chosen, seed=seed, greedy=greedy)
    settings.check()
    if chat:
        from gptcli.cli.chat import talk

        talk(folder, settings, system or "", asked, media=media, allow_urls=allow_urls, quiet=quiet)
    elif file is not None and output is not None:
        from gptcli.generation.file_prompts import form_of

        columns: dict[Any, list[str] | None] = {"image": image_column, "audio": audio_column}
        form = form_of(prompt_column, template, columns, allow_urls=allow_urls)
        rest = {"seed": seed, "form": form, **with_file}
        of_file.generate_file(file, output, folder=folder, settings=settings, asked=asked, json=json, out=out, **rest)
    elif engine != "transformers":
        _by_vllm(engine, folder, prompts, settings, asked, out, json=json)
    else:
        _complete(folder, prompts, media, settings, asked, out, json=json)


def _asked(
    precision: str,
    quantize: str | None,
    draft: str | None,
    prompt_lookup: int | None,
    json_schema: str | None,
    regex: str | None,
) -> Asked:
    from gptcli.generation.ready import Asked
    from gptcli.runs.folder import resolve_model

    if json_schema is not None:
        from gptcli.generation.constrain import read_schema

        json_schema = read_schema(json_schema)
    of_draft = None if draft is None else resolve_model(draft)
    asked = Asked(precision, quantize, of_draft, prompt_lookup, json_schema, regex)  # type: ignore[arg-type]
    asked.check()
    return asked


def _complete(
    folder: Path, prompts: list[str], media: list[Medium], settings: Settings, asked: Asked, out: Console, *, json: bool
) -> None:
    from gptcli.generation.media_prompt import placed, shown_prompt
    from gptcli.generation.ready import ready
    from gptcli.generation.text import complete
    from gptcli.model.load import load_tokenizer, memory_errors

    with memory_errors("Try a smaller --max-new-tokens or --num-return-sequences, or --precision bf16."):
        asked_for: Sequence[str | list[int]] = prompts
        seen, more = prompts, {}
        if media:  # what is wrong with them is said before the weights are read
            reader = of_media.reader_for(folder, (medium.modality for medium in media))
            more = {"tokenizer": load_tokenizer(folder)}
            asked_for = of_media.prompts_with(reader, more["tokenizer"], prompts, media)
            seen = [shown_prompt(*placed(prompt, media)) for prompt in prompts]
        else:
            of_media.check_texts(folder, prompts)
        it = ready(folder, asked, out.say, **more)
        out.say(f"{folder}, {it.made_on}, {settings.how}")
        if "constraint" in it.beside and settings.stop:
            out.warn("stop texts are not used: they could cut a constrained output before it is whole")
        for text, shown, ids in zip(prompts, seen, asked_for, strict=True):
            screen = _Screen(out, text, settings, json=json, shown=shown)
            beside = it.beside | ({"reader": reader} if media else {})
            done = complete(it.model, it.tokenizer, ids, settings, on_text=screen.stream, on_warning=out.warn, **beside)
            screen.end(done)
            if "constraint" in it.beside and any(one.finish_reason == "length" for one in done):
                out.warn("the tokens ran out before the output was whole: give more by --max-new-tokens")


def _by_vllm(
    engine: str, folder: Path, prompts: list[str], settings: Settings, asked: Asked, out: Console, *, json: bool
) -> None:
    from gptcli.errors import UsageError
    from gptcli.generation.serve import check_engine, check_folder

    if asked.quantize is not None or asked.draft is not None or asked.prompt_lookup is not None:
        raise UsageError(f"--engine {engine} goes with neither --quantize, nor --draft, nor --prompt-lookup")
    check_engine(engine, "gptcli generate --engine vllm")
    check_folder(folder, engine)
    from gptcli.generation.by_vllm import complete_by_vllm

    every = complete_by_vllm(
        folder, prompts, settings, asked.precision, json_schema=asked.json_schema, regex=asked.regex
    )
    for text, completions in zip(prompts, every, strict=True):
        screen = _Screen(out, text, settings, json=json)
        if len(completions) == 1:
            screen.stream(completions[0].text)
        screen.end(completions)


def _check_chat(chat: bool, others: dict[str, bool], system: str | None) -> None:
    """Refuse what has no meaning in a chat, and what has one nowhere else."""
    from gptcli.errors import UsageError

    if system is not None and not chat:
        raise UsageError("--system is for --chat", remedy="Elsewhere what the model should know is part of the prompt.")
    for name in (name for name, given in others.items() if given and chat):
        raise UsageError(f"--chat and {name} exclude each other")


class _Screen:
    """Shows one prompt and what follows it."""

    def __init__(self, out: Console, prompt: str, settings: Settings, *, json: bool, shown: str | None = None) -> None:
        self._out = out
        self._prompt = prompt
        self._shown = prompt if shown is None else shown
        self._json = json
        self._streams = settings.num_return_sequences == 1 and not json
        self._terminal = sys.stdout.isatty()
        self._begun = False

    def _show_prompt(self) -> None:
        text = self._safe(self._shown)
        self._begun = True
        self._out.write(f"{DIM}{text}{RESET}" if self._terminal and text else text)

    def _safe(self, text: str) -> str:
        return visible(text) if self._terminal else text

    def stream(self, text: str) -> None:
        """Show a piece at once; the prompt before the first one, when it is known to fit the model."""
        if self._streams:
            if not self._begun:
                self._show_prompt()
            self._out.write(self._safe(text))

    def end(self, completions: list[Completion]) -> None:
        """Show what was not streamed."""
        if self._json:
            shown = [done.as_json() for done in completions]
            self._out.print_json({"prompt": self._prompt, "completions": shown})
        elif self._streams:
            self.stream("")
            self._out.write("\n")
        else:
            for number, done in enumerate(completions, 1):
                self._out.write(f"[{number}] ")
                self._show_prompt()
                self._out.write(self._safe(done.text) + "\n")


def _piped() -> list[str]:
    """Standard input as one prompt, without its last new line, when it is a pipe or a file with something in it."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError, AttributeError):
        return []
    if not (stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)):
        return []
    text = sys.stdin.buffer.read().decode("utf-8", "replace")
    return [text.removesuffix("\n").removesuffix("\r")] if text.strip() else []
