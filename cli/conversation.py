"""One chat as the command line holds it: the conversation, what replies are asked with, and where they are shown."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import MofNCompleteColumn

from mlx_mtp import Chat, Engine, MLXMTPError, OptionError, Result, Sampling, Session
from mlx_mtp.cli import toy
from mlx_mtp.cli.line_input import interruption, no_echo
from mlx_mtp.cli.progress import PatientBar
from mlx_mtp.cli.reply_view import THINKING, MarkdownView, PlainView, View
from mlx_mtp.errors import plural

USUAL_TOKENS = 1024
SAMPLING = tuple(entry.name for entry in fields(Sampling) if entry.name != "logit_bias")


@dataclass(frozen=True)
class Settings:
    """What every reply is asked with; `thinking` is "show", "hide" or "off"."""

    sampling: Sampling
    max_tokens: int | None = None
    seed: int | None = None
    thinking: str = "off"

    def __post_init__(self) -> None:
        if self.thinking not in THINKING:
            raise OptionError(f"Thinking can be 'show', 'hide' or 'off', not '{self.thinking!s:.60}'.")

    def options(self, model: str | None) -> dict[str, Any]:
        """For Engine.stream of this model, None being the embedded one."""
        most = toy.most_tokens(model, self.max_tokens, USUAL_TOKENS)
        return {"sampling": self.sampling, "max_tokens": most, "seed": self.seed}

    def values(self) -> dict[str, Any]:
        """Everything `/set` knows, by name; None = the checkpoint's own."""
        values = {name: getattr(self.sampling, name) for name in SAMPLING}
        return values | {"max_tokens": self.max_tokens, "seed": self.seed, "thinking": self.thinking}

    def with_value(self, name: str, text: str) -> Settings:
        """The same with one value changed; OptionError where there is no such setting, or no such value of it."""
        name = name.lower().lstrip("-").replace("-", "_")
        if name not in self.values():
            raise OptionError(f"There is no setting '{name[:60]}'; there are {', '.join(self.values())}.")
        if name in SAMPLING:
            return replace(self, sampling=replace(self.sampling, **{name: _value(text)}))
        return replace(self, **{name: _value(text)})


def _value(text: str) -> Any:
    """A number, None for 'default', or the text; whoever gets it checks it."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return None if text == "default" else text


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

    def show(self, answer: RenderableType) -> None:
        """What a command answers: beside the replies, never among replies that go elsewhere."""
        (self.out if self.out.is_terminal else self.err).print(answer)

    def view(self, thinking: str) -> View:
        """What will show one reply."""
        if self.plain or not self.out.is_terminal or self.out.is_dumb_terminal:
            return PlainView(sys.stdout, thinking, self.note)
        return MarkdownView(self.out, thinking)


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

    @property
    def turns(self) -> int:
        """How many questions there are."""
        return sum(message["role"] == "user" for message in self.chat.messages)

    def use(self, settings: Settings) -> None:
        """Other settings from here on; OptionError where this model cannot be asked with them."""
        # The engine checks before it runs, and this is never run.
        self.chat.engine.stream([0], **settings.options(self.model)).close()
        self.settings, self.chat.thinking = settings, settings.thinking != "off"

    def say(self, text: str | None) -> None:
        """Sends a message, None for the last one in place of its reply, and shows what comes.

        Ctrl-C stops a reply: what there is then is kept, and where nobody is there to go on the program ends.
        """
        ask = self.chat.retry if text is None else partial(self.chat.send, text)
        before, view = self.chat.messages, self.screen.view(self.settings.thinking)
        short, repetition = toy.is_short(self.model, self.settings.max_tokens), toy.Repetition()
        try:
            with (
                no_echo(), interruption() as stop, PatientBar(self.screen.err, MofNCompleteColumn()) as bar,
                contextlib.closing(view),
            ):  # fmt: skip

                def on_prefill(done: int, total: int) -> None:
                    if stop.is_set():
                        raise KeyboardInterrupt
                    bar.update("reading the prompt", done, total)

                with contextlib.closing(ask(**self.settings.options(self.model), on_prefill=on_prefill)) as events:
                    for event in events:
                        bar.close()
                        view.show(event)
                        if stop.is_set() or (short and repetition.heard(event.tokens)):
                            break
        except KeyboardInterrupt:
            pass
        except (RuntimeError, MemoryError) as error:  # most often memory that the device does not have
            raise MLXMTPError(f"The reply failed ({error}); take turns back with /undo, or /reset the chat.") from None
        finally:
            if self.chat.session.busy:  # broken off where nobody can say what it had written
                self.chat.session = Session()
        self.thoughts = view.thoughts
        if self.chat.last is not None:
            self.screen.note(" · ".join(self._figures(self.chat.last)))
        elif self.chat.messages is not before:
            self.screen.note("stopped" if stop.is_set() else "stopped: it repeats itself")
        else:
            self.screen.note("stopped before there was an answer: nothing is kept of it")
        if stop.is_set() and not self.interactive:
            raise KeyboardInterrupt

    def _figures(self, result: Result) -> list[str]:
        """What there is to say about a reply, in short."""
        stats, plain = result.stats, self.chat.engine.plain_seconds_per_token
        found = [f"{stats.decode_tokens_per_second:.1f} tokens/s"] if stats.tokens > 1 else [f"{stats.tokens} tokens"]
        if plain and stats.drafted and stats.tokens > 1:
            found.append(f"est. {stats.decode_tokens_per_second * plain:.2f}x plain")
        if stats.drafted:
            found.append(f"{stats.tokens_per_round:.2f} tokens per round")
        if result.finish_reason == "length":
            full = stats.prompt_tokens + stats.tokens >= self.chat.engine.max_context
            found.append("cut where the context is full" if full else "cut at max_tokens")
        if not result.text.strip():
            found.append("no answer, so nothing is kept of it")
        return found

    def open(self, name: str) -> str:
        """Goes on with a saved conversation; what it is. The one at hand stays where that one cannot be read."""
        self.chat, self.thoughts = self.chat.engine.load_chat(os.path.expanduser(name)), ""
        if self.chat.thinking != (self.settings.thinking != "off"):
            self.settings = replace(self.settings, thinking="show" if self.chat.thinking else "off")
        ids = self.chat.session.ids
        return f"loaded {plural(self.turns, 'turn')} {f'with the K/V of {len(ids)} tokens' if ids else 'without K/V'}"
