"""Trains the embedded model's tokenizer and writes it in the forms that transformers and mlx_lm load.

One sentencepiece BPE model, `tokenizer.model`, and the same vocabulary and merges as `tokenizer.json`; both give the
same ids for any text, except that sentencepiece does not read `<pad>`, `<eos>`, `<bos>` and `<unk>` out of a text.
Newlines and runs of spaces are symbols of their own and never part of a word piece: a prompt cut after a newline or an
indentation is tokenized as in training, and an indentation costs one token.
Every text comes back from its ids byte for byte, except that U+2581, which sentencepiece writes for a space, comes back
as one. Does not load tokenizers: `transformers.AutoTokenizer` and `mlx_lm` do.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from mlx_mtp.loading import EMBEDDED
from mlx_mtp.training.small_target import CONTROL, MARKERS

SPACE = "\u2581"
NEWLINES = ("\n", "\n\n", "\n\n\n")
INDENTS = tuple(SPACE * width for width in (*range(2, 17), 20, 24, 28, 32))
# Every printable character of ASCII is a piece, however rare; other characters below the coverage fall back to bytes.
REQUIRED = "".join(chr(code) for code in range(33, 127))
COVERAGE = 0.9998
LINE_BYTES = 4000
CONFIG = {
    # The class that takes tokenizer.json as it is; GemmaTokenizer would rebuild it with its own settings.
    "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>",
    "unk_token": "<unk>", "additional_special_tokens": list(MARKERS), "clean_up_tokenization_spaces": False,
    "padding_side": "left", "model_max_length": 1_000_000,
}  # fmt: skip


def train_tokenizer(texts: Iterable[str], folder: Path, vocabulary: int = 4096) -> None:
    """Train on `texts` and write tokenizer.model, tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    model = _train(texts, vocabulary)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model)
    fast = _fast_tokenizer(sentencepiece.SentencePieceProcessor(model_proto=model))
    (folder / "tokenizer.json").write_text(fast.to_str(pretty=True), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(EMBEDDED / "target" / "chat_template.jinja", folder / "chat_template.jinja")


def _train(texts: Iterable[str], vocabulary: int) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_lines(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocabulary,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        # Code mixes letters and punctuation: without this `self.` and `__init__` could not become pieces.
        split_by_unicode_script=False,
        character_coverage=COVERAGE,
        required_chars=REQUIRED,
        max_sentence_length=2 * LINE_BYTES,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3,
        pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>", unk_piece="<unk>",
        user_defined_symbols=[*MARKERS, *NEWLINES, *INDENTS],
        minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def _lines(texts: Iterable[str]) -> Iterator[str]:
    # sentencepiece drops over-long sentences without a word; NUL is left to the byte pieces.
    for text in texts:
        for line in text.replace("\0", "").splitlines():
            for start in range(0, len(line), LINE_BYTES // 2):
                yield line[start : start + LINE_BYTES // 2]


def _fast_tokenizer(pieces: sentencepiece.SentencePieceProcessor) -> Tokenizer:
    """The same tokenizer for the tokenizers library."""
    size = pieces.get_piece_size()
    names = [pieces.id_to_piece(i) for i in range(size)]
    model = models.BPE(
        vocab={name: i for i, name in enumerate(names)},
        merges=_merges(pieces, names),
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    # Exactly this sequence makes mlx_lm choose its linear-time streaming detokenizer.
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in (*CONTROL, *MARKERS)])
    # Matched longest first, after spaces have become U+2581: what sentencepiece does with user-defined symbols.
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=True) for name in (*NEWLINES, *INDENTS)])
    bos = ("<bos>", pieces.bos_id())
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[bos]
    )
    return tokenizer


def _merges(pieces: sentencepiece.SentencePieceProcessor, names: list[str]) -> list[tuple[str, str]]:
    """Every way to make a piece out of two others, best piece first: sentencepiece merges by the result alone."""
    symbols = {*CONTROL, *MARKERS, *NEWLINES, *INDENTS}
    learned = {
        name: pieces.get_score(i) for i, name in enumerate(names) if name not in symbols and not pieces.is_byte(i)
    }
    merges: list[tuple[str, str]] = []
    for name in sorted(learned, key=lambda name: -learned[name]):
        splits = [(name[:cut], name[cut:]) for cut in range(1, len(name))]
        merges += [(left, right) for left, right in splits if left in learned and right in learned]
    return merges
