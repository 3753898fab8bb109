"""`mlx-mtp doctor`: what decides the speed here, measured, and what to do about it."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console

from mlx_mtp.checkpoints.kept import forget, probes_path, profiles_path
from mlx_mtp.cli import options
from mlx_mtp.cli.loading import load
from mlx_mtp.errors import MLXMTPError, OptionError
from mlx_mtp.measuring import tables
from mlx_mtp.measuring.advice import advise
from mlx_mtp.measuring.diagnosis import diagnose


def doctor(
    model: options.Model = None,
    drafter: options.Drafter = "auto",
    mode: options.Mode = "fast",
    as_json: Annotated[bool, options.OutputPanel("--json", help="Print one JSON object and nothing else.")] = False,
    forgetting: Annotated[
        bool, typer.Option("--forget", help="Measure nothing; drop what earlier runs learned of every pair.")
    ] = False,
) -> None:
    """Measure this machine with a pair, and say what to expect.

    Examples:
      mlx-mtp doctor -m smollm2
      mlx-mtp doctor --forget
    """
    if forgetting:
        if (model, drafter, mode) != (None, "auto", "fast"):
            raise OptionError("--forget drops all that was learned; leave out --model, --drafter and --mode.")
        return _forget(as_json)
    engine = load(model, drafter, mode=mode)
    with Console(stderr=True).status("measuring"):
        found = diagnose(engine)
    advice = advise(found)
    if as_json:
        print(json.dumps(found | {"advice": advice}))
    else:
        parts = tables.parts_of("measured", found)
        tables.print_parts(Console(), [*parts, *(f"{one['topic']}: {one['text']}" for one in advice)])


def _forget(as_json: bool) -> None:
    """Drops the profiles of the depth control and what exact mode found, and says whose they were."""
    dropped = []
    for path in (profiles_path(), probes_path()):
        try:
            dropped += forget(path)
        except OSError as error:
            raise MLXMTPError(f"What was learned could not be dropped ({error}); remove {path} yourself.") from None
    if as_json:
        print(json.dumps({"forgotten": dropped}))
    elif dropped:
        print("Forgotten what rounds cost, how often drafts were accepted and which passes are exact of:", *dropped,
              sep="\n  ")  # fmt: skip
    else:
        print("Nothing was learned yet, so there was nothing to forget.")
