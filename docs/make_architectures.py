"""Writes docs/architectures.md: what became of a tiny model of every causal architecture of the installed transformers.

python docs/make_architectures.py          an hour at most; tests/zoo has the trial itself
"""

import os
import sys
import tempfile
import warnings
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests" / "zoo"))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
warnings.filterwarnings("ignore")

HEAD = """# Architectures

What qgraft makes of every causal architecture that transformers {version} lists, found out with a tiny model of each
(`python docs/make_architectures.py`; `tests/zoo` tries the usual ones in every run and all of them in `make test-slow`).

**exact** means, measured by transformers' own model with the same weights: equal logits, from floats and packed in q8_0;
the same 24 greedy tokens from a prompt longer than its window, with fast decoding on; the same loss and gradients of LoRAs
on three samples of 7 to 40 tokens, packed in one row where the architecture keeps them apart, else one by one; equal
logits after saving and loading again. Layers that are known to compute x W^T + b hold packed weights; experts, routers,
convolutions and layers whose weights an architecture reads itself stay floats, and take no LoRA.
**refused** means that loading or training ends in that error. **not tried** means that no tiny model of the kind could be
made, or that transformers' own fails, so nothing is claimed.

{exact} exact, {refused} refused, {others} not tried.

| model_type | outcome |
|---|---|
"""


def main() -> None:
    """Write the table."""
    import torch
    import transformers
    from judge import outcome
    from kinds import KINDS

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    rows = {}
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            rows[kind] = outcome(kind, Path(folder))
        print(f"{kind}: {rows[kind]}", flush=True)
    write(rows, transformers.__version__)


def write(rows: dict[str, str], version: str) -> None:
    """The page; exits with an error where an outcome is that something is wrong."""
    counts = [
        sum(text.startswith(word) for text in rows.values()) for word in ("exact", "refused", "not tried", "wrong")
    ]
    if counts.pop():
        sys.exit("something is wrong: the table is left as it is")
    head = HEAD.format(version=version, **dict(zip(("exact", "refused", "others"), counts, strict=True)))
    lines = [f"| `{kind}` | {text} |" for kind, text in rows.items()]
    (HERE / "architectures.md").write_text(head + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
