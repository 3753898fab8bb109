"""The tokenizer of a GGUF as tokenizer.json and tokenizer_config.json, written with the library tokenizers.

Two kinds: "gpt2" (byte-level pairs with a list of merges; `tokenizer.ggml.pre` names how text is cut first) and
"llama" (sentencepiece's pairs: pieces with scores, which tell the order of merges). Facts: llama.cpp's llama-vocab.cpp
and convert_hf_to_gguf.py, and the tokenizers of the models as published.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from mlx_mtp.checkpoints.checkpoint import write_json
from mlx_mtp.converting.gguf_file import GGUFFile
from mlx_mtp.errors import CheckpointError, UnsupportedModel, brief

SPACE = "\u2581"
UNKNOWN, CONTROL, USER = 2, 3, 4  # of tokenizer.ggml.token_type
WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
# Ids that end a reply, in the order in which a checkpoint names them.
ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")


def _cut(pattern: str) -> Any:
    return pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False),
    ])  # fmt: skip


def _digits() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)])


# Words of Mistral's tokenizer "tekken": a change from small to large letters ends one.
LARGE, SMALL = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?[{LARGE}]*[{SMALL}]+|[^\r\n\p{{L}}\p{{N}}]?[{LARGE}]+[{SMALL}]*"
         r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")  # fmt: skip
# These take a word that is in the vocabulary as it is, whatever the merges would make of it.
WHOLE_WORDS = ("llama-bpe", "tekken")
# `tokenizer.ggml.pre` -> how text is cut into words.
CUTS: dict[str, Callable[[], Any]] = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(False),
    "smollm": _digits,
    "starcoder": _digits,
    "qwen2": lambda: _cut(WORDS % r"\p{N}"),
    "llama-bpe": lambda: _cut(WORDS % r"\p{N}{1,3}"),
    "tekken": lambda: _cut(CASED),
}


class GGUFTokenizer:
    """What a GGUF says of its tokenizer. Raises UnsupportedModel for a kind that is not known here."""

    def __init__(self, file: GGUFFile) -> None:
        self._keys, self._path = file.keys, file.path
        self.tokens = self._listed("tokens", str)
        types = self._keys.get("tokenizer.ggml.token_type")
        if types is None or len(types) != len(self.tokens) or len(set(self.tokens)) != len(self.tokens):
            raise CheckpointError(f"{self._path}: 'tokenizer.ggml.tokens' and 'tokenizer.ggml.token_type' do not "
                                  "belong together, or a token is in them twice; download the file again.")  # fmt: skip
        self._types = [int(kind) for kind in types]
        self._kind = self._keys.get("tokenizer.ggml.model")
        self._cut_name = self._keys.get("tokenizer.ggml.pre")
        if self._kind not in ("gpt2", "llama") or self._kind == "gpt2" and self._cut_name not in CUTS:
            kind = f"'{self._kind}'" + (f" that cuts text as '{self._cut_name}'" if self._kind == "gpt2" else "")
            raise UnsupportedModel(
                f"{self._path} has a tokenizer of kind {kind}, and those known here are 'llama', and 'gpt2' with "
                f"{', '.join(CUTS)}; use the checkpoint in Hugging Face's layout."
            )

    @property
    def stop_tokens(self) -> list[int]:
        """Ids that end a reply, each once."""
        return list(dict.fromkeys(found for name in ENDS if (found := self._id(name)) is not None))

    @property
    def first_token(self) -> int | None:
        """Id of the token that begins a text, whether or not one is put there."""
        return self._id("bos_token_id")

    def write(self, folder: Path, context: int) -> None:
        """tokenizer.json and tokenizer_config.json, the chat template in it. context: most positions."""
        try:
            tokenizer = self._byte_level() if self._kind == "gpt2" else self._sentencepiece()
        except Exception as error:  # tokenizers raises plain Exception
            raise CheckpointError(f"{self._path}: its tokens and merges make no tokenizer ({brief(error)}); "
                                  "download the file again.") from error  # fmt: skip
        pairs = list(zip(self.tokens, self._types, strict=True))
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)
                                      for token, kind in pairs if kind in (UNKNOWN, CONTROL)])  # fmt: skip
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token, kind in pairs if kind == USER])
        first, begins = self.first_token, self._flag("add_bos_token", self._kind == "llama")
        processor: list[Any] = [processors.ByteLevel(trim_offsets=False)] if self._kind == "gpt2" else []
        if begins and first is not None:
            name = self.tokens[first]
            processor.append(processors.TemplateProcessing(single=[name, "$A"], pair=[name, "$A", f"{name}:1", "$B:1"],
                                                           special_tokens=[(name, first)]))  # fmt: skip
        if processor:
            tokenizer.post_processor = processors.Sequence(processor)
        tokenizer.save(str(folder / "tokenizer.json"))
        named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
        ids = {f"{ours}_token": self._id(f"{theirs}_token_id") for ours, theirs in named.items()}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
                  **{name: self.tokens[token] for name, token in ids.items() if token is not None},
                  "model_max_length": context}  # fmt: skip
        if template := self._keys.get("tokenizer.chat_template"):
            config["chat_template"] = template
        write_json(folder / "tokenizer_config.json", config)

    def _byte_level(self) -> Tokenizer:
        merges = [tuple(merge.split(" ", 1)) for merge in self._listed("merges", str)]
        vocabulary = {token: i for i, token in enumerate(self.tokens)}
        tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=self._cut_name in WHOLE_WORDS))
        if self._cut_name == "qwen2":
            tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = CUTS[str(self._cut_name)]()
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    def _sentencepiece(self) -> Tokenizer:
        vocabulary = {token: i for i, token in enumerate(self.tokens)}
        scores = [float(score) for score in self._keys["tokenizer.ggml.scores"]]
        merges = []
        for piece, score in zip(self.tokens, scores, strict=True):
            for at in range(1, len(piece)):
                left, right = vocabulary.get(piece[:at]), vocabulary.get(piece[at:])
                if left is not None and right is not None:
                    merges.append((-score, left, right))
        merges.sort()
        unknown = self._id("unknown_token_id")
        tokenizer = Tokenizer(models.BPE(
            vocabulary, [(self.tokens[left], self.tokens[right]) for _, left, right in merges],
            unk_token=None if unknown is None else self.tokens[unknown], fuse_unk=True, byte_fallback=True,
        ))  # fmt: skip
        spaces: list[Any] = [normalizers.Replace(" ", SPACE)]
        ends: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        if self._flag("add_space_prefix", True):
            spaces.insert(0, normalizers.Prepend(SPACE))
            ends.append(decoders.Strip(" ", 1, 0))
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        tokenizer.normalizer, tokenizer.decoder = normalizers.Sequence(spaces), decoders.Sequence(ends)
        return tokenizer

    def _listed(self, name: str, kind: type) -> list[Any]:
        found = self._keys.get(f"tokenizer.ggml.{name}")
        if not isinstance(found, list) or not found or not all(isinstance(each, kind) for each in found):
            raise CheckpointError(f"{self._path} lacks 'tokenizer.ggml.{name}'; use a file that holds its tokenizer.")
        return found

    def _flag(self, name: str, default: bool) -> bool:
        return bool(self._keys.get(f"tokenizer.ggml.{name}", default))

    def _id(self, name: str) -> int | None:
        """An id of the vocabulary, None where the file names none."""
        found = self._keys.get(f"tokenizer.ggml.{name}")
        if found is not None and (type(found) is not int or not 0 <= found < len(self.tokens)):
            raise CheckpointError(f"{self._path}: 'tokenizer.ggml.{name}' is {found!r:.40}, and the vocabulary has "
                                  f"{len(self.tokens)} tokens; download the file again.")  # fmt: skip
        return found
