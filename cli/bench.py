"""`mlx-mtp bench`: stock mlx-lm, plain decoding and every drafter against each other on this machine."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn

import mlx_mtp
from mlx_mtp.checkpoints.atomic import replacing
from mlx_mtp.cli import options
from mlx_mtp.cli.loading import load
from mlx_mtp.cli.progress import PatientBar
from mlx_mtp.errors import MLXMTPError, OptionError, brief, lacking
from mlx_mtp.measuring import tables
from mlx_mtp.measuring.bench import Bench
from mlx_mtp.measuring.configurations import DEFAULT_DEPTHS, DEFAULT_NAMES, Plan, line_up
from mlx_mtp.measuring.machine import open_meter
from mlx_mtp.measuring.plots import plot
from mlx_mtp.measuring.prompts import read_prompts
from mlx_mtp.measuring.report import bench_markdown, bench_parts, build

DEFAULTS = Plan()
STDOUT = Path("-")
Arms = partial(typer.Option, rich_help_panel="Configurations")
Runs = partial(typer.Option, rich_help_panel="Runs")
DEPTHS_HELP = "Of all drafters: 'auto' or 0 to 8, with commas between several."
ARMS_HELP = "stock, plain, mtp, lookup, mlx-vlm or any drafter's name; NAME@3 and NAME@auto set a depth."
PROMPTS_HELP = "File of prompts: Spec-Bench, HumanEval (.gz too), chat JSONL or text; may be repeated."
JSON_HELP = "All that was measured, to a file; '-' = stdout."
MARKDOWN_HELP = "Tables to paste, to a file; '-' = stdout."


def bench(
    model: options.Model = None,
    drafter: options.Drafter = "auto",
    mode: options.Mode = "fast",
    max_context: options.MaxContext = None,
    arms: Annotated[str, Arms(metavar="A,B,...", help=ARMS_HELP)] = ",".join(DEFAULT_NAMES),
    depth: Annotated[
        str | None, Arms(metavar="N,M,...", help=DEPTHS_HELP, show_default=",".join(map(str, DEFAULT_DEPTHS)))
    ] = None,
    prompts: Annotated[
        list[Path] | None, options.PromptPanel(metavar="FILE", help=PROMPTS_HELP, show_default="a built-in set")
    ] = None,
    category: Annotated[list[str] | None, options.PromptPanel(help="Only this one; may be repeated.")] = None,
    per_category: Annotated[int, options.PromptPanel(min=1, help="Most prompts of a category.")] = 1,
    raw: Annotated[bool, options.PromptPanel("--raw", help="Continue texts as they stand, no chat template.")] = False,
    max_tokens: Annotated[int, Runs("--max-tokens", "-n", help="Tokens of every timed run.")] = DEFAULTS.max_tokens,
    repeats: Annotated[int, Runs(help="Timed runs of each, in turns.")] = DEFAULTS.repeats,
    cool_down: Annotated[float, Runs(help="Seconds of rest before every turn.")] = DEFAULTS.cool_down,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: Annotated[int, options.Sampled(help="Of the first prompt where tokens are drawn.")] = DEFAULTS.seed,
    as_json: Annotated[Path | None, options.OutputPanel("--json", metavar="FILE", help=JSON_HELP)] = None,
    as_markdown: Annotated[Path | None, options.OutputPanel("--markdown", metavar="FILE", help=MARKDOWN_HELP)] = None,
    as_plot: Annotated[
        Path | None, options.OutputPanel("--plot", metavar="FILE", help="PNG of speed and acceptance.")
    ] = None,
) -> None:
    """Measure this machine: stock mlx-lm, plain, and every drafter, on the same prompts in turns.

    Examples:
      mlx-mtp bench -m smollm2
      mlx-mtp bench -m smollm2 --arms plain,mtp,lookup+auto --repeats 2 -t 0
      mlx-mtp bench -m mlx-community/gemma-4-e4b-it-4bit --markdown report.md
    """
    files = {"--json": as_json, "--markdown": as_markdown, "--plot": as_plot}
    _check_files({option: file for option, file in files.items() if file is not None})
    asked = mlx_mtp.Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
    )
    plan = Plan(
        model=model, drafter=drafter, names=tuple(name.strip() for name in arms.split(",") if name.strip()),
        depths=tuple(options.number_or_word(one.strip()) for one in depth.split(",")) if depth else None, mode=mode,
        max_tokens=max_tokens, repeats=repeats, cool_down=cool_down, seed=seed, max_context=max_context,
        samplings=None if asked == mlx_mtp.Sampling() else (asked,),
    )  # fmt: skip
    chosen = read_prompts(prompts or (), category or (), per_category, raw)
    meter, why_not = open_meter()
    run = Bench(line_up(plan, load), chosen, meter)
    for sentence in run.notes:
        print(sentence, file=sys.stderr)
    run.notes += [why_not] if why_not else []
    _measure(run, files)


def _measure(run: Bench, files: dict[str, Path | None]) -> None:
    """Runs everything; Ctrl-C and errors, of MLX or of another engine, cost nothing that was measured before."""
    ended: BaseException | None = None
    try:
        seconds = run.expected_seconds()
        about = f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"
        print(f"This takes about {about} (configurations: {len(run.lineup.configurations)}, prompts: "
              f"{len(run.prompts)}). Ctrl-C shows what there is by then.", file=sys.stderr)  # fmt: skip
        with PatientBar(Console(stderr=True), MofNCompleteColumn()) as bar:
            for done, _ in enumerate(run.run(), 1):
                bar.update("measuring", done, run.steps)
    except (KeyboardInterrupt, Exception) as error:
        ended = error
        sentence = f"Stopped by an error: {brief(error)}." if isinstance(error, Exception) else "Interrupted."
        print(sentence, "What was measured so far follows.", file=sys.stderr)
        run.notes.append(sentence)
    report = build(run, ended is not None)
    if STDOUT not in files.values():
        tables.show(bench_parts(report))
    contents = {"--json": json.dumps(report, indent=2) + "\n", "--markdown": bench_markdown(report)}
    for option, content in contents.items():
        if files[option] == STDOUT:
            print(content, end="")
        elif file := files[option]:
            with replacing(file) as fresh:
                fresh.write_text(content, encoding="utf-8")
    if picture := files["--plot"]:
        with replacing(picture) as fresh:
            plot(report, fresh)
    if isinstance(ended, Exception):
        raise MLXMTPError(f"The bench stopped ({brief(ended)}); what was measured before is in the report.") from ended
    if ended:
        raise ended


def _check_files(files: dict[str, Path]) -> None:
    """Before anything is measured."""
    places = [file.resolve() for file in files.values()]
    if len(set(places)) < len(places):
        raise OptionError("--json, --markdown and --plot need a file each, and one is named twice.")
    if "--plot" in files and importlib.util.find_spec("matplotlib") is None:
        raise OptionError(lacking("--plot", "matplotlib", "plot"))
    for option, file in files.items():
        if file == STDOUT and option == "--plot":
            raise OptionError("--plot writes a picture, which stdout is no place for; name a file.")
        if file != STDOUT and (file.is_dir() or not os.access(file.absolute().parent, os.W_OK)):
            raise OptionError(f"{option} must be a file in a writable folder, not '{file}'.")
