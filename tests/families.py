"""What the tests of drafters with layers of their own share: checkpoints, and rounds with known outcomes."""

import json
import shutil
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from conftest import GOLDEN
from greedy import enlivened
from mlx.utils import tree_flatten, tree_map_with_path
from thinking import PLAIN_TEMPLATE, TOKENS, write_tokenizer

import mlx_mtp
from mlx_mtp.drafters.parallel import ParallelModel
from mlx_mtp.drafters.sequential import SequentialModel
from mlx_mtp.generation.interfaces import Drafter, States, Target
from mlx_mtp.training.trainer import followed

HEAD_DIM, EPS = 8, 1e-5
MODELS = {"parallel_heads": ParallelModel, "sequential_modules": SequentialModel}


def config_of(family: str, width: int, vocabulary: int, count: int, **fields: Any) -> dict[str, Any]:
    """A config.json of small llama layers; `count` heads or modules."""
    block = {
        "model_type": "llama", "hidden_size": width, "num_hidden_layers": 1, "intermediate_size": 24,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": HEAD_DIM, "rms_norm_eps": EPS,
        "vocab_size": vocabulary,
    }  # fmt: skip
    counted = "heads" if family == "parallel_heads" else "modules"
    config = {"model_type": family, counted: count, "hidden_size": width, "vocab_size": vocabulary, "block": block}
    return {**config, **({"reads": "hidden"} if counted == "heads" else {}), **fields}


def lively(model: Any, seed: int = 5) -> Any:
    """The model with random weights that make its output depend on everything it reads."""
    mx.random.seed(seed)

    def weight(name: str, array: mx.array) -> mx.array:
        if array.dtype == mx.int32:  # a shortlist
            return array
        drawn = mx.random.normal(array.shape)
        return 1.0 + 0.2 * drawn if array.ndim == 1 else drawn * array.shape[-1] ** -0.5

    model.update(tree_map_with_path(weight, model.parameters()))
    mx.eval(model.parameters())
    return model


def model_of(config: dict[str, Any]) -> Any:
    return lively(MODELS[config["model_type"]].of(config))


def written(folder: Path, config: dict[str, Any], weights: dict[str, mx.array] | None = None) -> Path:
    """A checkpoint; of a random model where no weights are given."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = dict(tree_flatten(model_of(config).parameters())) if weights is None else weights
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class Scripted:
    """A `choose` that notes the logits and takes the tokens that a script says."""

    def __init__(self, script: list[int]) -> None:
        self.script, self.logits = script, []

    def __call__(self, logits: mx.array, tokens: mx.array | None = None, forced: object = None) -> mx.array:
        assert tokens is None and forced is None
        self.logits.append(np.array(logits)[0, 0])
        return mx.array([[self.script[len(self.logits) - 1]]])


def drafted(
    drafter: Drafter, target: Target, tokens: np.ndarray, states: States, first: int, depth: int, seed: int
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Drafts through a whole sequence: (place of the newest token, logits of every draft [V]) of each round.

    The prompt are the first `first` tokens, heard in chunks. Then every round drafts `depth` tokens, as the sequence
    has them, and commits a random number of them; the rows after those hold other tokens and states.
    """
    random = np.random.default_rng(seed)
    memory, at = drafter.start(1, 16), 0

    def cut(start: int, stop: int, junk: int = 0) -> tuple[mx.array, States]:
        rows = mx.array(np.concatenate([tokens[start:stop], random.integers(0, 9, junk)])[None])
        noise = mx.array(random.normal(size=(1, junk, states.hidden.shape[-1])).astype(np.float32))
        heard = states.of_layers(drafter.aux_layers)
        hidden, *aux = (mx.concatenate([s[:, start:stop], noise], axis=1) for s in (heard.hidden, *heard.aux))
        return rows, States(hidden, tuple(aux))

    while at < first:
        size = int(random.integers(1, first - at + 1))
        memory = drafter.observe(drafter.grow(memory, 16 + at + size), *cut(at, at + size), mx.array([size - 1]))
        at += size
    cache = target.new_cache(256)
    while at + depth < len(tokens):
        sample = Scripted(tokens[at + 1 : at + 1 + depth].tolist())
        memory = drafter.grow(memory, at + depth + 16)
        hidden = states.hidden[:, at - 1 : at]
        _, memory = drafter.draft(memory, mx.array([[int(tokens[at])]]), hidden, cache, depth, sample)
        yield at, sample.logits
        accepted = int(random.integers(0, depth + 1))
        rows = cut(at, at + accepted + 1, depth - accepted)
        memory = drafter.observe(memory, *rows, mx.array([accepted]))
        at += accepted + 1


def drained(walk: Generator[Any, None, Any]) -> tuple[list[Any], Any]:
    """What a generator yields, and what it returns."""
    found: list[Any] = []
    return found, followed(walk, found.append)


# Conversations: 128 tokens, of which the target only writes those that stand for themselves.
WORDS = [*TOKENS, *(f"w{i:03}," for i in range(len(TOKENS), 128))]


def copy_with_tokenizer(
    variant: str, folder: Path, tokens: Sequence[str] = WORDS, template: str = PLAIN_TEMPLATE
) -> Path:
    """A golden target with a tokenizer and a chat template."""
    shutil.copytree(GOLDEN / variant / "target", folder, copy_function=shutil.copyfile)
    return write_tokenizer(folder, list(tokens), template)


def chat_folder(place: Path) -> Path:
    """A target with windows of 8 tokens and a tokenizer, and drafters that have weights."""
    copy_with_tokenizer("ple", place / "target")
    shutil.copytree(GOLDEN / "ple" / "assistant_tied", place / "assistant")
    for name, family in (("parallel", "parallel_heads"), ("sequential", "sequential_modules")):
        written(place / name, config_of(family, 32, 128, 2))
    return place


def talking(folder: Path, family: str = "none", **options: Any) -> mlx_mtp.Engine:
    """The target of a `chat_folder` with one of its drafters, or with one that `load` takes."""
    drafter = folder / family if (folder / family).is_dir() else family
    options = {"depth": 0 if family == "none" else 2, **options}
    engine = mlx_mtp.load(folder / "target", drafter=drafter, **options)
    enlivened(engine.target, silent=len(TOKENS))
    return engine
