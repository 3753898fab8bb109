"""Parity with transformers on models it has just made: other seeds, depths, patterns, heads and windows each time.

The committed golden arrays fix one model per variant; here the shapes vary. transformers computes in float32 with
eager attention; the checkpoint is what its own save_pretrained writes. Needs the extra `peers` (make peers).
"""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from greedy import in_passes, random_sizes

from mlx_mtp.checkpoints.checkpoint import Checkpoint
from mlx_mtp.drafters import load_drafter
from mlx_mtp.drafters.assistant import Convention
from mlx_mtp.generation.sampling import DraftSampler, SamplingSpec
from mlx_mtp.targets import load_target

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

TOLERANCE = 1e-3
S, F = "sliding_attention", "full_attention"
VOCABULARY = 160
ROTATION = {
    S: {"rope_type": "default", "rope_theta": 10000.0},
    F: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
}
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 40, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 16, "max_position_embeddings": 1024,
    "rope_parameters": ROTATION, "final_logit_softcapping": 30.0, "pad_token_id": 0, "eos_token_id": 1,
    "bos_token_id": 2, "tie_word_embeddings": True,
}  # fmt: skip
NO_LAYER_INPUTS: dict[str, Any] = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
K_EQUALS_V: dict[str, Any] = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
EXPERTS: dict[str, Any] = {"enable_moe_block": True, "num_experts": 5, "top_k_experts": 2, "moe_intermediate_size": 12}
LAYER_INPUTS: dict[str, Any] = {
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "use_double_wide_mlp": True,
}  # fmt: skip
# name: unified or not, layers, window, seed, and what the variant adds.
CASES: dict[str, tuple[bool, list[str], int, int, dict[str, Any]]] = {
    "layer inputs, window 4": (False, [S, S, S, S, F, S, S, F], 4, 1, {
        **LAYER_INPUTS, "num_key_value_heads": 1, "num_kv_shared_layers": 3}),
    "layer inputs, window 64, 8 heads": (False, [S, F, S, F, S, F], 64, 2, {
        **LAYER_INPUTS, "num_attention_heads": 8, "num_kv_shared_layers": 2}),
    "K = V, window 16": (False, [S, S, F, S, S, F], 16, 3, {**NO_LAYER_INPUTS, **K_EQUALS_V}),
    "experts, window 5": (False, [S, F, S, S, F], 5, 4, {**NO_LAYER_INPUTS, **K_EQUALS_V, **EXPERTS}),
    "unified, window 33": (True, [S, S, S, S, S, F], 33, 5, K_EQUALS_V),
}  # fmt: skip
CENTROIDS = (20, 6)
def randomise(model: Any, seed: int) -> Any:
    """Weights so large that attention, gates and the head all matter; norms and scales away from one."""
    chance = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            noise = torch.randn(weight.shape, generator=chance)
            if "norm" in name or name.endswith("scale"):
                weight.copy_(1.0 + 0.2 * noise)
            elif "embed_tokens" in name:
                weight.copy_(0.5 * noise)
            else:
                weight.copy_(0.8 * noise / weight.shape[-1] ** 0.5)  # larger ones make float32 itself chaotic
        for name, buffer in sorted(model.named_buffers()):
            if name.endswith("layer_scalar"):
                buffer.copy_(0.8 + 0.1 * torch.randn(buffer.shape, generator=chance))
            elif name.endswith("token_ordering"):
                buffer.copy_(torch.randperm(buffer.numel(), generator=chance))
    model.tie_weights()
    return model.eval().float()


def text_options(case: str, **more: Any) -> dict[str, Any]:
    _, kinds, window, _, extra = CASES[case]
    return {**COMMON, "layer_types": kinds, "num_hidden_layers": len(kinds), "sliding_window": window, **extra, **more}


def make_target(case: str, folder: Path) -> Any:
    unified, seed = CASES[case][0], CASES[case][3]
    name = "Gemma4Unified" if unified else "Gemma4"
    text = getattr(transformers, name + "TextConfig")(**text_options(case))
    config = getattr(transformers, name + "Config")(text_config=text, vision_config=None, audio_config=None)
    model = getattr(transformers, name + "ForConditionalGeneration")(config)
    model.set_attn_implementation("eager")
    randomise(model, seed).save_pretrained(folder)
    return model


def make_assistant(case: str, centroid: bool, folder: Path) -> Any:
    unified, _, _, seed, extra = CASES[case]
    name = "Gemma4Unified" if unified else "Gemma4"
    kept = {k: v for k, v in extra.items() if k in ("num_key_value_heads", *K_EQUALS_V)}
    kinds = [S, S, F]
    text = {**text_options(case), **({} if unified else NO_LAYER_INPUTS), "hidden_size": 32, "layer_types": kinds,
            "num_hidden_layers": 3, "num_kv_shared_layers": 3, "final_logit_softcapping": None}  # fmt: skip
    dropped = {*extra} - {*kept, *NO_LAYER_INPUTS, "num_kv_shared_layers", "num_attention_heads"}
    text = {k: v for k, v in text.items() if k not in dropped}
    config = getattr(transformers, name + "AssistantConfig")(
        text_config=getattr(transformers, name + "TextConfig")(**text), backbone_hidden_size=COMMON["hidden_size"],
        use_ordered_embeddings=centroid, num_centroids=CENTROIDS[0], centroid_intermediate_top_k=CENTROIDS[1],
        tie_word_embeddings=True,
    )  # fmt: skip
    model = getattr(transformers, name + "AssistantForCausalLM")(config)
    model.set_attn_implementation("eager")
    randomise(model, seed + 100).save_pretrained(folder)
    return model


@pytest.fixture(scope="module", params=CASES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("transformers")
    return request.param, make_target(request.param, folder / "target"), folder


def prompt_of(case: str) -> np.ndarray:
    """As long as three windows, but for a long one."""
    length = min(3 * CASES[case][2], 120)
    return np.random.default_rng(CASES[case][3]).integers(3, VOCABULARY, (1, length))


def test_logits_whole_by_token_and_in_chunks(made: tuple[str, Any, Path]) -> None:
    case, model, folder = made
    tokens = prompt_of(case)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor(tokens), use_cache=False).logits.numpy()
    assert 2 < np.abs(expected).max() < 30 and expected.std() > 0.5  # worth comparing
    target = load_target(Checkpoint.open(folder / "target"))
    assert np.abs(np.array(target.logits(mx.array(tokens))) - expected).max() < TOLERANCE
    for sizes in (random_sizes(tokens.shape[1], 3, 40), [1] * tokens.shape[1]):
        assert np.abs(np.array(in_passes(target, mx.array(tokens), sizes)[0]) - expected).max() < TOLERANCE


def readable(model: Any, tokens: np.ndarray) -> tuple[Any, dict[str, Any]]:
    """transformers' states of a prompt, and the whole K/V of the last storing layer of each kind."""
    text = model.config.get_text_config()
    cache = transformers.DynamicCache()  # told nothing of windows, it keeps every row
    with torch.no_grad():
        out = model(input_ids=torch.tensor(tokens), past_key_values=cache, use_cache=True, output_hidden_states=True)
    storing = text.num_hidden_layers - (text.num_kv_shared_layers or 0)
    last = {kind: i for i, kind in enumerate(text.layer_types[:storing])}
    return out, {kind: (cache.layers[i].keys, cache.layers[i].values) for kind, i in last.items()}


@pytest.mark.parametrize(("centroid", "convention"), [(False, Convention.A), (True, Convention.B)])
def test_assistant_steps(made: tuple[str, Any, Path], centroid: bool, convention: Convention, tmp_path: Path) -> None:
    case, model, folder = made
    assistant = make_assistant(case, centroid, tmp_path / "assistant")
    tokens, window = prompt_of(case), CASES[case][2]
    out, shared = readable(model, tokens)
    visible = {Convention.A: window + 1, Convention.B: window}[convention]
    shared[S] = tuple(rows[:, :, -visible:] for rows in shared[S])
    position = tokens.shape[1] - (convention is Convention.B)

    target = load_target(Checkpoint.open(folder / "target"))
    drafter = load_drafter(Checkpoint.open(tmp_path / "assistant"))
    drafter.convention = convention
    drafter.attach(target)
    cache = target.new_cache(256)
    states = target.forward(mx.array(tokens), cache)
    cache.advance(tokens.shape[1])
    first = int(out.logits[0, -1].argmax())
    chosen = DraftSampler(SamplingSpec(), {}, {}, mx.random.key(0))
    drafts, _ = drafter.draft({}, mx.array([[first]]), states.hidden[:, -1:], cache, 4, chosen)

    token, state, ours = torch.tensor([[first]]), out.hidden_states[-1][:, -1:], states.hidden[:, -1:]
    at, kv, masks = drafter.view(cache)
    for step in range(4):
        with torch.no_grad():
            expected = assistant(
                inputs_embeds=torch.cat([model.get_input_embeddings()(token), state], -1), attention_mask=None,
                position_ids=torch.tensor([[position]]), shared_kv_states=shared, use_cache=False,
            )  # fmt: skip
        hidden, ours = drafter.model.step(target.embed(mx.array(token.numpy())), ours, at, kv, masks)
        ids, logits = drafter.model.candidates(hidden)
        wanted, found = expected.logits[0, 0].numpy(), np.array(logits)[0, 0]
        wanted = wanted if ids is None else wanted[np.array(ids)[0, 0]]
        assert np.abs(found - wanted).max() < TOLERANCE
        token, state = expected.logits.argmax(-1), expected.last_hidden_state
        assert np.abs(np.array(ours) - state.numpy()).max() < TOLERANCE
        assert drafts[0, step].item() == token.item()
