"""Every family of targets with every family of drafters: the promises of mlx_mtp.testing; and plug-ins.

Small golden models for Gemma 4, random ones for mlx-lm's. A plug-in's families are checked the same way, on its side.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import GOLDEN
from families import config_of, written
from greedy import enlivened
from test_generic import BASE, CONFIGS
from test_generic import written as written_target

import mlx_mtp
from mlx_mtp import drafters, targets
from mlx_mtp.checkpoints.checkpoint import Checkpoint
from mlx_mtp.drafters import load_drafter
from mlx_mtp.drafters.lookup import Lookup, LookupFirst
from mlx_mtp.generation.interfaces import Drafter, Target
from mlx_mtp.targets import load_target
from mlx_mtp.testing import PROMISES, Conformance

# Shared K/V and layer inputs, K = V, experts, unified; rings that wrap, ours and mlx-lm's, and latents.
PAIRS = (
    ("ple", "assistant"), ("ple", "trunk"), ("ple", "modules"), ("ple", "lookup"), ("ple", "lookup+modules"),
    ("keqv", "assistant"), ("moe", "assistant"), ("unified", "assistant"),
    ("llama-sliding", "hidden"), ("llama-sliding", "lookup"), ("deepseek_v3", "modules"), ("gemma3_text", "trunk"),
    ("ple", "layers"), ("llama-sliding", "lookup+layers"),
)  # fmt: skip
FAMILIES = {"trunk": ("parallel_heads", 3, {"reads": "trunk"}), "hidden": ("parallel_heads", 3, {}),
            "modules": ("sequential_modules", 2, {}),
            "layers": ("sequential_modules", 1, {"aux_layers": [1, 0]})}  # fmt: skip


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Conformance]:
    """A pair by the names of its target and its drafter, loaded once."""
    root = tmp_path_factory.mktemp("conformance")

    @functools.cache
    def target_of(name: str) -> Target:
        if name in CONFIGS:
            return load_target(Checkpoint.open(written_target(root / name, BASE | CONFIGS[name])))
        return enlivened(load_target(Checkpoint.open(GOLDEN / name / "target")))

    def drafter_of(target: str, name: str) -> Drafter:
        if name.startswith("lookup"):
            return Lookup() if name == "lookup" else LookupFirst(drafter_of(target, name.removeprefix("lookup+")))
        if name == "assistant":
            return load_drafter(Checkpoint.open(GOLDEN / target / "assistant_tied"))
        family, count, fields = FAMILIES[name]
        config = config_of(family, 32, target_of(target).info.vocab_size, count, **fields)
        return load_drafter(Checkpoint.open(written(root / f"{target}-{name}", config)))

    return functools.cache(lambda target, drafter: Conformance(target_of(target), drafter_of(target, drafter)))


@pytest.mark.parametrize("promise", PROMISES)
@pytest.mark.parametrize(("target", "drafter"), PAIRS)
def test_promise(target: str, drafter: str, promise: str, pair_of: Callable[[str, str], Conformance]) -> None:
    pair_of(target, drafter).check(promise)


def test_every_registered_family_is_in_a_pair(pair_of: Callable[[str, str], Conformance]) -> None:
    pairs = [pair_of(*names) for names in PAIRS]
    for registry, found in ((targets.registry, [pair.target for pair in pairs]),
                            (drafters.registry, [pair.drafter for pair in pairs])):  # fmt: skip
        registry.model_types  # noqa: B018  # imports the families
        families = {getattr(loader, "__self__", loader).__module__ for loader in registry._loaders.values()}
        assert families <= {type(one).__module__ for one in found}


# Families of other distributions

PLUGIN = '''
from mlx_mtp.testing import MarkovDrafter, MarkovTarget


def target(checkpoint):
    return MarkovTarget(checkpoint.weights()["table"])


def drafter(checkpoint):
    return MarkovDrafter(checkpoint.weights()["table"])
'''
ENTRY_POINTS = """
[mlx_mtp.targets]
table = plugged_in:target
gemma4 = plugged_in:no_such_function
[mlx_mtp.drafters]
table = plugged_in:drafter
broken = plugged_in:no_such_function
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny distribution on sys.path, and a checkpoint of its families."""
    about = tmp_path / "plugged_in-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: plugged-in\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(ENTRY_POINTS)
    (tmp_path / "plugged_in.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    for registry in (targets.registry, drafters.registry):
        monkeypatch.setattr(registry, "_loaders", dict(registry._loaders))
    monkeypatch.delitem(sys.modules, "plugged_in", raising=False)
    folder = tmp_path / "table"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "table"}')
    mx.save_safetensors(str(folder / "model.safetensors"), {"table": mx.random.normal((40, 40), key=mx.random.key(1))})
    return folder


@pytest.mark.parametrize("promise", [name for name in PROMISES if name != "every_depth"])
def test_families_of_another_distribution(plugin: Path, promise: str) -> None:
    engine = mlx_mtp.load(plugin, drafter=plugin, depth=3)
    Conformance(engine.target, engine.drafter).check(promise)


def test_what_a_plugin_cannot_give(plugin: Path) -> None:
    """It takes no family's place, and one that cannot be imported is a sentence; so is a type that nobody names."""
    assert "table" in drafters.registry.model_types
    assert mlx_mtp.load(GOLDEN / "ple" / "target", drafter=None).target.info.vocab_size == 128
    for model_type, error, words in (("broken", mlx_mtp.CheckpointError, "plugged_in:no_such_function"),
                                     ("nobody", mlx_mtp.UnsupportedModel, "table")):  # fmt: skip
        (plugin / "config.json").write_text(f'{{"model_type": "{model_type}"}}')
        with pytest.raises(error, match=words):
            mlx_mtp.load(GOLDEN / "ple" / "target", drafter=plugin)
