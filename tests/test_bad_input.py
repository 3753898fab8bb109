"""Every bad input to a command ends in one sentence on stderr and exit code 2; and what good input prints."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from conftest import GOLDEN, Command, one_sentence

TARGET, TIED, CENTROID = (GOLDEN / "ple" / part for part in ("target", "assistant_tied", "assistant_centroid"))
KEQV = GOLDEN / "keqv"
STATS = {
    "prompt_tokens", "prefilled_tokens", "tokens", "rounds", "drafted", "accepted", "drafted_by_position",
    "verified_by_position", "accepted_by_position", "tokens_per_round", "depth_counts", "prefill_seconds",
    "decode_seconds", "decode_tokens_per_second", "host_syncs", "head_passes", "peak_memory_bytes", "mode",
}  # fmt: skip
MISSING = object()

Refused = Callable[..., str]


@pytest.fixture
def run(command: Command) -> Command:
    return lambda *args: command("generate", *args)


@pytest.fixture
def refused(run: Command) -> Refused:
    """Runs, expects a refusal, returns the sentence."""

    def call(*args: object) -> str:
        return one_sentence(*run(*args))

    return call


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Path], Path]:
    """A writable copy of a checkpoint folder."""

    def make(source: Path) -> Path:
        target = tmp_path / f"{source.parent.name}-{source.name}"
        shutil.copytree(source, target, copy_function=shutil.copyfile)
        target.chmod(0o755)
        return target

    return make


def edit(folder: Path, key: str, value: Any) -> None:
    """Sets or removes a field of config.json; 'text.x' is inside text_config."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    fields = config["text_config"] if key.startswith("text.") else config
    name = key.removeprefix("text.")
    if value is MISSING:
        fields.pop(name)
    else:
        fields[name] = value
    file.write_text(json.dumps(config))


# Places


def test_paths_that_are_no_checkpoint(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    names = (tmp_path / "nowhere", "nowhere", "./no/such/deep/folder", "~nobody-here/model", "x" * 300, "a\nb")
    for name in names:
        assert "found nothing" in refused("--model", name, "--tokens", "1")
    assert "found a file" in refused("--model", "file", "--tokens", "1")
    assert "config.json" in refused("--model", "empty", "--tokens", "1")


def test_hub_names_without_network_fail_at_once(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("waited for the network"))
    assert "no/such" in refused("--model", "no/such", "--tokens", "1")
    assert "no/such" in refused("--model", TARGET, "--drafter", "no/such", "--tokens", "1")


def test_drafter_paths(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    names = ("nowhere", "parallel", "sequential", "lookup+nowhere")
    for drafter in (tmp_path / "nowhere", tmp_path / "file", tmp_path, *names):
        refused("--model", TARGET, "--drafter", drafter, "--tokens", "1")
    assert "drafter" in refused("--model", TARGET, "--drafter", TARGET, "--tokens", "1")
    assert "target" in refused("--model", TIED, "--tokens", "1")


# config.json


@pytest.mark.parametrize(
    "text", ["", "{", "no", "[]", "7", "null", '"x"', "[" * 100_000, "{}", '{"model_type": 3}', '{"model_type": ""}',
             '{"model_type": "no\\nsuch"}', '{"model_type": "llama"}', '{"model_type": "gemma4"}',
             '{"model_type": "gemma4", "text_config": []}', '{"model_type": "gemma4", "text_config": [1]}',
             '{"model_type": "gemma4", "text_config": "x"}']
)  # fmt: skip
def test_config_that_is_none(refused: Refused, copy: Callable[[Path], Path], text: str) -> None:
    for source, args in ((TARGET, ["--model"]), (TIED, ["--model", TARGET, "--drafter"])):
        folder = copy(source)
        (folder / "config.json").write_text(text)
        refused(*args, folder, "--tokens", "1")


def test_config_in_another_encoding(refused: Refused, copy: Callable[[Path], Path]) -> None:
    folder = copy(TARGET)
    (folder / "config.json").write_bytes(b"\xff\xfe{\x00")
    assert "config.json" in refused("--model", folder, "--tokens", "1")


SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
NONSENSE = ("many", -1, 0, 1.5, True, [4], {"a": 1}, 10**12, 10**400)


@pytest.mark.parametrize("field", SIZES)
def test_required_sizes(refused: Refused, copy: Callable[[Path], Path], field: str) -> None:
    for source, args in ((TARGET, ["--model"]), (TIED, ["--model", TARGET, "--drafter"])):
        folder = copy(source)
        for value in (*NONSENSE, None, MISSING):
            edit(folder, f"text.{field}", value)
            assert f"'{field}'" in refused(*args, folder, "--tokens", "1")


@pytest.mark.parametrize("field", ["head_dim", "num_key_value_heads", "sliding_window", "max_position_embeddings"])
def test_sizes_with_a_default(refused: Refused, copy: Callable[[Path], Path], field: str) -> None:
    folder = copy(TARGET)
    for value in NONSENSE:
        edit(folder, f"text.{field}", value)
        assert f"'{field}'" in refused("--model", folder, "--tokens", "1")


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("num_kv_shared_layers", [6, 7, 5, -1, "3", 2.5, [], {}]),
        ("hidden_size_per_layer_input", [-8, "8", [8], 10**9]),
        ("vocab_size_per_layer_input", [-8, "8", [8], 10**9]),
        ("rms_norm_eps", ["x", -1, [], float("nan"), float("inf")]),
        ("final_logit_softcapping", ["x", -1, [1], float("nan")]),
        ("layer_types", ["full_attention", 6, ["full_attention"] * 5, ["full_attention"] * 7, ["x"] * 6, [[]] * 6,
                         [1] * 6, {"a": 1}, ["sliding_attention"] * 6]),
        ("rope_parameters", [7, "x", [1], {"full_attention": 1}, {"sliding_attention": []},
                             {"full_attention": {"rope_theta": "x"}}, {"full_attention": {"rope_type": "default"}},
                             {"full_attention": {"rope_type": "yarn", "rope_theta": 1.0}},
                             {"full_attention": {"rope_type": [], "rope_theta": 1.0}},
                             {"full_attention": {"rope_theta": -1}}, {"full_attention": {"rope_theta": float("nan")}},
                             {"full_attention": {"rope_theta": 1e4, "partial_rotary_factor": "x"}},
                             {"full_attention": {"rope_theta": 1e4, "partial_rotary_factor": 2}},
                             {"full_attention": {"rope_theta": 1e4, "factor": 0}}]),
        ("per_layer_config", [7, "x", [1], {"2": 7}, {"2": {"head_dim": "x"}}, {"2": {"head_dim": 7}},
                              {"2": {"num_key_value_heads": 3}}, {"2": {"num_key_value_heads": 8}}]),
        ("num_attention_heads", [3, 5]),
        ("num_key_value_heads", [3, 8]),
        ("head_dim", [7]),
        ("hidden_activation", ["relu", 7, [], {}]),
        ("attention_bias", [True]),
        ("tie_word_embeddings", [False]),
        ("enable_moe_block", [True]),
    ],
)  # fmt: skip
def test_fields_of_a_target(refused: Refused, copy: Callable[[Path], Path], field: str, values: list[Any]) -> None:
    folder = copy(TARGET)
    for value in values:
        edit(folder, f"text.{field}", value)
        refused("--model", folder, "--tokens", "1")


@pytest.mark.parametrize("values", [{"num_experts": "x"}, {"num_experts": 4, "top_k_experts": 5},
                                    {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": None}])  # fmt: skip
def test_mixture_fields(refused: Refused, copy: Callable[[Path], Path], values: dict[str, Any]) -> None:
    folder = copy(TARGET)
    for key, value in ({"enable_moe_block": True} | values).items():
        edit(folder, f"text.{key}", value)
    refused("--model", folder, "--tokens", "1")


@pytest.mark.parametrize("field", ["backbone_hidden_size", "num_centroids", "centroid_intermediate_top_k"])
def test_fields_of_a_drafter(refused: Refused, copy: Callable[[Path], Path], field: str) -> None:
    folder = copy(CENTROID)
    for value in NONSENSE:
        edit(folder, field, value)
        assert f"'{field}'" in refused("--model", TARGET, "--drafter", folder, "--tokens", "1")


def test_centroids_divide_the_vocabulary(refused: Refused, copy: Callable[[Path], Path]) -> None:
    folder = copy(CENTROID)
    edit(folder, "num_centroids", 15)
    assert "15 centroids" in refused("--model", TARGET, "--drafter", folder, "--tokens", "1")


@pytest.mark.parametrize("text", ["{", "[]", '{"do_sample": true, "top_k": 40.0}',
                                  '{"do_sample": true, "top_k": "x"}', '{"do_sample": true, "temperature": NaN}'])
def test_generation_config(refused: Refused, copy: Callable[[Path], Path], text: str) -> None:
    folder = copy(TARGET)
    (folder / "generation_config.json").write_text(text)
    assert "generation_config.json" in refused("--model", folder, "--tokens", "1")


# Weights


def test_weights_that_are_no_file(refused: Refused, copy: Callable[[Path], Path]) -> None:
    folder = copy(TARGET)
    (folder / "model.safetensors").unlink()
    assert "model*.safetensors" in refused("--model", folder, "--tokens", "1")
    (folder / "model.safetensors").mkdir()
    assert "model.safetensors" in refused("--model", folder, "--tokens", "1")


def test_centroid_ordering_is_checked(refused: Refused, copy: Callable[[Path], Path]) -> None:
    folder = copy(CENTROID)
    whole = dict(mx.load(str(CENTROID / "model.safetensors")))  # type: ignore[arg-type]
    name = "masked_embedding.token_ordering"
    vocabulary = whole[name].shape[0]
    for ordering in (mx.zeros((3,), dtype=mx.int32), mx.full((vocabulary,), vocabulary, dtype=mx.int32), None):
        weights = {key: value for key, value in whole.items() if key != name}
        mx.save_safetensors(
            str(folder / "model.safetensors"), weights if ordering is None else weights | {name: ordering}
        )
        assert name in refused("--model", TARGET, "--drafter", folder, "--tokens", "1")


# A drafter that does not fit


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("text.vocab_size", 64, "vocabulary 64"),
        ("text.sliding_window", 16, "sliding window 16"),
        ("hidden_size", 64, "hidden size"),
        ("text.head_dim", 16, "head size of sliding_attention"),
        ("text.per_layer_config", {"2": {"head_dim": 32}, "5": {"head_dim": 32}}, "head size of full_attention"),
        ("text.num_key_value_heads", 2, "K/V heads"),
        ("text.layer_types", ["full_attention"] * 6, "sliding_attention layer"),
    ],
)
def test_drafter_that_does_not_fit(
    refused: Refused, copy: Callable[[Path], Path], key: str, value: Any, what: str
) -> None:
    """The target's config is changed and weights are made to match it, the drafter stays as it is."""
    from mlx.utils import tree_flatten

    from mlx_mtp.targets.gemma4 import Gemma4Model
    from mlx_mtp.targets.gemma4_config import Gemma4Config

    folder = copy(TARGET)
    edit(folder, key if key.startswith("text.") else f"text.{key}", value)
    model = Gemma4Model(Gemma4Config.from_dict(json.loads((folder / "config.json").read_text())))
    weights = {f"model.language_model.{name}": array for name, array in tree_flatten(model.parameters())}
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    sentence = refused("--model", folder, "--drafter", TIED, "--tokens", "1")
    assert what in sentence and "drafter" in sentence


def test_drafter_of_another_model(refused: Refused) -> None:
    for target, drafter in ((TARGET, KEQV / "assistant_tied"), (KEQV / "target", TIED)):
        assert "does not fit" in refused("--model", target, "--drafter", drafter, "--tokens", "1")


# Prompts and options


@pytest.mark.parametrize("tokens", ["", " ", ",", "1,", "x", "1;2", "1.5", "1,2,x", "-1", "128", "1,2,999999999999999"])
def test_token_ids(refused: Refused, tokens: str) -> None:
    refused("--model", TARGET, "--tokens", tokens)


def test_prompts(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "neither" in refused("--model", TARGET)
    assert "both" in refused("text", "--model", TARGET, "--tokens", "1")
    assert "empty" in refused("", "--model", TARGET)
    assert "--tokens" in refused("text", "--model", TARGET)
    bom = "\ufeff".encode()  # nothing but the mark is nothing
    for piped, word in ((b"", "empty"), (bom, "empty"), (b"caf\xe9", "UTF-8"), ("Text".encode("utf-16"), "UTF-8")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(piped), encoding="utf-8"))
        assert word in refused("-", "--model", TARGET)
    assert "UTF-8" in refused("caf\udce9", "--model", TARGET)


def test_prompt_longer_than_the_context(refused: Refused, run: Command) -> None:
    assert "8 tokens, found 9" in refused("--model", TARGET, "--tokens", "1" + ",1" * 8, "--max-context", 8)
    assert "found 8" in refused("--model", TARGET, "--tokens", "1" + ",1" * 7, "--max-context", 8)
    assert "256" in refused("--model", TARGET, "--tokens", "1" + ",1" * 300)
    code, out, _ = run("--model", TARGET, "--tokens", "1,2,3,4,5,6,7", "--max-context", 8, "--json")
    assert code == 0 and len(json.loads(out)["tokens"]) == 1


@pytest.mark.parametrize(
    "options",
    [["--depth", "9"], ["--depth", "-1"], ["--depth", "x"], ["--depth", ""], ["--depth", "1.5"], ["--max-tokens", "0"],
     ["--max-tokens", "-3"], ["--temperature", "-1"], ["--temperature", "nan"], ["--top-p", "0"], ["--top-k", "-1"],
     ["--min-p", "1.5"], ["--repetition-penalty", "0"], ["--presence-penalty", "inf"], ["--seed", "-1"],
     ["--logprobs", "65"], ["--mode", "quick"], ["--draft-head-bits", "5"], ["--draft-head-bits", "x"],
     ["--max-context", "0"], ["--max-context", "1"], ["--max-context", "-5"], ["--max-context", "257"]],
)  # fmt: skip
def test_options_out_of_range(refused: Refused, options: list[str]) -> None:
    found = refused("--model", TARGET, "--drafter", TIED, "--tokens", "1,2", *options)
    assert options[0].removeprefix("--").replace("-", "_") in found.replace("-", "_") and options[1] in found


@pytest.mark.parametrize("args", [["--nope"], ["--max-tokens", "x"], ["--temperature", "x"], ["--depth"], ["a", "b"]])
def test_a_command_line_that_makes_no_sense(refused: Refused, args: list[str]) -> None:
    refused(*args)


def test_broken_tokenizer(refused: Refused, copy: Callable[[Path], Path]) -> None:
    folder = copy(TARGET)
    for text in ("", "{", "[]", '{"model": 7}'):
        (folder / "tokenizer.json").write_text(text)
        assert "tokenizer" in refused("text", "--model", folder)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        *((f"chat {options}", "") for options in (
            "--thinking maybe", "--load nowhere", "--max-tokens 0", "--seed -1", "--model nowhere", "--depth 99",
            f"--model {TARGET}", "--temperature -1", "extra")),
        ("doctor --model /no/such/folder", "/no/such/folder"), ("doctor --mode quick --json", "exact"),
        ("doctor --forget --drafter lookup", "--forget drops all"),
        ("bench --category poetry", "'code', 'edit'"), ("bench --depth 2 --depths 2,4", "leave one out"),
        ("bench --depths 9", "0 to 8, not 9"), ("bench --arms stock,oracle", "'oracle'"),
        ("bench --arms ,", "no configuration"), ("bench --arms plain,mlx-vlm@auto", "mlx-vlm@auto"),
        ("bench --json same.txt --markdown ./same.txt", "named twice"), ("bench --plot -", "name a file"),
        ("bench --json /no/such/folder/a.json", "/no/such/folder/a.json"),
        ("bench --max-tokens 1", "max_tokens must be 8"), ("bench --per-category 0", "--per-category"),
        ("bench --max-context 300 --category 'long context'", "at most 172 tokens"),
    ],
)  # fmt: skip
def test_other_commands(command: Command, monkeypatch: pytest.MonkeyPatch, line: str, words: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hello\n")))
    code, out, err = command(*shlex.split(line))
    assert words in one_sentence(code, out, err.splitlines(keepends=True)[-1] if "bench" in line else err)


# The same through a real process


def process(*args: object) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "mlx_mtp.cli.app", "generate", *map(str, args)],
        capture_output=True, text=True, timeout=300, env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_a_process_says_one_sentence() -> None:
    """A warning is pending (no drafter is known), which a refusal must not let through."""
    one_sentence(*process("--model", TARGET, "--tokens", "128"))


def test_warnings_still_come_with_good_input() -> None:
    code, out, err = process("--model", TARGET, "--tokens", "1,2", "--max-tokens", 2)
    assert code == 0 and len(out.split()) == 2 and "No drafter is known" in err


# Good input


@pytest.mark.parametrize("drafter", ["none", TIED, CENTROID])
def test_json_is_one_object(run: Command, drafter: object) -> None:
    args = ("--model", TARGET, "--drafter", drafter, "--depth", 0 if drafter == "none" else 2, "--tokens", "1, 2,3")
    code, out, err = run(*args, "--max-tokens", 7, "--json")
    assert code == 0 and err == "" and out.count("\n") == 1
    found = json.loads(out)
    assert set(found) == {"text", "tokens", "logprobs", "finish_reason", "stats"}
    assert set(found["stats"]) == STATS
    assert found["text"] == "" and found["logprobs"] is None and found["finish_reason"] in ("stop", "length")
    assert found["stats"]["tokens"] == len(found["tokens"]) <= 7 and found["stats"]["prompt_tokens"] == 3
    assert (found["stats"]["drafted"] > 0) == (drafter != "none")


def test_tokens_print_as_ids_without_a_tokenizer(run: Command) -> None:
    args = ("--model", TARGET, "--drafter", TIED, "--tokens", "5,6,7", "--max-tokens", 5)
    _, as_json, _ = run(*args, "--json")
    for extra in ((), ("--raw",)):
        code, out, err = run(*args, *extra)
        assert code == 0 and err == "" and [int(word) for word in out.split()] == json.loads(as_json)["tokens"]


def test_thinking_where_nothing_can_ask_for_it(refused: Refused) -> None:
    assert "thinking only with" in refused("hi", "--thinking", "--max-tokens", 1)


def test_raw_takes_the_prompt_as_it_stands(run: Command) -> None:
    lengths = []
    for extra in (("--raw",), ()):
        code, out, err = run("import os", "--max-tokens", 2, "--json", *extra)
        assert code == 0 and err == ""
        lengths.append(json.loads(out)["stats"]["prompt_tokens"])
    assert lengths[0] < lengths[1]
