"""Every causal architecture of transformers, as a tiny model: exact, or refused, and as docs/architectures.md says."""

import re
from pathlib import Path

import pytest
import transformers
from judge import outcome
from kinds import KINDS

TABLE = Path(__file__).parents[2] / "docs" / "architectures.md"
ROW = re.compile(r"^\| `([\w-]+)` \| (.+) \|$", re.MULTILINE)
USUAL = {
    "cohere", "deepseek_v3", "falcon", "gemma", "gemma2", "gemma3_text", "glm4", "gpt2", "gpt_oss", "granite", "lfm2",
    "llama", "llama4_text", "mamba2", "mistral", "mixtral", "olmo2", "opt", "phi", "phi3", "qwen2", "qwen3",
    "qwen3_next", "smollm3", "stablelm", "starcoder2",
}  # fmt: skip


def table() -> dict[str, str]:
    return dict(ROW.findall(TABLE.read_text(encoding="utf-8").partition("## From GGUF files")[0]))


def test_the_table_has_every_kind():
    """The release that it was made with is named in it; others have some kinds more or less."""
    stated = TABLE.read_text(encoding="utf-8")
    if f"transformers {transformers.__version__}" in stated:
        assert sorted(table()) == KINDS
    assert not USUAL - table().keys()


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k in USUAL else pytest.mark.slow) for k in KINDS])
def test_exact_or_refused(kind, tmp_path):
    got = outcome(kind, tmp_path)
    assert not got.startswith("wrong"), got
    if f"transformers {transformers.__version__}" in TABLE.read_text(encoding="utf-8"):
        assert got == table()[kind]
