"""`gptcli generate`: texts that go on from prompts, shown while they are made."""

from __future__ import annotations

import os
import stat
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptcli.cli.arguments import Debug, Json, Quiet
from gptcli.reporting import visible

if TYPE_CHECKING:
    from pathlib import Path

    from gptcli.cli.console import Console
    from gptcli.generation.text import Completion, Settings
    from gptcli.recipe.schema import Generate

Model = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="A run's name, a folder or a Hub id; default: the newest run's weights."),
]
Prompt = Annotated[
    list[str] | None,
    typer.Option(
        "--prompt", "-p", metavar="TEXT", help="What the text starts with (repeatable); default: standard input."
    ),
]
MaxNewTokens = Annotated[int | None, typer.Option("--max-new-tokens", help="Tokens at most.")]
MinNewTokens = Annotated[int | None, typer.Option("--min-new-tokens", help="Tokens at least.")]
Temperature = Annotated[float | None, typer.Option("--temperature", help="Above 1: bolder; 0: greedy.")]
TopP = Annotated[float | None, typer.Option("--top-p", help="Only the likeliest tokens of this probability together.")]
TopK = Annotated[int | None, typer.Option("--top-k", help="Only so many of the likeliest tokens; 0: all.")]
RepetitionPenalty = Annotated[float | None, typer.Option("--repetition-penalty", help="Above 1: repeat less.")]
NumReturnSequences = Annotated[int | None, typer.Option("--num-return-sequences", "-n", help="Texts a prompt.")]
Stop = Annotated[list[str] | None, typer.Option("--stop", metavar="TEXT", help="A text to stop at (repeatable).")]
Seed = Annotated[int | None, typer.Option("--seed", help="The same seed gives the same texts; default: a new one.")]
Greedy = Annotated[bool, typer.Option("--greedy", help="Always the likeliest token.")]
Precision = Annotated[str, typer.Option("--precision", metavar="auto|fp32|bf16", help="Of the model's weights.")]
Engine = Annotated[
    str, typer.Option("--engine", metavar="transformers|vllm", help="What runs the model; vllm where it is installed.")
]

DIM, RESET = "\033[2m", "\033[0m"


def generate(
    model: Model = None,
    prompt: Prompt = None,
    max_new_tokens: MaxNewTokens = None,
    min_new_tokens: MinNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    repetition_penalty: RepetitionPenalty = None,
    num_return_sequences: NumReturnSequences = None,
    stop: Stop = None,
    seed: Seed = None,
    greedy: Greedy = False,
    precision: Precision = "auto",
    engine: Engine = "transformers",
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Continue prompts with a model; the newest run's when none is named."""
    del debug
    from gptcli.cli.console import console
    from gptcli.errors import UsageError
    from gptcli.runs.folder import resolve_model

    if precision not in ("auto", "fp32", "bf16"):
        raise UsageError(f"--precision {precision} is not one of auto, fp32, bf16")
    folder = resolve_model(model)
    out = console(json=True, quiet=quiet)  # standard output holds the texts and nothing else
    given = _recipe_section(folder, out)
    prompts = prompt or _piped() or list(given.prompts)
    if not prompts:
        raise UsageError(
            "no prompt", remedy='Give one: gptcli generate --prompt "Once upon a time", or pipe a text in.'
        )
    chosen = {
        "max_new_tokens": max_new_tokens,
        "min_new_tokens": min_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "repetition_penalty": repetition_penalty,
        "num_return_sequences": num_return_sequences,
        "stop": tuple(stop) if stop else None,
    }
    from gptcli.generation.text import complete
    from gptcli.generation.text import settings as make_settings

    settings = make_settings(given, chosen, seed=seed, greedy=greedy)
    settings.check()
    if engine != "transformers":
        return _by_vllm(engine, folder, prompts, settings, precision, out, json=json)
    from gptcli.model.load import load_model, load_tokenizer, memory_errors

    with memory_errors("Try a smaller --max-new-tokens or --num-return-sequences, or --precision bf16."):
        tokenizer = load_tokenizer(folder)
        loaded = load_model(folder, dtype=precision)  # type: ignore[arg-type]
        how = "greedy" if not settings.samples else f"seed {settings.seed}"
        out.say(f"{folder}, {str(loaded.dtype).removeprefix('torch.')} on {loaded.device}, {how}")
        for text in prompts:
            screen = _Screen(out, text, settings, json=json)
            completions = complete(loaded, tokenizer, text, settings, on_text=screen.stream, on_warning=out.warn)
            screen.end(completions)


def _by_vllm(
    engine: str, folder: Path, prompts: list[str], settings: Settings, precision: str, out: Console, *, json: bool
) -> None:
    from gptcli.generation.serve import check_engine, check_folder

    check_engine(engine, "gptcli generate --engine vllm")
    check_folder(folder)
    from gptcli.generation.by_vllm import complete_by_vllm

    for text, completions in zip(prompts, complete_by_vllm(folder, prompts, settings, precision), strict=True):
        screen = _Screen(out, text, settings, json=json)
        if len(completions) == 1:
            screen.stream(completions[0].text)
        screen.end(completions)


class _Screen:
    """Shows one prompt and what follows it."""

    def __init__(self, out: Console, prompt: str, settings: Settings, *, json: bool) -> None:
        self._out = out
        self._prompt = prompt
        self._json = json
        self._streams = settings.num_return_sequences == 1 and not json
        self._terminal = sys.stdout.isatty()
        self._begun = False

    def _show_prompt(self) -> None:
        text = self._safe(self._prompt)
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
            shown: list[dict[str, Any]] = [
                {"text": done.text, "tokens": done.tokens, "finish_reason": done.finish_reason} for done in completions
            ]
            self._out.print_json({"prompt": self._prompt, "completions": shown})
        elif self._streams:
            self.stream("")
            self._out.write("\n")
        else:
            for number, done in enumerate(completions, 1):
                self._out.write(f"[{number}] ")
                self._show_prompt()
                self._out.write(self._safe(done.text) + "\n")


def _recipe_section(folder: Path, out: Console) -> Generate:
    """The `generate` section of the model's run; the schema's defaults for any other model."""
    from gptcli.errors import GptcliError
    from gptcli.recipe.load import load_recipe
    from gptcli.recipe.schema import Generate
    from gptcli.runs.folder import owner

    run = owner(folder)
    if run is not None and run.resolved.is_file():
        try:
            return load_recipe(str(run.resolved)).recipe.generate
        except GptcliError as error:  # written by another version: its settings are lost, its model is not
            out.warn(f"the run's recipe cannot be read, so the usual settings are taken: {error.lines()[0]}")
    return Generate()


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
