"""Independent forward passes in NumPy, float64, row by row: a decoder layer with a past, and what is made of it."""

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

Weights = Mapping[str, np.ndarray]


def float64(arrays: Mapping[str, mx.array]) -> dict[str, np.ndarray]:
    return {name: np.array(array.astype(mx.float32)).astype(np.float64) for name, array in arrays.items()}


def below(weights: Weights, prefix: str) -> dict[str, np.ndarray]:
    """The weights whose name starts with `prefix`, without it."""
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


def rms(x: np.ndarray, weight: np.ndarray | float, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


def rotated(x: np.ndarray, position: int, wave_lengths: np.ndarray) -> np.ndarray:
    """Rotary position of heads [H, d]; pairs are (i, i + d/2)."""
    one, two = np.split(x, 2, axis=-1)
    cos, sin = np.cos(position / wave_lengths), np.sin(position / wave_lengths)
    return np.concatenate([one * cos - two * sin, one * sin + two * cos], axis=-1)


def attended(queries: np.ndarray, keys: list[np.ndarray], values: list[np.ndarray], scale: float) -> np.ndarray:
    """One row's queries [H, d] over the rows of a past, each [G, d]: [H * d]."""
    repeats = len(queries) // len(keys[0])
    every_key, every_value = (np.repeat(np.stack(rows), repeats, axis=1) for rows in (keys, values))
    scores = np.einsum("hd,shd->hs", queries, every_key) * scale
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.einsum("hs,shd->hd", weights / weights.sum(axis=1, keepdims=True), every_value).reshape(-1)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def in_halves(weight: np.ndarray, size: int) -> np.ndarray:
    """Rows of q or k [H * d, D] whose neighbours turn together, in the order in which (i, i + d/2) do."""
    heads = weight.reshape(-1, size, weight.shape[-1])
    return np.concatenate([heads[:, 0::2], heads[:, 1::2]], axis=1).reshape(weight.shape)


class DecoderLayer:
    """A layer of llama's, Qwen's or Gemma's kind, by the weights that it has, which remembers the rows it has seen.

    window: of rows that it sees, the newest. Where a block's result has a norm, as Gemma's have, the gate is GELU's.
    """

    def __init__(
        self, weights: Weights, head_dim: int = 8, eps: float = 1e-5, wave_lengths: Any = None,
        window: int | None = None, scale: float | None = None, norms_values: bool = False,
    ) -> None:  # fmt: skip
        self.w, self.head_dim, self.eps, self.window, self.norms_values = weights, head_dim, eps, window, norms_values
        self.wave_lengths = 1e4 ** (np.arange(0, head_dim, 2) / head_dim) if wave_lengths is None else wave_lengths
        self.scale = head_dim**-0.5 if scale is None else scale
        self.keys: list[np.ndarray] = []
        self.values: list[np.ndarray] = []

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return rms(x, self.w[f"{name}.weight"], self.eps)

    def __call__(self, x: np.ndarray, position: int) -> np.ndarray:
        """The next row [D] -> [D]."""
        w, norms = self.w, "pre_feedforward_layernorm.weight" in self.w
        normed = self.norm(x, "input_layernorm")
        query, key, value = (
            w[f"self_attn.{n}_proj.weight"] @ normed + w.get(f"self_attn.{n}_proj.bias", 0.0) for n in "qkv"
        )
        query, key, value = (part.reshape(-1, self.head_dim) for part in (query, key, value))
        if "self_attn.q_norm.weight" in w:
            query, key = self.norm(query, "self_attn.q_norm"), self.norm(key, "self_attn.k_norm")
        query, key = (rotated(part, position, self.wave_lengths) for part in (query, key))
        self.keys.append(key)
        self.values.append(rms(value, 1.0, self.eps) if self.norms_values else value)
        span = -self.window if self.window else None
        seen = w["self_attn.o_proj.weight"] @ attended(query, self.keys[span:], self.values[span:], self.scale)
        x = x + (self.norm(seen, "post_attention_layernorm") if norms else seen)
        normed = self.norm(x, "pre_feedforward_layernorm" if norms else "post_attention_layernorm")
        gate = w["mlp.gate_proj.weight"] @ normed
        inner = (gelu(gate) if norms else gate / (1 + np.exp(-gate))) * (w["mlp.up_proj.weight"] @ normed)
        found = w["mlp.down_proj.weight"] @ inner
        x = x + (self.norm(found, "post_feedforward_layernorm") if norms else found)
        return x * w.get("layer_scalar", 1.0)

    def over(self, rows: np.ndarray) -> np.ndarray:
        """Rows [T, D] of a whole sequence -> [T, D]."""
        return np.stack([self(row, place) for place, row in enumerate(rows)])


def count_of(weights: Weights, name: str) -> int:
    """How many heads.<i> or blocks.<i> there are."""
    return 1 + max(int(key.split(".")[1]) for key in weights if key.startswith(name))


def parallel_heads(weights: Weights, states: np.ndarray, eps: float = 1e-5) -> np.ndarray:
    """Gloeckle et al. 2024, section 2: per head and place [n, T, D] the norm of the head's layer over states 0..t."""
    found = []
    for i in range(count_of(weights, "heads.")):
        rows = DecoderLayer(below(weights, f"heads.{i}.layer.")).over(states)
        found.append(rms(rows, weights[f"heads.{i}.norm.weight"], eps))
    return np.stack(found)


class Equations:
    """DeepSeek-V3's equations 21 to 23, row by row. states and embedded [T, D] are the target's; so are aux, inputs of
    its layers, which the first module may read beside (EAGLE-3, section 3.1)."""

    def __init__(
        self, weights: Weights, states: np.ndarray, embedded: np.ndarray, aux: Sequence[np.ndarray] = (),
        eps: float = 1e-5,
    ) -> None:  # fmt: skip
        self.w, self.states, self.embedded, self.aux, self.eps = weights, states, embedded, aux, eps
        self.modules = count_of(weights, "blocks.")

    def read(self, row: int) -> np.ndarray:
        """What the first module reads of the target's layers after the token at `row`."""
        normed = [rms(each[row], self.w[f"aux_norms.{i}.weight"], self.eps) for i, each in enumerate(self.aux)]
        return self.w["aux_proj.weight"] @ np.concatenate(normed)

    def join(self, k: int, state: np.ndarray, place: int) -> np.ndarray:
        w = below(self.w, f"blocks.{k}.")
        token, before = rms(self.embedded[place], w["enorm.weight"], self.eps), rms(state, w["hnorm.weight"], self.eps)
        return w["eh_proj.weight"] @ np.concatenate([token, before])

    def drafts(self, newest: int, depth: int) -> list[np.ndarray]:
        """What goes into the unembedding for each of `depth` drafts after the token at `newest`."""
        layers = [DecoderLayer(below(self.w, f"blocks.{k}.layer.")) for k in range(self.modules)]
        # left[k][row]: the state after the token at `row`; of the target for k = 0, of module k else.
        left: list[dict[int, np.ndarray]] = [dict(enumerate(self.states[:newest]))] + [{} for _ in layers]
        for row in range(newest + depth):
            for k, layer in enumerate(layers):
                if row - 1 in left[k]:
                    joined = self.join(k, left[k][row - 1], row)
                    joined = joined + self.read(row - 1) if self.aux and k == 0 else joined
                    left[k + 1][row] = layer(joined, row)
            if row not in left[-1] and row - 1 in left[-1]:  # nothing before it has a state: it goes on from its own
                left[-1][row] = layers[-1](self.join(self.modules - 1, left[-1][row - 1], row), row)
        found = []
        for step in range(depth):
            k = min(step + 1, self.modules)
            found.append(rms(left[k][newest + step], self.w[f"blocks.{k - 1}.norm.weight"], self.eps))
        return found


class Gemma:
    """Gemma 4's text model without its options: no shared K/V, no per-layer embedding, no experts."""

    def __init__(self, weights: Weights, kinds: list[str], head_dims: list[int], window: int, cap: float) -> None:
        self.w, self.kinds, self.head_dims, self.window, self.cap = weights, kinds, head_dims, window, cap
        self.eps = 1e-6

    def embed(self, token: int) -> np.ndarray:
        table = self.w["embed_tokens.weight"]
        return table[token] * np.sqrt(table.shape[1])

    def head(self, hidden: np.ndarray) -> np.ndarray:
        """Hidden [..., D] -> logits [..., V]."""
        return np.tanh(hidden @ self.w["embed_tokens.weight"].T / self.cap) * self.cap

    def states(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Hidden and trunk [T, D] of a sequence."""
        x = np.stack([self.embed(token) for token in tokens])
        trunk = x
        for i in range(len(self.kinds)):
            trunk, x = x, self._layer(i, x)
        return rms(x, self.w["norm.weight"], self.eps), trunk

    def _layer(self, i: int, rows: np.ndarray) -> np.ndarray:
        size, full = self.head_dims[i], self.kinds[i] == "full_attention"
        wave_lengths = (1e6 if full else 1e4) ** (2 * np.arange(size // 2) / size)
        if full:
            wave_lengths[int(0.25 * size // 2) :] = np.inf
        window = None if full else self.window
        own = below(self.w, f"layers.{i}.")
        return DecoderLayer(own, size, self.eps, wave_lengths, window, 1.0, norms_values=True).over(rows)
