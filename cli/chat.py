"""`mlx-mtp chat`: a conversation on a terminal or through pipes, with a line of figures after each reply."""

from __future__ import annotations

import sys
from typing import Annotated, Literal

import typer

import mlx_mtp
from mlx_mtp.checkpoints import hub, memory, pairs
from mlx_mtp.cli import commands, loading, notices, options
from mlx_mtp.cli.conversation import Conversation, Screen, Settings
from mlx_mtp.cli.line_input import HINT, Lines, lines

SYSTEM_HELP = "An instruction for the whole conversation."
THINKING_HELP = "Thoughts of models that have them."


def chat(
    model: options.Model = None,
    drafter: options.Drafter = "auto",
    depth: options.Depth = "auto",
    mode: options.Mode = "fast",
    draft_head_bits: options.HeadBits = "auto",
    max_context: options.MaxContext = None,
    system: Annotated[str | None, options.PromptPanel(help=SYSTEM_HELP)] = None,
    load: Annotated[str | None, options.PromptPanel(metavar="FILE", help="Go on with a saved conversation.")] = None,
    max_tokens: Annotated[int, options.MaxTokens(help="Most tokens of a reply.")] = 1024,
    stop: options.Stop = None,
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
    verbose: options.Verbose = False,
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
    settings = Settings(sampling, max_tokens, seed, tuple(stop or ()), thinking or "off")
    if verbose:
        notices.say_more()
    screen = Screen(plain)

    def engine(name: str | None, drafter: str) -> mlx_mtp.Engine:
        with notices.held_back():
            loaded = loading.load(
                name, drafter, depth=depth, mode=mode, draft_head_bits=draft_head_bits, max_context=max_context
            )
            if loaded.tokenizer is None or not loaded.tokenizer.has_chat_template:
                raise mlx_mtp.PromptError(
                    "This checkpoint has no chat template; use another model, or 'mlx-mtp generate --raw'."
                )
            return loaded

    model = choose_model(model, screen)
    source = lines(list(commands.COMMANDS))
    chat = engine(model, drafter).chat(system)
    conversation = Conversation(chat, settings, screen, engine, model, drafter, source.interactive)
    _prepare(conversation, load, system, thinking)
    if source.interactive:
        _greet(conversation)
    if not converse(conversation, source):
        raise typer.Exit(2)


def choose_model(name: str | None, screen: Screen) -> str | None:
    """The model to load: the one that was named; else the best known pair that fits, if somebody is there who agrees
    to it and the hub answers or a copy is here; else None, the embedded one, and a line that says so."""
    if name is not None:
        return name
    why = "No --model named"
    if sys.stdin.isatty() and sys.stdout.isatty():
        pair = pairs.best_pair(memory.available_bytes())
        here = pair is not None and hub.cached(pair.target) is not None
        if pair is not None and (here or hub.hub_answers()):
            cost = "it is downloaded already" if here else f"a download of {memory.readable(pair.download_bytes)}"
            if typer.confirm(f"{pair.target} fits this machine ({cost}). Chat with it?", default=here):
                return pair.target
        elif pair is not None:
            why += ", and the hub does not answer"
    screen.note(f"{why}: the embedded model, a small one that knows Python's standard library.")
    return None


def _prepare(conversation: Conversation, load: str | None, system: str | None, thinking: str | None) -> None:
    """Settings and a saved conversation as asked for on the command line; refused before anything is shown."""
    settings, tokenizer = conversation.settings, conversation.chat.engine.tokenizer
    conversation.use(settings)
    if load is not None:
        conversation.screen.note(conversation.open(load))
        if system is not None:
            conversation.chat.set_system(system)
        if thinking is not None:
            conversation.use(settings)
    if thinking in ("show", "hide") and tokenizer and not tokenizer.can_think:
        conversation.screen.note("This checkpoint's chat template knows no thinking.")


def _greet(conversation: Conversation) -> None:
    engine = conversation.chat.engine
    drafter = "no drafter" if engine.drafter is None else f"drafter {conversation.drafter}"
    thinking = ", thinking " + conversation.settings.thinking if engine.tokenizer and engine.tokenizer.can_think else ""
    name = conversation.model or "embedded model"
    conversation.screen.note(f"mlx-mtp {mlx_mtp.__version__} · {name}, {drafter}, mode {engine.mode}{thinking}")
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
            conversation.screen.refuse(error)
            followed = False
        except KeyboardInterrupt:
            if not source.interactive:
                raise
            conversation.screen.note(HINT)
    return followed or source.interactive
