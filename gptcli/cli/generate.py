"""`gptcli generate`: texts that go on from prompts, shown while they are made."""

from __future__ import annotations

import os
import stat
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptcli.cli.arguments import Debug, Json, Quiet
from gptcli.cli.generate_file import File, Output, Overwrite, Processes, PromptColumn, SaveEvery
from gptcli.reporting import visible

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from gptcli.cli.console import Console
    from gptcli.generation.row import Completion
    from gptcli.generation.settings import Settings
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
MinP = Annotated[
    float | None, typer.Option("--min-p", help="Only tokens with this share of the likeliest token's probability.")
]
RepetitionPenalty = Annotated[float | None, typer.Option("--repetition-penalty", help="Above 1: repeat less.")]
NoRepeatNgramSize = Annotated[
    int | None, typer.Option("--no-repeat-ngram-size", help="No run of so many tokens comes twice; 0: no such rule.")
]
NumBeams = Annotated[int | None, typer.Option("--num-beams", help="Above 1: beam search, where nothing is drawn.")]
NumReturnSequences = Annotated[int | None, typer.Option("--num-return-sequences", "-n", help="Texts a prompt.")]
Stop = Annotated[list[str] | None, typer.Option("--stop", metavar="TEXT", help="A text to stop at (repeatable).")]
BadWord = Annotated[
    list[str] | None, typer.Option("--bad-word", metavar="TEXT", help="A text whose tokens never come (repeatable).")
]
Logprobs = Annotated[
    int | None,
    typer.Option("--logprobs", metavar="N", help="With --json: each token's log-probability, and the N likeliest."),
]
Draft = Annotated[
    str | None,
    typer.Option("--draft", metavar="MODEL", help="A smaller model that proposes tokens; the text stays the same."),
]
PromptLookup = Annotated[
    int | None,
    typer.Option("--prompt-lookup", metavar="N", help="Propose N tokens from the prompt; the text stays the same."),
]
Seed = Annotated[int | None, typer.Option("--seed", help="The same seed gives the same texts; default: a new one.")]
Greedy = Annotated[bool, typer.Option("--greedy", help="Always the likeliest token.")]
Precision = Annotated[str, typer.Option("--precision", metavar="auto|fp32|bf16", help="Of the model's weights.")]

DIM, RESET = "\033[2m", "\033[0m"


def generate(
    model: Model = None,
    prompt: Prompt = None,
    file: File = None,
    output: Output = None,
    prompt_column: PromptColumn = None,
    save_every: SaveEvery = None,
    processes: Processes = None,
    overwrite: Overwrite = False,
    max_new_tokens: MaxNewTokens = None,
    min_new_tokens: MinNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    no_repeat_ngram_size: NoRepeatNgramSize = None,
    num_beams: NumBeams = None,
    num_return_sequences: NumReturnSequences = None,
    stop: Stop = None,
    bad_word: BadWord = None,
    logprobs: Logprobs = None,
    draft: Draft = None,
    prompt_lookup: PromptLookup = None,
    seed: Seed = None,
    greedy: Greedy = False,
    precision: Precision = "auto",
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Continue prompts with a model; the newest run's when none is named."""
    del debug
    from gptcli.cli.console import console
    from gptcli.cli.generate_file import check_options, generate_file
    from gptcli.errors import UsageError
    from gptcli.runs.folder import resolve_model

    with_file: dict[str, Any] = {"save_every": save_every, "processes": processes, "overwrite": overwrite}
    check_options(file=file, output=output, prompts=bool(prompt), prompt_column=prompt_column, **with_file)
    if precision not in ("auto", "fp32", "bf16"):
        raise UsageError(f"--precision {precision} is not one of auto, fp32, bf16")
    folder = resolve_model(model)
    out = console(json=file is None or json, quiet=quiet)  # standard output holds the texts and nothing else
    given = _recipe_section(folder, out)
    prompts = [] if file is not None else prompt or _piped() or list(given.prompts)
    if not prompts and file is None:
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
        "num_return_sequences": num_return_sequences,
        "stop": stop or None,
        "bad_words": bad_word or None,
        "logprobs": logprobs,
    }
    from gptcli.generation.settings import settings as make_settings

    settings = make_settings(given, chosen, seed=seed, greedy=greedy)
    settings.check()
    if logprobs is not None and not json and file is None:
        raise UsageError("--logprobs shows in --json alone", remedy="Add --json.")
    if draft is not None and prompt_lookup is not None:
        raise UsageError("--draft and --prompt-lookup are two ways to one end", remedy="Leave one of them out.")
    if file is not None and output is not None:
        how: dict[str, Any] = {"seed": seed, "precision": precision, "column": prompt_column, **with_file}
        how |= {"draft": draft, "prompt_lookup": prompt_lookup}
        generate_file(file, output, folder=folder, settings=settings, json=json, out=out, **how)
        return
    from gptcli.generation.text import complete
    from gptcli.model.load import load_model, load_tokenizer, memory_errors

    with memory_errors("Try a smaller --max-new-tokens or --num-return-sequences, or --precision bf16."):
        tokenizer = load_tokenizer(folder)
        loaded = load_model(folder, dtype=precision)  # type: ignore[arg-type]
        out.say(f"{folder}, {str(loaded.dtype).removeprefix('torch.')} on {loaded.device}, {settings.how}")
        proposing = prompt_lookup if draft is None else load_draft(draft, tokenizer, precision)
        for text in prompts:
            screen = _Screen(out, text, settings, json=json)
            completions = complete(
                loaded, tokenizer, text, settings, on_text=screen.stream, on_warning=out.warn, draft=proposing
            )
            screen.end(completions)


def load_draft(name: str, tokenizer: PreTrainedTokenizerBase, precision: str) -> PreTrainedModel:
    """The model that proposes tokens; one of another vocabulary would propose other texts."""
    from gptcli.errors import UsageError
    from gptcli.model.load import load_model, load_tokenizer
    from gptcli.runs.folder import resolve_model

    folder = resolve_model(name)
    if load_tokenizer(folder).get_vocab() != tokenizer.get_vocab():
        raise UsageError(
            "the draft's tokenizer is not the model's",
            where=str(folder),
            remedy="A draft proposes tokens, so both need the same vocabulary: train it with tokenizer: {from: MODEL}.",
        )
    return load_model(folder, dtype=precision)  # type: ignore[arg-type]


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
