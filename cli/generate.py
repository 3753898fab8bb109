"""`mlx-mtp generate`: one completion, streamed as text or printed as one JSON object."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn

import mlx_mtp
from mlx_mtp.cli import notices, options
from mlx_mtp.cli.loading import load
from mlx_mtp.cli.progress import PatientBar
from mlx_mtp.errors import brief
from mlx_mtp.text.tokenizer import Prompt


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; '-' reads it from standard input.")] = None,
    model: options.Model = None,
    drafter: options.Drafter = "auto",
    depth: options.Depth = "auto",
    max_tokens: options.MaxTokens = 256,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    presence_penalty: options.PresencePenalty = None,
    frequency_penalty: options.FrequencyPenalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    mode: options.Mode = "fast",
    draft_head_bits: options.HeadBits = "auto",
    max_context: options.MaxContext = None,
    tokens: Annotated[str | None, typer.Option(help="Token ids in place of a prompt: 1,2,3.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it stands, no chat template.")] = False,
    thinking: Annotated[bool, typer.Option("--thinking", help="Let a model that can think first.")] = False,
    json_schema: Annotated[Path | None, typer.Option(help="File with a JSON schema that the answer keeps to.")] = None,
    grammar: Annotated[Path | None, typer.Option(help="File with a lark grammar that the answer keeps to.")] = None,
    regex: Annotated[str | None, typer.Option(help="Regular expression that the answer matches as a whole.")] = None,
    logprobs: Annotated[int, typer.Option(help="Logprobs of every token and of the n likeliest (--json).")] = 0,
    verbose: options.Verbose = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Generate one completion."""
    if logprobs and not as_json:
        raise mlx_mtp.OptionError(f"--logprobs {logprobs} would be lost: they are printed with --json only; add it.")
    asked, schema = _prompt(prompt, tokens), None if json_schema is None else _schema(json_schema)
    sampling = mlx_mtp.Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty, frequency_penalty=frequency_penalty,
    )  # fmt: skip
    if verbose:
        notices.say_more()
    console = Console(stderr=True)
    bar = PatientBar(console, MofNCompleteColumn())
    with notices.held_back():
        engine = load(
            model, drafter, depth=depth, mode=mode, draft_head_bits=draft_head_bits, max_context=max_context
        )
        stream = engine.stream(
            asked, max_tokens=max_tokens, sampling=sampling, stop=stop or [], seed=seed, logprobs=logprobs, raw=raw,
            thinking=thinking, json_schema=schema, grammar=None if grammar is None else _read(grammar, "--grammar"),
            regex=regex, on_prefill=functools.partial(bar.update, "reading the prompt"),
        )  # fmt: skip
    result, interrupted = None, False
    texts: list[str] = []
    ids: list[int] = []
    try:
        with bar:
            for event in stream:
                bar.close()
                result = event.result
                texts.append(event.text)
                ids += event.tokens
                if not as_json:
                    # Without a tokenizer the ids are all there is to show.
                    shown = event.text if engine.tokenizer else "".join(f"{token} " for token in event.tokens)
                    print(shown, end="", flush=True)
    except KeyboardInterrupt:
        interrupted = True
    if as_json:
        partial = mlx_mtp.Result("".join(texts), ids, None, "interrupted", mlx_mtp.Stats()).as_dict() | {"stats": None}
        print(json.dumps(result.as_dict() if result else partial))
    else:
        print()
        if result and sys.stdout.isatty():
            console.print(summary(result.stats), style="dim", highlight=False)
    if interrupted:
        raise typer.Exit(130)


def summary(stats: mlx_mtp.Stats) -> str:
    """One line about a reply."""
    line = f"{stats.tokens} tokens, {stats.decode_tokens_per_second:.1f} tokens/s"
    return line + (f", {stats.tokens_per_round:.2f} tokens per round ({stats.mode})" if stats.drafted else "")


def _prompt(prompt: str | None, tokens: str | None) -> Prompt:
    if (prompt is None) == (tokens is None):
        found = "neither" if prompt is None else "both"
        raise mlx_mtp.PromptError(f"Give either a prompt or --tokens 1,2,3; {found} came.")
    if tokens is not None:
        return options.token_ids(tokens)
    text = sys.stdin.read() if prompt == "-" else prompt or ""
    if not options.is_utf8(text):
        raise mlx_mtp.PromptError("The prompt is not UTF-8; convert it first.")
    return text


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
