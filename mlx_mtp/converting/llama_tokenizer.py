"""Llama 2's sentencepiece tokenizer in the form that transformers and mlx-lm load, with the ids of sentencepiece.

tokenizer.json gets the vocabulary and merges that transformers reads out of tokenizer.model, and sentencepiece's own
rule for spaces: one is put before every text, also before one that begins with a space, as code often does
(transformers' own LlamaTokenizer puts none there). Ids are compared with sentencepiece's before it is believed.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Tokenizer, normalizers

from mlx_mtp.checkpoints.checkpoint import write_json
from mlx_mtp.errors import CheckpointError, brief

SPACE = "\u2581"
PROBES = ("def f(x):\n    return x", "    x = 1\n\n", "a  b\tc", "caf\u00e9 \u6f22\u5b57 \U0001f600", "", " ")


def write_tokenizer(model: Path, folder: Path, vocabulary: int, context: int) -> dict[str, Any]:
    """tokenizer.model, tokenizer.json and tokenizer_config.json in `folder`; what config.json must know of them.

    Raises CheckpointError where `model` is no sentencepiece model, one that works otherwise than Llama 2's, or one with
    more pieces than the target's vocabulary.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(model, folder / "tokenizer.model")
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
        if pieces.get_piece_size() > vocabulary:
            raise ValueError(f"{pieces.get_piece_size()} pieces for a vocabulary of {vocabulary}")
        fast = _fast_tokenizer(folder, pieces)
        wrong = [text for text in PROBES if fast.encode(text).ids != [pieces.bos_id(), *pieces.encode(text)]]
        if wrong:
            raise ValueError(f"other ids than sentencepiece's for {wrong[0]!r}")
    # sentencepiece, transformers and tokenizers raise RuntimeError, OSError, ValueError, plain Exception, ...
    except Exception as error:
        raise CheckpointError(f"{model} is no sentencepiece tokenizer like Llama 2's ({brief(error)}); "
                              "use the tokenizer.model of this checkpoint.") from error  # fmt: skip
    special = {"bos_token": pieces.bos_id(), "eos_token": pieces.eos_id(), "unk_token": pieces.unk_id()}
    fast.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {
        # The class that takes tokenizer.json as it is.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: pieces.id_to_piece(token) for name, token in special.items() if token >= 0},
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
    })  # fmt: skip
    return {"bos_token_id": special["bos_token"], "eos_token_id": special["eos_token"]}


def _fast_tokenizer(folder: Path, pieces: Any) -> Tokenizer:
    from transformers import LlamaTokenizer  # slow to import

    tokenizer: Tokenizer = LlamaTokenizer.from_pretrained(
        str(folder), add_bos_token=True, add_eos_token=False,
        bos_token=pieces.id_to_piece(pieces.bos_id()), eos_token=pieces.id_to_piece(pieces.eos_id()),
        unk_token=pieces.id_to_piece(pieces.unk_id()),
    ).backend_tokenizer  # fmt: skip
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.pre_tokenizer = None
    return tokenizer
