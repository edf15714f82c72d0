"""llama.cpp itself, by way of the xllamacpp package: what it writes after a prompt, with which log-probabilities."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

RUNNER = Path(__file__).with_name("run_llamacpp.py")


@dataclass(frozen=True)
class Continuation:
    """What llama.cpp wrote, n tokens, and the k likeliest ones at each step, the likeliest first."""

    ids: list[int]
    top_ids: Tensor  # [n, k] int64
    top_logprobs: Tensor  # [n, k] float64

    def logprobs(self) -> Tensor:
        """The log-probability of each of `ids` [n]; -inf where it is not among the k likeliest."""
        chosen = self.top_ids == torch.tensor(self.ids)[:, None]
        return self.top_logprobs.masked_fill(~chosen, -torch.inf).amax(-1)

    def gap(self, ours: Tensor) -> Tensor:
        """|difference| to our log-probabilities [n, vocabulary] on the k likeliest tokens, [n, k]."""
        return (ours.gather(1, self.top_ids) - self.top_logprobs).abs()

    def kl(self, ours: Tensor) -> Tensor:
        """KL(llama.cpp || ours) at each step [n], all tokens but the k likeliest taken as one."""
        p, q = (_with_rest(logprobs) for logprobs in (self.top_logprobs, ours.gather(1, self.top_ids)))
        return (p * (p / q).log()).sum(-1)


def _with_rest(logprobs: Tensor) -> Tensor:
    """Probabilities [n, k + 1] from log-probabilities [n, k]: the last is what is left to 1."""
    p = logprobs.exp()
    return torch.cat([p, 1 - p.sum(-1, keepdim=True)], dim=1).clamp(min=1e-9)


Greedy = Callable[..., Continuation]


@pytest.fixture(scope="session")
def llamacpp_greedy() -> Greedy:
    """See `greedy`."""
    pytest.importorskip("xllamacpp")
    return greedy


def greedy(
    path: Path,
    prompt: Sequence[int],
    n: int,
    *,
    lora: Path | None = None,
    top: int = 10,
    stop: Sequence[int] = (),
    forced: Sequence[int] = (),
    exact: bool = False,
    scales: Sequence[float] | None = None,
) -> Continuation:
    """Up to `n` tokens after `prompt`, each the likeliest, by llama.cpp on the CPU with the GGUF file at `path`.

    Args:
        lora: GGUF-LoRA to run beside it.
        top: how many of the likeliest tokens to report at each step.
        stop: ids after which it ends; the last of `ids` is then one of them.
        forced: ids that are written instead of the likeliest ones, first to last: the log-probabilities of a given text.
        exact: compute a float32 model in float32; otherwise as llama.cpp does by itself.
        scales: of the LoRA, as each request asks for it; None for what the server began with.
    """
    job = {
        "model": str(path), "loras": [str(lora)] if lora else [], "exact": exact, "prompt": list(prompt), "n": n,
        "top": top, "stop": list(stop), "forced": list(forced),
        "scales": None if scales is None else list(scales),
    }  # fmt: skip
    result = _run(job)
    top = torch.tensor(result["top"], dtype=torch.float64)
    return Continuation(result["ids"], top[..., 0].long(), top[..., 1])


def _run(job: dict[str, Any]) -> Any:
    done = subprocess.run(
        [sys.executable, str(RUNNER)], input=json.dumps(job), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"llama.cpp failed:\n{done.stdout[-500:]}\n{done.stderr[-2000:]}"
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="session")
def llamacpp_behind() -> Callable[..., list[dict[int, float]]]:
    """See `behind`."""
    pytest.importorskip("xllamacpp")
    return behind


def behind(files: Sequence[tuple[Path, Sequence[int], int]]) -> list[dict[int, float]]:
    """For each (file, prompt, context of the session) llama.cpp's log-probability of every token behind the prompt."""
    job = {"files": [[str(path), list(prompt), context] for path, prompt, context in files]}
    return [{int(token): logprob for token, logprob in each} for each in _run(job)]


@pytest.fixture(scope="session")
def our_logprobs() -> Callable[..., Tensor]:
    """See `score`."""
    return score


def score(model: nn.Module, prompt: Sequence[int], ids: Sequence[int]) -> Tensor:
    """Our model's log-probabilities [len(ids), vocabulary] at each of `ids` after `prompt`; float64."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0].double()
    return torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
