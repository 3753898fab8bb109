"""`mlx-mtp serve`: the engine behind an HTTP address that speaks OpenAI's and Anthropic's APIs."""

from __future__ import annotations

import logging
import signal
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import mlx_mtp
from mlx_mtp.cli import options, progress
from mlx_mtp.cli.loading import load
from mlx_mtp.errors import lacking
from mlx_mtp.loading import EMBEDDED

Who = partial(typer.Option, rich_help_panel="Who may ask, and where")
Limits = partial(typer.Option, rich_help_panel="Limits")
KEY_HELP = "What clients must send as their key."
CORS_HELP = "Web page (https://name) that may ask, or '*'; may be repeated."
HOST_HELP = "Another name clients may call it by, such as host.docker.internal; may be repeated."
LENIENT_HELP = "Leave out what is not known, and name it in the header x-ignored-fields."


def serve(
    model: options.Model = None,
    drafter: options.Drafter = "auto",
    depth: options.Depth = "auto",
    mode: options.Mode = "fast",
    max_context: options.MaxContext = None,
    host: Annotated[str, Who(help="Address to listen on; all but loopback need --api-key.")] = "127.0.0.1",
    port: Annotated[int, Who(help="Port to listen on; 0 = any free one.")] = 8080,
    api_key: Annotated[str | None, Who(envvar="MLX_MTP_API_KEY", help=KEY_HELP, show_default="none needed")] = None,
    cors: Annotated[list[str] | None, Who(help=CORS_HELP, show_default="none")] = None,
    allow_host: Annotated[list[str] | None, Who(help=HOST_HELP, show_default="none; with --api-key all")] = None,
    model_name: Annotated[str | None, Who(help="The model's name for clients.", show_default="as --model")] = None,
    lenient: Annotated[bool, Who("--lenient", help=LENIENT_HELP)] = False,
    max_tokens: Annotated[int, options.MaxTokens(help="Tokens of a reply whose request names no number.")] = 1024,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: Annotated[int | None, options.Sampled(help="Of requests that bring none.", show_default="random")] = None,
    most_tokens: Annotated[int | None, Limits(help="Most tokens of a reply.", show_default="what fits")] = None,
    queue: Annotated[int, Limits(min=0, help="Requests that may wait; more get 429.")] = 32,
    session_memory: Annotated[float, Limits(help="GB of K/V kept between requests; 0 = none.")] = 1.0,
    body_size: Annotated[float, Limits(help="Most MB of a request.")] = 8.0,
    grace: Annotated[float, Limits(min=0, help="Seconds for running replies to finish after SIGTERM.")] = 30.0,
    verbose: Annotated[bool, options.OutputPanel("--verbose", help="Log every request.")] = False,
) -> None:
    """Serve OpenAI's Chat Completions, Completions and Responses, Anthropic's Messages, and a chat page.

    Examples:
      mlx-mtp serve -m smollm2
      mlx-mtp serve -m mlx-community/gemma-4-e4b-it-4bit --port 8000 --model-name gemma
      MLX_MTP_API_KEY=secret mlx-mtp serve --host 0.0.0.0
    """
    try:
        from mlx_mtp.serving import app, server
        from mlx_mtp.serving import options as serving
    except ModuleNotFoundError as error:
        raise mlx_mtp.OptionError(lacking("The server", error.name, "serve")) from error
    name = model_name or _name(model)
    wanted = serving.ServerOptions(
        model=name, others=[model] if model else [], api_key=api_key, origins=cors or [],
        hosts=serving.hosts_of(host, allow_host or (), api_key), tokens=max_tokens, most_tokens=most_tokens, seed=seed,
        lenient=lenient, session_bytes=int(session_memory * 1e9), body_bytes=int(body_size * 1e6),
        sampling=mlx_mtp.Sampling(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
        ),
    )  # fmt: skip
    if verbose:
        for library in ("mlx_mtp", "uvicorn"):
            logging.getLogger(library).setLevel(logging.INFO)
    with server.listen(host, port) as listener:
        with progress.held_back():
            engine = load(model, drafter, depth=depth, mode=mode, max_context=max_context)
            running = server.Server(app.create_app(engine, wanted, queue), grace=grace, access_log=verbose)
        _greet(name, f"[{host}]" if ":" in host else host, listener.getsockname()[1])
        # uvicorn ends in good order and then raises the signal again; SIGTERM has had its effect by then.
        signal.signal(signal.SIGTERM, lambda *_: None)
        running.run(sockets=[listener])


def _greet(name: str, host: str, port: int) -> None:
    address = f"http://{host}:{port}/"
    Console(stderr=True).print(
        f"Serving {name} at {address}v1 (Ctrl-C stops). A page to chat on: {address}",
        soft_wrap=True, markup=False, highlight=False,
    )  # fmt: skip


def _name(model: str | None) -> str:
    """What clients call the model: a hub name as it is, else the folder's own name."""
    if model is None:
        return EMBEDDED.name
    return Path(model).resolve().name if Path(model).exists() else model
