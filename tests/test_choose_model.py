"""Which model `chat` takes when none is named: the best pair that fits if somebody agrees, else the embedded one."""

from types import SimpleNamespace

import pytest

from mlx_mtp.checkpoints.pairs import KnownPair
from mlx_mtp.cli import chat

BEST = KnownPair(target="org/best-it", assistant="org/best-it-assistant", download_bytes=3 * 10**9, weight_bytes=1)


class Notes:
    """A screen that keeps what it was told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch):
    """choose_model(None) with a terminal or none, a hub that answers or not, a copy or none, and an answer."""

    def run(terminal: bool, answers: bool, cached: bool, agrees: bool, pair: KnownPair | None = BEST):
        stream, screen, asked = SimpleNamespace(isatty=lambda: terminal), Notes(), []
        monkeypatch.setattr(chat, "sys", SimpleNamespace(stdin=stream, stdout=stream))
        monkeypatch.setattr(chat.pairs, "best_pair", lambda size: pair)
        monkeypatch.setattr(chat.hub, "hub_answers", lambda: answers)
        monkeypatch.setattr(chat.hub, "cached", lambda name: "here" if cached else None)
        monkeypatch.setattr(chat.typer, "confirm", lambda text, default: asked.append((text, default)) or agrees)
        return chat.choose_model(None, screen), screen.said, asked

    return run


def test_a_named_model_is_taken() -> None:
    assert chat.choose_model("org/other", Notes()) == "org/other"


def test_the_best_pair_is_offered_with_its_size(ask) -> None:
    chosen, said, ((text, default),) = ask(True, True, False, True)
    assert chosen == "org/best-it" and not said
    assert "org/best-it" in text and "3.0 GB" in text and default is False


def test_one_that_is_here_needs_no_hub(ask) -> None:
    chosen, _, ((text, default),) = ask(True, False, True, True)
    assert chosen == "org/best-it" and "already" in text and default is True


def test_whoever_declines_gets_the_embedded_model(ask) -> None:
    chosen, (line,), asked = ask(True, True, False, False)
    assert chosen is None and asked and "embedded" in line


@pytest.mark.parametrize("pair", [BEST, None])
def test_without_hub_or_pair_nobody_is_asked(ask, pair: KnownPair | None) -> None:
    chosen, (line,), asked = ask(True, False, False, True, pair)
    assert chosen is None and not asked and ("does not answer" in line) == (pair is not None)


def test_a_pipe_is_not_asked(ask) -> None:
    chosen, (line,), asked = ask(False, True, True, True)
    assert chosen is None and not asked and "embedded" in line
