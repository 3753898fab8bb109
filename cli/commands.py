"""What a chat understands besides messages: /help, /undo, /save and the others. One that fails changes nothing."""

from __future__ import annotations

import difflib
import os
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass

from rich.table import Table

from mlx_mtp import OptionError, PromptError
from mlx_mtp.cli.conversation import Conversation
from mlx_mtp.engine import SEEDED_DEPTH
from mlx_mtp.errors import plural
from mlx_mtp.generation.types import acceptance

EMBEDDED = "embedded"  # the name by which /model knows the model that comes with the program
ANY_MODEL = ("none", "lookup")  # drafters that stay when the model changes
SHOWN = 60
TEXT = "TEXT"  # an argument of any kind, over several lines
FILE = "FILE"  # an argument that must be there
SLIP = re.compile(r"/+[A-Za-z_-]*")


@dataclass(frozen=True)
class Command:
    """run(conversation, argument); argument: what it is called in /help, "" where there is none."""

    run: Callable[[Conversation, str], None]
    argument: str
    help: str


def is_command(text: str) -> bool:
    """Whether what somebody typed is meant for the chat and not for the model: one line that begins with a command.

    A single word that only looks like one is taken for a slip; a path, or several pasted lines, are a message. Only a
    command whose argument is text of any kind may have several lines.
    """
    if not text.startswith("/"):
        return False
    name, *rest = text.split(None, 1)
    if name in COMMANDS and COMMANDS[name].argument == TEXT:
        return True
    return len(text.splitlines()) == 1 and (name in (*COMMANDS, "/") or (not rest and bool(SLIP.fullmatch(name))))


def obey(conversation: Conversation, text: str) -> None:
    """Does what the command says; EOFError for leaving. MLXMTPError, and nothing done, where that cannot be."""
    name, *rest = text.split(None, 1)
    command = COMMANDS.get(name)
    if command is None:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        meant = f"did you mean '{near[0]}'?" if near else "'/help' lists them."
        raise OptionError(f"There is no command '{name[:SHOWN]}'; {meant} A space in front makes it a message.")
    argument = rest[0].strip() if rest else ""
    if argument and not command.argument:
        raise OptionError(f"{name} takes nothing after it, but there was '{argument[:SHOWN]}'.")
    if command.argument == FILE and not argument:
        raise OptionError("A name for the file is missing; write one, like session.")
    command.run(conversation, argument)


def _help(conversation: Conversation, _: str) -> None:
    rows = [(f"{name} {command.argument}".rstrip(), command.help) for name, command in COMMANDS.items()]
    conversation.screen.show(_table(rows))
    conversation.screen.show(
        "Enter sends. Alt-Enter, or a backslash at the end of a line, begins a new line; pasted lines are one message. "
        "Ctrl-C stops a reply, Ctrl-D leaves."
    )


def _table(rows: list[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    for row in rows:
        table.add_row(*row)
    return table


def _reset(conversation: Conversation, _: str) -> None:
    conversation.chat.reset()
    conversation.thoughts = ""
    conversation.screen.note("the conversation is empty")


def _undo(conversation: Conversation, _: str) -> None:
    taken = conversation.chat.undo()
    if taken is None:
        raise PromptError("There is no question to take back; the conversation is empty.")
    conversation.screen.note(f"taken back: {textwrap.shorten(taken, SHOWN, placeholder=' ...')}")


def _retry(conversation: Conversation, _: str) -> None:
    settings = conversation.settings
    if not _drawn(conversation) or settings.seed is not None:
        why = "there is a seed" if _drawn(conversation) else "temperature is 0"
        conversation.screen.note(f"{why}: the same question gives the same reply")
    conversation.say(None)


def _drawn(conversation: Conversation) -> bool:
    """Whether replies are drawn, not greedy."""
    return bool(conversation.settings.sampling.over(conversation.chat.engine.defaults).temperature)


def _system(conversation: Conversation, text: str) -> None:
    chat = conversation.chat
    if not text:
        conversation.screen.show(chat.system or "no instruction; /system TEXT sets one")
        return
    chat.set_system(None if text == "none" else text)
    conversation.screen.note("no instruction any more" if text == "none" else "instruction set")


def _set(conversation: Conversation, text: str) -> None:
    if not text:
        values = conversation.settings.values().items()
        conversation.screen.show("\n".join(f"{name} {'default' if value is None else value}" for name, value in values))
        return
    name, _, value = text.partition(" ")
    if not value.strip():
        raise OptionError(f"/set needs a value after '{name[:SHOWN]}'; '/set' alone shows the values.")
    conversation.use(conversation.settings.with_value(name, value.strip()))
    conversation.screen.note(f"{name} is {value.strip()}")


def _stats(conversation: Conversation, _: str) -> None:
    chat, engine = conversation.chat, conversation.chat.engine
    kept = f"{len(chat.session.ids)} of at most {engine.max_context} tokens kept"
    rows = [
        ("conversation", f"{plural(conversation.turns, 'turn')}, {kept}"),
        ("K/V kept", f"{chat.session.nbytes / 1e6:.1f} MB"),
    ]
    if chat.last is not None:
        stats = chat.last.stats
        accepted = [f"{i}: {share:.0%}" for i, share in enumerate(acceptance([stats]), 1)]
        depths = [f"{depth}: {count}" for depth, count in sorted(stats.depth_counts.items())]
        rows += [
            ("last reply", f"{stats.tokens} tokens, ended by {chat.last.finish_reason}, mode {stats.mode}"),
            ("prompt", f"{stats.prompt_tokens} tokens, {stats.prefilled_tokens} prefilled"),
            ("prefill", f"{stats.prefill_seconds:.2f} s"),
            ("decoding", f"{stats.decode_seconds:.2f} s, {stats.decode_tokens_per_second:.1f} tokens/s"),
            ("tokens per round", f"{stats.tokens_per_round:.2f}"),
            ("drafts accepted", ", ".join(accepted) or "none drafted"),
            ("rounds by depth", ", ".join(depths) or "none"),
            ("peak memory", f"{stats.peak_memory_bytes / 1e6:.0f} MB"),
        ]
    conversation.screen.show(_table(rows))
    fixed = engine.depth == "auto" and conversation.settings.seed is not None and _drawn(conversation)
    why = f"Drafting {SEEDED_DEPTH} tokens a round at most: a seed above temperature 0 fixes the depth."
    conversation.screen.show(why if fixed else engine.depth_reason)
    if chat.last is None:
        conversation.screen.show("no finished reply yet")


def _save(conversation: Conversation, name: str) -> None:
    conversation.screen.note(f"saved in {conversation.chat.save(os.path.expanduser(name))}")


def _load(conversation: Conversation, name: str) -> None:
    conversation.screen.note(conversation.open(name))


def _model(conversation: Conversation, name: str) -> None:
    if not name:
        conversation.screen.show(conversation.model or EMBEDDED)
        return
    drafter = conversation.drafter if conversation.drafter in ANY_MODEL else "auto"
    model = None if name == EMBEDDED else name
    conversation.chat = conversation.chat.moved(conversation.load(model, drafter))
    conversation.model, conversation.drafter, conversation.thoughts = model, drafter, ""
    conversation.screen.note(f"going on with {name}; the next reply runs the whole conversation")


def _thoughts(conversation: Conversation, _: str) -> None:
    conversation.screen.show(conversation.thoughts.strip("\n") or "no thoughts in the last reply")


def _quit(conversation: Conversation, _: str) -> None:
    raise EOFError


COMMANDS = {
    "/help": Command(_help, "", "this list"),
    "/reset": Command(_reset, "", "forget the conversation"),
    "/undo": Command(_undo, "", "take the last question and its reply back"),
    "/retry": Command(_retry, "", "another reply to the last question"),
    "/system": Command(_system, TEXT, "an instruction for the whole conversation; 'none' removes it"),
    "/set": Command(_set, "NAME VALUE", "temperature, max_tokens, thinking, ...; alone it shows them"),
    "/stats": Command(_stats, "", "figures of the last reply, and why so much is drafted"),
    "/thoughts": Command(_thoughts, "", "what the model thought before the last reply"),
    "/save": Command(_save, FILE, "keep the conversation with its K/V"),
    "/load": Command(_load, FILE, "go on with a saved conversation"),
    "/model": Command(_model, "NAME", "go on with another model"),
    "/quit": Command(_quit, "", "leave, like Ctrl-D"),
}
