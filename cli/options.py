"""Options that several commands share, defined once; and the parsing typer does not do."""

from __future__ import annotations

from typing import Annotated

import typer

from mlx_mtp import OptionError, PromptError

Model = Annotated[
    str | None,
    typer.Option(help="Folder or hub name of the target.", show_default="the embedded model"),
]
Drafter = Annotated[str, typer.Option(help="Folder or hub name of the drafter, 'auto' or 'none'.")]
Depth = Annotated[str, typer.Option(help="Drafts per round: 'auto' or 0 to 8; 0 decodes plainly.")]
MaxTokens = Annotated[int, typer.Option(help="Most tokens to generate.")]
Temperature = Annotated[float, typer.Option(help="0 = greedy, the only value so far.")]
MaxContext = Annotated[
    int | None, typer.Option(help="Most tokens of prompt and reply together.", show_default="the model's limit")
]


def depth_value(text: str) -> int | str:
    """'auto' or a whole number; its range is checked where the drafter is known."""
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise OptionError(f"Expected --depth 'auto' or 0 to 8, found '{text}'.") from None


def token_ids(text: str) -> list[int]:
    """'1,2,3' -> [1, 2, 3]; PromptError for anything else."""
    try:
        ids = [int(part) for part in text.split(",")]
    except ValueError:
        raise PromptError(f"Expected --tokens as whole numbers with commas, like 1,2,3, found '{text}'.") from None
    return ids
