"""A conversation of several turns, whose K/V stay from one turn to the next.

Invariant: `messages` are always what was said and answered; a reply that was stopped stays as far as it came, one
without any answer leaves them as they were. One reply runs at a time: whatever else changes the conversation ends it
first (its generator then just ends), and messages that are edited meanwhile win over it. Every turn is the template
over all messages, so it is what a fresh run would be; the session finds out what of it is new.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from mlx_mtp.chat import saved
from mlx_mtp.errors import OptionError, PromptError
from mlx_mtp.generation import checks
from mlx_mtp.generation.prefix import Session
from mlx_mtp.generation.request import ReplyOptions
from mlx_mtp.generation.types import Event, Result

if TYPE_CHECKING:
    from mlx_mtp.engine import Engine

Message = dict[str, Any]


@dataclass
class _Running:
    """A reply from `send` or `retry`. asked: the messages it answers. over: nothing of it counts any more."""

    asked: list[Message]
    events: Generator[Event, None, None]
    before: list[Message] | None = None  # the conversation's messages when it began to run
    said: list[str] = field(default_factory=list)
    over: bool = False


class Chat:
    """One conversation with an engine. Made by `Engine.chat` and `Engine.load_chat`.

    Attributes:
        messages: {"role": "system" | "user" | "assistant", "content": str}.
        thinking: Asks checkpoints that can to think first; thoughts are streamed and never kept.
        last: The Result of the newest reply.
    """

    def __init__(self, engine: Engine, system: str | None = None, thinking: bool = False) -> None:
        self.engine, self.thinking = engine, checks.flag("thinking", thinking)
        self.messages: list[Message] = []
        self.session = Session()
        self.last: Result | None = None
        self._newest: _Running | None = None
        self.set_system(system)

    @property
    def system(self) -> str | None:
        """The instruction in front of the conversation."""
        first = self.messages[:1]
        return str(first[0]["content"]) if first and first[0]["role"] == "system" else None

    def set_system(self, text: str | None) -> None:
        """Another instruction in front of the conversation, None for none; the messages stay."""
        text = None if text is None else checks.text("The system message", text)
        self.stop()
        said = [message for message in self.messages if message["role"] != "system"]
        self.messages = [{"role": "system", "content": text}, *said] if text else said

    def send(self, text: str, **options: Unpack[ReplyOptions]) -> Generator[Event, None, None]:
        """Says `text` and streams the reply; options as for Engine.stream.

        Raises PromptError, and OptionError while another reply runs, before anything runs.
        """
        if not checks.text("The message", text, PromptError).strip():
            raise PromptError("The message is empty; write at least one character.")
        return self._reply([*self.messages, {"role": "user", "content": text}], options)

    def ask(self, text: str, **options: Unpack[ReplyOptions]) -> Result:
        """Says `text` and gives the whole reply; as `send` otherwise."""
        *_, last = self.send(text, **options)
        assert last.result is not None, "the last event has it"
        return last.result

    def __repr__(self) -> str:
        return f"<Chat of {len(self.messages)} messages with {self.engine!r}>"

    def retry(self, **options: Unpack[ReplyOptions]) -> Generator[Event, None, None]:
        """Streams another reply to the last question, in place of the one there is once it has something to say."""
        messages = self.messages[:-1] if self.messages and self.messages[-1]["role"] == "assistant" else self.messages
        if not messages or messages[-1]["role"] != "user":
            raise PromptError("There is no question to answer again: an empty conversation; say something first.")
        return self._reply(list(messages), options)

    def undo(self) -> str | None:
        """Takes the last question and its reply back; the question, None where there is none."""
        running, had = self._newest, len(self.messages)
        self.stop()
        if running is not None and running.before is not None and len(running.asked) > had == len(self.messages):
            return str(running.asked[-1]["content"])  # one that has no answer yet
        places = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not places:
            return None
        taken = self.messages[places[-1]]["content"]
        del self.messages[places[-1] :]
        return str(taken)

    def reset(self) -> None:
        """Forgets everything but the system message."""
        self.stop()
        self.messages = [message for message in self.messages if message["role"] == "system"]
        self.session.clear()
        self.last = None

    def moved(self, engine: Engine) -> Chat:
        """The same conversation with another engine, whose next reply runs all of it. PromptError without template."""
        if engine.tokenizer is None or not engine.tokenizer.has_chat_template:
            raise PromptError("The other checkpoint has no chat template; use another model.")
        self.stop()
        other = Chat(engine, thinking=self.thinking)
        other.messages = list(self.messages)
        return other

    def save(self, file: str | Path) -> Path:
        """Writes messages and K/V to `file` (".safetensors" is added where it is missing) and returns its path."""
        self.stop()
        return saved.save_chat(self, Path(file))

    @classmethod
    def load(cls, engine: Engine, file: str | Path) -> Chat:
        """The conversation that `save` wrote; CheckpointError where it is another model's or not whole."""
        messages, thinking, session = saved.load_chat(engine, Path(file))
        chat = cls(engine, thinking=thinking)
        chat.messages, chat.session = messages, session
        return chat

    def stop(self) -> None:
        """Ends the reply that runs, if one does: what was answered so far is kept. From any thread."""
        reply, self._newest = self._newest, None
        if reply is None:
            return
        self._settle(reply)
        with contextlib.suppress(ValueError):  # it is at work right now: it ends at its next event
            reply.events.close()
        if self.session.busy:
            self.session = Session()

    def _reply(self, messages: list[Message], options: ReplyOptions) -> Generator[Event, None, None]:
        """Checks what a reply to the last of `messages` needs; the generator keeps what comes of it."""
        if self._newest is not None and self._newest.before is not None:
            raise OptionError("A reply still runs; read it to its end, close it, or call stop().")
        tokenizer = self.engine.tokenizer
        if tokenizer is None:
            raise PromptError("A chat needs a tokenizer and this checkpoint has none; use another model.")
        ids = tokenizer.chat(messages, thinking=self.thinking)
        request = self.engine.request(ids, session=self.session, tools=False, **options)
        self._newest = _Running(messages, self.engine.run(self.engine.after_thought(request, self.thinking)))
        return self._kept(self._newest)

    def _kept(self, reply: _Running) -> Generator[Event, None, None]:
        """The reply's events; whatever ends them, what was answered so far joins the messages."""
        if reply.over:
            return
        if self._newest is not reply:
            raise OptionError("This reply was never read before the next was asked for; read the newest one.")
        reply.before, self.last = list(self.messages), None
        try:
            for event in reply.events:
                if reply.over:
                    return
                reply.said.append(event.content)
                result = event.result
                if result is not None:
                    self.last = result = replace(result, text="".join(reply.said))
                yield replace(event, text=event.content, result=result)
        finally:
            reply.events.close()
            self._settle(reply)
            if self._newest is reply:
                self._newest = None

    def _settle(self, reply: _Running) -> None:
        """What was answered so far joins the messages, once; a question without any answer is as good as not asked."""
        answer = "".join(reply.said)
        if self.messages == reply.before and not reply.over and answer.strip():
            self.messages = [*reply.asked, {"role": "assistant", "content": answer}]
        reply.over = True
