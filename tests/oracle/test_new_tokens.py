"""Merged files with new tokens in llama.cpp: the ids of texts, and log-probabilities to the rounding of float32."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Q

import qgraft
from qgraft.adapters.base import find_adapter
from qgraft.adapters.token_rows import TokenRows
from qgraft.checkpoints.gguf_model import load_gguf
from qgraft.data.new_tokens import add_new_tokens

RUNNER = Path(__file__).with_name("run_llamacpp_vocabulary.py")
TEXTS = ["<tool>ab</tool>", "ab <tool> b", "<tool><tool>\n</tool> ", "  </tool>the", "a<tool", "</tool>"]
ROUNDING, GELU = 3e-5, 2e-2  # llama.cpp computes GELU by a table in float16: measured 8e-3, of log-probabilities of -60


def vocabulary(path: Path) -> dict[str, list]:
    job = [{"model": str(path), "texts": TEXTS, "special": False}]
    done = subprocess.run(
        [sys.executable, str(RUNNER)], input=json.dumps(job), capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])[0]


@pytest.mark.spread(1)
@pytest.mark.parametrize(
    ("architecture", "tied"), [("qwen2", True), ("llama", False), ("gemma", True), ("phi3", False)]
)
def test_llamacpp_reads_the_merged_file(architecture, tied, make_gguf, llamacpp_greedy, our_logprobs, tmp_path):
    path = make_gguf(tmp_path / "base.gguf", architecture, tied=tied, types=(Q.F32,)).path
    model, tokenizer = load_gguf(path, torch.float32)
    base = model.qgraft
    base.tokenizer = tokenizer
    new = [token.id for token in add_new_tokens(tokenizer, base.tokens, ["</tool>", "a b"], ["<tool>"])]
    indices = [5, *new]
    given = indices if tied else {"embed_tokens": indices, "lm_head": indices}
    qgraft.attach_lora(model, r=2, target_modules="down_proj", trainable_token_indices=given)
    torch.manual_seed(4)
    with torch.no_grad():
        for part in find_adapter(model).parts.values():
            if isinstance(part, TokenRows):
                part.rows += 0.3 * torch.randn_like(part.rows)
            elif hasattr(part, "lora_B"):
                part.lora_B.normal_(0, 0.2)
    ids = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in TEXTS]
    prompt = [*ids[0], 5, *ids[1]]
    with_adapter = our_logprobs(model, prompt, [7, new[-1], 9])
    qgraft.merge(model, method="nearest", min_retained=-1e9, progress=False)
    qgraft.save(model, merged := tmp_path / "merged.gguf")

    said = vocabulary(merged)
    assert said["ids"] == ids
    assert len(said["kinds"]) == len(tokenizer) == model.config.vocab_size
    theirs = llamacpp_greedy(merged, prompt, 3, top=len(tokenizer), exact=True, forced=[7, new[-1], 9])
    assert theirs.gap(with_adapter).max() < (GELU if architecture == "gemma" else ROUNDING)
    again, words = load_gguf(merged, torch.float32)
    assert [list(words(text, add_special_tokens=False)["input_ids"]) for text in TEXTS] == ids
    assert our_logprobs(again, prompt, [7, 9]).equal(our_logprobs(model, prompt, [7, 9]))
