"""Write docs/gguf-keys.md from the table in checkpoints/gguf_keys.py; a test fails when the file is stale."""

from collections.abc import Iterator
from pathlib import Path

from qgraft.checkpoints.gguf_key_parts import IGNORED, MUSTS, OTHER_GROUPS, Keys
from qgraft.checkpoints.gguf_keys import TABLE

HEADER = """# The metadata keys of a GGUF file

Written by docs/make_gguf_keys.py from `checkpoints/gguf_keys.py`; do not edit.

Every key of a file is **used**, **without effect** on what is computed, or **refused** unless it says what is computed
anyway. A key in none of these lists is named in a note when the file is loaded, and has no effect.
`qgraft inspect model.gguf` shows these lists of a file, under `keys`. A key that is absent has llama.cpp's default. One that
asks for another computation is refused also where llama.cpp passes over it. Saving a model keeps every key as it is.

The judge is llama.cpp (`tests/oracle/test_gguf_keys.py`): log-probabilities of tiny float32 files with each key agree to
0.01, mostly to 0.00001 (architectures with GELU, which llama.cpp takes from a table in half precision, to 0.003). Where
llama.cpp departs from the model that a file was made of, qgraft computes as the authors' model in transformers does:

* `attention.sliding_window` of phi3 and starcoder2: every layer has that window. llama.cpp attends to everything.
* `rope.scaling.yarn_beta_fast`, `yarn_beta_slow` and `yarn_attn_factor`: what the authors chose, as the converter wrote it.
  llama.cpp passes over them for these architectures, and computes with 32, 1 and 1 + ln(factor) / 10.
* `rope.scaling.type` yarn of gpt-oss: the ramp between fast and slow frequencies begins and ends where its authors' does.
  llama.cpp rounds both ends to whole frequencies.
* `rope_factors_long.weight` and `rope_factors_short.weight` (longrope): a text longer than
  `rope.scaling.original_context_length` is rotated by the long list, a shorter one by the short list. In llama.cpp the
  context of the session decides: in a long session short texts are rotated by the long list, too.

Known from tensors, because no key states it: `output.weight` (absent: the output layer is the embedding),
`rope_freqs.weight` (a divisor for each frequency: Llama 3.1), biases, StableLM's norms for each head and its parallel
residual. Every fourth layer of SmolLM3 has no rotations, and EXAONE 4 has windows where it has 64 layers. The attention
of Gemma-2-27B and Gemma-3-27B is scaled by 1 / sqrt(width / heads), that of all other Gemmas by 1 / sqrt(head_dim):
known by the number of layers, as in llama.cpp. Files of StarCoder2 state no window (the published ones were trained
with 4,096 tokens): qgraft and llama.cpp attend to everything.

A number may be a list with one for each layer, if all are the same. Names below are without the architecture in front
(`llama.rope.freq_base`). `general.architecture` is one of {architectures}.
"""


def page() -> str:
    """The whole text of docs/gguf-keys.md."""
    parts = [HEADER.format(architectures=", ".join(f"`{name}`" for name in TABLE))]
    parts += [_table(f"Used by `{name}`", "sets", _used(keys)) for name, keys in TABLE.items()]
    musts = {key: must.expected for key, must in MUSTS.items()}
    parts.append(_table("Refused where it is not used", "unless it is", musts.items()))
    special = {f"{key} ({name})": m.expected for name, keys in TABLE.items() for key, m in keys.musts.items()}
    parts.append(_table("For one architecture, refused", "unless it is", special.items()))
    ignored = {f"{key} ({name})": why for name, keys in TABLE.items() for key, why in keys.ignored.items()}
    groups = {f"{group}*": why for group, why in OTHER_GROUPS.items()}
    parts.append(_table("Without effect", "why", {**IGNORED, **ignored, **groups}.items()))
    return "\n".join(parts)


def _used(keys: Keys) -> Iterator[tuple[str, str]]:
    yield from ((key, f"`{field}`") for key, field in keys.fields.items())
    yield from ((key, f"`{field}`, in a file with experts") for key, field in keys.experts.items())
    yield from keys.used.items()


def _table(title: str, head: str, rows) -> str:
    lines = [f"| `{key.replace(' (', '` (') if ' (' in key else key + '`'} | {text} |" for key, text in rows]
    return "\n".join([f"## {title}", "", f"| key | {head} |", "|---|---|", *lines, ""])


if __name__ == "__main__":
    Path(__file__).with_name("gguf-keys.md").write_text(page(), encoding="utf-8")
