"""`gptcli serve`: a model behind an OpenAI-compatible server on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from gptcli.cli.arguments import Debug, Json, Quiet
from gptcli.cli.generate_options import Engine, Model, Precision

Host = Annotated[str, typer.Option("--host", metavar="ADDRESS", help="0.0.0.0: for other machines too.")]
Port = Annotated[str, typer.Option("--port", metavar="N|auto", help="auto (or 0): any free one.")]
AllowUrls = Annotated[
    bool, typer.Option("--allow-urls", help="Images and sounds of requests may be http and https addresses.")
]
Worker = Annotated[bool, typer.Option("--worker", hidden=True, help="Be the server's process.")]


def serve(
    model: Model = None,
    host: Host = "127.0.0.1",
    port: Port = "8000",
    precision: Precision = "auto",
    engine: Engine = "transformers",
    allow_urls: AllowUrls = False,
    worker: Worker = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Serve a model by an OpenAI-compatible API, until Ctrl+C; the newest run's when none is named."""
    from gptcli.cli.console import console
    from gptcli.errors import UsageError
    from gptcli.generation.given import recipe_section
    from gptcli.generation.serve import (
        Server,
        check_engine,
        check_folder,
        has_chat_template,
        run_server,
        served_name,
    )
    from gptcli.generation.settings import settings
    from gptcli.model.load import check_precision
    from gptcli.network import port_to_listen_at
    from gptcli.runs.folder import resolve_model

    check_precision(precision)
    check_engine(engine, "gptcli serve")
    if allow_urls and engine != "transformers":
        raise UsageError(f"--allow-urls does not go with --engine {engine}, which fetches by its own rules")
    folder = resolve_model(model)
    if is_local := folder.is_dir():
        folder = folder.resolve()
    check_folder(folder, engine)
    out = console(json=json, quiet=quiet)
    listens_at = _port(port) if worker else port_to_listen_at(host, _port(port))
    server = Server(served_name(folder), host, listens_at, has_chat_template(folder))
    if worker:
        from gptcli.generation.pinned import serve_pinned, serve_vllm

        if engine == "vllm":
            return serve_vllm(folder, server, precision)
        given_settings = settings(recipe_section(folder, out.warn), {})
        return serve_pinned(folder, server, given_settings, precision, allow_urls=allow_urls)

    def ready(pid: int) -> None:
        if json:
            out.print_json({"model": server.name, "url": server.url, "engine": engine, "pid": pid})
        out.say(f"{server.name} answers at {server.url}; Ctrl+C ends it. Try:\n\n{server.curl()}\n")
        if is_local and not server.chats:
            out.say("It has no chat template: it continues texts (/v1/completions) and does not chat.")

    if server.is_exposed:
        out.warn(f"whoever reaches {host}:{server.port} can use this model: there is no authentication")
    out.say(f"{folder}: starting {'vllm serve' if engine == 'vllm' else 'transformers serve'} ...")
    place = ["--host", host, "--port", str(server.port), "--precision", precision, "--engine", engine]
    place += ["--allow-urls"] * allow_urls
    given = ["serve", str(folder), *place, "--worker", *(["--debug"] if debug else [])]
    run_server(given, server, on_ready=ready, on_line=out.say)


def _port(text: str) -> int:
    from gptcli.errors import UsageError

    if text == "auto":
        return 0
    if not (text.isascii() and text.isdigit() and int(text) < 65536):
        raise UsageError(f"--port {text} is no port", remedy="A number from 1 to 65535, or auto.")
    return int(text)
