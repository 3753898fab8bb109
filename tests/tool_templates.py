"""Chat templates that declare, call and answer tools, in the notations of models that people run."""

from __future__ import annotations

import shutil
from pathlib import Path

from tokenizers_at_hand import CHATML

from mlx_mtp.loading import EMBEDDED

# The ends of turns are CHATML's.
_TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
_DECLARED = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
)
_END = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
HERMES = _DECLARED + _TURN + (
    "{% for c in m.tool_calls or [] %}{% set tool_call = c.function %}"
    "{{ '\\n<tool_call>\\n' }}{\"name\": \"{{ tool_call.name }}\", \"arguments\": {{ tool_call.arguments | tojson }}}"
    "{{ '\\n</tool_call>' }}{% endfor %}"
) + _END  # fmt: skip
CODER = _DECLARED + _TURN + (
    "{% for c in m.tool_calls or [] %}{{ '\\n' }}<tool_call>\n<function={{ c.function.name }}>{{ '\\n' }}"
    "{% for k, v in c.function.arguments | items %}<parameter={{ k }}>{{ '\\n' }}"
    "{{ v if v is string else v | tojson }}{{ '\\n' }}</parameter>{{ '\\n' }}{% endfor %}</function>\n</tool_call>"
    "{% endfor %}"
) + _END  # fmt: skip
MISTRAL = _DECLARED + _TURN + (
    "{% for c in m.tool_calls or [] %}[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}"
    "{% endfor %}"
) + _END  # fmt: skip
_VALUE = (
    "{% macro value(v) %}{% if v is string %}<|\"|>{{ v }}<|\"|>{% elif v is mapping %}{{ '{' }}"
    "{% for k, x in v | dictsort %}{{ k }}:{{ value(x) }}{{ '' if loop.last else ',' }}{% endfor %}{{ '}' }}"
    "{% elif v is boolean %}{{ 'true' if v else 'false' }}{% elif v is iterable %}[{% for x in v %}{{ value(x) }}"
    "{{ '' if loop.last else ',' }}{% endfor %}]{% else %}{{ v }}{% endif %}{% endmacro %}"
)
GEMMA = _VALUE + _DECLARED + _TURN + (
    "{% for c in m.tool_calls or [] %}<|tool_call>call:{{ c.function.name }}{{ value(c.function.arguments) }}"
    "<tool_call|>{% endfor %}"
) + _END  # fmt: skip
PLAIN = CHATML


def embedded_with_tools(folder: Path) -> Path:
    """A copy of the embedded target in `folder`, with a template that knows tools and thoughts by other marks."""
    target = shutil.copytree(EMBEDDED / "target", folder / "target", copy_function=shutil.copyfile)
    text = HERMES.replace("<|im_start|>", "<|turn>").replace("<|im_end|>", "<turn|>")
    (target / "chat_template.jinja").write_text(text)
    return target
