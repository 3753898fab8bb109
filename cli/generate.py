"""`mlx-mtp generate`: one completion, streamed as text or printed as one JSON object."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn

import mlx_mtp
from mlx_mtp.cli import options, progress, toy
from mlx_mtp.cli.loading import load
from mlx_mtp.errors import brief
from mlx_mtp.text.tokenizer import Prompt

USUAL = 256
SHOWN = toy.DEFAULT.format(usual=USUAL)


def generate(
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="In quotes, or piped in.")] = None,
    tokens: Annotated[str | None, options.PromptPanel(help="Token ids in place of a prompt: 1,2,3.")] = None,
    raw: Annotated[bool, options.PromptPanel("--raw", help="Continue the prompt as it stands, no template.")] = False,
    model: options.Model = None,
    drafter: options.Drafter = "auto",
    depth: options.Depth = "auto",
    mode: options.Mode = "fast",
    max_context: options.MaxContext = None,
    max_tokens: Annotated[int | None, options.MaxTokens(help="Most tokens to generate.", show_default=SHOWN)] = None,
    stop: Annotated[list[str] | None, options.ReplyPanel(help="Text that ends it; may be repeated.")] = None,
    thinking: Annotated[bool, options.ReplyPanel("--thinking", help="Let a model that can think first.")] = False,
    json_schema: Annotated[Path | None, options.ReplyPanel(help="File with a JSON schema that it keeps to.")] = None,
    grammar: Annotated[Path | None, options.ReplyPanel(help="File with a lark grammar that it keeps to.")] = None,
    regex: Annotated[str | None, options.ReplyPanel(help="Regular expression that it matches as a whole.")] = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    presence_penalty: options.PresencePenalty = None,
    frequency_penalty: options.FrequencyPenalty = None,
    seed: options.Seed = None,
    as_json: Annotated[bool, options.OutputPanel("--json", help="Print one JSON object and nothing else.")] = False,
    logprobs: Annotated[int, options.OutputPanel(help="With --json: logprobs of each token and the n likeliest.")] = 0,
) -> None:
    """Generate one completion.

    Examples:
      mlx-mtp generate "Why are leaves green?" -m smollm2
      git diff | mlx-mtp generate -m smollm2 -n 100 -t 0
      mlx-mtp generate "def fib(n):" --raw --json
    """
    if logprobs and not as_json:
        raise mlx_mtp.OptionError(f"--logprobs {logprobs} would be lost: they are printed with --json only; add it.")
    asked, schema = _prompt(prompt, tokens, raw), None if json_schema is None else _schema(json_schema)
    sampling = mlx_mtp.Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty, frequency_penalty=frequency_penalty,
    )  # fmt: skip
    console = Console(stderr=True)
    with progress.held_back():
        engine = load(model, drafter, depth=depth, mode=mode, max_context=max_context)
        bar = progress.PatientBar(console, MofNCompleteColumn())
        stream = engine.stream(
            asked, max_tokens=toy.most_tokens(model, max_tokens, USUAL), sampling=sampling, stop=stop or [], seed=seed,
            logprobs=logprobs, raw=raw, thinking=thinking, json_schema=schema, regex=regex,
            grammar=None if grammar is None else _read(grammar, "--grammar"),
            on_prefill=functools.partial(bar.update, "reading the prompt"),
        )  # fmt: skip
    short = toy.is_short(model, max_tokens)
    heard = _printed(stream, bar, engine.tokenizer is not None, short, as_json)
    if as_json:
        print(json.dumps(_as_dict(heard)))
    elif sys.stdout.isatty():
        for line in _about(heard, short):
            console.print(line, style="dim", highlight=False)
    if heard.interrupted:
        raise typer.Exit(130)


@dataclass
class _Heard:
    """The events of a completion, up to its end or an interrupt."""

    events: list[mlx_mtp.Event] = field(default_factory=list)
    interrupted: bool = False

    @property
    def result(self) -> mlx_mtp.Result | None:
        return self.events[-1].result if self.events else None


def _printed(
    stream: Iterator[mlx_mtp.Event], bar: progress.PatientBar, words: bool, short: bool, as_json: bool
) -> _Heard:
    """Prints text as it comes, unless it shall be JSON; the ids where there is no tokenizer, and so no words. short:
    a reply that repeats itself ends."""
    heard, repetition = _Heard(), toy.Repetition()
    try:
        with bar:
            for event in stream:
                bar.close()
                heard.events.append(event)
                if as_json:
                    continue
                print(event.text if words else "".join(f"{token} " for token in event.tokens), end="", flush=True)
                if short and repetition.heard(event.tokens):
                    break
    except KeyboardInterrupt:
        heard.interrupted = True
    if not as_json:
        print()
    return heard


def _as_dict(heard: _Heard) -> dict[str, Any]:
    """The result for JSON; what there is of it after an interrupt."""
    if heard.result:
        return heard.result.as_dict()
    text = "".join(event.text for event in heard.events)
    ids = [token for event in heard.events for token in event.tokens]
    return mlx_mtp.Result(text, ids, None, "interrupted", mlx_mtp.Stats()).as_dict() | {"stats": None}


def _about(heard: _Heard, short: bool) -> Iterator[str]:
    """Lines below a text on a terminal."""
    if heard.result:
        stats = heard.result.stats
        rounds = f", {stats.tokens_per_round:.2f} tokens per round ({stats.mode})" if stats.drafted else ""
        yield f"{stats.tokens} tokens, {stats.decode_tokens_per_second:.1f} tokens/s{rounds}"
    if short and not heard.interrupted and (heard.result is None or heard.result.finish_reason == "length"):
        yield toy.NOTE


def _prompt(prompt: str | None, tokens: str | None, raw: bool) -> Prompt:
    """What was named, or what a pipe holds; the newline with which that ends belongs to it only where it is raw."""
    if tokens is not None:
        if prompt is not None:
            raise mlx_mtp.PromptError("Give either a prompt or --tokens 1,2,3; both came.")
        try:
            return [int(part) for part in tokens.split(",")]
        except ValueError:
            message = f"--tokens must be whole numbers with commas, like 1,2,3, not '{tokens}'."
            raise mlx_mtp.PromptError(message) from None
    if prompt is None or prompt == "-":
        prompt = "" if prompt is None and sys.stdin.isatty() else sys.stdin.read()
        prompt = prompt if raw else prompt.removesuffix("\n")
        if not prompt:
            raise mlx_mtp.PromptError("A prompt is missing: write it after 'generate', in quotes, or pipe it in.")
    return prompt


def _schema(file: Path) -> dict[str, Any]:
    """A JSON object out of a file."""
    try:
        found = json.loads(_read(file, "--json-schema"))
    except (ValueError, RecursionError) as error:
        raise mlx_mtp.OptionError(f"--json-schema: '{file}' is no JSON ({error}).") from None
    if not isinstance(found, dict):
        raise mlx_mtp.OptionError(f"--json-schema: '{file}' must hold an object, not a {type(found).__name__}.")
    return found


def _read(file: Path, option: str) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise mlx_mtp.OptionError(f"{option}: '{file}' cannot be read ({brief(error)}); check the path.") from None
