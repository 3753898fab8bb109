"""Which model `chat` takes when none is named: the best pair that fits if somebody agrees, else the embedded one."""

from types import SimpleNamespace

import pytest

from mlx_mtp.checkpoints.pairs import KnownPair
from mlx_mtp.cli import chat

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
