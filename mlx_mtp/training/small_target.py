"""The small target that is trained where none is given: Gemma 4 E2B in miniature, and a tokenizer made of the data."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from mlx_mtp.errors import OptionError
from mlx_mtp.generation.cache import FULL, SLIDING
from mlx_mtp.targets.gemma4_config import DEFAULT_ROPE

TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
CONTROL = ("<pad>", "<eos>", "<bos>", "<unk>")
MARKERS = ("<|turn>", "<turn|>", "<|think|>", "<|channel>", "<channel|>")
IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
TURN_END = 5  # <turn|>
# Newlines and indentations are pieces of their own, so that a prompt cut after one is tokenized as in training.
PIECES = Regex(r"\d|\n+| {2,}")

# Gemma 4's turns. No tools and no thinking: the target is trained with neither.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message['role'] == 'assistant' -%}
        {%- set role = 'model' -%}
    {%- elif message['role'] in ['system', 'user', 'model'] -%}
        {%- set role = message['role'] -%}
    {%- else -%}
        {{- raise_exception('expected role system, user or assistant, found ' ~ message['role']) -}}
    {%- endif -%}
    {%- if role == 'system' and not loop.first -%}
        {{- raise_exception('expected the system message first, found it after another message') -}}
    {%- endif -%}
    {{- '<|turn>' ~ role ~ '\\n' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] | trim -}}
    {%- else -%}
        {%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] | trim -}}{%- endfor -%}
    {%- endif -%}
    {{- '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|turn>model\\n' -}}
{%- endif -%}
"""


def target_config(vocabulary: int) -> dict[str, Any]:
    """config.json in published form, so that mlx-lm and transformers load the target too.

    Per-layer embeddings, shared K/V, double-wide MLP, one K/V head, twice 2 sliding layers and a full one.
    """
    kinds = [SLIDING, SLIDING, FULL] * 2
    text = {
        "model_type": "gemma4_text", "vocab_size": vocabulary, "hidden_size": 320, "intermediate_size": 768,
        "num_hidden_layers": len(kinds), "layer_types": kinds, "num_attention_heads": 4, "num_key_value_heads": 1,
        "head_dim": 64, "global_head_dim": 128, "num_global_key_value_heads": None, "sliding_window": 128,
        "max_position_embeddings": 8192, "num_kv_shared_layers": 3, "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": vocabulary, "attention_k_eq_v": False,
        "enable_moe_block": False, "final_logit_softcapping": 30.0, "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "tie_word_embeddings": True,
        "rope_parameters": DEFAULT_ROPE, "use_bidirectional_attention": None, **IDS,
    }  # fmt: skip
    return {
        "model_type": "gemma4", "architectures": ["Gemma4ForConditionalGeneration"], "vocab_size": vocabulary,
        "text_config": text, "vision_config": None, "audio_config": None,
        "tie_word_embeddings": True, **IDS, "eos_token_id": [IDS["eos_token_id"], TURN_END],
    }  # fmt: skip


def train_tokenizer(texts: Iterable[str], folder: Path, vocabulary: int) -> None:
    """Trains byte-level BPE on `texts` and writes it as transformers and mlx_lm load it, the chat template last.

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
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", IDS["bos_token_id"])]
    )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, "padding_side": "left",
        "additional_special_tokens": list(MARKERS), "model_max_length": 1_000_000,
        **{f"{name[1:-1]}_token": name for name in CONTROL},
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
