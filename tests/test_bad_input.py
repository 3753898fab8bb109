"""Every bad input to a command ends in one sentence on stderr and exit code 2; and what good input prints."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from conftest import GOLDEN, Command, one_sentence, refusal
from mlx.utils import tree_flatten

import mlx_mtp
from mlx_mtp.targets.gemma4 import Gemma4Model
from mlx_mtp.targets.gemma4_config import Gemma4Config

FOLDERS = {"target": GOLDEN / "ple" / "target", "tied": GOLDEN / "ple" / "assistant_tied",
           "centroid": GOLDEN / "ple" / "assistant_centroid"}  # fmt: skip
TARGET, TIED, CENTROID = FOLDERS.values()
STATS = {
    "prompt_tokens", "prefilled_tokens", "tokens", "rounds", "drafted", "accepted", "drafted_by_position",
    "verified_by_position", "accepted_by_position", "tokens_per_round", "depth_counts", "prefill_seconds",
    "decode_seconds", "decode_tokens_per_second", "host_syncs", "head_passes", "peak_memory_bytes", "mode",
}  # fmt: skip
MISSING = object()
ONE = "--tokens", "1"

Refused = Callable[..., str]
Copy = Callable[[Path], Path]


@pytest.fixture
def run(command: Command) -> Command:
    return partial(command, "generate")


@pytest.fixture
def refused(run: Command) -> Refused:
    """Runs, expects a refusal, returns the sentence."""
    return lambda *args, **options: one_sentence(*run(*args, **options))


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    def make(source: Path) -> Path:
        target = tmp_path / f"{source.parent.name}-{source.name}"
        shutil.copytree(source, target, copy_function=shutil.copyfile)
        target.chmod(0o755)
        return target

    return make


@pytest.fixture
def unloaded(refused: Refused, copy: Copy) -> Callable[[str, Callable[[Path], object]], str]:
    """Refuses a copy of a folder, as the target or as its drafter, once something was done to it."""
    copies: dict[str, Path] = {}

    def call(role: str, change: Callable[[Path], object]) -> str:
        folder = copies[role] = copies.get(role) or copy(FOLDERS[role])
        change(folder)
        return refused(*(("--model",) if role == "target" else ("--model", TARGET, "--drafter")), folder, *ONE)

    return call


def edit(folder: Path, key: str, value: Any) -> None:
    """Sets or removes a field of config.json; 'text.x' is inside text_config."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    fields = config["text_config"] if key.startswith("text.") else config
    fields[key.removeprefix("text.")] = value
    if value is MISSING:
        fields.pop(key.removeprefix("text."))
    file.write_text(json.dumps(config))


# Places


def test_paths_that_are_no_checkpoint(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("waited for the network"))
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    names = (tmp_path / "nowhere", "nowhere", "./no/such/deep/folder", "~nobody-here/model", "x" * 300, "a\nb")
    for name, words in (*((name, "found nothing") for name in names), ("file", "found a file"),
                        ("empty", "config.json"), ("no/such", "no/such"), (TIED, "target")):  # fmt: skip
        assert words in refused("--model", name, *ONE)
    for drafter in (*names[:2], "file", "empty", "parallel", "sequential", "lookup+nowhere"):
        refused("--model", TARGET, "--drafter", drafter, *ONE)
    for drafter, words in (("no/such", "no/such"), (TARGET, "drafter")):
        assert words in refused("--model", TARGET, "--drafter", drafter, *ONE)


# config.json


@pytest.mark.parametrize(
    "text", ["", "{", "no", "[]", "7", "null", '"x"', "[" * 100_000, "{}", '{"model_type": 3}', '{"model_type": ""}',
             '{"model_type": "no\\nsuch"}', '{"model_type": "llama"}', '{"model_type": "gemma4"}',
             '{"model_type": "gemma4", "text_config": []}', '{"model_type": "gemma4", "text_config": [1]}',
             '{"model_type": "gemma4", "text_config": "x"}', "\xff\xfe{\x00"]
)  # fmt: skip
@pytest.mark.parametrize("role", ["target", "tied"])
def test_config_that_is_none(unloaded: Refused, role: str, text: str) -> None:
    unloaded(role, lambda folder: (folder / "config.json").write_bytes(text.encode("latin-1")))


SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
NONSENSE = ("many", -1, 0, 1.5, True, [4], {"a": 1}, 10**12, 10**400)
# (folder, field, values that it cannot have, whether the sentence names it)
FIELDS: list[tuple[str, str, Sequence[Any], bool]] = [
    *((role, f"text.{field}", (*NONSENSE, None, MISSING), True) for role in ("target", "tied") for field in SIZES),
    *(("target", f"text.{field}", NONSENSE, True)
      for field in ("head_dim", "num_key_value_heads", "sliding_window", "max_position_embeddings")),
    *(("centroid", field, NONSENSE, True)
      for field in ("backbone_hidden_size", "num_centroids", "centroid_intermediate_top_k")),
    ("centroid", "num_centroids", [15], False),  # does not divide the vocabulary
    *(("target", f"text.{field}", values, False) for field, values in {
        "num_kv_shared_layers": [6, 7, 5, -1, "3", 2.5, [], {}],
        "hidden_size_per_layer_input": [-8, "8", [8], 10**9],
        "vocab_size_per_layer_input": [-8, "8", [8], 10**9],
        "rms_norm_eps": ["x", -1, [], float("nan"), float("inf")],
        "final_logit_softcapping": ["x", -1, [1], float("nan")],
        "layer_types": ["full_attention", 6, ["full_attention"] * 5, ["full_attention"] * 7, ["x"] * 6, [[]] * 6,
                        [1] * 6, {"a": 1}, ["sliding_attention"] * 6],
        "rope_parameters": [7, "x", [1], {"full_attention": 1}, {"sliding_attention": []},
                            *({"full_attention": rope} for rope in (
                                {"rope_theta": "x"}, {"rope_type": "default"}, {"rope_type": "yarn", "rope_theta": 1.0},
                                {"rope_type": [], "rope_theta": 1.0}, {"rope_theta": -1}, {"rope_theta": float("nan")},
                                {"rope_theta": 1e4, "partial_rotary_factor": "x"},
                                {"rope_theta": 1e4, "partial_rotary_factor": 2}, {"rope_theta": 1e4, "factor": 0}))],
        "per_layer_config": [7, "x", [1], {"2": 7}, {"2": {"head_dim": "x"}}, {"2": {"head_dim": 7}},
                             {"2": {"num_key_value_heads": 3}}, {"2": {"num_key_value_heads": 8}}],
        "num_attention_heads": [3, 5], "num_key_value_heads": [3, 8], "head_dim": [7],
        "hidden_activation": ["relu", 7, [], {}], "attention_bias": [True], "tie_word_embeddings": [False],
        "enable_moe_block": [True],
    }.items()),
]  # fmt: skip


@pytest.mark.parametrize(("role", "field", "values", "named"), FIELDS)
def test_fields(unloaded: Refused, role: str, field: str, values: Sequence[Any], named: bool) -> None:
    for value in values:
        sentence = unloaded(role, lambda folder, value=value: edit(folder, field, value))
        assert not named or f"'{field.removeprefix('text.')}'" in sentence


@pytest.mark.parametrize("values", [{"num_experts": "x"}, {"num_experts": 4, "top_k_experts": 5},
                                    {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": None}])  # fmt: skip
def test_mixture_fields(unloaded: Refused, values: dict[str, Any]) -> None:
    unloaded("target", lambda folder: [edit(folder, f"text.{key}", value)
                                       for key, value in {"enable_moe_block": True, **values}.items()])  # fmt: skip


@pytest.mark.parametrize("text", ["{", "[]", '{"do_sample": true, "top_k": 40.0}',
                                  '{"do_sample": true, "top_k": "x"}', '{"do_sample": true, "temperature": NaN}'])
def test_generation_config(unloaded: Refused, text: str) -> None:
    sentence = unloaded("target", lambda folder: (folder / "generation_config.json").write_text(text))
    assert "generation_config.json" in sentence


# Weights


def test_weights_that_are_no_file(unloaded: Refused) -> None:
    assert "model*.safetensors" in unloaded("target", lambda folder: (folder / "model.safetensors").unlink())
    assert "model.safetensors" in unloaded("target", lambda folder: (folder / "model.safetensors").mkdir())


def test_centroid_ordering_is_checked(unloaded: Refused) -> None:
    whole = dict(mx.load(str(CENTROID / "model.safetensors")))  # type: ignore[arg-type]
    name = "masked_embedding.token_ordering"
    vocabulary = whole[name].shape[0]
    for ordering in (mx.zeros((3,), dtype=mx.int32), mx.full((vocabulary,), vocabulary, dtype=mx.int32), None):
        weights = {key: value for key, value in (whole | {name: ordering}).items() if value is not None}
        assert name in unloaded("centroid", lambda folder, weights=weights: mx.save_safetensors(
            str(folder / "model.safetensors"), weights))  # fmt: skip


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
def test_drafter_that_does_not_fit(refused: Refused, copy: Copy, key: str, value: Any, what: str) -> None:
    """The target's config is changed and weights are made to match it, the drafter stays as it is."""
    folder = copy(TARGET)
    edit(folder, key if key.startswith("text.") else f"text.{key}", value)
    model = Gemma4Model(Gemma4Config.from_dict(json.loads((folder / "config.json").read_text())))
    weights = {f"model.language_model.{name}": array for name, array in tree_flatten(model.parameters())}
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    sentence = refused("--model", folder, "--drafter", TIED, *ONE)
    assert what in sentence and "drafter" in sentence


# Prompts and options


@pytest.mark.parametrize("tokens", ["", " ", ",", "1,", "x", "1;2", "1.5", "1,2,x", "-1", "128", "1,2,999999999999999"])
def test_token_ids(refused: Refused, tokens: str) -> None:
    refused("--model", TARGET, "--tokens", tokens)


def test_prompts(refused: Refused) -> None:
    assert "missing" in refused("--model", TARGET, stdin=b"")
    assert "both" in refused("text", "--model", TARGET, "--tokens", "1")
    assert "empty" in refused("", "--model", TARGET)
    assert "--tokens" in refused("text", "--model", TARGET)
    bom = "\ufeff".encode()  # nothing but the mark is nothing
    for piped, word in ((b"", "missing"), (bom, "missing"), (b"caf\xe9", "UTF-8"), ("Text".encode("utf-16"), "UTF-8")):
        assert word in refused("-", "--model", TARGET, stdin=piped)
    assert "UTF-8" in refused("caf\udce9", "--model", TARGET)
    assert "thinking only with" in refused("hi", "--thinking", "--max-tokens", 1)


@pytest.mark.parametrize(
    "options",
    [["--depth", "9"], ["--depth", "-1"], ["--depth", "x"], ["--depth", ""], ["--depth", "1.5"], ["--max-tokens", "0"],
     ["--max-tokens", "-3"], ["--temperature", "-1"], ["--temperature", "nan"], ["--top-p", "0"], ["--top-k", "-1"],
     ["--min-p", "1.5"], ["--repetition-penalty", "0"], ["--presence-penalty", "inf"], ["--seed", "-1"],
     ["--logprobs", "65"], ["--mode", "quick"],
     ["--max-context", "0"], ["--max-context", "1"], ["--max-context", "-5"], ["--max-context", "257"]],
)  # fmt: skip
def test_options_out_of_range(refused: Refused, options: list[str]) -> None:
    found = refused("--model", TARGET, "--drafter", TIED, "--tokens", "1,2", *options)
    assert options[0].removeprefix("--").replace("-", "_") in found.replace("-", "_") and options[1] in found


def test_broken_tokenizer(refused: Refused, copy: Copy) -> None:
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
        *((f"generate {options}", "") for options in ("--nope", "--max-tokens x", "--temperature x", "--depth", "a b")),
        ("doctor --model /no/such/folder", "/no/such/folder"), ("doctor --mode quick --json", "exact"),
        ("doctor --forget --drafter lookup", "--forget drops all"),
        ("bench --category poetry", "'code', 'edit'"),
        ("bench --depth 2,9", "0 to 8, not 9"), ("bench --arms stock,oracle", "'oracle'"),
        ("bench --arms ,", "no configuration"), ("bench --arms plain,mlx-vlm@auto", "mlx-vlm@auto"),
        ("bench --json same.txt --markdown ./same.txt", "named twice"), ("bench --plot -", "name a file"),
        ("bench --json /no/such/folder/a.json", "/no/such/folder/a.json"),
        ("bench --max-tokens 1", "max_tokens must be 8"), ("bench --per-category 0", "--per-category"),
        ("bench --max-context 300 --category 'long context'", "at most 172 tokens"),
    ],
)  # fmt: skip
def test_command_lines(command: Command, line: str, words: str) -> None:
    code, out, err = command(*shlex.split(line), stdin=b"Hello\n")
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


def test_raw_takes_the_prompt_as_it_stands(run: Command) -> None:
    lengths = []
    for extra in (("--raw",), ()):
        code, out, err = run("import os", "--max-tokens", 2, "--json", *extra)
        assert code == 0 and err == ""
        lengths.append(json.loads(out)["stats"]["prompt_tokens"])
    assert lengths[0] < lengths[1]


@pytest.mark.parametrize("name", ["no\nsuch\r\n place", "\x1b[31msuch place\a", "no\udcffsuch place", "no\u2028such"])
def test_names_that_would_break_a_line_or_a_terminal(name: str, embedded: mlx_mtp.Engine, tmp_path: Path) -> None:
    """Wherever a name comes from: what is printed is one line of characters that can be printed."""
    wrong: Any = name
    for call in (
        lambda: mlx_mtp.load(tmp_path / name), lambda: mlx_mtp.load(name), lambda: mlx_mtp.load(drafter=name),
        lambda: embedded.load_chat(tmp_path / name), lambda: mlx_mtp.load(mode=wrong),
        lambda: embedded.generate("a", grammar=f"start: {name}"),
    ):  # fmt: skip
        sentence = refusal(call)
        assert sentence.isprintable() and sentence.encode(), sentence


HOMELESS = """
import pwd, sys
def nobody(_): raise KeyError
pwd.getpwuid = nobody
from mlx_mtp.cli.app import main
sys.argv = ["mlx-mtp", *sys.argv[1:]]
main()
"""


@pytest.mark.parametrize("arguments", ["models", "chat --max-tokens 4", "train --target x --data ~nobody-here/x.txt"])
def test_a_user_without_a_home(tmp_path: Path, arguments: str) -> None:
    """As in a container that runs with a number as its user: nothing is kept, and no folder is named ~."""
    homes = "HOME", "MLX_MTP_CACHE", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "HF_HOME", "HF_HUB_CACHE"
    environment = {name: value for name, value in os.environ.items() if name not in homes}
    found = subprocess.run([sys.executable, "-c", HOMELESS, *arguments.split()], cwd=tmp_path, env=environment,
                           input="hello\n", capture_output=True, text=True, timeout=120)  # fmt: skip
    assert "Traceback" not in found.stderr and found.returncode == (2 if "train" in arguments else 0), found.stderr
    assert not list(tmp_path.iterdir())
