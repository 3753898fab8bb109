"""What a chat understands besides messages: /help, /undo, /save and the others.

What it does: reads a command, does it on the conversation, says what came of it. A command that fails leaves everything
as it was. What it does not do: anything a Python program could not do through `mlx_mtp.Chat`.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from mlx_mtp import OptionError, PromptError
from mlx_mtp.cli.conversation import Conversation
from mlx_mtp.cli.line_input import Verbatim
from mlx_mtp.engine import SEEDED_DEPTH
from mlx_mtp.generation.types import acceptance

EMBEDDED = "embedded"  # the name by which /model knows the model that comes with the program
ANY_MODEL = ("none", "lookup")  # drafters that stay when the model changes
SHOWN = 60
TEXT = "TEXT"  # an argument of any kind, over several lines
SLIP = re.compile(r"/+[A-Za-z_-]*")


@dataclass(frozen=True)
class Command:
    """run(conversation, argument) -> whether the chat goes on."""

    run: Callable[[Conversation, str], bool]
    argument: str
    help: str


def is_command(text: str) -> bool:
    """Whether what somebody typed is meant for the chat and not for the model: one line that begins with a command.

    A single word that only looks like one is taken for a slip; a path, or several pasted lines, are a message. Only a
    command whose argument is text of any kind may have several lines.
    """
    if isinstance(text, Verbatim) or not text.startswith("/"):
        return False
    name, *rest = text.split(None, 1)
    if name in COMMANDS and COMMANDS[name].argument == TEXT:
        return True
    return len(text.splitlines()) == 1 and (name in (*COMMANDS, "/") or (not rest and bool(SLIP.fullmatch(name))))


def obey(conversation: Conversation, text: str) -> bool:
    """Does what the command says; whether the chat goes on. MLXMTPError, and nothing done, where that cannot be."""
    name, *rest = text.split(None, 1)
    command = COMMANDS.get(name)
    if command is None:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        raise OptionError(
            f"Expected a command, found '{name[:SHOWN]}'; "
            + (f"did you mean '{near[0]}'?" if near else "'/help' lists them.")
            + " A space in front makes it a message."
        )
    argument = rest[0].strip() if rest else ""
    if argument and not command.argument:
        raise OptionError(f"Expected nothing behind {name}, found '{argument[:SHOWN]}'.")
    return command.run(conversation, argument)


def _help(conversation: Conversation, _: str) -> bool:
    table = Table.grid(padding=(0, 2))
    for name, command in COMMANDS.items():
        table.add_row(f"{name} {command.argument}".rstrip(), command.help)
    conversation.screen.show(table)
    conversation.screen.say(
        "Enter sends. Alt-Enter, or a backslash at the end of a line, begins a new line; pasted lines are one message. "
        "Ctrl-C stops a reply, Ctrl-D leaves."
    )
    return True


def _reset(conversation: Conversation, _: str) -> bool:
    conversation.chat.reset()
    conversation.adopt(conversation.chat)
    conversation.screen.note("the conversation is empty")
    return True


def _undo(conversation: Conversation, _: str) -> bool:
    taken = conversation.chat.undo()
    if taken is None:
        raise PromptError("Expected a question to take back, found an empty conversation.")
    conversation.screen.note(f"taken back: {_short(taken)}")
    return True


def _retry(conversation: Conversation, _: str) -> bool:
    settings, engine = conversation.settings, conversation.chat.engine
    greedy = settings.sampling.over(engine.defaults).temperature == 0
    if greedy or settings.seed is not None:
        why = "temperature is 0" if greedy else "there is a seed"
        conversation.screen.note(f"{why}: the same question gives the same reply")
    conversation.retry()
    return True


def _system(conversation: Conversation, text: str) -> bool:
    chat = conversation.chat
    if not text:
        conversation.screen.say(chat.system or "no instruction; /system TEXT sets one")
        return True
    chat.set_system(None if text == "none" else text)
    conversation.screen.note("no instruction any more" if text == "none" else "instruction set")
    return True


def _set(conversation: Conversation, text: str) -> bool:
    if not text:
        for name, value in conversation.settings.values().items():
            conversation.screen.say(f"{name} {_own(value)}")
        return True
    name, _, value = text.partition(" ")
    if not value.strip():
        raise OptionError(f"Expected a name and a value, found '{name[:SHOWN]}' alone; '/set' shows the values.")
    conversation.use(conversation.settings.with_value(name, value.strip()))
    conversation.screen.note(f"{name} is {value.strip()}")
    return True


def _own(value: object) -> str:
    return "default" if value is None else str(value)


def _stats(conversation: Conversation, _: str) -> bool:
    chat = conversation.chat
    table = Table.grid(padding=(0, 2))
    for name, value in _figures(conversation):
        table.add_row(name, value)
    conversation.screen.show(table)
    conversation.screen.say(_depth(conversation))
    if chat.last is None:
        conversation.screen.say("no finished reply yet")
    return True


def _depth(conversation: Conversation) -> str:
    """Why so many tokens are drafted, as replies are asked for now."""
    engine, settings = conversation.chat.engine, conversation.settings
    seeded = settings.seed is not None and settings.sampling.over(engine.defaults).temperature
    if seeded and engine.depth == "auto":
        return f"Drafting {SEEDED_DEPTH} tokens a round at most: a seed above temperature 0 fixes the depth."
    return engine.depth_reason


def _figures(conversation: Conversation) -> list[tuple[str, str]]:
    chat, engine = conversation.chat, conversation.chat.engine
    turns = sum(message["role"] == "user" for message in chat.messages)
    found = [
        ("conversation", f"{turns} turns, {len(chat.session.ids)} of at most {engine.max_context} tokens kept"),
        ("K/V kept", f"{chat.session.nbytes / 1e6:.1f} MB"),
    ]
    if chat.last is None:
        return found
    stats = chat.last.stats
    stood = [f"{i}: {share:.0%}" for i, share in enumerate(acceptance([stats]), 1)]
    depths = [f"{depth}: {count}" for depth, count in sorted(stats.depth_counts.items())]
    return [
        *found,
        ("last reply", f"{stats.tokens} tokens, ended by {chat.last.finish_reason}, mode {stats.mode}"),
        ("prompt", f"{stats.prompt_tokens} tokens, {stats.prefilled_tokens} prefilled"),
        ("prefill", f"{stats.prefill_seconds:.2f} s"),
        ("decoding", f"{stats.decode_seconds:.2f} s, {stats.decode_tokens_per_second:.1f} tokens/s"),
        ("tokens per round", f"{stats.tokens_per_round:.2f}"),
        ("drafts that stood", ", ".join(stood) or "none drafted"),
        ("rounds by depth", ", ".join(depths) or "none"),
        ("peak memory", f"{stats.peak_memory_bytes / 1e6:.0f} MB"),
    ]


def _save(conversation: Conversation, name: str) -> bool:
    file = conversation.chat.save(_file(name))
    conversation.screen.note(f"saved in {file}")
    return True


def _load(conversation: Conversation, name: str) -> bool:
    conversation.screen.note(conversation.open(_file(name)))
    return True


def _file(name: str) -> Path:
    if not name:
        raise OptionError("Expected a file's name, found none; write one, like session.")
    return Path(os.path.expanduser(name))


def _model(conversation: Conversation, name: str) -> bool:
    if not name:
        conversation.screen.say(conversation.model or EMBEDDED)
        return True
    model = None if name == EMBEDDED else name
    drafter = conversation.drafter if conversation.drafter in ANY_MODEL else "auto"
    conversation.move(model, drafter)
    conversation.screen.note(f"going on with {name}; the next reply runs the whole conversation")
    return True


def _thoughts(conversation: Conversation, _: str) -> bool:
    conversation.screen.say(conversation.thoughts.strip("\n") or "no thoughts in the last reply")
    return True


def _quit(conversation: Conversation, _: str) -> bool:
    return False


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else line[: SHOWN - 4] + " ..."


COMMANDS = {
    "/help": Command(_help, "", "this list"),
    "/reset": Command(_reset, "", "forget the conversation"),
    "/undo": Command(_undo, "", "take the last question and its reply back"),
    "/retry": Command(_retry, "", "another reply to the last question"),
    "/system": Command(_system, TEXT, "an instruction for the whole conversation; 'none' removes it"),
    "/set": Command(_set, "NAME VALUE", "temperature, max_tokens, thinking, ...; alone it shows them"),
    "/stats": Command(_stats, "", "figures of the last reply, and why so much is drafted"),
    "/thoughts": Command(_thoughts, "", "what the model thought before the last reply"),
    "/save": Command(_save, "FILE", "keep the conversation with its K/V"),
    "/load": Command(_load, "FILE", "go on with a saved conversation"),
    "/model": Command(_model, "NAME", "go on with another model"),
    "/quit": Command(_quit, "", "leave, like Ctrl-D"),
}
