"""What a chat understands: every command, and that one which fails leaves all as it was; which model it takes."""

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from thinking import ANSWER, THOUGHT, thinking_engine

import mlx_mtp
from mlx_mtp.checkpoints.pairs import KnownPair
from mlx_mtp.cli import chat
from mlx_mtp.cli.chat import converse
from mlx_mtp.cli.commands import COMMANDS, is_command
from mlx_mtp.cli.conversation import Conversation, Screen, Settings

QUESTION, NEXT = "What does os.walk do?", "And os.listdir?"


class Script:
    """Messages that are there beforehand. An exception in their place is raised."""

    def __init__(self, texts: tuple[str | type[BaseException], ...], interactive: bool = True) -> None:
        self._texts: Iterator[str | type[BaseException]] = iter(texts)
        self.interactive = interactive

    def read(self) -> str:
        text = next(self._texts, EOFError)
        if isinstance(text, str):
            return text
        raise text


class Talk:
    """A conversation whose output is kept: replies, what is said beside them, refusals."""

    def __init__(self, engine: mlx_mtp.Engine, capsys: pytest.CaptureFixture[str], thinking: str = "off") -> None:
        self._capsys = capsys
        self.notes = io.StringIO()
        screen = Screen(plain=True, err=Console(file=self.notes, force_terminal=True, width=200, color_system=None,
                                                highlight=False, markup=False))  # fmt: skip
        settings = Settings(mlx_mtp.Sampling(), max_tokens=12, thinking=thinking)
        self.loaded: list[tuple[str | None, str]] = []
        chat = engine.chat(thinking=thinking != "off")
        self.conversation = Conversation(chat, settings, screen, self._load, model="some/name", drafter="lookup")

    def _load(self, name: str | None, drafter: str) -> mlx_mtp.Engine:
        self.loaded.append((name, drafter))
        if name == "bad":
            raise mlx_mtp.ModelNotFound("There is no such folder.")
        return mlx_mtp.load(drafter=None)

    def run(self, *texts: str | type[BaseException]) -> tuple[str, str, str]:
        """Replies, notes, refusals."""
        self._capsys.readouterr()
        self.notes.seek(0)
        self.notes.truncate()
        assert converse(self.conversation, Script(texts))
        out, err = self._capsys.readouterr()
        return out, self.notes.getvalue(), err

    def refused(self, text: str) -> str:
        """One sentence, and nothing changed."""
        chat, settings = self.conversation.chat, self.conversation.settings
        messages, ids = list(chat.messages), list(chat.session.ids)
        out, _, err = self.run(text)
        assert out == "" and err.endswith(".\n") and err.count("\n") == 1 and 20 < len(err) < 600
        assert self.conversation.chat is chat and self.conversation.settings is settings
        assert chat.messages == messages and chat.session.ids == ids
        return err


@pytest.fixture
def talk(embedded: mlx_mtp.Engine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Talk:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    return Talk(embedded, capsys)


def test_messages_and_the_quiet_line(talk: Talk) -> None:
    out, notes, err = talk.run(QUESTION, NEXT)
    messages = talk.conversation.chat.messages
    assert err == "" and [message["content"] for message in messages[::2]] == [QUESTION, NEXT]
    assert out == "".join(message["content"].removesuffix("\n") + "\n" for message in messages[1::2])
    assert notes.count("tokens/s") == 2 and "tokens per round" in notes and "cut at max_tokens" in notes
    assert "plain" not in notes  # a fixed depth has no curve


def test_help_names_every_command(talk: Talk) -> None:
    out, notes, err = talk.run("/help")
    assert out == "" and err == ""
    assert all(name in notes for name in COMMANDS) and "Alt-Enter" in notes and "backslash" in notes
    promised = {"help", "reset", "undo", "retry", "system", "set", "stats", "save", "load", "model", "quit"}
    assert promised <= {name.removeprefix("/") for name in COMMANDS}


@pytest.mark.parametrize("text", ["/nope", "/", "/helpp", "/ help", "/quit now", "/undo 2", "//x"])
def test_unknown_commands(talk: Talk, text: str) -> None:
    talk.refused(text)
    assert "'/retry'" in talk.refused("/retyr")


def test_undo_retry_reset(talk: Talk) -> None:
    assert "empty" in talk.refused("/undo") and "empty" in talk.refused("/retry")
    first, *_ = talk.run(QUESTION)
    again, notes, _ = talk.run("/retry")
    assert again == first and "temperature is 0" in notes and len(talk.conversation.chat.messages) == 2
    *_, notes, _ = talk.run(NEXT, "/undo")
    assert f"taken back: {NEXT}" in notes and len(talk.conversation.chat.messages) == 2
    talk.run("/reset")
    assert talk.conversation.chat.messages == [] and talk.run(QUESTION)[0] == first


def test_system(talk: Talk) -> None:
    assert "no instruction" in talk.run("/system")[1]
    talk.run("/system  Be brief.\nAnd kind. ")
    assert talk.conversation.chat.system == "Be brief.\nAnd kind." and "Be brief." in talk.run("/system")[1]
    talk.run("/system none")
    assert talk.conversation.chat.system is None


def test_set(talk: Talk) -> None:
    changes = ("temperature 0.7", "top-k 5", "--top_p 0.9", "min_p 0", "repetition_penalty 1.1", "max_tokens 3")
    talk.run(*(f"/set {change}" for change in changes), "/set seed 4")
    settings = talk.conversation.settings
    assert settings.sampling == mlx_mtp.Sampling(
        temperature=0.7, top_k=5, top_p=0.9, min_p=0.0, repetition_penalty=1.1
    )
    assert (settings.max_tokens, settings.seed) == (3, 4)
    shown = talk.run("/set")[1]
    assert "temperature 0.7" in shown and "frequency_penalty default" in shown and "thinking off" in shown
    talk.run(QUESTION)
    assert talk.conversation.chat.last.stats.tokens <= 3
    talk.run("/set temperature default", "/set seed default")
    assert talk.conversation.settings.sampling.temperature is None and talk.conversation.settings.seed is None


@pytest.mark.parametrize(
    "change",
    [
        "temperature", "temperature x", "temperature -1", "temperature nan", "temperature 1e9", "top_k 1.5", "top_p 0",
        "max_tokens 0", "max_tokens default", "seed -1", "seed 1e3", f"seed {2**64}", "thinking maybe", "nothing 3",
        "logit_bias 3", "depth 3", "stop x", "top_k " + "9" * 5000,
    ],
)  # fmt: skip
def test_bad_settings_change_nothing(talk: Talk, change: str) -> None:
    talk.refused(f"/set {change}")


def test_stats(talk: Talk) -> None:
    _, notes, _ = talk.run("/stats")
    assert "no finished reply" in notes and "a round: the depth is fixed." in notes
    talk.run(QUESTION)
    *_, notes, _ = talk.run("/stats")
    stats = talk.conversation.chat.last.stats
    assert f"{stats.prompt_tokens} tokens, {stats.prefilled_tokens} prefilled" in notes and "1 turns" in notes
    assert f"{stats.tokens} tokens" in notes and "mode fast" in notes and "drafts accepted   1:" in notes


def test_save_and_load(talk: Talk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    talk.run("/system Be brief.", QUESTION)
    *_, notes, _ = talk.run("/save ~/my chat")
    assert "my chat.safetensors" in notes and (tmp_path / "my chat.safetensors").exists()
    before = list(talk.conversation.chat.messages)
    expected, *_ = talk.run(NEXT)
    talk.run("/reset")
    *_, notes, _ = talk.run("/load ~/my chat")
    assert "1 turns" in notes and talk.conversation.chat.messages == before
    found, *_ = talk.run(NEXT)
    assert found == expected and talk.conversation.chat.last.stats.prefilled_tokens < 20
    (tmp_path / "damaged.safetensors").write_bytes((tmp_path / "my chat.safetensors").read_bytes()[:-9])
    (tmp_path / "text.safetensors").write_text("mine")
    for text in ("/load ~/nowhere", "/load ~/damaged", "/load ~/text", "/load", "/save", "/save ~/text", "/load /"):
        talk.refused(text)
    assert (tmp_path / "text.safetensors").read_text() == "mine"


def test_model(talk: Talk) -> None:
    talk.run(QUESTION)
    messages = list(talk.conversation.chat.messages)
    assert "some/name" in talk.run("/model")[1]
    assert "no such folder" in talk.refused("/model bad")
    before = talk.conversation.chat.engine
    talk.run("/model other/name")
    assert talk.conversation.chat.engine is not before
    assert talk.conversation.chat.messages == messages and "other/name" in talk.run("/model")[1]
    talk.run(NEXT, "/model embedded")
    # The lookup belongs to no model, so it stays.
    assert talk.loaded == [("bad", "lookup"), ("other/name", "lookup"), (None, "lookup")]
    assert talk.conversation.model is None and len(talk.conversation.chat.messages) == 4


def test_leaving(talk: Talk) -> None:
    talk.run("/quit", QUESTION)
    assert talk.conversation.chat.messages == []
    talk.run(KeyboardInterrupt, QUESTION)
    assert talk.conversation.chat.messages
    with pytest.raises(KeyboardInterrupt):
        converse(talk.conversation, Script((KeyboardInterrupt,), interactive=False))


def test_a_reply_that_fails_is_one_sentence(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    talk.run(QUESTION)
    engine = talk.conversation.chat.engine
    with monkeypatch.context() as patch:

        def fail(*_: object, **__: object) -> None:
            raise RuntimeError("[malloc] Unable to allocate 99 bytes.")

        patch.setattr(engine._decoder.rounds, "submit", fail)
        assert "Unable to allocate" in talk.run(NEXT)[2]
    assert not talk.conversation.chat.session.busy and talk.run(NEXT)[0]


# Thinking


def test_thinking(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    talk = Talk(thinking_engine(tmp_path), capsys, thinking="hide")
    out, notes, _ = talk.run("Why?", "/thoughts")
    assert out == f"{ANSWER}\n" and "thought for 2 tokens" in notes and THOUGHT in notes
    out, notes, _ = talk.run("/set thinking show", "And?")
    assert out == f"Thinking:\n{THOUGHT}\n\nAnswer:\n{ANSWER}\n" and "thought for" not in notes
    out, notes, _ = talk.run("/set thinking off", "x", "/thoughts")
    assert out == f"{ANSWER}\n" and "thought for" not in notes and "no thoughts" in notes
    assert not talk.conversation.chat.thinking
    talk.run("/set thinking show", "/set max_tokens 3")
    messages = list(talk.conversation.chat.messages)
    out, notes, _ = talk.run("Why?")
    assert "no answer, so nothing is kept" in notes and talk.conversation.chat.messages == messages


def test_what_is_a_command() -> None:
    meant = ("/help", "/reset", "/system Be\nbrief.", "/quit ", "/save /tmp/file", "/hepl", "/Users", "/", "/ help")
    assert all(map(is_command, meant))
    messages = ("/Users/me/file.txt what is this?", "/Users/me/file.txt", "/etc/passwd", "/helpful people",
                "/tmp is full", "/quit\nmore", "/undo\nx", " /help", "help", "/file.txt", "/1", "")
    assert not any(map(is_command, messages))


# Which model is taken when none is named: the best pair that fits if somebody agrees, else the embedded one

BEST = KnownPair(target="org/best-it", assistant="org/best-it-assistant", download_bytes=3 * 10**9, weight_bytes=1)


@pytest.mark.parametrize(
    ("terminal", "answers", "cached", "agrees", "pair", "asked", "said"),
    [
        (True, True, False, True, BEST, ("3.0 GB", False), None),  # offered with its size
        (True, False, True, True, BEST, ("already", True), None),  # one that is here needs no hub
        (True, True, False, False, BEST, ("3.0 GB", False), "embedded"),  # declined
        (True, False, False, True, BEST, None, "does not answer"),
        (True, False, False, True, None, None, "embedded"),  # nothing fits
        (False, True, True, True, BEST, None, "embedded"),  # a pipe is not asked
    ],
)  # fmt: skip
def test_who_is_asked_and_what_is_taken(
    terminal: bool, answers: bool, cached: bool, agrees: bool, pair: KnownPair | None, asked: tuple[str, bool] | None,
    said: str | None, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    stream, notes, questions = SimpleNamespace(isatty=lambda: terminal), [], []
    monkeypatch.setattr(chat, "sys", SimpleNamespace(stdin=stream, stdout=stream))
    monkeypatch.setattr(chat.pairs, "best_pair", lambda size: pair)
    monkeypatch.setattr(chat.hub, "hub_answers", lambda: answers)
    monkeypatch.setattr(chat.hub, "cached", lambda name: "here" if cached else None)
    monkeypatch.setattr(chat.typer, "confirm", lambda text, default: questions.append((text, default)) or agrees)
    screen = SimpleNamespace(note=notes.append)
    assert chat.choose_model("org/other", screen) == "org/other" and not questions and not notes
    assert chat.choose_model(None, screen) == (None if said else "org/best-it")
    assert len(questions) == (asked is not None) and len(notes) == (said is not None)
    assert all(asked[0] in text and "org/best-it" in text and default is asked[1] for text, default in questions)
    assert all(said in note for note in notes)
