"""Options that several commands share, defined once; and the parsing typer does not do."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

import typer

from mlx_mtp.checkpoints import packaged, pairs
from mlx_mtp.loading import FAMILIES

# The panels of `--help`.
PairPanel = partial(typer.Option, rich_help_panel="Model and drafter")
PromptPanel = partial(typer.Option, rich_help_panel="Prompt")
ReplyPanel = partial(typer.Option, rich_help_panel="Reply")
OutputPanel = partial(typer.Option, rich_help_panel="Output")
Sampled = partial(typer.Option, rich_help_panel="Sampling")
Own = partial(Sampled, show_default="the model's own")


def models() -> list[str]:
    """Names that a shell completes."""
    return [*packaged.MODELS, *(pair.target for pair in pairs.known_pairs())]


def drafters() -> list[str]:
    """Names that a shell completes."""
    return ["auto", "none", "lookup", "lookup+auto", *FAMILIES]


MODEL_HELP = "Folder or hub name of the target, or 'smollm2'."
DRAFTER_HELP = "Folder or hub name of the drafter, 'auto', 'lookup', 'lookup+NAME' or 'none'."
MODE_HELP = "exact: greedy output bit-equal with and without the drafter."
CONTEXT_HELP = "Most tokens of prompt and reply together."
Model = Annotated[
    str | None,
    PairPanel("--model", "-m", metavar="NAME", help=MODEL_HELP, show_default="the embedded model",
              autocompletion=models),
]  # fmt: skip
Drafter = Annotated[str, PairPanel(metavar="NAME", help=DRAFTER_HELP, autocompletion=drafters)]
Depth = Annotated[str, PairPanel(metavar="N", help="Drafts per round: 'auto' or 0 to 8; 0 decodes plainly.")]
Mode = Annotated[Literal["fast", "exact"], PairPanel(help=MODE_HELP)]
MaxContext = Annotated[int | None, PairPanel(help=CONTEXT_HELP, show_default="the model's limit")]

MaxTokens = partial(ReplyPanel, "--max-tokens", "-n")
Temperature = Annotated[float | None, Own("--temperature", "-t", help="0 = greedy.")]
TopK = Annotated[int | None, Own(help="Keep the k likeliest tokens; 0 = all.")]
TopP = Annotated[float | None, Own(help="Keep the likeliest tokens up to this weight.")]
MinP = Annotated[float | None, Own(help="Keep those at least this likely beside the best.")]
RepetitionPenalty = Annotated[float | None, Own(help="Above 1 avoids tokens seen before.")]
PresencePenalty = Annotated[float | None, Sampled(help="Taken once from tokens generated before.")]
FrequencyPenalty = Annotated[float | None, Sampled(help="Taken per occurrence from tokens generated before.")]
Seed = Annotated[int | None, Sampled(help="The same seed gives the same reply.", show_default="another each time")]


def number_or_word(text: str) -> int | str:
    """'3' -> 3, 'auto' as it is; the library checks what it means."""
    try:
        return int(text)
    except ValueError:
        return text
