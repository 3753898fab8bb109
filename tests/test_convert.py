"""Conversions against the originals' own mathematics in NumPy, and what a conversion must never do.

The logits of target and heads are compared with forward passes under the original names, orders and rotary convention.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import GOLDEN, Command, one_sentence, ran
from families import config_of, drafted, written
from greedy import same_or_tie
from layouts import (
    DEEPSEEK,
    META_PARAMS,
    META_VOCABULARY,
    MIMO,
    Arrays,
    deepseek_arrays,
    from_fp8,
    meta_arrays,
    meta_folder,
    meta_logits,
    mimo_arrays,
    write_folder,
    write_pth,
)
from mlx_lm.utils import load_model
from references import DecoderLayer, below, float64, rms

import mlx_mtp
from mlx_mtp.checkpoints.checkpoint import Checkpoint
from mlx_mtp.converting import convert as converted
from mlx_mtp.converting import meta
from mlx_mtp.drafters import load_drafter
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


# Modules in a checkpoint


def module_agrees(target: Path, drafter: Path, logits_of: Any, normed: bool = True) -> None:
    """The first draft's logits are the module's, as `logits_of(states, embedded)` computes them.

    normed: from the target's states after its final norm, else from those in front of it.
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


def joined(w: Arrays, names: tuple[str, str, str], first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The norms of both, side by side, through a matrix: [T, D] and [T, D] -> [T, D]."""
    parts = [rms(rows, w[f"{name}.weight"], 1e-5) for name, rows in zip(names, (first, second), strict=False)]
    return np.concatenate(parts, axis=1) @ w[f"{names[2]}.weight"].T


def deepseek_reference(arrays: Arrays, folder: Path) -> Any:
    """The equations around a third layer, as mlx-lm reads one from the same numbers."""
    own = {name: array.astype(np.float64) for name, array in below(arrays, "model.layers.2.").items()}
    others = [f"model.layers.2.{name}" for name in ("enorm", "hnorm", "eh_proj", "shared_head", "embed_tokens")]
    whole = {name: array for name, array in arrays.items() if not name.startswith(tuple(others))}
    config = {**DEEPSEEK, "num_hidden_layers": 3, "num_nextn_predict_layers": 0}
    model, _ = load_model(write_folder(folder, config, whole))

    def logits(states: np.ndarray, embedded: np.ndarray) -> np.ndarray:
        x = mx.array(joined(own, ("enorm", "hnorm", "eh_proj"), embedded, states)[None].astype(np.float32))
        rows = np.array(model.layers[2](x, mx.tri(x.shape[1], dtype=mx.bool_)))[0].astype(np.float64)
        return rms(rows, own["shared_head.norm.weight"], 1e-5) @ own["shared_head.head.weight"].T

    return logits


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
    module_agrees(target, written[-1], deepseek_reference(arrays, tmp_path / "whole"))
    if not with_target:
        decodes_alike(source, written[-1])


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


def test_mimos_module_gives_its_own_logits(tmp_path: Path) -> None:
    arrays = mimo_arrays()
    source = write_folder(tmp_path / "in", MIMO, arrays)
    (drafter,) = converted(source, tmp_path / "out")
    own = {name: array.astype(np.float64) for name, array in below(arrays, "model.mtp_layers.0.").items()}
    head = arrays["lm_head.weight"].astype(np.float64)

    def logits(states: np.ndarray, embedded: np.ndarray) -> np.ndarray:
        x = joined(own, ("hidden_layernorm", "token_layernorm", "input_proj"), states, embedded)
        return rms(DecoderLayer(own).over(x), own["final_layernorm.weight"], 1e-5) @ head.T

    module_agrees(source, drafter, logits, normed=False)
    decodes_alike(source, drafter)


def meta_source(folder: Path, lost: str = "none", **params: Any) -> Path:
    return meta_folder(folder, {n: a for n, a in meta_arrays().items() if not n.startswith(lost)}, **params)


def deepseek_source(folder: Path, lost: str = "", copy: float = 0.0, **changed: Any) -> Path:
    arrays = {name: array for name, array in deepseek_arrays().items() if name != lost}
    key = "model.layers.2.shared_head.head.weight"
    arrays[key] = arrays[key] + copy
    return write_folder(folder, {**DEEPSEEK, **changed}, arrays)


@pytest.mark.parametrize(
    ("source", "changed", "says"),
    [
        *((meta_source, changed, says) for changed, says in (
            ({"n_future_tokens": 4}, "3 are extra heads"), ({"dim": 40}, "shape"), ({"dim": "wide"}, "'dim'"),
            ({"n_heads": 3}, "divide"), ({"n_kv_heads": 4}, "k_proj"), ({"use_scaled_rope": True}, "Llama 3"),
            *(({"lost": name}, "lacks|counts")
              for name in ("extra_heads.0.ffn_norm.", "tok_embeddings.", "output.", "layers.1.")))),
        *((deepseek_source, changed, says) for changed, says in (
            ({"lost": "model.layers.2.hnorm.weight"}, "'hnorm.weight' in module 0"),
            ({"lost": "model.layers.2.mlp.experts.3.up_proj.weight"}, "cannot be brought"),
            ({"lost": "model.layers.2.self_attn.o_proj.weight"}, "lacks 1 tensors: self_attn.o_proj.weight"),
            ({"num_nextn_predict_layers": 2}, "is 2, but there are the modules"),
            ({"num_nextn_predict_layers": 99}, "in/config.json: .*num_nextn_predict_layers"),
            ({"vocab_size": "many"}, "in/config.json: .*vocab_size"), ({"hidden_size": 64}, "shape"),
            ({"model_type": "nonsense"}, "nonsense"), ({"copy": 1.0}, "copy"))),
    ],
)  # fmt: skip
def test_what_is_not_whole_is_refused(source: Any, changed: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(mlx_mtp.MLXMTPError, match=says) as caught:
        converted(source(tmp_path / "in", **changed), tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


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


def test_the_command_converts(tmp_path: Path, command: Command) -> None:
    source = meta_folder(tmp_path / "in", meta_arrays())
    code, out, err = command("convert", source / "consolidated.pth", "--out", tmp_path / "out")
    assert (code, out) == (0, "") and str(tmp_path / "out" / "parallel") in err
    assert ran("convert", tmp_path / "out/target", "--out", tmp_path / "q", "--bits", 4, "--group-size", 32) == 0


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
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    (tmp_path / "target").symlink_to(GOLDEN / "ple" / "target")
    (tmp_path / "pth").mkdir()
    (tmp_path / "pth" / "other.pth").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert says in one_sentence(*command("convert", *arguments))
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
