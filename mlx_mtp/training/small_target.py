"""The small target that is trained where none is given: the embedded one's shape and chat template, new weights, and a
tokenizer made of the data."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from mlx_mtp.checkpoints.checkpoint import read_json
from mlx_mtp.errors import OptionError
from mlx_mtp.loading import EMBEDDED

SETTINGS = ("tokenizer_config.json", "chat_template.jinja", "generation_config.json")
CONTROL = ("<pad>", "<eos>", "<bos>", "<unk>")
MARKERS = ("<|turn>", "<turn|>", "<|think|>", "<|channel>", "<channel|>")
# Newlines and indentations are pieces of their own, so that a prompt cut after one is tokenized as in training.
PIECES = Regex(r"\d|\n+| {2,}")


def target_config(vocabulary: int) -> dict[str, Any]:
    """config.json, in published form, of Gemma 4 E2B in miniature: per-layer embeddings, shared K/V, double-wide MLP,
    one K/V head, twice 2 sliding layers and a full one."""
    config = read_json(EMBEDDED / "target" / "config.json")
    config["vocab_size"] = vocabulary
    config["text_config"] |= {"vocab_size": vocabulary, "vocab_size_per_layer_input": vocabulary}
    return config


def train_tokenizer(texts: Iterable[str], folder: Path, vocabulary: int) -> None:
    """Trains byte-level BPE on `texts` and writes it as transformers and mlx_lm load it.

    Few texts give fewer than `vocabulary` pieces, and the rest of the target's rows stay unused. OptionError where not
    even every byte and marker is a piece.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(PIECES, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(name, special=True, normalized=False) for name in (*CONTROL, *MARKERS)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    if (found := tokenizer.get_vocab_size()) > vocabulary:
        raise OptionError(f"vocabulary must be at least {found}: every byte and marker is a piece.")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", CONTROL.index("<bos>"))]
    )
    folder.mkdir(parents=True, exist_ok=True)
    for name in SETTINGS:
        shutil.copyfile(EMBEDDED / "target" / name, folder / name)
    tokenizer.save(str(folder / "tokenizer.json"))
