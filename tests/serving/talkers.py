"""Tiny models with adapters that change what they say, and answers of transformers' own generate() to compare with."""

from collections.abc import Mapping
from typing import Any

import torch

from qgraft.adapters.attach import attach_lora
from qgraft.adapters.attach_prefix import attach_prefix
from qgraft.adapters.base import find_adapter
from qgraft.adapters.choose import use_adapter

MIXES: tuple[dict[str, float], ...] = (
    {}, {"law": 1.0}, {"med": 1.0}, {"law": 0.7, "med": 0.3}, {"law": -0.5}, {"style": 1.0}, {"style": 1.0, "med": 1.0},
)  # fmt: skip
# Calls as a list behind a mark, with ids that no model writes
MISTRAL_TEMPLATE = """
{%- for m in messages %}
    {%- if m.tool_calls %}[TOOL_CALLS] [
        {%- for c in m.tool_calls %}{"name": {{ c.function.name | tojson }}, "arguments": {{ c.function.arguments | tojson
            }}, "id": "{{ c.id }}"}{{ "" if loop.last else ", " }}{% endfor %}]{{ eos_token }}
    {%- else %}[INST] {{ tools | tojson if tools else "" }}{{ m.content }} [/INST]{% endif %}
{%- endfor %}"""


def with_adapters(model: Any, prefix: bool = True) -> Any:
    """Two LoRAs and a prefix on the model, with random weights, and none of them active."""
    attach_lora(model, r=4, lora_alpha=8, name="law")
    attach_lora(model, r=2, use_rslora=True, name="med")
    if prefix:
        attach_prefix(model, pre_seq_len=5, name="style")
    draw = torch.Generator().manual_seed(3)
    for name in ("law", "med"):
        for lora in find_adapter(model, name).parts.values():
            lora.lora_B.data.copy_(torch.empty(lora.lora_B.shape).normal_(0, 0.2, generator=draw))
    use_adapter(model, None)
    return model.eval()


def generated(model: Any, prompt: list[int], mix: Mapping[str, float], tokens: int, ends: list[int]) -> list[int]:
    """What transformers' own generate() answers to one prompt alone, without what ends it."""
    use_adapter(model, dict(mix))
    ids = torch.tensor([prompt])
    with torch.no_grad():
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, eos_token_id=ends or None
        )
    use_adapter(model, None)
    said = output[0, len(prompt) :].tolist()
    return said[:-1] if said and said[-1] in ends else said
