"""Options that several commands share, defined once; and the parsing typer does not do."""

from __future__ import annotations

from typing import Annotated

import typer

from mlx_mtp import PromptError

MODEL_HELP = "Folder or hub name of the target, or 'smollm2'."
Model = Annotated[str | None, typer.Option("--model", "-m", help=MODEL_HELP, show_default="the embedded model")]
Drafter = Annotated[str, typer.Option(help="Folder or hub name of the drafter, 'auto', 'lookup' or 'none'.")]
Depth = Annotated[str, typer.Option(help="Drafts per round: 'auto' or 0 to 8; 0 decodes plainly.")]
MaxTokens = Annotated[int, typer.Option(help="Most tokens to generate.")]
OWN = "the checkpoint's own"
Temperature = Annotated[float | None, typer.Option(help="0 = greedy.", show_default=OWN)]
TopK = Annotated[int | None, typer.Option(help="Keep the k likeliest tokens; 0 = all.", show_default=OWN)]
TopP = Annotated[float | None, typer.Option(help="Keep the likeliest tokens up to this weight.", show_default=OWN)]
MinP = Annotated[float | None, typer.Option(help="Keep those at least this likely beside the best.", show_default=OWN)]
RepetitionPenalty = Annotated[float | None, typer.Option(help="Above 1 avoids tokens seen before.", show_default=OWN)]
PresencePenalty = Annotated[float | None, typer.Option(help="Taken once from tokens generated before.")]
FrequencyPenalty = Annotated[float | None, typer.Option(help="Taken per occurrence from tokens generated before.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same reply.", show_default="another each time")]
Mode = Annotated[str, typer.Option(help="'fast', or 'exact': greedy output bit-equal with and without the drafter.")]
HeadBits = Annotated[str, typer.Option(help="Bits of a drafter's dense output head: 'auto', 0 (as it is), 4 or 8.")]
Stop = Annotated[list[str] | None, typer.Option(help="Text that ends the reply; may be repeated.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Say when the number of drafts changes.")]
CONTEXT_HELP = "Most tokens of prompt and reply together."
MaxContext = Annotated[int | None, typer.Option(help=CONTEXT_HELP, show_default="the model's limit")]


def is_utf8(text: str) -> bool:
    """Whether an argument or a line was UTF-8; Python keeps other bytes as surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def number_or_word(text: str) -> int | str:
    """'3' -> 3, 'auto' as it is; the library checks what it means."""
    try:
        return int(text)
    except ValueError:
        return text


def token_ids(text: str) -> list[int]:
    """'1,2,3' -> [1, 2, 3]; PromptError for anything else."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise PromptError(f"--tokens must be whole numbers with commas, like 1,2,3, not '{text}'.") from None
