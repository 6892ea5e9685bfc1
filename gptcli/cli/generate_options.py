"""The options of `gptcli generate`, but for those of a file of prompts."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

# By the panel of the help that shows them.
_length = partial(typer.Option, rich_help_panel="Where a text ends")
_follow = partial(typer.Option, rich_help_panel="What can follow")
_run = partial(typer.Option, rich_help_panel="How the model is run")

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
MaxNewTokens = Annotated[int | None, _length("--max-new-tokens", help="Tokens at most.")]
MinNewTokens = Annotated[int | None, _length("--min-new-tokens", help="Tokens at least.")]
Temperature = Annotated[float | None, _follow("--temperature", help="Above 1: bolder; 0: greedy.")]
TopP = Annotated[
    float | None,
    _follow("--top-p", help="Only the likeliest tokens of this probability together."),
]
TopK = Annotated[int | None, _follow("--top-k", help="Only so many of the likeliest tokens; 0: all.")]
MinP = Annotated[
    float | None,
    _follow("--min-p", help="Only tokens with this share of the likeliest token's probability."),
]
RepetitionPenalty = Annotated[float | None, _follow("--repetition-penalty", help="Above 1: repeat less.")]
NoRepeatNgramSize = Annotated[
    int | None,
    _follow("--no-repeat-ngram-size", help="No run of so many tokens comes twice; 0: no such rule."),
]
NumBeams = Annotated[
    int | None,
    _follow("--num-beams", help="Above 1: beam search, where nothing is drawn."),
]
NumReturnSequences = Annotated[int | None, _follow("--num-return-sequences", "-n", help="Texts a prompt.")]
Stop = Annotated[
    list[str] | None,
    _length("--stop", metavar="TEXT", help="A text to stop at (repeatable)."),
]
BadWord = Annotated[
    list[str] | None,
    _follow("--bad-word", metavar="TEXT", help="A text whose tokens never come (repeatable)."),
]
Logprobs = Annotated[
    int | None,
    typer.Option("--logprobs", metavar="N", help="With --json: each token's log-probability, and the N likeliest."),
]
Draft = Annotated[
    str | None,
    _run("--draft", metavar="MODEL", help="A smaller model that proposes tokens; the text stays the same."),
]
PromptLookup = Annotated[
    int | None,
    _run("--prompt-lookup", metavar="N", help="Propose N tokens from the prompt; the text stays the same."),
]
Seed = Annotated[
    int | None,
    _follow("--seed", help="The same seed gives the same texts; default: a new one."),
]
Greedy = Annotated[bool, _follow("--greedy", help="Always the likeliest token.")]
Precision = Annotated[str, _run("--precision", metavar="auto|fp32|bf16", help="Of the model's weights.")]
Chat = Annotated[bool, typer.Option("--chat", help="Talk with the model, in turns; /help there shows the commands.")]
System = Annotated[str | None, typer.Option("--system", metavar="TEXT", help="With --chat: its system prompt.")]
JsonSchema = Annotated[
    str | None,
    _follow("--json-schema", metavar="FILE|JSON", help="Nothing but JSON of this schema can follow."),
]
Regex = Annotated[
    str | None,
    _follow("--regex", metavar="PATTERN", help="Nothing but a match of this expression can follow."),
]
Quantize = Annotated[
    str | None,
    _run("--quantize", metavar="int8|int4", help="Make the weights small in memory (torchao)."),
]
Engine = Annotated[
    str,
    _run("--engine", metavar="transformers|vllm", help="What runs the model; vllm where it is installed."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON line a prompt; with --file one document in the end.")]
