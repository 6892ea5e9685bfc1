"""The commands, registered; `main` runs one and turns every error into a few lines and an exit code.

Command modules import torch and everything heavy inside their functions, so that `gptcli --help` stays at a quarter
of a second.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Annotated

import typer

from gptcli import __version__
from gptcli.errors import AbortedError, GptcliError, OutOfMemoryError

# In the order of `--help`: the module under gptcli.cli, and the function or group (a typer app) in it.
COMMANDS = {
    "tokenize": ("tokenize", "tokenize"),
    "pretrain": ("pretrain", "pretrain"),
    "finetune": ("finetune", "finetune"),
    "generate": ("generate", "generate"),
    "eval": ("evaluate", "evaluate"),
    "export": ("export", "export"),
    "plan": ("plan", "plan"),
    "serve": ("serve", "serve"),
    "recipes": ("recipes", "app"),
    "runs": ("runs", "app"),
    "doctor": ("doctor", "doctor"),
}


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"gptcli {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    del version


def build_app(wanted: str | None) -> typer.Typer:
    """The command line; only the command that is `wanted` when there is one, since each costs start-up time."""
    app = typer.Typer(
        name="gptcli",
        help="Pretrain and fine-tune causal language models from one YAML recipe, on CPU, one GPU or many.",
        epilog="Start with: gptcli pretrain quickstart",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for name in [wanted] if wanted in COMMANDS else COMMANDS:
        module, attribute = COMMANDS[name]
        command = getattr(import_module(f"gptcli.cli.{module}"), attribute)
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name)
        else:
            app.command(name)(command)
    return app


def main(arguments: list[str]) -> int:
    """Run one command; return its exit code. With `--debug` an error is raised with its traceback."""
    debug = "--debug" in arguments
    try:
        if "GPTCLI_LAUNCHER_PID" in os.environ:
            from gptcli.launch import follow_parent

            follow_parent()
        app = build_app(arguments[0] if arguments else None)
        code = app(args=arguments, standalone_mode=False)
    except GptcliError as error:
        return _report(error, debug)
    except KeyboardInterrupt:
        return _report(_aborted(), debug)
    except MemoryError:
        return _report(OutOfMemoryError("this machine has no memory left"), debug)
    except BrokenPipeError:
        # The reader of a pipe (`| head`) went away; leave quietly, and let no flush at exit complain.
        sys.stderr.close()
        return 1
    except Exception as error:
        return _unexpected(error, debug)
    if code == AbortedError.exit_code:  # what typer makes of Ctrl+C
        return _report(_aborted(), debug)
    return code if isinstance(code, int) else 0


def _report(error: GptcliError, debug: bool) -> int:
    from gptcli.cli.console import print_error
    from gptcli.launch import hand_to_parent

    text = ""
    if debug:
        import traceback

        text = "".join(traceback.format_exception(error))
    if not hand_to_parent(error, text):
        print_error(error, text)
    return error.exit_code


def _unexpected(error: Exception, debug: bool) -> int:
    show = getattr(error, "show", None)
    exit_code = getattr(error, "exit_code", None)
    if show is not None and isinstance(exit_code, int):  # a usage error of the command-line parser
        show()
        return exit_code
    if isinstance(error, OSError) and error.filename is not None:
        return _report(GptcliError(error.strerror or str(error), where=str(error.filename)), debug)
    kind = f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")
    remedy = "This is unexpected. Run again with --debug for the traceback, and report it."
    return _report(GptcliError(f"{kind}: {_first_line(error)}", remedy=remedy), debug)


def _aborted() -> AbortedError:
    return AbortedError("there was nothing to save")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:500] if lines else "no message"
