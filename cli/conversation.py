"""One chat as the command line holds it: the conversation, what replies are asked with, and where they are shown.

What it does: streams a reply to the screen, lets Ctrl-C stop it, and says in one line how fast it was. What it does
not do: read input (line_input.py), or know commands (commands.py).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType

from mlx_mtp import Chat, Engine, Event, MLXMTPError, OptionError, Result, Sampling, Session
from mlx_mtp.cli.line_input import Interruption, no_echo
from mlx_mtp.cli.progress import PrefillBar
from mlx_mtp.cli.reply_view import THINKING, MarkdownView, PlainView, View

SAMPLING = tuple(entry.name for entry in fields(Sampling) if entry.name != "logit_bias")
WHOLE = ("top_k", "max_tokens", "seed")
NO_DEFAULT = ("max_tokens", "thinking")  # settings that always have a value


@dataclass(frozen=True)
class Settings:
    """What every reply is asked with; `thinking` is "show", "hide" or "off"."""

    sampling: Sampling
    max_tokens: int
    seed: int | None = None
    stop: tuple[str, ...] = ()
    thinking: str = "off"

    def options(self) -> dict[str, Any]:
        """For Engine.stream."""
        return {"sampling": self.sampling, "max_tokens": self.max_tokens, "seed": self.seed, "stop": self.stop}

    def values(self) -> dict[str, Any]:
        """Everything `/set` knows, by name; None = the checkpoint's own."""
        values = {name: getattr(self.sampling, name) for name in SAMPLING}
        return values | {"max_tokens": self.max_tokens, "seed": self.seed, "thinking": self.thinking}

    def with_value(self, name: str, text: str) -> Settings:
        """The same with one value changed; OptionError where there is no such setting or value."""
        name = name.lower().lstrip("-").replace("-", "_")
        if name not in self.values():
            raise OptionError(f"Expected one of {', '.join(self.values())}, found '{name[:60]}'; '/set' shows them.")
        if name == "thinking":
            return replace(self, thinking=checked_thinking(text))
        default = text == "default" and name not in NO_DEFAULT
        changed: dict[str, Any] = {name: None if default else _number(name, text)}
        if name in SAMPLING:
            return replace(self, sampling=replace(self.sampling, **changed))
        return replace(self, **changed)


def checked_thinking(text: str) -> str:
    """One of the ways to treat thoughts; OptionError for any other word."""
    if text not in THINKING:
        raise OptionError(f"Expected thinking as 'show', 'hide' or 'off', found '{text[:60]}'.")
    return text


def _number(name: str, text: str) -> float | int:
    whole = name in WHOLE
    try:
        return int(text) if whole else float(text)
    except ValueError:
        also = "" if name in NO_DEFAULT else " or 'default'"
        what = "a whole number" if whole else "a number"
        raise OptionError(f"Expected {name} as {what}{also}, found '{text[:60]}'.") from None


@dataclass
class Screen:
    """Standard output, and what is said beside the replies. plain: no Markdown."""

    plain: bool
    out: Console = field(default_factory=lambda: Console(emoji=False, markup=False, highlight=False))
    err: Console = field(default_factory=lambda: Console(stderr=True, emoji=False, markup=False, highlight=False))

    def note(self, text: str) -> None:
        """A quiet line, for somebody who watches: on the terminal that shows the replies, else on stderr's."""
        console = self.out if self.out.is_terminal else self.err
        if console.is_terminal:
            console.print(text, style="dim")

    def say(self, text: str) -> None:
        """What a command answers: beside the replies, never among replies that go elsewhere."""
        self.show(text)

    def show(self, answer: RenderableType) -> None:
        """The same for more than a line."""
        (self.out if self.out.is_terminal else self.err).print(answer)

    def refuse(self, error: Exception | str) -> None:
        """One sentence on standard error."""
        sys.stdout.flush()
        print(" ".join(str(error).split()), file=sys.stderr, flush=True)

    def view(self, thinking: str, count: Callable[[str], int]) -> View:
        """What will show one reply."""
        if self.plain or not self.out.is_terminal or self.out.is_dumb_terminal:
            return PlainView(sys.stdout, thinking, count, self.note)
        return MarkdownView(self.out, thinking, count)


@dataclass
class Conversation:
    """load(name, drafter): an engine with the options of the command line; model and drafter are what it was given.

    interactive: whether somebody sits there and goes on after a reply was stopped.
    """

    chat: Chat
    settings: Settings
    screen: Screen
    load: Callable[[str | None, str], Engine]
    model: str | None = None
    drafter: str = "auto"
    interactive: bool = True
    thoughts: str = ""
    # Tokens of the conversation behind so many turns: tells new tokens from those that had to be run again.
    lengths: dict[int, int] = field(default_factory=dict)

    def use(self, settings: Settings) -> None:
        """Other settings from here on; OptionError where this model cannot be asked with them."""
        # The engine checks before it runs, and this is never run.
        self.chat.engine.stream([0], **replace(settings, stop=()).options()).close()
        self.settings, self.chat.thinking = settings, settings.thinking != "off"

    def say(self, text: str) -> None:
        """Sends a message and shows the reply."""
        stop = Interruption()
        self._show(self.chat.send(text, **self._options(stop)), stop)

    def retry(self) -> None:
        """Shows another reply to the last question."""
        stop = Interruption()
        self._show(self.chat.retry(**self._options(stop)), stop)

    def _options(self, stop: Interruption) -> dict[str, Any]:
        self._bar = PrefillBar(self.screen.err)

        def on_prefill(done: int, total: int) -> None:
            if stop.asked:
                raise KeyboardInterrupt
            self._bar.update(done, total)

        return self.settings.options() | {"on_prefill": on_prefill}

    def _show(self, events: Generator[Event, None, None], stop: Interruption) -> None:
        """Ctrl-C stops it: what there is then is kept, and where nobody is there to go on the program ends."""
        tokenizer = self.chat.engine.tokenizer
        assert tokenizer is not None
        view = self.screen.view(self.settings.thinking, lambda text: len(tokenizer.encode(text, special=False)))
        before = self.chat.messages
        try:
            with no_echo(), stop, self._bar, contextlib.closing(events), contextlib.closing(view):
                for event in events:
                    self._bar.close()
                    view.show(event)
                    if stop.asked:
                        break
        except KeyboardInterrupt:
            pass
        except (RuntimeError, MemoryError) as error:  # most often memory that the device does not have
            raise MLXMTPError(
                f"Expected a reply, found that it failed ({error}); take turns back with /undo, or /reset the chat."
            ) from None
        finally:
            self.thoughts = view.thoughts
            if self.chat.session.busy:  # broken off where nobody can say what it had written
                self.chat.session = Session()
        result = self.chat.last
        if result is None:
            kept = self.chat.messages is not before
            self.screen.note("stopped" if kept else "stopped before there was an answer: nothing is kept of it")
        else:
            self.screen.note(" · ".join(self._figures(result)))
        if stop.asked and not self.interactive:
            raise KeyboardInterrupt

    def _figures(self, result: Result) -> list[str]:
        """What there is to say about a reply, in short."""
        stats, plain = result.stats, self.chat.engine.plain_seconds_per_token
        answered = bool(result.text.strip())
        turn = sum(message["role"] == "user" for message in self.chat.messages) + (not answered)
        new = stats.prompt_tokens - self.lengths.get(turn - 1, 0)
        if answered:
            self.lengths[turn] = stats.prompt_tokens + stats.tokens
        found = [f"{stats.decode_tokens_per_second:.1f} tokens/s"] if stats.tokens > 1 else [f"{stats.tokens} tokens"]
        if plain and stats.drafted and stats.tokens > 1:
            found.append(f"est. {stats.decode_tokens_per_second * plain:.2f}x plain")
        if stats.drafted:
            found.append(f"{stats.tokens_per_round:.2f} tokens per round")
        if stats.prefilled_tokens > max(new, 0) + 1:  # 1: the last token of a reply has no K/V yet
            found.append(f"{stats.prefilled_tokens} tokens prefilled")
        if result.finish_reason == "length":
            full = stats.prompt_tokens + stats.tokens >= self.chat.engine.max_context
            found.append("cut where the context is full" if full else "cut at max_tokens")
        if not answered:
            found.append("no answer, so nothing is kept of it")
        return found

    def adopt(self, chat: Chat) -> None:
        """Goes on with another conversation."""
        self.chat, self.lengths, self.thoughts = chat, {}, ""

    def open(self, file: Path) -> str:
        """Goes on with a saved conversation; what it is. The one at hand stays where that one cannot be read."""
        chat = self.chat.engine.load_chat(file)
        self.adopt(chat)
        if chat.thinking != (self.settings.thinking != "off"):
            self.settings = replace(self.settings, thinking="show" if chat.thinking else "off")
        turns = sum(message["role"] == "user" for message in chat.messages)
        kept = f"with the K/V of {len(chat.session.ids)} tokens" if chat.session.ids else "without K/V"
        return f"loaded {turns} turns {kept}"

    def move(self, model: str | None, drafter: str) -> None:
        """Goes on with another model; everything stays where that one cannot be loaded."""
        engine = self.load(model, drafter)
        self.adopt(self.chat.moved(engine))
        self.model, self.drafter = model, drafter
