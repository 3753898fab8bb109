"""`mlx-mtp bench`: stock mlx-lm, plain decoding and every drafter against each other on this machine."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import mlx_mtp
from mlx_mtp.checkpoints.atomic import replacing
from mlx_mtp.cli import options
from mlx_mtp.cli.loading import load
from mlx_mtp.errors import MLXMTPError, OptionError, brief
from mlx_mtp.measuring import tables
from mlx_mtp.measuring.arms import DEFAULT_ARMS, DEFAULT_DEPTHS, Plan, line_up
from mlx_mtp.measuring.energy import open_meter
from mlx_mtp.measuring.plots import check_matplotlib, plot
from mlx_mtp.measuring.prompts import read_prompts
from mlx_mtp.measuring.report import Setting, build
from mlx_mtp.measuring.run import Bench
from mlx_mtp.measuring.summary import markdown, summary

DEFAULTS = Plan()
STDOUT = Path("-")
OUTPUT, PROMPTS, ARMS = "Output", "Prompts", "Configurations"


def bench(
    model: options.Model = None,
    drafter: options.Drafter = "auto",
    depth: Annotated[
        str | None, typer.Option(help="One depth for all drafters, 'auto' or 0 to 8.", rich_help_panel=ARMS)
    ] = None,
    depths: Annotated[
        str | None,
        typer.Option(help="Their depths, with commas.", show_default=",".join(map(str, DEFAULT_DEPTHS)),
                     rich_help_panel=ARMS),
    ] = None,
    arms: Annotated[
        str, typer.Option(help="stock, plain, mtp, lookup, mlx-vlm or any drafter's name; NAME@3 and NAME@auto set a "
                          "depth.", rich_help_panel=ARMS)
    ] = ",".join(DEFAULT_ARMS),
    mode: options.Mode = "fast",
    prompts: Annotated[
        list[Path] | None,
        typer.Option(help="File of prompts: Spec-Bench, HumanEval (.gz too), chat JSONL or text; may be repeated.",
                     show_default="a built-in set", rich_help_panel=PROMPTS),
    ] = None,
    category: Annotated[
        list[str] | None, typer.Option(help="Only this one; may be repeated.", rich_help_panel=PROMPTS)
    ] = None,
    per_category: Annotated[int, typer.Option(help="Most prompts of a category.", rich_help_panel=PROMPTS)] = 1,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue texts as they stand, no chat template.", rich_help_panel=PROMPTS)
    ] = False,
    max_tokens: Annotated[int, typer.Option(help="Tokens of every timed run.")] = DEFAULTS.max_tokens,
    repeats: Annotated[int, typer.Option(help="Timed runs of each, in turns.")] = DEFAULTS.repeats,
    cool_down: Annotated[float, typer.Option(help="Seconds of rest before every turn.")] = DEFAULTS.cool_down,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: Annotated[int, typer.Option(help="Of the first prompt where tokens are drawn.")] = DEFAULTS.seed,
    max_context: options.MaxContext = None,
    as_json: Annotated[
        Path | None, typer.Option("--json", help="File for everything that was measured; '-' = stdout.",
                                  rich_help_panel=OUTPUT)
    ] = None,
    as_markdown: Annotated[
        Path | None, typer.Option("--markdown", help="File for tables ready to paste; '-' = stdout.",
                                  rich_help_panel=OUTPUT)
    ] = None,
    as_plot: Annotated[
        Path | None, typer.Option("--plot", help="PNG file for speed and acceptance.", rich_help_panel=OUTPUT)
    ] = None,
) -> None:  # fmt: skip
    """Measure this machine: stock mlx-lm, plain, and every drafter, on the same prompts in turns."""
    files = {"--json": as_json, "--markdown": as_markdown, "--plot": as_plot}
    _check_files(files)
    asked = mlx_mtp.Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
    )
    plan = Plan(
        model=model, drafter=drafter, arms=tuple(name.strip() for name in arms.split(",") if name.strip()),
        depths=_depths(depth, depths), mode=mode, max_tokens=max_tokens, repeats=repeats, cool_down=cool_down,
        seed=seed, max_context=max_context, samplings=None if asked == mlx_mtp.Sampling() else (asked,),
    )  # fmt: skip
    if per_category < 1:
        raise OptionError(f"Expected --per-category of at least 1, found {per_category}; raise it.")
    chosen = read_prompts(prompts or (), category or (), per_category, raw)
    if as_plot:
        check_matplotlib()
    setting = Setting(["mlx-mtp", *sys.argv[1:]])
    meter, why_not = open_meter()
    setting.notes += [why_not] if why_not else []
    _measure(Bench(plan, line_up(plan, load), chosen, meter), setting, files)


def _measure(run: Bench, setting: Setting, files: dict[str, Path | None]) -> None:
    """Runs everything; Ctrl-C leaves what was measured so far in all outputs."""
    for sentence in run.lineup.left_out:
        print(sentence, file=sys.stderr)
    ended = _followed(run.run(), run.steps)
    setting.notes += [ended.sentence] if ended.error else []
    report = build(run, setting, ended.early)
    contents = {"--json": json.dumps(report, indent=2) + "\n", "--markdown": markdown(report)}
    if STDOUT not in files.values():  # tables on a terminal, Markdown in a pipe
        if sys.stdout.isatty():
            tables.show(Console(), summary(report))
        else:
            print(contents["--markdown"], end="")
    for option, content in contents.items():
        _write(files[option], content)
    if picture := files["--plot"]:
        with replacing(picture) as fresh:
            plot(report, fresh)
    ended.leave()


@dataclass(frozen=True)
class Ended:
    """How a run ended: by itself, by Ctrl-C, or by an error, which costs no figure that was recorded before it."""

    interrupted: bool = False
    error: Exception | None = None

    @property
    def early(self) -> bool:
        """Whether something is missing."""
        return self.interrupted or self.error is not None

    @property
    def sentence(self) -> str:
        """For the report's notes and for the user."""
        return f"Stopped by an error: {brief(self.error)}." if self.error else "Interrupted."

    def leave(self) -> None:
        """Exit code 130 after Ctrl-C, one sentence and exit code 2 after an error; otherwise nothing."""
        if self.error is not None:
            raise MLXMTPError(
                f"Expected the bench to run to its end, found an error ({brief(self.error)}); what was measured before "
                "it is in the report."
            ) from self.error
        if self.interrupted:
            raise typer.Exit(130)


def _followed(steps: Iterator[str], total: int) -> Ended:
    """Takes all steps under a bar with the time left, on a terminal."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    # Steps differ in length, so the time left goes by all of them and not by the last few.
    bar = Progress(*columns, console=console, transient=True, speed_estimate_period=24 * 3600.0,
                   disable=not console.is_interactive)  # fmt: skip
    try:
        with bar:
            task = bar.add_task("measuring", total=total)
            for what in steps:
                bar.update(task, advance=1, description=what)
    except KeyboardInterrupt:
        print("Interrupted; what was measured so far follows.", file=sys.stderr)
        return Ended(interrupted=True)
    except Exception as error:  # of MLX or of another engine: what was measured must not be lost with it
        print(f"Stopped by an error ({brief(error)}); what was measured so far follows.", file=sys.stderr)
        return Ended(error=error)
    return Ended()


def _write(file: Path | None, content: str) -> None:
    if file == STDOUT:
        print(content, end="")
    elif file is not None:
        with replacing(file) as fresh:
            fresh.write_text(content, encoding="utf-8")


def _check_files(files: dict[str, Path | None]) -> None:
    """Before anything is measured."""
    given = {option: file for option, file in files.items() if file is not None}
    if list(given.values()).count(STDOUT) > 1 or given.get("--plot") == STDOUT:
        raise OptionError("Expected '-' for --json or for --markdown, found it elsewhere or twice; name a file.")
    places = [file.resolve() for file in given.values() if file != STDOUT]
    if len(set(places)) < len(places):
        raise OptionError("Expected a file of its own for each of --json, --markdown and --plot, found one twice.")
    for option, file in given.items():
        if file != STDOUT and (file.is_dir() or not os.access(file.absolute().parent, os.W_OK)):
            raise OptionError(f"Expected {option} as a file in a writable folder, found '{file}'; change it.")


def _depths(depth: str | None, depths: str | None) -> tuple[int | str, ...] | None:
    if depth is not None and depths is not None:
        raise OptionError("Expected --depth or --depths, found both; leave one out.")
    given = depth if depths is None else depths
    return None if given is None else tuple(options.depth_value(one.strip()) for one in given.split(","))
