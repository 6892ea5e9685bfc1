"""`transformers serve` with one model that cannot be changed: what the server's process runs.

The model is loaded as everywhere in gptcli (safetensors only, nothing missing) and handed to transformers' server. That
one would load any model that a client names at /load_model, list the Hub's cache at /v1/models, sample nothing where
generation_config.json does not ask for it, and go on past the model's context; here it does none of it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcli.errors import MissingError, UsageError, first_line
from gptcli.generation.by_vllm import DTYPES
from gptcli.generation.media_prompt import model_reader
from gptcli.generation.served_media import Sees, checked
from gptcli.generation.text import room, stop_ids
from gptcli.model.load import load_model, load_tokenizer, memory_errors

if TYPE_CHECKING:
    from gptcli.generation.serve import Server
    from gptcli.generation.settings import Settings

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
# Answers that are on their way when the server is asked to end.
GRACE_SECONDS = 3
MOST_NEW_TOKENS = 1024

Application = Callable[[Any, Any, Any], Awaitable[None]]


def serve_pinned(folder: Path, server: Server, given: Settings, precision: str, *, allow_urls: bool = False) -> None:
    """Serve the model of a folder or a Hub id until a signal comes; that ends this process.

    Args:
        folder: what is loaded.
        server: where, and the model's name.
        given: how to sample where a request does not say.
        precision: of the weights.
        allow_urls: whether images and sounds of requests may be fetched.

    Raises:
        GptcliError: as `load_model` and `load_tokenizer`.
    """
    with memory_errors("Try --precision bf16."):
        tokenizer: Any = load_tokenizer(folder)
        model = load_model(folder, dtype=precision)  # type: ignore[arg-type]
        reader = model_reader(folder)
    from fastapi import HTTPException
    from jinja2 import TemplateError
    from transformers.cli.serve import Serve
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.model_manager import ModelManager, TimedModel

    _prepare(model, tokenizer, given)
    read: Any = ChatCompletionHandler
    read.get_processor_inputs_from_messages = staticmethod(checked(read.get_processor_inputs_from_messages, reader))
    processor: Any = tokenizer if reader is None else Sees(model, tokenizer, reader, allow_urls=allow_urls)

    class Pinned(Serve):
        def start_server(self) -> None:
            manager = self._model_manager
            manager.force_model = server.name
            key = ModelManager.process_model_name(server.name)
            manager.loaded_models[key] = TimedModel(model, timeout_seconds=-1, processor=processor)
            config: Any = self.server.config
            for wrong in (HTTPException, TemplateError, ValueError, TypeError, LookupError):
                config.app.add_exception_handler(wrong, _told_to_the_client)
            config.app = only(config.app, server, chats=bool(tokenizer.chat_template))
            config.timeout_graceful_shutdown = GRACE_SECONDS
            with contextlib.suppress(KeyboardInterrupt):  # what uvicorn ends with when a signal came
                self.server.run()
            sys.stdout.flush()
            os._exit(0)  # to take apart all that was imported takes seconds

    Pinned(host=server.host, port=server.port, log_level="error", non_blocking=True)


def serve_vllm(folder: Path, server: Server, precision: str) -> None:
    """Become `vllm serve` for this folder; it takes the place of this process.

    Raises:
        MissingError: there is no such program.
    """
    beside = str(Path(sys.executable).parent)
    program = shutil.which("vllm", path=os.pathsep.join((beside, os.environ.get("PATH", ""))))
    if program is None:
        raise MissingError("vLLM is installed without its program `vllm`", remedy="pip install --force-reinstall vllm")
    os.execv(program, vllm_arguments(program, folder, server, precision))


def vllm_arguments(program: str, folder: Path, server: Server, precision: str) -> list[str]:
    """The command line of `vllm serve`: safetensors only, this name, this address."""
    place = ["--host", server.host, "--port", str(server.port)]
    model = ["--served-model-name", server.name, "--load-format", "safetensors", "--dtype", DTYPES[precision]]
    return [program, "serve", str(folder), *place, *model]


def _prepare(model: Any, tokenizer: Any, given: Settings) -> None:
    """Let the model sample as `given` unless a request says otherwise, and end where its context ends."""
    from transformers import GenerationConfig

    ends = stop_ids(model, tokenizer)
    pad = tokenizer.pad_token_id
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        temperature=given.temperature,
        top_p=given.top_p,
        top_k=given.top_k,
        repetition_penalty=given.repetition_penalty,
        eos_token_id=ends or None,
        pad_token_id=pad if pad is not None else (ends[0] if ends else 0),
    )
    generate = model.generate

    def bounded(**options: Any) -> Any:
        config, tokens = options["generation_config"], options["input_ids"].shape[-1]
        if tokens == 0:
            raise ValueError("the prompt is empty")
        try:
            config.max_new_tokens = room(model, tokens, config.max_new_tokens or MOST_NEW_TOKENS)
        except UsageError as error:
            raise ValueError(f"{error.what}. {error.remedy}") from None
        if config.temperature is not None:  # transformers' server never turns sampling on
            config.do_sample = config.temperature != 0
        return generate(**options | {"tokenizer": tokenizer})

    model.generate = bounded


def only(app: Application, server: Server, *, chats: bool) -> Application:
    """The server without what one model does not need; it names that one at /v1/models.

    At a loopback address it answers only those who call it by that: no web page that has its own name lead here.
    """
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import JSONResponse

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        path = scope.get("path")
        if scope["type"] != "http" or path == "/health" or path == TEXT or (path == CHAT and chats):
            await app(scope, receive, send)
        elif path == "/v1/models":
            entry = {"id": server.name, "object": "model", "created": 0, "owned_by": "gptcli"}
            await JSONResponse({"object": "list", "data": [entry]})(scope, receive, send)
        elif path == CHAT:
            message = f"the model {server.name!r} has no chat template: it continues texts, at /v1/completions"
            await JSONResponse(_error(message), 400)(scope, receive, send)
        else:
            await JSONResponse(_error(f"there is no {path} here"), 404)(scope, receive, send)

    if server.host in ("127.0.0.1", "localhost"):
        own: Application = TrustedHostMiddleware(guarded, allowed_hosts=["127.0.0.1", "localhost"])
        return own
    return guarded


async def _told_to_the_client(request: Any, error: Any) -> Any:
    """What a request did wrong, where OpenAI's clients look for it; transformers' server leaves most to code 500."""
    from starlette.responses import JSONResponse

    del request
    message = str(getattr(error, "detail", None) or f"this request cannot be answered: {first_line(error)}")
    return JSONResponse(_error(message), getattr(error, "status_code", 400))


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}
