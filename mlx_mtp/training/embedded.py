"""The recipe of the embedded pair: a miniature of Gemma 4 E2B and its assistant, trained on the standard library.

What it does: sizes, the two stages (target, then assistant on the frozen target) and the export in the published
checkpoint layout. What it does not do: the loop (trainer.py) or the data (data.py).

Everything follows from the seed and the Python version whose library is read; a stage that was interrupted goes on
from its checkpoint, a stage that is finished is not run again.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_mtp.cache import FULL, SLIDING
from mlx_mtp.checkpoint import Checkpoint, named_parameters, write_checkpoint
from mlx_mtp.drafters.assistant import AssistantConfig, AssistantModel
from mlx_mtp.targets.gemma4 import DEFAULT_ROPE, Gemma4Config, Gemma4Model, Gemma4Target, published_weights
from mlx_mtp.targets.gemma4 import load as load_gemma4
from mlx_mtp.training.continuations import continuations, openings
from mlx_mtp.training.corpus import Document, is_held_out, standard_library
from mlx_mtp.training.data import Batches, fingerprint, pack, read_documents
from mlx_mtp.training.objective import assistant_loss, next_token_loss
from mlx_mtp.training.tokenizer import train_tokenizer
from mlx_mtp.training.trainer import Progress, Trainer, TrainOptions

WINDOW = 128
UNROLL = 3  # draft steps the assistant is trained for
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
TURN_START, TURN_END = 4, 5  # <|turn>, <turn|>
OPENING = 96  # tokens of the corpus that the target continues with its own
FINE_TUNING = 0.4  # share of the learning rate for the second stage


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a user may turn: how long, how much at once, from which seed."""

    target_steps: int = 1400
    drafter_steps: int = 600  # on the corpus
    agreement_steps: int = 300  # then on what the target itself writes
    batch_size: int = 4
    length: int = 512
    learning_rate: float = 2e-3
    seed: int = 0
    vocabulary: int = 4096
    data: Sequence[str] = ()  # empty = Python's standard library


def text_config(vocabulary: int) -> dict[str, Any]:
    """Per-layer embeddings, shared K/V, double-wide MLP, one K/V head, 2 sliding + 1 full: E2B in small."""
    kinds = [SLIDING, SLIDING, FULL] * 2
    return {
        "model_type": "gemma4_text", "vocab_size": vocabulary, "hidden_size": 320, "intermediate_size": 768,
        "num_hidden_layers": len(kinds), "layer_types": kinds, "num_attention_heads": 4, "num_key_value_heads": 1,
        "head_dim": 64, "global_head_dim": 128, "num_global_key_value_heads": None, "sliding_window": WINDOW,
        "max_position_embeddings": 8192, "num_kv_shared_layers": 3, "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": vocabulary, "attention_k_eq_v": False,
        "enable_moe_block": False, "final_logit_softcapping": 30.0, "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "tie_word_embeddings": True,
        "rope_parameters": DEFAULT_ROPE, "use_bidirectional_attention": None, **IDS,
    }  # fmt: skip


def target_config(vocabulary: int) -> dict[str, Any]:
    """config.json of the target, published form, so that mlx-lm and transformers load it too."""
    return {
        "model_type": "gemma4", "architectures": ["Gemma4ForConditionalGeneration"], "vocab_size": vocabulary,
        "text_config": text_config(vocabulary), "vision_config": None, "audio_config": None,
        "tie_word_embeddings": True, **IDS, "eos_token_id": [IDS["eos_token_id"], TURN_END],
    }  # fmt: skip


def assistant_config(target: Gemma4Config) -> dict[str, Any]:
    """config.json of the assistant: the released ones' form with one full layer in place of four, dense tied head.

    One, because beside so small a target the cost of a draft step is its number of operations: on two cores a step of
    one full layer takes 0.8 ms, of a sliding and a full one 1.2 ms, and the target's pass over five rows 5.2 ms.
    """
    text = text_config(target.vocab_size) | {
        "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 1, "num_kv_shared_layers": 1,
        "layer_types": [FULL], "use_double_wide_mlp": False,
        "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "final_logit_softcapping": None,
    }  # fmt: skip
    return {
        "model_type": "gemma4_assistant", "architectures": ["Gemma4AssistantForCausalLM"], "text_config": text,
        "backbone_hidden_size": target.hidden_size, "use_ordered_embeddings": False, "num_centroids": 16,
        "centroid_intermediate_top_k": 4, "reads_last": 512, "tie_word_embeddings": True, **IDS,
    }  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """What is being done and how far it is, for whoever shows it; `progress` where something is trained."""

    name: str
    step: int
    steps: int
    progress: Progress | None = None


def train_embedded(folder: Path, recipe: Recipe) -> Generator[Stage, None, None]:
    """Makes folder/target and folder/assistant; resumes what an earlier call left in folder."""
    target_folder, assistant_folder = folder / "target", folder / "assistant"
    train, held = prepare(folder, recipe)
    if not (target_folder / "config.json").exists():
        yield from _train_target(folder, target_folder, recipe, train, held)
    if not (assistant_folder / "config.json").exists():
        yield from _train_assistant(folder, target_folder, assistant_folder, recipe, train, held)


def prepare(folder: Path, recipe: Recipe) -> tuple[np.ndarray, np.ndarray]:
    """Tokenizer and packed ids (training, held out), made once and kept in `folder`."""
    from mlx_lm.tokenizer_utils import load as load_tokenizer

    files = folder / "train.npy", folder / "held_out.npy"
    if not all(file.exists() for file in files):
        folder.mkdir(parents=True, exist_ok=True)
        train, held = _split(recipe)
        if not (folder / "tokenizer" / TOKENIZER_FILES[-1]).exists():
            train_tokenizer((_plain(document) for document in train), folder / "tokenizer", recipe.vocabulary)
        tokenizer = load_tokenizer(folder / "tokenizer")
        np.save(files[1], pack(held, tokenizer))
        np.save(files[0], pack(train, tokenizer))
    return np.load(files[0]), np.load(files[1])


def _split(recipe: Recipe) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents: whole modules of the standard library, or every 25th of the user's."""
    if not recipe.data:
        documents = list(standard_library())
        held = [document for document in documents if is_held_out(document.module)]
        return [document for document in documents if not is_held_out(document.module)], held
    documents = list(read_documents(recipe.data))
    held = documents[::25] if len(documents) >= 25 else documents[-1:]
    return [document for document in documents if document not in held] or documents, held


def _plain(document: Document) -> str:
    return document.text or "\n".join(message["content"] for message in document.messages or [])


def _trainer_data(
    recipe: Recipe, train: np.ndarray, held: np.ndarray, seed: int, lookahead: int
) -> tuple[Batches, list[np.ndarray]]:
    batches = Batches(train, recipe.batch_size, recipe.length, seed, lookahead)
    fixed = Batches(held, recipe.batch_size, recipe.length, 0, lookahead)
    return batches, [fixed.batch(i) for i in range(min(8, fixed.steps_per_epoch))]


def _train_target(
    folder: Path, out: Path, recipe: Recipe, train: np.ndarray, held: np.ndarray
) -> Iterator[Stage]:
    mx.random.seed(recipe.seed)
    config = target_config(recipe.vocabulary)
    model = Gemma4Model(Gemma4Config.from_dict(config))
    batches, fixed = _trainer_data(recipe, train, held, recipe.seed, 0)
    trainer = Trainer(
        model, next_token_loss, batches.batch,
        TrainOptions(steps=recipe.target_steps, learning_rate=recipe.learning_rate), folder / "train-target",
        data=fingerprint(train), held_out=fixed, figures=("accuracy",),
    )  # fmt: skip
    trainer.resume()
    for progress in trainer.run():
        yield Stage("target", progress.step, progress.steps, progress)
    _copy_tokenizer(folder / "tokenizer", out)
    generation = {"do_sample": False, **IDS, "eos_token_id": config["eos_token_id"]}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    write_checkpoint(out, config, published_weights(model))


def _train_assistant(
    folder: Path, target_folder: Path, out: Path, recipe: Recipe, train: np.ndarray, held: np.ndarray
) -> Iterator[Stage]:
    """First on the corpus, then on the target's own continuations of it with a third of the corpus for rehearsal."""
    mx.random.seed(recipe.seed + 1)
    target = load_gemma4(Checkpoint.open(target_folder))  # as shipped: rounded to float16 and back
    assert isinstance(target, Gemma4Target)
    target.model.freeze()
    config = assistant_config(target.config)
    drafter = AssistantModel(AssistantConfig.from_dict(config))
    yield from _agree("assistant", folder, drafter, target, recipe, recipe.drafter_steps, train, held)
    if recipe.agreement_steps:
        rows = max(recipe.agreement_steps * recipe.batch_size // 2, recipe.batch_size + 1)
        own = yield from _own_words(folder / "own_words.npy", target, train, recipe, rows)
        fixed_rows = 8 * recipe.batch_size + 1
        fixed = yield from _own_words(folder / "own_words_held_out.npy", target, held, recipe, fixed_rows)
        rehearsal = train[: len(own) // 2]
        mixed = np.concatenate([own, rehearsal])
        yield from _agree("agreement", folder, drafter, target, recipe, recipe.agreement_steps, mixed, fixed)
    out.mkdir(parents=True, exist_ok=True)
    generation = {"is_assistant": True, "num_assistant_tokens": UNROLL, "num_assistant_tokens_schedule": "constant"}
    (out / "generation_config.json").write_text(json.dumps(generation | IDS, indent=2) + "\n")
    write_checkpoint(out, config, named_parameters(drafter))


def _agree(
    name: str, folder: Path, drafter: AssistantModel, target: Gemma4Target, recipe: Recipe, steps: int,
    train: np.ndarray, held: np.ndarray,
) -> Iterator[Stage]:  # fmt: skip
    """One stage of the assistant's training, from the weights it has."""
    batches, fixed = _trainer_data(recipe, train, held, recipe.seed + 1, UNROLL)
    rate = recipe.learning_rate * (1.0 if name == "assistant" else FINE_TUNING)
    trainer = Trainer(
        drafter, assistant_loss(target, UNROLL), batches.batch,
        TrainOptions(steps=steps, learning_rate=rate), folder / f"train-{name}",
        data=fingerprint(train), held_out=fixed, figures=tuple(f"agreement_{j + 1}" for j in range(UNROLL)),
    )  # fmt: skip
    trainer.resume()
    for progress in trainer.run():
        yield Stage(name, progress.step, progress.steps, progress)


def _own_words(
    file: Path, target: Gemma4Target, ids: np.ndarray, recipe: Recipe, count: int
) -> Generator[Stage, None, np.ndarray]:
    """What the target writes behind `count` windows of a corpus, in one row of ids; kept as it grows."""
    opening = min(OPENING, recipe.length // 2)
    # A reply begins behind the last line that the chat template writes.
    marker = [TURN_START, *_reply_marker(file.parent / "tokenizer")]
    prompts = openings(ids, count, opening, marker, recipe.seed)
    rows = np.load(file) if file.exists() else np.zeros((0, recipe.length), ids.dtype)
    for written in continuations(target, prompts[len(rows) :], recipe.length - opening, recipe.seed + len(rows)):
        rows = np.concatenate([rows, written.astype(ids.dtype)])
        np.save(file, rows)
        yield Stage("own words", len(rows), count)
    return rows.reshape(-1)


def _reply_marker(tokenizer_folder: Path) -> list[int]:
    from mlx_lm.tokenizer_utils import load as load_tokenizer

    return load_tokenizer(tokenizer_folder).encode("model\n", add_special_tokens=False)


def _copy_tokenizer(source: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        (out / name).write_bytes((source / name).read_bytes())
