"""What a chat understands: every command, and that one which fails leaves all as it was; which model it takes."""

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from conftest import Command
from rich.console import Console
from thinking import ANSWER, THOUGHT, thinking_engine

import mlx_mtp
from mlx_mtp.cli import chat, toy
from mlx_mtp.cli.chat import converse
from mlx_mtp.cli.commands import COMMANDS, is_command
from mlx_mtp.cli.conversation import Conversation, Screen, Settings

QUESTION, NEXT = "What does os.walk do?", "And os.listdir?"


def script(*texts: str | type[BaseException], interactive: bool = True) -> Any:
    """Messages that are there beforehand. An exception in their place is raised."""
    return SimpleNamespace(read=mock.Mock(side_effect=[*texts, EOFError]), interactive=interactive)


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
        assert converse(self.conversation, script(*texts))
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
        "max_tokens 0", "seed -1", "seed 1e3", f"seed {2**64}", "thinking maybe", "nothing 3",
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
    assert f"{stats.prompt_tokens} tokens, {stats.prefilled_tokens} prefilled" in notes and "1 turn," in notes
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
    assert "1 turn " in notes and talk.conversation.chat.messages == before
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
        converse(talk.conversation, script(KeyboardInterrupt, interactive=False))


def test_a_reply_that_fails_is_one_sentence(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    talk.run(QUESTION)
    engine = talk.conversation.chat.engine
    with monkeypatch.context() as patch:
        fails = mock.Mock(side_effect=RuntimeError("[malloc] Unable to allocate 99 bytes."))
        patch.setattr(engine._decoder.rounds, "submit", fails)
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


# Which model is taken when none is named: one of a numbered list if somebody is there to ask, else the embedded one


def row(target: str, downloaded: str, fits: bool | None = True) -> dict[str, Any]:
    return {"target": target, "downloaded": downloaded, "fits": fits, "download_bytes": 5 * 10**9,
            "memory_bytes": 6 * 10**9}  # fmt: skip


BIG, OTHERS = row("org/big", "no", fits=False), [row(f"org/{i}", "no") for i in range(8)]
PARTLY, HERE, SMALL = row("org/partly", "partly"), row("org/here", "yes"), row("smollm2", "no")
OFFERED = ["org/0", "org/1", "org/2", "org/3", "org/4", "smollm2"]


@pytest.mark.parametrize(
    ("answers", "known", "typed", "listed", "taken"),
    [
        (True, [BIG, *OTHERS, SMALL], "", OFFERED, "smollm2"),  # enter: what costs little
        (True, [BIG, *OTHERS, SMALL], "9\nsix\n2\n", OFFERED, "org/1"),  # asked again until it is a number of them
        (True, [*OTHERS[:1], HERE, SMALL], "", ["org/here", "org/0", "smollm2"], "org/here"),  # enter: what is here
        (True, [PARTLY, SMALL], "1", ["org/partly", "smollm2"], "org/partly"),
        (True, [PARTLY, SMALL], "3", ["org/partly", "smollm2"], None),  # the embedded one is the last
        (False, [*OTHERS, SMALL], "", ["smollm2"], None),  # nothing to be had from the hub
        (False, [*OTHERS, HERE, SMALL], "", ["org/here", "smollm2"], "org/here"),
        (True, [row("org/unknown", "no", fits=None)], "", [], None),
    ],
)  # fmt: skip
def test_who_is_asked_and_what_is_taken(
    answers: bool, known: list[dict[str, Any]], typed: str, listed: list[str], taken: str | None,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    terminal = SimpleNamespace(isatty=lambda: True)
    monkeypatch.setattr(chat, "sys", SimpleNamespace(stdin=terminal, stdout=terminal))
    monkeypatch.setattr(chat.models, "rows", lambda available: known)
    monkeypatch.setattr(chat.hub, "hub_answers", lambda: answers)
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed + "\n"))
    notes: list[str] = []
    screen = Screen(plain=False)
    monkeypatch.setattr(screen, "note", notes.append)
    assert chat.choose_model("org/other", screen) == "org/other" and capsys.readouterr().out == ""
    assert chat.choose_model(None, screen) == taken
    shown = capsys.readouterr()
    lines = [line.split()[:2] for line in (shown.out + shown.err).splitlines() if line[:1].isdigit()]
    assert lines == [[str(at), name] for at, name in enumerate([*listed, "the"], 1)]
    assert len(notes) == (taken is None)


def test_a_pipe_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "_chosen", None)  # calling it would fail
    notes: list[str] = []
    assert chat.choose_model(None, SimpleNamespace(note=notes.append)) is None
    assert len(notes) == 1 and "toy" in notes[0]


# The embedded toy


@pytest.mark.parametrize(
    ("tokens", "found"),
    [([1, 2, 3, 4, 5, 6] * 3, 18), ([7, 7, 7, 7, 7, 7, 7, 7], 8), (list(range(90)), None),
     ([*range(20), *range(20)], None), ([9, *[1, 2] * 20], 11)],
)  # fmt: skip
def test_where_a_reply_goes_round_in_circles(tokens: list[int], found: int | None) -> None:
    """Six tokens in a row for the third time, in whatever pieces they come."""
    for piece in (1, 2):
        repetition = toy.Repetition()
        heard = (i + piece for i in range(0, len(tokens), piece) if repetition.heard(tokens[i : i + piece]))
        at = next(heard, None)
        assert at is None if found is None else found <= (at or 0) < found + piece


def test_only_the_embedded_model_is_cut_short() -> None:
    assert [toy.most_tokens(*case, 1024) for case in ((None, None), ("x", None), (None, 5), ("x", 5), (None, 0))] == [
        toy.TOKENS, 1024, 5, 5, 0
    ]  # fmt: skip


def test_the_toy_is_stopped_and_a_number_takes_that_back(command: Command) -> None:
    code, out, err = command("generate", "def f(x):", "--depth", 3)
    whole = command("generate", "def f(x):", "--depth", 3, "-n", 200)[1]
    assert (code, err) == (0, "") and whole.startswith(out.rstrip("\n")) and len(whole) > len(out) + 100
    assert len(json.loads(command("generate", "def f(x):", "--json")[1])["tokens"]) <= toy.TOKENS
    chatted = command("chat", "--depth", 3, stdin=b"def f(x):\n")
    assert chatted[0] == 0 and len(chatted[1]) < len(whole) - 100
