"""Tokenizers of other formats as tokenizer.json and tokenizer_config.json, written with the library tokenizers.

Three kinds: byte-level pairs with a list of merges (GGUF's "gpt2"; `tokenizer.ggml.pre` names how text is cut first),
sentencepiece's pairs (GGUF's "llama", Meta's tokenizer.model): pieces with scores, which tell the order of merges, and
such pairs with a list of merges (GGUF's "gemma4"), which never cross the end of a line.
Facts: llama.cpp's llama-vocab.cpp and convert_hf_to_gguf.py, and the tokenizers of the models as published.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from mlx_mtp.checkpoints.checkpoint import write_json
from mlx_mtp.errors import CheckpointError, UnsupportedModel, explaining

SPACE = "\u2581"
UNKNOWN, CONTROL, USER = 2, 3, 4  # of tokenizer.ggml.token_type
PROBES = ("def f(x):\n    return x", "    x = 1\n\n", "a  b\tc", "caf\u00e9 \u6f22\u5b57 \U0001f600", "", " ")
WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
# Words of Mistral's tokenizer "tekken": a change from small to large letters ends one.
LARGE, SMALL = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?[{LARGE}]*[{SMALL}]+|[^\r\n\p{{L}}\p{{N}}]?[{LARGE}]+[{SMALL}]*"
         r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")  # fmt: skip
WHOLE_WORDS = ("llama-bpe", "tekken")  # take a word of the vocabulary as it is, whatever the merges make of it
ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")  # end a reply, in the order in which a checkpoint names them
DIGITS = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
BYTES = pre_tokenizers.ByteLevel(False, use_regex=False)
PIECES = ("llama", "gemma4")  # kinds with pieces of text in place of bytes
LINES = pre_tokenizers.Split(Regex(r"\n+"), "isolated")  # ends of lines in a row are one word
# `tokenizer.ggml.pre` -> how text is cut into words.
CUTS: dict[str, list[Any]] = {
    "gpt-2": [pre_tokenizers.ByteLevel(False)],
    "smollm": DIGITS,
    "starcoder": DIGITS,
    "qwen2": [pre_tokenizers.Split(Regex(WORDS % r"\p{N}"), "isolated"), BYTES],
    "llama-bpe": [pre_tokenizers.Split(Regex(WORDS % r"\p{N}{1,3}"), "isolated"), BYTES],
    "tekken": [pre_tokenizers.Split(Regex(CASED), "isolated"), BYTES],
}


def write_llama(model: Path, folder: Path, vocabulary: int, context: int) -> dict[str, Any]:
    """Llama 2's tokenizer.model in both forms, with the ids of sentencepiece; what config.json must know of them.
    CheckpointError for any other tokenizer, and for more pieces than the target's vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(model, folder / "tokenizer.model")
    # sentencepiece and tokenizers raise RuntimeError, OSError, ValueError, plain Exception, ...
    what, advice = f"{model} is no sentencepiece tokenizer like Llama 2's", "use the tokenizer.model of this checkpoint"
    with explaining(what, advice, Exception):
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
        every = range(pieces.get_piece_size())
        kinds = [CONTROL if pieces.is_control(i) else UNKNOWN if pieces.is_unknown(i) else 0 for i in every]
        ids = {"bos": pieces.bos_id(), "eos": pieces.eos_id(), "unknown": pieces.unk_id()}
        stated = {f"{name}_token_id": token for name, token in ids.items() if token >= 0} | {
            "model": "llama",
            "tokens": [pieces.id_to_piece(i) for i in every],
            "scores": [pieces.get_score(i) for i in every],
            "token_type": kinds,
        }
        tokenizer = StatedTokenizer(model, {f"tokenizer.ggml.{name}": value for name, value in stated.items()})
        fast = tokenizer.write(folder, vocabulary, context)
        wrong = [text for text in PROBES if fast.encode(text).ids != [pieces.bos_id(), *pieces.encode(text)]]
        if wrong:
            raise ValueError(f"other ids than sentencepiece's for {wrong[0]!r}")
    return {name: tokenizer.id_of(name) for name in ("bos_token_id", "eos_token_id")}


class StatedTokenizer:
    """A tokenizer by the keys that a GGUF has of one. Raises UnsupportedModel for a kind that is not known here."""

    def __init__(self, path: Path, keys: Mapping[str, Any]) -> None:
        self._path, self._keys = path, keys
        self.tokens = self._listed("tokens")
        self._vocabulary, kinds = {token: i for i, token in enumerate(self.tokens)}, self._get("token_type")
        if kinds is None or not len(kinds) == len(self.tokens) == len(self._vocabulary):
            raise CheckpointError(f"{self._path}: 'tokenizer.ggml.tokens' and 'tokenizer.ggml.token_type' do not "
                                  "belong together, or a token is in them twice; download the file again.")  # fmt: skip
        self._kinds = [int(kind) for kind in kinds]
        self._model, self._cut = self._get("model"), self._get("pre")
        if self._model not in PIECES and (self._model != "gpt2" or self._cut not in CUTS):
            kind = f"'{self._model}'" + (f" that cuts text as '{self._cut}'" if self._model == "gpt2" else "")
            raise UnsupportedModel(
                f"{self._path} has a tokenizer of kind {kind}, and those known here are "
                f"{', '.join(map(repr, PIECES))}, and 'gpt2' with {', '.join(CUTS)}; "
                "use the checkpoint in Hugging Face's layout."
            )

    @property
    def stop_tokens(self) -> list[int]:
        return list(dict.fromkeys(found for name in ENDS if (found := self.id_of(name)) is not None))

    def id_of(self, name: str) -> int | None:
        """An id of the vocabulary, None where the file names none."""
        found = self._get(name)
        if found is not None and (type(found) is not int or not 0 <= found < len(self.tokens)):
            raise CheckpointError(f"{self._path}: 'tokenizer.ggml.{name}' is {found!r:.40}, and the vocabulary has "
                                  f"{len(self.tokens)} tokens; download the file again.")  # fmt: skip
        return found

    def write(self, folder: Path, vocabulary: int, context: int) -> Tokenizer:
        """tokenizer.json and tokenizer_config.json for a model; what the first holds. context: most positions."""
        if len(self.tokens) > vocabulary:
            raise CheckpointError(f"{self._path} has {len(self.tokens)} pieces for a vocabulary of {vocabulary}; use "
                                  "the tokenizer of this checkpoint.")  # fmt: skip
        # tokenizers raises plain Exception
        with explaining(f"{self._path}: its tokens and merges make no tokenizer", "download the file again", Exception):
            tokenizer = self._pairs() if self._model in PIECES else self._byte_level()
            self._mark_special(tokenizer)
        tokenizer.save(str(folder / "tokenizer.json"))
        named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
        ids = {f"{ours}_token": self.id_of(f"{theirs}_token_id") for ours, theirs in named.items()}
        template = self._keys.get("tokenizer.chat_template")
        write_json(folder / "tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast",  # the class that takes tokenizer.json as it is
            "clean_up_tokenization_spaces": False,
            **{name: self.tokens[token] for name, token in ids.items() if token is not None},
            "model_max_length": context,
            **({"chat_template": template} if template else {}),
        })  # fmt: skip
        return tokenizer

    def _byte_level(self) -> Tokenizer:
        tokenizer = Tokenizer(models.BPE(self._vocabulary, self._merges(), ignore_merges=self._cut in WHOLE_WORDS))
        if self._cut == "qwen2":
            tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(CUTS[self._cut])
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    def _merges(self) -> list[Any]:
        """Pairs of pieces in the order in which they are joined."""
        if self._model != "llama":
            return [tuple(merge.split(" ", 1)) for merge in self._listed("merges")]
        vocabulary, merges = self._vocabulary, []
        for piece, score in zip(self.tokens, self._get("scores"), strict=True):
            for at in range(1, len(piece)):
                left, right = vocabulary.get(piece[:at]), vocabulary.get(piece[at:])
                if left is not None and right is not None:
                    merges.append((-float(score), left, right))
        return [(self.tokens[left], self.tokens[right]) for _, left, right in sorted(merges)]

    def _pairs(self) -> Tokenizer:
        """sentencepiece's. Usually a space is put before every text, also before one that begins with a space, as code
        often does (transformers' own LlamaTokenizer puts none there)."""
        unknown, lines = self.id_of("unknown_token_id"), self._model == "gemma4"
        tokenizer = Tokenizer(models.BPE(
            self._vocabulary, self._merges(), unk_token=None if unknown is None else self.tokens[unknown],
            fuse_unk=True, byte_fallback=True, ignore_merges=lines,
        ))  # fmt: skip
        spaces: list[Any] = [normalizers.Replace(" ", SPACE)]
        ends: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        if self._get("add_space_prefix", not lines):
            spaces.insert(0, normalizers.Prepend(SPACE))
            ends.append(decoders.Strip(" ", 1, 0))
        else:
            tokenizer.pre_tokenizer = LINES if lines else pre_tokenizers.Split(" ", "merged_with_previous")
        tokenizer.normalizer, tokenizer.decoder = normalizers.Sequence(spaces), decoders.Sequence(ends)
        return tokenizer

    def _mark_special(self, tokenizer: Tokenizer) -> None:
        """Special tokens, those that a user defined, and the one that is put before every text."""
        kinds = list(zip(self.tokens, self._kinds, strict=True))
        special = [token for token, kind in kinds if kind in (UNKNOWN, CONTROL)]
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token, kind in kinds if kind == USER])
        after: list[Any] = [] if self._model in PIECES else [processors.ByteLevel(trim_offsets=False)]
        first = self.id_of("bos_token_id")
        if first is not None and self._get("add_bos_token", self._model in PIECES):
            name = self.tokens[first]
            after.append(processors.TemplateProcessing(single=[name, "$A"], pair=[name, "$A", f"{name}:1", "$B:1"],
                                                       special_tokens=[(name, first)]))  # fmt: skip
        if after:
            tokenizer.post_processor = processors.Sequence(after)

    def _get(self, name: str, default: Any = None) -> Any:
        return self._keys.get(f"tokenizer.ggml.{name}", default)

    def _listed(self, name: str) -> list[str]:
        found = self._get(name)
        if not isinstance(found, list) or not found:  # lists are of strings, numbers are arrays
            raise CheckpointError(f"{self._path} lacks 'tokenizer.ggml.{name}'; use a file that holds its tokenizer.")
        return found
