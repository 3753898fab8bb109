"""A tiny checkpoint that thinks: a tokenizer with a template in Gemma 4's manner, and a target that follows a chain."""

from pathlib import Path

import mlx.core as mx
from tokenizers import AddedToken, Tokenizer, decoders, models
from tokenizers_at_hand import write

import mlx_mtp
from mlx_mtp.testing import MarkovDrafter, MarkovTarget
from mlx_mtp.text.tokenizer import Tokenizer as OurTokenizer

TOKENS = [
    "<pad>", "<bos>", "<turn|>", "<|turn>", "\n", "user\n", "model\n", "system\n", "<|think|>", "<|channel>",
    "<channel|>", "thought\n", "Hm", ", so", "Yes", ", sure", ".", "Why?", "And?", "Be brief.", "x",
]  # fmt: skip
REPLY = ["model\n", "<|channel>", "thought\n", "Hm", ", so", "<channel|>", "Yes", ", sure", ".", "<turn|>"]
THOUGHT, ANSWER = "Hm, so", "Yes, sure."
TEMPLATE = (
    "<bos>{% if enable_thinking %}<|turn>system\n<|think|><turn|>\n{% endif %}"
    "{% for message in messages %}"
    "<|turn>{{ {'assistant': 'model'}.get(message.role, message.role) }}\n{{ message.content | trim }}<turn|>\n"
    "{% endfor %}{{ '<|turn>model\n' }}{% if not enable_thinking %}<|channel>thought\n<channel|>{% endif %}"
)
PLAIN_TEMPLATE = TEMPLATE.partition("{% if not")[0]  # without a closed thought in front of the answer


def write_tokenizer(folder: Path, tokens: list[str] = TOKENS, template: str = TEMPLATE) -> Path:
    """tokenizer.json and its config: every token is split off as it stands, nothing else is known."""
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0]))
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    tokenizer.decoder = decoders.Fuse()
    ends = {"bos_token": "<bos>", "eos_token": "<turn|>"}
    return write(folder, tokenizer, template, clean_up_tokenization_spaces=False, **ends)


def thinking_engine(folder: Path, depth: int = 0) -> mlx_mtp.Engine:
    """Writes a thought and an answer to everything, or only the answer where the prompt has closed the thought."""
    tokenizer = OurTokenizer.load(write_tokenizer(folder))
    table = mx.full((len(TOKENS), len(TOKENS)), -20.0)
    for one, next_one in zip(REPLY, REPLY[1:], strict=False):
        table[TOKENS.index(one), TOKENS.index(next_one)] = 20.0
    mx.eval(table)  # for other threads than this one
    target = MarkovTarget(table)
    drafter = MarkovDrafter(table) if depth else None
    return mlx_mtp.Engine(target, drafter, tokenizer, stop_tokens=[TOKENS.index("<turn|>")], depth=depth)
