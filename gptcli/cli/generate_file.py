"""`gptcli generate --file`: every prompt of a file, in one process or in several."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gptcli.cli.generate_media import reader_for
from gptcli.errors import UsageError

if TYPE_CHECKING:
    from gptcli.cli.console import Console
    from gptcli.generation.file_prompts import PromptForm
    from gptcli.generation.ready import Asked
    from gptcli.generation.settings import Settings

_option = partial(typer.Option, rich_help_panel="A file of prompts")

File = Annotated[
    str | None,
    _option("--file", metavar="FILE", help="Complete every prompt of a .jsonl, .txt, .csv, .tsv or .parquet."),
]
Output = Annotated[
    str | None,
    _option("--output", metavar="FILE.jsonl", help="Each row of --file and its completions."),
]
PromptColumn = Annotated[
    str | None,
    _option("--prompt-column", metavar="NAME", help="The column of the prompts; default: prompt."),
]
Template = Annotated[
    str | None,
    _option("--template", metavar="TEXT", help="A prompt of several columns: '{image} What is {thing}?'."),
]
ImageColumn = Annotated[
    list[str] | None,
    _option("--image-column", metavar="NAME", help="A column of pictures (repeatable)."),
]
AudioColumn = Annotated[
    list[str] | None,
    _option("--audio-column", metavar="NAME", help="A column of sounds (repeatable)."),
]
SaveEvery = Annotated[
    int | None,
    _option("--save-every", min=1, help="Prompts between saves; default: by a rule."),
]
Processes = Annotated[
    str | None,
    _option("--processes", metavar="N|auto", help="Processes that share the work; auto: one a visible GPU."),
]
Overwrite = Annotated[
    bool,
    _option("--overwrite", help="Replace an output, or another job's unfinished work."),
]

_ADVICE = ("Run fewer processes (--processes), or --precision bf16.", "The same command goes on with what is done.")


def check_options(*, file: str | None, output: str | None, prompts: bool, **others: Any) -> None:
    """Raise `UsageError` for options that do not go together; `others` go with --file alone."""
    if file is None:
        given = [name for name, value in {"output": output, **others}.items() if value not in (None, False)]
        if given:
            raise UsageError(f"--{given[0].replace('_', '-')} goes with --file")
        return
    if prompts:
        raise UsageError(
            "--file and --prompt exclude each other", remedy="Put the prompt into the file, or give it as --template."
        )
    if output is None:
        raise UsageError("--file needs --output FILE.jsonl, where the completions go")


def generate_file(
    file: str,
    output: str,
    *,
    folder: Path,
    settings: Settings,
    seed: int | None,
    asked: Asked,
    form: PromptForm,
    save_every: int | None,
    processes: str | None,
    overwrite: bool,
    json: bool,
    out: Console,
) -> None:
    """Complete the prompts of a file; in a process that gptcli started, a share of them."""
    from gptcli.data.readers import has_records, record_suffixes
    from gptcli.generation.file import complete_file
    from gptcli.generation.file_job import FileJob
    from gptcli.launch import group, launch, local_processes

    if not has_records(file):
        raise UsageError(f"--file {file}: a file of prompts is {record_suffixes()}")
    if form.media:
        reader_for(folder, (kind for kind, _ in form.media))
    mine = group()
    wanted = _wanted(processes)
    if mine.world_size > 1 and mine.launcher != "gptcli":
        raise UsageError(
            f"generate --file was started by {mine.launcher} as one of {mine.world_size} processes",
            remedy="Start it once, with --processes N.",
        )
    count = mine.world_size if mine.world_size > 1 else local_processes(wanted, option="--processes")
    job = FileJob(
        file=Path(file),
        output=Path(output).resolve(),
        form=form,
        model=folder,
        settings=settings,
        seed=seed,
        asked=asked,
        save_every=save_every,
        processes=count,
        overwrite=overwrite,
    )
    if mine.world_size > 1:
        _share(job, mine.rank, mine.world_size, mine.local_rank)
        return

    def start(number: int) -> None:
        launch(sys.argv[1:], processes=number, name="generate", warn=out.warn, advice=_ADVICE)

    result = complete_file(job, out, workers=start)
    if json:
        out.print_json({"output": output, **result})


def _share(job: Any, rank: int, processes: int, local_rank: int) -> None:
    import torch

    from gptcli.generation.file_work import complete_share

    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    complete_share(job, rank, processes)


def _wanted(processes: str | None) -> int | Literal["auto"]:
    if processes in (None, "auto"):
        return "auto"
    if not str(processes).isdecimal() or int(str(processes)) < 1:
        raise UsageError(f"--processes {processes} is neither a number nor auto")
    return int(str(processes))
