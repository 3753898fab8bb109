"""Peak memory of a training step with n heads, their logits one after the other or all at once, per n.

    .venv/bin/python benchmarks/training_memory.py [--heads 1,2,4] [--vocabulary 32768] [--json FILE]

A small Gemma 4 trunk with parallel heads, so that the logits are nearly all there is. MLX's CPU backend runs ahead of
what is evaluated and would hold the next head's logits early; a memory limit of one byte makes it wait, on every
device.
"""

from __future__ import annotations

from typing import Any

import common
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_mtp.drafters.layers import LayersConfig
from mlx_mtp.drafters.parallel import ParallelModel
from mlx_mtp.generation.cache import NoCache
from mlx_mtp.targets.gemma4 import Gemma4Model
from mlx_mtp.targets.gemma4_config import Gemma4Config
from mlx_mtp.training.objective import Joint, joint_parallel_loss

WIDTH = 64
TEXT: dict[str, Any] = {
    "hidden_size": WIDTH, "intermediate_size": 128, "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"], "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 32, "global_head_dim": 32, "sliding_window": 64, "final_logit_softcapping": 30.0,
}  # fmt: skip
BLOCK: dict[str, Any] = {
    "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": 128, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "rms_norm_eps": 1e-6,
}  # fmt: skip


def at_once(module: Joint, batch: mx.array) -> mx.array:
    """The same loss with the logits of all heads at once, for comparison."""
    count = 1 + len(module.drafter.heads)
    rows = batch.shape[1] - count
    states = module.target(batch[:, :rows], NoCache(module.target.config.sliding_window, batch.shape[0]))
    hiddens = [states.hidden, *module.drafter(module.drafter.read(states))]
    labels = [batch[:, i + 1 : i + 1 + rows] for i in range(count)]
    losses = [nn.losses.cross_entropy(module.target.head(h), y) for h, y in zip(hiddens, labels, strict=True)]
    return mx.concatenate(losses).mean() * count


def peak(heads: int, vocabulary: int, batch: int, rows: int, in_order: bool) -> int:
    """Bytes that one step needs at its peak, above those of the parameters."""
    target = Gemma4Model(Gemma4Config.from_dict(TEXT | {"vocab_size": vocabulary}))
    config = LayersConfig(count=heads - 1, reads="trunk", hidden_size=WIDTH, vocab_size=vocabulary, norm_eps=1e-6,
                          block=BLOCK)  # fmt: skip
    joint = Joint(target, ParallelModel(config))
    tokens = mx.random.randint(0, vocabulary, (batch, rows + heads))
    mx.eval(joint.parameters(), tokens)
    loss = joint_parallel_loss()
    gradient = nn.value_and_grad(joint, (lambda module, ids: loss(module, ids)[0]) if in_order else at_once)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    value, gradients = gradient(joint, tokens)
    mx.eval(value, [array for _, array in tree_flatten(gradients)])
    return mx.get_peak_memory() - before


def main() -> None:
    args = common.options(__doc__, heads="1,2,4", vocabulary=32_768, batch=2, rows=128)
    mx.set_memory_limit(1)
    counts = [int(count) for count in args.heads.split(",")]
    found: dict[str, Any] = {"vocabulary": args.vocabulary, "batch": args.batch, "rows": args.rows, "peak_bytes": {}}
    for name, in_order in (("in order", True), ("at once", False)):
        peaks = {n: peak(n, args.vocabulary, args.batch, args.rows, in_order) for n in counts}
        found["peak_bytes"][name] = peaks
        first = peaks[counts[0]]
        print(f"{name}: " + ", ".join(f"{n} heads {p / 1e6:.0f} MB ({p / first:.2f}x)" for n, p in peaks.items()))
    common.save(args.json, found)


if __name__ == "__main__":
    main()
