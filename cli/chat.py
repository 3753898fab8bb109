"""`mlx-mtp chat`: a conversation on a terminal or through pipes, with a line of figures after each reply."""

from __future__ import annotations

import sys
from typing import Annotated, Literal

import typer
from rich.prompt import IntPrompt
from rich.table import Table

import mlx_mtp
from mlx_mtp.checkpoints import hub, memory, packaged
from mlx_mtp.cli import commands, loading, models, options, progress, toy
from mlx_mtp.cli.conversation import USUAL_TOKENS, Conversation, Screen, Settings
from mlx_mtp.cli.line_input import HINT, Lines, lines

MOST_OFFERED = 5  # that must be downloaded
SHOWN = toy.DEFAULT.format(usual=USUAL_TOKENS)
THINKING_HELP = "Thoughts of models that have them."


def chat(
    model: options.Model = None,
    drafter: options.Drafter = "auto",
    depth: options.Depth = "auto",
    mode: options.Mode = "fast",
    max_context: options.MaxContext = None,
    system: Annotated[str | None, options.PromptPanel(help="An instruction for the whole conversation.")] = None,
    load: Annotated[str | None, options.PromptPanel(metavar="FILE", help="Go on with a saved conversation.")] = None,
    max_tokens: Annotated[int | None, options.MaxTokens(help="Most tokens of a reply.", show_default=SHOWN)] = None,
    thinking: Annotated[
        Literal["show", "hide", "off"] | None, options.ReplyPanel(help=THINKING_HELP, show_default="off")
    ] = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    presence_penalty: options.PresencePenalty = None,
    frequency_penalty: options.FrequencyPenalty = None,
    seed: options.Seed = None,
    plain: Annotated[bool, options.OutputPanel("--plain", help="Text as it comes, no Markdown.")] = False,
) -> None:
    """Chat on the terminal; in a pipe every line of standard input is a message.

    Examples:
      mlx-mtp chat
      mlx-mtp chat -m smollm2 --system "Answer in one sentence."
      mlx-mtp chat -m mlx-community/gemma-4-e4b-it-4bit --thinking show
    """
    sampling = mlx_mtp.Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty, frequency_penalty=frequency_penalty,
    )  # fmt: skip
    settings = Settings(sampling, max_tokens, seed, thinking or "off")
    screen = Screen(plain)

    def engine(name: str | None, drafter: str) -> mlx_mtp.Engine:
        with progress.held_back():
            loaded = loading.load(name, drafter, depth=depth, mode=mode, max_context=max_context)
            if loaded.tokenizer is None or not loaded.tokenizer.has_chat_template:
                raise mlx_mtp.PromptError(
                    "This checkpoint has no chat template; use another model, or 'mlx-mtp generate --raw'."
                )
            return loaded

    model = choose_model(model, screen)
    source = lines(list(commands.COMMANDS))
    conversation = Conversation(
        engine(model, drafter).chat(), settings, screen, engine, model, drafter, source.interactive
    )
    if load is not None:
        screen.note(conversation.open(load))
    if system is not None:
        conversation.chat.set_system(system)
    conversation.use(conversation.settings if thinking is None else settings)
    if source.interactive:
        _greet(conversation)
    if not converse(conversation, source):
        raise typer.Exit(2)


def choose_model(name: str | None, screen: Screen) -> str | None:
    """The model to load: the one that was named; else, where somebody is there to ask, one that they choose; else None,
    the embedded one, and a line that says so."""
    if name is not None:
        return name
    if sys.stdin.isatty() and sys.stdout.isatty() and (chosen := _chosen(screen)):
        return chosen
    screen.note(toy.NOTE)
    return None


def _chosen(screen: Screen) -> str | None:
    """One of the models that fit with head-room, those that are here first. Enter takes one that costs little."""
    fitting = [row for row in models.rows(memory.available_bytes()) if row["fits"]]
    here = [row for row in fitting if row["downloaded"] == "yes"]
    left = [row for row in fitting if row not in here]
    online = hub.hub_answers() if left else False
    small = [row for row in left if row["target"] in packaged.MODELS]
    offered = here + [row for row in left if row not in small][: MOST_OFFERED * online] + small
    table = Table("", "model that fits here", "download", "memory", box=None, pad_edge=False)
    for at, row in enumerate(offered, 1):
        download, needed = models.sizes(row)
        table.add_row(str(at), row["target"], "is here" if row in here else download, needed)
    last = len(offered) + 1
    table.add_row(str(last), "the embedded toy, whose text is weak", "is here")
    screen.show(table)
    screen.show("'mlx-mtp models' lists all known ones, --model NAME takes any other.")
    default = 1 if here else last - 1 if online and small else last
    numbers = [str(number) for number in range(1, last + 1)]
    answer = IntPrompt.ask("Which one", console=screen.out, choices=numbers, show_choices=False, default=default)
    return None if answer == last else str(offered[answer - 1]["target"])


def _greet(conversation: Conversation) -> None:
    engine = conversation.chat.engine
    drafter = "no drafter" if engine.drafter is None else f"drafter {conversation.drafter}"
    name, thinking = conversation.model or "embedded model", conversation.settings.thinking
    can_think = engine.tokenizer is not None and engine.tokenizer.can_think
    said = f", thinking {thinking}" if can_think else "" if thinking == "off" else ", which knows no thinking"
    conversation.screen.note(f"mlx-mtp {mlx_mtp.__version__} · {name}, {drafter}, mode {engine.mode}{said}")
    conversation.screen.note("/help shows the commands, Ctrl-C stops a reply, Ctrl-D leaves.")


def converse(conversation: Conversation, source: Lines) -> bool:
    """Messages and commands until there are no more; whether all of them could be followed, if nobody was there."""
    followed = True
    while True:
        try:
            text = source.read()
            if source.interactive and commands.is_command(text):
                commands.obey(conversation, text)
            else:
                conversation.say(text)
        except EOFError:
            break
        except mlx_mtp.MLXMTPError as error:
            sys.stdout.flush()
            print(error, file=sys.stderr, flush=True)
            followed = False
        except KeyboardInterrupt:
            if not source.interactive:
                raise
            conversation.screen.note(HINT)
    return followed or source.interactive
