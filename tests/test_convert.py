"""Conversions against the originals' own mathematics in NumPy, and what a conversion must never do.

The logits of target and heads are compared with forward passes under the original names, orders and rotary convention.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import GOLDEN
from families import config_of, drafted, written
from greedy import same_or_tie
from layouts import (
    DEEPSEEK,
    GLM,
    META_PARAMS,
    META_VOCABULARY,
    MIMO,
    Arrays,
    deepseek_arrays,
    deepseek_module,
    from_fp8,
    glm_arrays,
    meta_arrays,
    meta_folder,
    meta_logits,
    mimo_arrays,
    mimo_module,
    write_folder,
    write_pth,
)
from references import below, float64

import mlx_mtp
from mlx_mtp.checkpoints.checkpoint import Checkpoint
from mlx_mtp.cli import app
from mlx_mtp.converting import convert as converted
from mlx_mtp.converting import meta
from mlx_mtp.drafters import load_drafter
from mlx_mtp.loading import EMBEDDED
from mlx_mtp.targets import load_target

TOLERANCE = 1e-3
TOKENS = np.random.default_rng(8).integers(3, 90, 24)


def draft_logits(target: Path, drafter: Path, depth: int) -> Iterator[tuple[int, list[np.ndarray]]]:
    """What the engine's parts propose through a sequence: (place of the newest token, logits of every draft)."""
    loaded, heads = load_target(Checkpoint.open(target)), load_drafter(Checkpoint.open(drafter))
    heads.attach(loaded)
    states = loaded.forward(mx.array(TOKENS[None]), loaded.new_cache(256))
    yield from drafted(heads, loaded, TOKENS, states, 4, depth, 1)


def decodes_alike(target: Path, drafter: Path) -> None:
    """The drafter changes nothing about the answer."""
    plain = mlx_mtp.load(target, drafter=None)
    expected = plain.generate(TOKENS[:6].tolist(), max_tokens=24, ignore_end=True).tokens
    engine = mlx_mtp.load(target, drafter=drafter, depth=2)
    found = engine.generate(TOKENS[:6].tolist(), max_tokens=24, ignore_end=True)
    assert found.stats.drafted > 0
    same_or_tie(plain, TOKENS[:6].tolist(), expected, found.tokens)


# Meta


@pytest.mark.parametrize(("params", "kind"), [({}, "FloatStorage"), ({"rope_theta": 500.0}, "DoubleStorage"),
                                              ({"n_kv_heads": None}, "FloatStorage")])  # fmt: skip
def test_metas_heads_give_the_releases_logits(tmp_path: Path, params: dict[str, Any], kind: str) -> None:
    arrays = meta_arrays({**META_PARAMS, **params})
    target, heads = converted(meta_folder(tmp_path / "in", arrays, kind, **params), tmp_path / "out")
    expected = meta_logits(arrays, {**META_PARAMS, **params}, TOKENS)
    found = np.array(load_target(Checkpoint.open(target)).logits(mx.array(TOKENS[None])))[0]
    assert np.abs(found - expected[0]).max() < TOLERANCE
    rounds = 0
    for at, logits in draft_logits(target, heads, 2):
        assert np.abs(np.stack(logits) - expected[1:, at - 1]).max() < TOLERANCE
        rounds += 1
    assert rounds > 3
    assert np.abs(expected[0] - expected[1]).max() > 0.5  # heads that differ, or the order would not matter
    decodes_alike(target, heads)


def test_weights_in_several_files_are_refused(tmp_path: Path) -> None:
    source = meta_folder(tmp_path / "in", meta_arrays())
    write_pth(source / "consolidated.01.pth", meta_arrays())
    with pytest.raises(mlx_mtp.UnsupportedModel, match="cut into 2 files"):
        converted(source, tmp_path / "out")


def test_a_baseline_without_extra_heads_is_a_target_alone(tmp_path: Path) -> None:
    params = {**META_PARAMS, "n_layers": 3, "n_future_tokens": 1}
    written = converted(meta_folder(tmp_path / "in", meta_arrays(params), **params), tmp_path / "out")
    assert [folder.name for folder in written] == ["target"]


def sentencepiece_model(file: Path) -> Any:
    import sentencepiece

    texts = ["def hello world print return self name value"] * 50 + ["the quick brown fox jumps over 12345"] * 50
    with file.open("wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=stream, model_type="bpe", vocab_size=META_VOCABULARY,
            byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True, split_digits=True, minloglevel=2,
        )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_file=str(file))


@pytest.mark.parametrize("above", [False, True])
def test_the_tokenizer_gives_sentencepieces_ids(tmp_path: Path, above: bool) -> None:
    source = meta_folder(tmp_path / "in", meta_arrays())
    pieces = sentencepiece_model((tmp_path if above else source) / "tokenizer.model")
    target, heads = converted(source, tmp_path / "out")
    engine = mlx_mtp.load(target, drafter=heads, depth=2)
    assert engine.tokenizer is not None and engine.stop_tokens == {pieces.eos_id()}
    code = "def hello(world):\n    return 1\n"
    for text in (code, "    print the fox", "\n\nvalue  name", "caf\u00e9 \u6f22 \U0001f600", " "):
        ids = engine.tokenizer.encode(text)
        assert ids == [pieces.bos_id(), *pieces.encode(text)]
        stream = engine.tokenizer.stream()
        shown = []
        for token in ids[1:]:
            stream.add_token(token)
            shown.append(stream.last_segment)
        stream.finalize()
        assert "".join([*shown, stream.last_segment]).strip() == text.strip()


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    source = meta_folder(tmp_path / "in", meta_arrays(vocabulary=META_VOCABULARY - 1))
    sentencepiece_model(source / "tokenizer.model")
    with pytest.raises(mlx_mtp.CheckpointError, match="350 pieces for a vocabulary of 349"):
        converted(source, tmp_path / "out")
    (source / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(mlx_mtp.CheckpointError, match="tokenizer.model"):
        converted(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"n_future_tokens": 4}, "3 are extra heads"),
        ({"dim": 40}, "shape"),
        ({"dim": "wide"}, "'dim'"),
        ({"n_heads": 3}, "divide"),
        ({"n_kv_heads": 4}, "k_proj"),
        ({"use_scaled_rope": True}, "Llama 3"),
    ],
)
def test_params_that_do_not_belong_are_refused(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(mlx_mtp.MLXMTPError, match=says):
        converted(meta_folder(tmp_path / "in", meta_arrays(), **change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("lost", ["extra_heads.0.ffn_norm.", "tok_embeddings.", "output.", "layers.1."])
def test_a_missing_tensor_is_named(lost: str, tmp_path: Path) -> None:
    arrays = {name: array for name, array in meta_arrays().items() if not name.startswith(lost)}
    with pytest.raises(mlx_mtp.CheckpointError, match="lacks|counts"):
        converted(meta_folder(tmp_path / "in", arrays), tmp_path / "out")


# Modules in a checkpoint


def module_agrees(target: Path, drafter: Path, logits_of: Any, normed: bool = True) -> None:
    """The first draft's logits are the module's, as `logits_of(states, embedded)` computes them.

    normed: from the target's states behind its final norm, else from those in front of it.
    """
    loaded = load_target(Checkpoint.open(target))
    trunk = loaded.model.model  # type: ignore[attr-defined]
    hidden = trunk.embed_tokens(mx.array(TOKENS[None]))
    for layer in trunk.layers:
        hidden = layer(hidden, mx.tri(len(TOKENS), dtype=mx.bool_))
    hidden = trunk.norm(hidden) if normed else hidden
    table = float64({"table": loaded.embed(mx.array(TOKENS[None]))})["table"][0]
    expected = logits_of(np.array(hidden)[0, :-1].astype(np.float64), table[1:])
    rounds = 0
    for at, (logits,) in draft_logits(target, drafter, 1):
        assert np.abs(logits - expected[at - 1]).max() < TOLERANCE
        rounds += 1
    assert rounds > 3


def deepseek_reference(arrays: Arrays, prefix: str = "model.layers.2.") -> Any:
    own = {name: array.astype(np.float64) for name, array in below(arrays, prefix).items()}
    return lambda states, embedded: deepseek_module(own, DEEPSEEK, states, embedded)


@pytest.mark.parametrize("with_target", [False, True])
def test_deepseeks_module_gives_its_own_logits(with_target: bool, tmp_path: Path) -> None:
    arrays = deepseek_arrays()
    source = write_folder(tmp_path / "in", DEEPSEEK, arrays)
    (source / "tokenizer_config.json").write_text("{}")
    written = converted(source, tmp_path / "out", with_target=with_target)
    assert [folder.name for folder in written] == ["target", "sequential"][not with_target :]
    target = written[0] if with_target else source
    assert (target / "tokenizer_config.json").exists()
    if with_target:
        assert Checkpoint.open(target).weights().keys() == {n for n in arrays if not n.startswith("model.layers.2.")}
    module_agrees(target, written[-1], deepseek_reference(arrays))
    if not with_target:
        decodes_alike(source, written[-1])


def test_two_modules_stay_in_order(tmp_path: Path) -> None:
    config = {**DEEPSEEK, "num_nextn_predict_layers": 2}
    arrays = deepseek_arrays(config)
    (out,) = converted(write_folder(tmp_path / "in", config, arrays), tmp_path / "out")
    found = Checkpoint.open(out).weights()
    for k in (0, 1):
        assert np.array_equal(np.array(found[f"blocks.{k}.hnorm.weight"]), arrays[f"model.layers.{2 + k}.hnorm.weight"])


def test_fp8_blocks_are_unpacked(tmp_path: Path) -> None:
    arrays = deepseek_arrays()
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    packed = np.random.default_rng(1).integers(0, 0x78, arrays[name].shape).astype(np.uint8)
    scale = np.array([[0.25]], np.float32)
    (out,) = converted(
        write_folder(tmp_path / "in", DEEPSEEK, {**arrays, name: packed, f"{name}_scale_inv": scale}), tmp_path / "out"
    )
    found = Checkpoint.open(out).weights()["blocks.0.layer.mlp.switch_mlp.up_proj.weight"]
    assert np.allclose(np.array(found.astype(mx.float32))[3], from_fp8(packed) * 0.25, rtol=1e-2)


def test_other_models_of_deepseeks_layout(tmp_path: Path) -> None:
    arrays = glm_arrays()
    source = write_folder(tmp_path / "in", GLM, arrays)
    (drafter,) = converted(source, tmp_path / "out")
    stacked = Checkpoint.open(drafter).weights()["blocks.0.layer.mlp.switch_mlp.down_proj.weight"]
    assert np.array_equal(np.array(stacked[2]), arrays["model.layers.2.mlp.experts.2.down_proj.weight"])
    decodes_alike(source, drafter)


def test_mimos_module_gives_its_own_logits(tmp_path: Path) -> None:
    arrays = mimo_arrays()
    source = write_folder(tmp_path / "in", MIMO, arrays)
    (drafter,) = converted(source, tmp_path / "out")
    own = {name: array.astype(np.float64) for name, array in below(arrays, "model.mtp_layers.0.").items()}
    head = arrays["lm_head.weight"].astype(np.float64)
    module_agrees(source, drafter, lambda states, embedded: mimo_module(own, MIMO, states, embedded, head), False)
    decodes_alike(source, drafter)


@pytest.mark.parametrize(
    ("lost", "changed", "says"),
    [
        ("model.layers.2.hnorm.weight", {}, "'hnorm.weight' in module 0"),
        ("model.layers.2.mlp.experts.3.up_proj.weight", {}, "cannot be brought"),
        ("model.layers.2.self_attn.o_proj.weight", {}, "lacks 1 tensors: self_attn.o_proj.weight"),
        ("", {"num_nextn_predict_layers": 2}, "is 2, but there are the modules"),
        ("", {"num_nextn_predict_layers": 99}, "in/config.json: .*num_nextn_predict_layers"),
        ("", {"vocab_size": "many"}, "in/config.json: .*vocab_size"),
        ("", {"hidden_size": 64}, "shape"),
        ("", {"model_type": "nonsense"}, "nonsense"),
    ],
)
def test_modules_that_are_not_whole_are_refused(
    lost: str, changed: dict[str, Any], says: str, tmp_path: Path
) -> None:
    arrays = {name: array for name, array in deepseek_arrays().items() if name != lost}
    with pytest.raises(mlx_mtp.MLXMTPError, match=says) as caught:
        converted(write_folder(tmp_path / "in", {**DEEPSEEK, **changed}, arrays), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_embedding_of_its_own_is_refused(tmp_path: Path) -> None:
    arrays = deepseek_arrays()
    key = "model.layers.2.shared_head.head.weight"
    with pytest.raises(mlx_mtp.UnsupportedModel, match="copy"):
        converted(write_folder(tmp_path / "in", DEEPSEEK, {**arrays, key: arrays[key] + 1}), tmp_path / "out")


# Quantising


def within_a_step(whole: mx.array, packed: dict[str, mx.array], path: str, bits: int, group: int) -> bool:
    scales, biases = packed[f"{path}.scales"], packed[f"{path}.biases"]
    found = mx.dequantize(packed[f"{path}.weight"], scales, biases, group, bits)
    step = mx.repeat(mx.abs(scales), group, axis=-1)
    return bool(mx.all(mx.abs(found - whole) <= step * 1.001).item())


def test_a_target_and_its_heads_are_quantised(tmp_path: Path) -> None:
    bits = 4
    source = meta_folder(tmp_path / "in", meta_arrays())
    sentencepiece_model(source / "tokenizer.model")
    whole = converted(source, tmp_path / "whole")
    small = converted(source, tmp_path / "small", bits=bits, group_size=32)
    for path, one, other in (("model.layers.1.mlp.up_proj", whole[0], small[0]),
                             ("heads.1.layer.self_attn.q_proj", whole[1], small[1])):  # fmt: skip
        packed, weights = Checkpoint.open(other).weights(), Checkpoint.open(one).weights()
        assert within_a_step(weights[f"{path}.weight"], packed, path, bits, 32)
    assert json.loads((small[1] / "config.json").read_text())["quantization"]["bits"] == bits
    engine = mlx_mtp.load(small[0], drafter=small[1], depth=2)
    assert engine.tokenizer is not None
    assert engine.generate(TOKENS[:6].tolist(), max_tokens=8, ignore_end=True).stats.drafted > 0
    with pytest.raises(mlx_mtp.CheckpointError, match="full precision"):
        converted(small[0], tmp_path / "twice", bits=4, group_size=32)


def test_the_embedded_pair_is_quantised(tmp_path: Path) -> None:
    (target,) = converted(EMBEDDED / "target", tmp_path / "target", bits=8)
    (drafter,) = converted(EMBEDDED / "assistant", tmp_path / "drafter", bits=8)
    size = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    assert size < 0.6 * sum(file.stat().st_size for file in (EMBEDDED / "target").glob("*.safetensors"))
    engine, whole = mlx_mtp.load(target, drafter=drafter, depth=2), load_target(Checkpoint.open(EMBEDDED / "target"))
    assert engine.tokenizer is not None and engine.tokenizer.has_chat_template
    tokens = mx.array([engine.tokenizer.encode("import os\nimport sys\n\ndef main():\n")])
    expected = whole.logits(tokens)
    assert 0 < mx.abs(engine.target.logits(tokens) - expected).max().item() < 0.1 * mx.abs(expected).max().item()
    stats = engine.generate(tokens[0].tolist(), max_tokens=24, ignore_end=True).stats
    assert stats.accepted > 0.3 * stats.drafted  # what it drafts still makes sense


def test_a_quantised_assistant_keeps_its_order(tmp_path: Path) -> None:
    """A centroid head's table is reordered at load; the files must hold it in the order of tokens."""
    source = GOLDEN / "ple" / "assistant_centroid"
    (out,) = converted(source, tmp_path / "out", bits=8, group_size=32)
    weights, packed = Checkpoint.open(source).weights(), Checkpoint.open(out).weights()
    assert "pre_projection.scales" in packed
    table = "model.embed_tokens.weight"  # too narrow for groups here: it stays as it is
    assert mx.array_equal(packed[table], weights[table]).item()
    result = mlx_mtp.load(GOLDEN / "ple" / "target", drafter=out, depth=2).generate([5, 6, 7], max_tokens=12)
    assert result.stats.drafted > 0


def test_sequential_modules_are_quantised(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in", DEEPSEEK, deepseek_arrays())
    target, drafter = converted(source, tmp_path / "out", bits=8, group_size=32, with_target=True)
    names = Checkpoint.open(drafter).weights()
    assert "blocks.0.eh_proj.scales" in names and "blocks.0.layer.mlp.gate.scales" not in names
    result = mlx_mtp.load(target, drafter=drafter, depth=2).generate(TOKENS[:6].tolist(), max_tokens=8, ignore_end=True)
    assert result.stats.drafted > 0


def test_a_group_that_fits_nowhere_is_refused(tmp_path: Path) -> None:
    source = written(tmp_path / "in", config_of("parallel_heads", 32, 128, 1))
    with pytest.raises(mlx_mtp.OptionError, match="groups of 128"):
        converted(source, tmp_path / "out", bits=4, group_size=128)
    assert not (tmp_path / "out").exists()


# Folders


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    source, out = meta_folder(tmp_path / "in", meta_arrays()), tmp_path / "out"
    converted(source, out)
    before = (out / "target" / "model.safetensors").stat().st_ino
    with pytest.raises(mlx_mtp.OptionError, match="--force"):
        converted(source, out)
    assert (out / "target" / "model.safetensors").stat().st_ino == before
    converted(source, out, force=True)
    assert (out / "target" / "model.safetensors").stat().st_ino != before
    other = tmp_path / "photographs"
    for folder in (other, out, out / "target" / "more"):
        folder.mkdir(exist_ok=True)
        (folder / "one.jpg").write_bytes(b"dear")
        with pytest.raises(mlx_mtp.OptionError, match="more than a checkpoint"):
            converted(source, other if folder == other else out, force=True)
        assert (folder / "one.jpg").read_bytes() == b"dear"
        (out / "one.jpg").unlink(missing_ok=True)
    for inside in (source, tmp_path):
        with pytest.raises(mlx_mtp.OptionError, match="holds the source"):
            converted(source, inside, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "photographs"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, MemoryError])
def test_an_interrupted_conversion_leaves_nothing_and_what_was_there(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = meta_folder(tmp_path / "in", meta_arrays()), tmp_path / "out"
    converted(source, out)
    seen = []

    def fails(*_: object) -> Any:
        seen.extend(path.name for path in tmp_path.iterdir())
        raise error

    monkeypatch.setattr(meta, "halves", fails)
    with pytest.raises((error, mlx_mtp.OptionError)):
        converted(source, out, force=True)
    assert any(name.startswith(".out.partial") for name in seen)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    load_drafter(Checkpoint.open(out / "parallel"))


# The command


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["mlx-mtp", "convert", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        app.main()
    return int(ended.value.code or 0)


def test_the_command_converts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = meta_folder(tmp_path / "in", meta_arrays())
    assert command(monkeypatch, source / "consolidated.pth", "--out", tmp_path / "out") == 0
    shown = capsys.readouterr()
    assert str(tmp_path / "out" / "parallel") in shown.err and not shown.out
    assert command(monkeypatch, tmp_path / "out/target", "--out", tmp_path / "q", "--bits", 4, "--group-size", 32) == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere", "--out", "out"], "nowhere"),
        (["target", "--out", "out"], "--bits"),
        (["target", "--out", "out", "--bits", "5"], "must be 4 or 8"),
        (["target", "--out", "out", "--bits", "4", "--group-size", "7"], "--group-size"),
        (["target", "--out", "out", "--what", "split"], "no MTP modules"),
        (["target", "--out", "out", "--what", "melt"], "--what"),
        (["target", "--out", "out", "--bits", "8", "--group-size", "32", "--with-target"], "--with-target"),
        (["target", "--out", "pth/other.pth/out", "--bits", "8", "--group-size", "32"], "cannot be written"),
        (["pth", "--out", "out"], "params.json"),
    ],
)
def test_misuse_is_one_sentence(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "target").symlink_to(GOLDEN / "ple" / "target")
    (tmp_path / "pth").mkdir()
    (tmp_path / "pth" / "other.pth").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, *arguments) == 2
    shown = capsys.readouterr()
    assert says in shown.err and shown.err.count("\n") == 1 and not shown.out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("value", "bits"), [(mx.nan, None), (mx.inf, 4)])
def test_weights_that_are_not_finite_are_never_written(value: float, bits: int | None, tmp_path: Path) -> None:
    """A module's, which is split off, and a drafter's, which is quantised: one spoiled number in either."""
    arrays = deepseek_arrays()
    spoiled = next(name for name in sorted(arrays) if name.endswith("eh_proj.weight"))
    arrays[spoiled] = arrays[spoiled].copy()
    arrays[spoiled].flat[5] = value
    source = write_folder(tmp_path / "in", DEEPSEEK, arrays)
    config = config_of("parallel_heads", 64, 96, 1)
    drafter = written(tmp_path / "drafter", config)
    weights = mx.load(str(drafter / "model.safetensors"))
    name = next(name for name in sorted(weights) if name.endswith("norm.weight"))
    weights[name] = mx.where(mx.arange(weights[name].size) == 3, value, weights[name])
    written(drafter, config, weights)
    for folder, how in ((source, {"what": "split", "bits": bits}), (drafter, {"bits": 4, "group_size": 32})):
        with pytest.raises(mlx_mtp.CheckpointError, match="expected finite numbers as weights"):
            converted(folder, tmp_path / "out", **how)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["drafter", "in"]
