"""`gptcli tokenize`: turn a recipe's sources into verified token shards, and say what is in them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptcli.cli.arguments import Debug, Json, Overrides, Quiet, RecipeArgument, Smoke, Verify

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gptcli.cli.console import Console
    from gptcli.data.media.item import Medium
    from gptcli.data.preview import Shown
    from gptcli.data.tokenize import Prepared
    from gptcli.recipe.load import LoadedRecipe


OPEN, CLOSE = "⟦", "⟧"  # around what is trained on


def tokenize(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    preview: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Show N documents as tokens, in colour, and write nothing.")
    ] = None,
    verify: Verify = False,
    piece: Annotated[
        str | None, typer.Option(metavar="I/N", help="Do the I-th of N parts only: one task of a job array.")
    ] = None,
    finish: Annotated[bool, typer.Option("--finish", help="Put together what all --piece tasks did.")] = False,
    smoke: Smoke = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train the tokenizer if the recipe asks for it, write verified token shards, print the data report."""
    del debug
    from gptcli.errors import UsageError
    from gptcli.recipe.availability import check_available
    from gptcli.recipe.load import load_recipe

    modes = {"--preview": preview, "--piece": piece, "--finish": finish, "--smoke": smoke}
    if len(given := [name for name, value in modes.items() if value]) > 1:
        raise UsageError(f"{' and '.join(given)} exclude each other")
    share = _share(piece)
    loaded = load_recipe(recipe, overrides or ())
    check_available(loaded, "tokenize")
    loaded.require("tokenize", "data")

    from gptcli.cli.console import console

    out = console(json=json, quiet=quiet)
    result: dict[str, Any]
    if smoke:
        from gptcli.train.smoke import smoke_run

        result = smoke_run(recipe, overrides or (), "tokenize", out)
    elif preview:
        result = _preview(loaded, preview, out, json=json)
    elif share is not None:
        result = _do_share(loaded, share, out)
    else:
        from gptcli.data.tokenize import finish_shares, prepare
        from gptcli.model.media import media_model

        media = media_model(loaded)
        if finish:
            prepared = finish_shares(loaded, out, media=media)
        else:
            prepared = prepare(loaded, out, verify=verify or None, media=media)
        result = _result(prepared)
        if not json:
            _print(prepared, out)
    if json:
        out.print_json(result)


def _share(piece: str | None) -> tuple[int, int] | None:
    """The (i, n) of "I/N"."""
    from gptcli.errors import UsageError

    if piece is None:
        return None
    index, slash, count = piece.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise UsageError(f"--piece {piece} is not I/N with 1 <= I <= N", remedy="For example: --piece 3/16")
    return int(index), int(count)


def _do_share(loaded: LoadedRecipe, share: tuple[int, int], out: Console) -> dict[str, Any]:
    from gptcli.data.tokenize import prepare_share
    from gptcli.model.media import media_model

    result = prepare_share(loaded, out, share, media=media_model(loaded))
    done = result["pieces"] - result["missing"]
    out.say(f"part {result['share']} is done; {done:,} of {result['pieces']:,} pieces are there in all")
    if not result["missing"]:
        out.say("all are there: run it once more with --finish")
    return result


def _preview(loaded: LoadedRecipe, count: int, out: Console, *, json: bool) -> dict[str, Any]:
    from gptcli.data.job import find_job
    from gptcli.data.preview import preview
    from gptcli.data.tokenize import find_tokenizer
    from gptcli.model.media import media_model

    media = media_model(loaded)
    job = find_job(loaded, out, reads_media=media is not None)
    tokenizer, _ = find_tokenizer(loaded, job, out, media)
    documents = preview(job, tokenizer, count)
    if not json:
        for document in documents:
            _show(document, out)
    return {
        "documents": [
            {
                "document": document.document,
                "total": document.total,
                **({"media": [_medium(each) for each in document.media]} if document.media else {}),
                "tokens": [
                    {
                        "id": number,
                        "text": text,
                        "special": special,
                        **({} if trained is None else {"supervised": trained}),
                    }
                    for (number, text, special), trained in zip(document.tokens, _trained(document), strict=True)
                ],
            }
            for document in documents
        ]
    }


def _medium(medium: Medium) -> dict[str, Any]:
    return {"kind": medium.modality, "name": medium.name, "extent": medium.extent, "tokens": medium.tokens}


def _show(document: Shown, out: Console) -> None:
    """Print a document, its tokens in turn on two colours; without colours, a bar between them.

    Of what is trained on the tokens are bright and the others dim; without colours, it stands in brackets.
    """
    from rich.text import Text

    from gptcli.data.media.fault import shown_name
    from gptcli.data.media.item import NOUNS, counted, shown_extent
    from gptcli.reporting import visible

    colours = out.rich.color_system is not None
    line = Text(overflow="fold")
    before: bool | None = None
    for number, (text, special, trained) in enumerate(_collapsed(document)):
        shown = text.replace("\r", "␍").replace("\t", "⇥").replace("\n", "⏎\n")
        if not colours and bool(before) != bool(trained):
            line.append(OPEN if trained else CLOSE)
        elif not colours and number:
            line.append("|")
        before = trained
        if trained is None:
            style = "bold magenta reverse" if special else ("on grey23", "on dark_blue")[number % 2]
        elif trained:
            style = "bold black on bright_green" if special else ("bold on green4", "bold on dark_green")[number % 2]
        else:
            style = "dim magenta" if special else "dim"
        line.append(visible(shown), style=style)
    if not colours and before:
        line.append(CLOSE)
    if (rest := document.total - len(document.tokens)) > 0:
        line.append(f" ... and {rest:,} more tokens", style="dim")
    told = ""
    if document.supervised is not None:
        marks = "bright" if colours else f"in {OPEN} {CLOSE}"
        told = f", {sum(document.supervised):,} of those shown are trained on ({marks})"
    out.say(f"{document.document}: {document.total:,} tokens{told}")
    for medium in document.media:
        size = f"{shown_extent(medium)}, {counted(medium.tokens, 'token')}"
        out.say(visible(f"  {NOUNS[medium.modality]} {shown_name(medium.name)} ({size})"))
    if not out.quiet:
        out.rich.print(line)
        out.rich.print()


def _collapsed(document: Shown) -> Iterator[tuple[str, bool, bool | None]]:
    """(text, whether it is special, whether it is trained on) of tokens, a special one that is repeated once."""
    from itertools import groupby

    tokens = (
        (text, special, trained)
        for (_, text, special), trained in zip(document.tokens, _trained(document), strict=True)
    )
    for each, run in groupby(tokens):
        count = len([*run])
        text, special, trained = each
        if special and count > 1:
            yield f"{text} x {count}", special, trained
        else:
            yield from [each] * count


def _trained(document: Shown) -> list[bool | None]:
    return [None] * len(document.tokens) if document.supervised is None else [*document.supervised]


def _result(prepared: Prepared) -> dict[str, Any]:
    return {
        **prepared.report,
        "reused": prepared.reused,
        "tokenizer_folder": str(prepared.tokenizer),
        "train_folder": str(prepared.train.folder),
        "validation_folder": str(prepared.validation.folder) if prepared.validation is not None else None,
    }


def _print(prepared: Prepared, out: Console) -> None:
    from gptcli.data.report import report_lines

    for line in report_lines(prepared.report):
        out.say(line)
    out.say(f"tokenizer: {prepared.report['tokenizer']['vocab_size']:,} entries, {prepared.tokenizer}")
    found = "found in the cache" if prepared.reused else "written"
    out.say(f"shards {found} (fingerprint {prepared.fingerprint}): {prepared.train.folder.parent}")
