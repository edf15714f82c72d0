"""Files with a chat template of their own for conversations with tools (Command-R, Hermes 2 Pro): llama.cpp's prompts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qgraft
from qgraft.checkpoints.gguf_file import read_gguf
from qgraft.checkpoints.gguf_tokenizer import TEMPLATE
from qgraft.data.templates import named_template, tokenizers_own

PLAIN = (
    "{% for m in messages %}D[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}D:{% endif %}"
)
TOOLS = "{% for t in tools or [] %}<{{ t.function.name }}>{% endfor %}" + PLAIN.replace("D", "U")
CHAT = [{"role": "user", "content": "hi"}]
LOOK = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
WITHOUT, WITH = "D[user]hi<|im_end|>D:", "<look>U[user]hi<|im_end|>U:"
CASES: dict[
    str, tuple[dict[str, Any], tuple[str, str]]
] = {  # keys -> prompts without tools and with them, of llama.cpp
    "both": ({TEMPLATE: PLAIN, f"{TEMPLATE}.tool_use": TOOLS, f"{TEMPLATE}s": ["tool_use"]}, (WITHOUT, WITH)),
    "without the list": ({TEMPLATE: PLAIN, f"{TEMPLATE}.tool_use": TOOLS}, (WITHOUT, WITH)),
    "that alone": ({TEMPLATE: "", f"{TEMPLATE}.tool_use": TOOLS}, ("U[user]hi<|im_end|>U:", WITH)),
    "others by name": ({TEMPLATE: PLAIN, f"{TEMPLATE}.rag": TOOLS}, (WITHOUT, WITHOUT)),
}


@pytest.mark.spread(1)
@pytest.mark.parametrize("case", CASES)
def test_prompts_are_llamacpps(tiny_gguf: Callable[..., Any], tmp_path: Path, case: str) -> None:
    keys, expected = CASES[case]
    model, tokenizer = qgraft.load(tiny_gguf("llama", metadata=keys).path)
    asked: Any = {"add_generation_prompt": True, "tokenize": False}
    assert (
        tokenizer.apply_chat_template(CHAT, **asked),
        tokenizer.apply_chat_template(CHAT, tools=LOOK, **asked),
    ) == expected
    chosen = named_template(tokenizer, None)
    assert (chosen.with_tools or chosen.text) == (PLAIN if case == "others by name" else TOOLS)
    ends = model.generation_config.eos_token_id
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in ([ends] if isinstance(ends, int) else ends)
    tokenizer.save_pretrained(tmp_path / "folder")
    tiny_gguf("llama").model.save_pretrained(tmp_path / "folder")
    folder, _ = qgraft.load(tmp_path / "folder")
    qgraft.save(folder, tmp_path / "again.gguf")
    _, again = qgraft.load(tmp_path / "again.gguf")
    assert tokenizers_own(again) == tokenizers_own(tokenizer)
    assert read_gguf(tmp_path / "again.gguf").metadata.get(f"{TEMPLATE}s", ["tool_use"]) == ["tool_use"]
