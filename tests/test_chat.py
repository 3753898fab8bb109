"""Conversations: every turn is what a fresh run on all messages gives, but runs only what is new; no thoughts kept."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from conftest import GOLDEN
from families import chat_folder, talking
from greedy import assert_greedy
from thinking import ANSWER, THOUGHT, thinking_engine

import mlx_mtp

ONE, TWO, THREE = "Why?", "And?", "x"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_folder(tmp_path_factory.mktemp("chats"))


@pytest.fixture(scope="module")
def engine(folder: Path) -> mlx_mtp.Engine:
    """With a drafter that has a memory of its own; sessions of every family are in conformance.py."""
    return talking(folder, "sequential")


@pytest.fixture(scope="module")
def plain(folder: Path) -> mlx_mtp.Engine:
    return talking(folder)


def said(chat: mlx_mtp.Chat, text: str | None = None, tokens: int = 24, **options) -> mlx_mtp.Result:
    """A whole turn, None = the last question again; what was streamed is what the result says."""
    options = {"max_tokens": tokens, **options}
    events = list(chat.send(text, **options) if text is not None else chat.retry(**options))
    assert chat.last is events[-1].result is not None
    assert "".join(event.text for event in events) == chat.last.text
    return chat.last


def ids_of(chat: mlx_mtp.Chat, question: str) -> list[int]:
    return chat.engine.tokenizer.chat([*chat.messages, {"role": "user", "content": question}], chat.thinking)


def same_as_fresh(engine: mlx_mtp.Engine, ids: list[int], tokens: list[int], most: int) -> None:
    """The tokens of a run without a session, or parting where the two best logits are nearer than rounding."""
    fresh = engine.generate(ids, max_tokens=most).tokens
    if fresh != tokens:
        assert_greedy(engine, ids, tokens)


def common(one: list[int], other: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def test_turns_run_only_what_is_new_and_equal_fresh_runs(engine: mlx_mtp.Engine) -> None:
    """48 tokens go beyond the rings of 8 + 32 slots."""
    chat = engine.chat()
    ids = ids_of(chat, ONE)
    first = said(chat, ONE, 48)
    assert first.stats.prefilled_tokens == len(ids) and first.stats.tokens == 48
    same_as_fresh(engine, ids, first.tokens, 48)
    held = [*ids, *first.tokens[:-1]]
    for question in (TWO, THREE):
        ids = ids_of(chat, question)
        result = said(chat, question, 24)
        assert result.stats.prompt_tokens == len(ids) > 48
        assert result.stats.prefilled_tokens == len(ids) - common(ids, held)
        # The question, the marks of a turn around it, and the last token of the reply before.
        assert result.stats.prefilled_tokens <= len(engine.tokenizer.encode(question)) + 12
        same_as_fresh(engine, ids, result.tokens, 24)
        held = [*ids, *result.tokens[:-1]]
    roles = [message["role"] for message in chat.messages]
    assert roles == ["user", "assistant"] * 3 and chat.messages[-1]["content"] == result.text


def test_a_stopped_reply_stays_as_far_as_it_came(engine: mlx_mtp.Engine) -> None:
    chat = engine.chat()
    events = chat.send(ONE, max_tokens=200)
    heard = "".join(next(events).text for _ in range(12))
    events.close()
    assert chat.messages == [{"role": "user", "content": ONE}, {"role": "assistant", "content": heard}]
    assert chat.last is None and not chat.session.busy
    ids = ids_of(chat, TWO)
    second = said(chat, TWO)
    assert second.stats.prefilled_tokens < len(ids) - 10
    same_as_fresh(engine, ids, second.tokens, 24)


def test_a_turn_without_any_answer_is_not_kept(plain: mlx_mtp.Engine) -> None:
    chat = plain.chat()
    said(chat, ONE)
    kept = list(chat.messages)
    chat.send(TWO).close()  # never begun
    interrupt = mock.Mock(side_effect=KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        list(chat.send(TWO, on_prefill=interrupt))
    assert chat.messages == kept
    with pytest.raises(KeyboardInterrupt):  # the answer that was there stays, too
        list(chat.retry(on_prefill=interrupt))
    assert chat.messages == kept and not chat.session.busy
    end = {token: 100.0 for token in list(plain.stop_tokens)[:1]}
    result = said(chat, TWO, sampling=mlx_mtp.Sampling(logit_bias=end))
    assert result.text == "" and result.finish_reason == "stop" and chat.messages == kept


def test_a_conversation_too_long_is_refused_and_stays(plain: mlx_mtp.Engine) -> None:
    chat = mlx_mtp.Engine(plain.target, None, plain.tokenizer, stop_tokens=plain.stop_tokens, max_context=60).chat()
    said(chat, TWO, 20)
    kept = list(chat.messages)
    with pytest.raises(mlx_mtp.PromptError, match="shorter than the context of 60"):
        chat.send("x" * 60)
    assert chat.messages == kept
    said(chat, "More?", 4)


def test_checkpoints_without_a_template(plain: mlx_mtp.Engine) -> None:
    bare = mlx_mtp.load(GOLDEN / "ple" / "target", drafter=None)
    with pytest.raises(mlx_mtp.PromptError, match="tokenizer"):
        bare.chat().send("Hello")
    with pytest.raises(mlx_mtp.PromptError, match="chat template"):
        plain.chat().moved(bare)


# Thinking


@pytest.mark.parametrize("depth", [0, 3])
def test_thoughts_are_streamed_and_not_kept(tmp_path: Path, depth: int) -> None:
    engine = thinking_engine(tmp_path, depth)
    assert engine.tokenizer.can_think
    chat = engine.chat(thinking=True)
    for turn, question in enumerate(("Why?", "And?"), 1):
        events = list(chat.send(question))
        assert "".join(event.thinking for event in events) == THOUGHT
        assert "".join(event.text for event in events) == ANSWER == chat.last.text
        assert engine.tokenizer.decode(chat.last.tokens) == f"<|channel>thought\n{THOUGHT}<channel|>{ANSWER}"
        assert chat.messages[-1] == {"role": "assistant", "content": ANSWER} and len(chat.messages) == 2 * turn
    prompt = engine.tokenizer.decode(engine.tokenizer.chat(chat.messages, thinking=True))
    assert THOUGHT not in prompt and prompt.count(ANSWER) == 2 and "<|think|>" in prompt


# While a reply runs


def begun(chat: mlx_mtp.Chat) -> tuple[Any, str]:
    """A reply under way, and the beginning of its answer."""
    events, heard = chat.send(ONE, max_tokens=60), ""
    while len(heard) < 12:
        heard += next(events).text
    return events, heard


def turn(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def works(chat: mlx_mtp.Chat) -> None:
    """The conversation goes on, as a fresh one with the same messages would."""
    fresh = chat.engine.chat()
    fresh.messages = list(chat.messages)
    assert said(chat, THREE, 12).text == said(fresh, THREE, 12).text and chat.messages == fresh.messages


def test_a_second_question_while_one_is_answered_is_refused(plain: mlx_mtp.Engine) -> None:
    chat = plain.chat()
    events, heard = begun(chat)
    with pytest.raises(mlx_mtp.OptionError, match="still runs"):
        chat.send(TWO)
    heard += "".join(event.text for event in events)
    assert chat.messages == turn(ONE, heard)
    works(chat)


SYSTEM = [{"role": "system", "content": "Be brief."}]
CHANGES: dict[str, tuple[Callable[[mlx_mtp.Chat, Path], object], Callable[[str], list[dict[str, str]]]]] = {
    "reset": (lambda chat, _: chat.reset(), lambda heard: SYSTEM),
    "set_system": (lambda chat, _: chat.set_system("Be long."),
                   lambda heard: [{"role": "system", "content": "Be long."}, *turn(ONE, heard)]),
    "undo": (lambda chat, _: chat.undo(), lambda heard: SYSTEM),
    "stop": (lambda chat, _: chat.stop(), lambda heard: [*SYSTEM, *turn(ONE, heard)]),
    "save": (lambda chat, file: chat.engine.load_chat(chat.save(file)), lambda heard: [*SYSTEM, *turn(ONE, heard)]),
    "moved": (lambda chat, _: chat.moved(chat.engine), lambda heard: [*SYSTEM, *turn(ONE, heard)]),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_whatever_changes_the_conversation_ends_the_reply(name: str, plain: mlx_mtp.Engine, tmp_path: Path) -> None:
    change, kept = CHANGES[name]
    chat = plain.chat(system="Be brief.")
    events, heard = begun(chat)
    found = change(chat, tmp_path / "chat")
    assert list(events) == [] and not chat.session.busy
    assert name != "reset" or chat.session.ids == []
    assert name != "undo" or found == ONE
    onward = found if isinstance(found, mlx_mtp.Chat) else chat
    assert onward.messages == chat.messages == kept(heard)
    works(onward)


def test_a_change_from_another_thread(plain: mlx_mtp.Engine) -> None:
    """A window's button, while the reply is at work in another thread; here in the middle of its prompt."""
    for change in ("reset", "undo", "stop"):
        chat = plain.chat()

        def elsewhere(done: int, total: int, chat: mlx_mtp.Chat = chat, change: str = change) -> None:
            thread = threading.Thread(target=getattr(chat, change))
            thread.start()
            thread.join()

        assert list(chat.send(ONE, on_prefill=elsewhere)) == [] and chat.messages == []
        works(chat)


def test_replies_that_nobody_reads_lock_nothing(plain: mlx_mtp.Engine) -> None:
    chat = plain.chat()
    forgotten = chat.send(ONE)  # never read
    first = said(chat, TWO)
    with pytest.raises(mlx_mtp.OptionError, match="never read"):
        next(forgotten)
    assert chat.messages == turn(TWO, first.text)
    late = chat.send(THREE)
    chat.reset()
    assert list(late) == [] and chat.messages == []
    next(chat.send(ONE, max_tokens=60))  # dropped at once
    works(chat)
