"""Small tokenizers of every kind, made here and now: byte-level, with byte fallback, by words, by suffixes."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = [
    "The capital of France is Paris, isn't it?",
    "def hello(world):\n    return world + 1\n",
    "caf\u00e9 na\u00efve \u6f22\u5b57 \U0001f600 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "It is 12.5 % of what they do not say .",
]
WORDS = [word for text in TEXTS for word in text.split(" ")]
LEARNED = TEXTS + [" ".join(random.Random(i).sample(WORDS, 6)) for i in range(200)]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPACE = "\u2581"


def byte_level() -> Tokenizer:
    """GPT-2's kind."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(LEARNED, trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))  # fmt: skip
    return made


def _fallback(normalizer: normalizers.Normalizer, decoder: list[decoders.Decoder]) -> Tokenizer:
    """SentencePiece's kind: pieces with U+2581 for a space, bytes for what has no piece."""
    rough = Tokenizer(models.BPE(unk_token="<unk>"))
    rough.normalizer = normalizer
    rough.train_from_iterator(
        [text for text in LEARNED if text.isascii()],
        trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False),
    )
    learned = json.loads(rough.to_str())["model"]
    names = [*learned["vocab"], *(f"<0x{byte:02X}>" for byte in range(256))]
    merges = [tuple(pair) for pair in learned["merges"]]
    made = Tokenizer(models.BPE(
        {name: i for i, name in enumerate(names)}, merges, unk_token="<unk>", byte_fallback=True))  # fmt: skip
    made.normalizer = normalizer
    made.decoder = decoders.Sequence(decoder)
    made.add_special_tokens([AddedToken(name, normalized=False) for name in SPECIAL])
    return made


def llama() -> Tokenizer:
    """With a space put in front of every text, and taken off again."""
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return _fallback(normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]), steps)


def gemma() -> Tokenizer:
    """Without that space."""
    return _fallback(normalizers.Replace(" ", SPACE),
                     [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])  # fmt: skip


def unigram() -> Tokenizer:
    """Metaspace, whose first space is dropped when decoded."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.train_from_iterator(LEARNED, trainers.UnigramTrainer(
        vocab_size=160, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False))  # fmt: skip
    return made


def word_piece() -> Tokenizer:
    """BERT's kind: words with a space in front, but for pieces that begin with ##."""
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    made.train_from_iterator(LEARNED, trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=SPECIAL, show_progress=False))  # fmt: skip
    return made


def suffixes() -> Tokenizer:
    """The first GPT's kind: a mark at the end of each word, a space where another follows."""
    made = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder()
    made.train_from_iterator(LEARNED, trainers.BpeTrainer(
        vocab_size=200, special_tokens=SPECIAL, end_of_word_suffix="</w>", show_progress=False))  # fmt: skip
    return made


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": byte_level, "llama": llama, "gemma": gemma, "unigram": unigram, "word piece": word_piece,
    "suffixes": suffixes,
}  # fmt: skip


def write(
    folder: Path, made: Tokenizer, template: str | None = CHATML, bos: bool = False, eos: bool = False, **config: Any
) -> Path:
    """The files of a tokenizer; bos, eos: what its post-processor puts around a text."""
    folder.mkdir(parents=True, exist_ok=True)
    if bos or eos:
        single = " ".join(["<s>"] * bos + ["$A"] + ["</s>"] * eos)
        ends = [(name, SPECIAL.index(name)) for name in ("<s>", "</s>")]
        made.post_processor = processors.TemplateProcessing(single=single, special_tokens=ends)
    made.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>",
        "clean_up_tokenization_spaces": True,
    }  # fmt: skip
    if template is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | config))
    return folder
