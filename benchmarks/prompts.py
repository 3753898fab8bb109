"""Prompts for the benchmarks: held-out modules of the standard library, and texts the drafter was not made for."""

from __future__ import annotations

import random

from embedded.corpus import is_held_out, standard_library

LINES_APART = 4000

SPANISH = (
    "La primavera llegó tarde aquel año, y los almendros del valle no abrieron sus flores hasta bien entrado abril. "
    "Los viejos decían que era señal de buena cosecha, pero nadie lo creía del todo. "
)
GERMAN = (
    "Der Zug hielt auf freier Strecke, und niemand wusste, weshalb. Draußen lag das Land unter einer dünnen Schicht "
    "Reif, und ein einzelner Vogel zog seine Kreise über den Feldern. "
)


def held_out_code(tokens: int, most: int, encode: object) -> list[list[int]]:
    """The beginnings of held-out source files and every 4000 characters, `tokens` tokens each, evenly chosen."""
    found: list[list[int]] = []
    for document in standard_library():
        text = document.text or ""
        if not is_held_out(document.module) or not text:
            continue
        for start in range(0, max(1, len(text) - 6 * tokens), LINES_APART):
            ids = encode(text[start : start + 8 * tokens])[:tokens]  # type: ignore[operator]
            if len(ids) == tokens:
                found.append(ids)
    return found[:: max(1, len(found) // most)][:most]


def held_out_chat(most: int) -> list[list[dict[str, str]]]:
    """Questions about held-out modules."""
    found = [d.messages[:1] for d in standard_library() if is_held_out(d.module) and d.messages]
    return found[:: max(1, len(found) // most)][:most]


def unfriendly(tokens: int, encode: object, vocabulary: int) -> dict[str, list[int]]:
    """Prompts that a drafter trained on Python is bad at: shuffled words, other languages, random bytes, random ids."""
    chance = random.Random(0)
    words = " ".join(d.text or "" for d in standard_library() if d.module == "textwrap").split()
    chance.shuffle(words)
    texts = {
        "shuffled words": " ".join(words),
        "Spanish": SPANISH * 20,
        "German": GERMAN * 20,
        "random bytes": "".join(chr(chance.randrange(33, 383)) for _ in range(4 * tokens)),
    }
    found = {name: encode(text)[:tokens] for name, text in texts.items()}  # type: ignore[operator]
    found["random ids"] = [chance.randrange(6, vocabulary) for _ in range(tokens)]
    return found
