"""`gptcli export`: a model for others, as a folder, a GGUF file or a repository of the Hub."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptcli.cli.arguments import Debug, Json, Quiet

if TYPE_CHECKING:
    from gptcli.cli.console import Console
    from gptcli.model.export import Exported
    from gptcli.reporting import Reporter

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="A run's name, a folder (also an adapter's) or a Hub id; default: the newest run's weights.",
    ),
]
Output = Annotated[Path | None, typer.Option("--output", "-o", metavar="FOLDER", help="Write a Hugging Face folder.")]
Merge = Annotated[bool, typer.Option("--merge", help="Merge an adapter into its base.")]
Quantize = Annotated[
    str | None,
    typer.Option("--quantize", metavar="int8|int4", help="Weights of 8 or 4 bits (torchao); a GGUF file: int8 only."),
]
Precision = Annotated[
    str,
    typer.Option("--precision", metavar="auto|fp32|bf16", help="Of the weights that are written; auto: as they are."),
]
Gguf = Annotated[
    Path | None, typer.Option("--gguf", metavar="FILE", help="Write a GGUF file, by llama.cpp's converter.")
]
Converter = Annotated[
    str | None,
    typer.Option("--gguf-converter", metavar="PATH", help="llama.cpp's convert_hf_to_gguf.py, or the folder it is in."),
]
Push = Annotated[
    str | None, typer.Option("--push", metavar="OWNER/NAME", help="Upload to the Hub, as a private repository if new.")
]
Public = Annotated[bool, typer.Option("--public", help="A new repository of --push is for all to see.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a model's folder or a file that is there.")]


def export(
    model: Model = None,
    output: Output = None,
    merge: Merge = False,
    quantize: Quantize = None,
    precision: Precision = "auto",
    gguf: Gguf = None,
    gguf_converter: Converter = None,
    push: Push = None,
    public: Public = False,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a model as a clean folder, merged, quantized, as GGUF, or to the Hub; default: the newest run's."""
    del debug
    _check_options(output, quantize, precision, gguf, push, gguf_converter=gguf_converter, public=public)
    from gptcli.cli.console import console
    from gptcli.model.export import check_source, check_target
    from gptcli.runs.folder import owner, resolve_model

    out = console(json=json, quiet=quiet)
    source = resolve_model(model)
    check_source(source, merge=merge)
    for target in (output, gguf):
        if target is not None:
            check_target(target, source, overwrite=overwrite)
    # What is missing is told before any work.
    from gptcli.model import gguf as gguf_file
    from gptcli.model import push as hub
    from gptcli.reporting import Silent

    converter = None if gguf is None else gguf_file.find_converter(gguf_converter)
    if push is not None:
        hub.check_login(push)
    result: dict[str, Any] = {"model": str(source)}
    with ExitStack() as stack:
        folder = output
        if push is not None and folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gptcli-"))) / push.split("/")[1]
        done = None if folder is None else _export(source, folder, precision, quantize, out)
        if done is not None and output is not None:
            result |= {"output": str(output), **_fields(done)}
        if gguf is not None and converter is not None:
            if done is None or quantize is not None:
                gguf.parent.mkdir(parents=True, exist_ok=True)
                work = stack.enter_context(tempfile.TemporaryDirectory(prefix=f".{gguf.name}.tmp-", dir=gguf.parent))
                done = _export(source, Path(work) / gguf.stem, precision, None, Silent())
            result |= {"gguf": str(gguf), "gguf_bytes": _convert(done, gguf, converter, quantize, out)}
        if push is not None and folder is not None:
            comfort = "Nothing was written." if output is None else f"The folder is whole: {output}"
            run = owner(source)
            message = f"Exported by gptcli from {source.name if run is None else run.name}"
            result["pushed"] = hub.push(
                folder, push, private=not public, message=message, comfort=comfort, reporter=out
            )
    if json:
        out.print_json(result)


def _check_options(
    output: Path | None,
    quantize: str | None,
    precision: str,
    gguf: Path | None,
    push: str | None,
    *,
    gguf_converter: str | None,
    public: bool,
) -> None:
    """Raise `UsageError` for options that do not go together."""
    from gptcli.errors import UsageError
    from gptcli.model.load import check_precision
    from gptcli.runs.folder import HUB_ID

    if output is None and gguf is None and push is None:
        raise UsageError(
            "nothing to write", remedy="Give --output FOLDER, --gguf FILE or --push OWNER/NAME, or several of them."
        )
    check_precision(precision)
    if gguf_converter is not None and gguf is None:
        raise UsageError("--gguf-converter without --gguf FILE")
    if push is not None and not HUB_ID.fullmatch(push):
        raise UsageError(f"--push {push} is not OWNER/NAME", remedy="For example: --push me/my-model")
    if public and push is None:
        raise UsageError("--public without --push OWNER/NAME")
    if quantize is not None:
        if quantize not in ("int8", "int4"):
            raise UsageError(f"--quantize {quantize} is not one of int8, int4")
        if gguf is not None and quantize == "int4":
            raise UsageError(
                "llama.cpp's converter writes no 4 bits",
                remedy="Leave out --quantize, then: llama-quantize FILE NEW_FILE Q4_K_M (of llama.cpp).",
            )
    if output is not None and output.is_file():
        raise UsageError(f"--output {output} is a file", remedy="Name a folder.")
    if gguf is not None and gguf.is_dir():
        raise UsageError(f"--gguf {gguf} is a folder", remedy=f"Name a file: {gguf / 'model.gguf'}")


def _export(source: Path, folder: Path, precision: str, quantize: str | None, out: Reporter) -> Exported:
    from gptcli.model.export import export as write

    return write(source, folder, precision=precision, quantization=quantize, reporter=out)  # type: ignore[arg-type]


def _convert(done: Exported, gguf: Path, converter: Path, quantize: str | None, out: Console) -> int:
    from gptcli.data.tokenizer import division
    from gptcli.model.export import check_room
    from gptcli.model.gguf import TYPES, convert

    check_room(gguf, done.bytes)
    outtype = TYPES[quantize or done.dtype]
    return convert(done.folder, gguf, converter, outtype=outtype, division=division(done.folder), reporter=out)


def _fields(done: Exported) -> dict[str, Any]:
    found: dict[str, Any] = {"parameters": done.parameters, "bytes": done.bytes, "dtype": done.dtype}
    if (quantized := done.quantized) is not None:
        found["quantized"] = {"kind": quantized.kind, "matrices": quantized.matrices, "left": quantized.left}
    return found
