"""Make golden.json: TRL's generalized_jsd_loss and its gradients, on the logits of logits().

python tests/golden/distillation/make.py      needs trl; made with trl 1.16.0, torch 2.13.0
"""

import json
import os
import warnings
from importlib.metadata import version
from pathlib import Path

import torch

os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
BETAS, TEMPERATURES, PLACES, VOCABULARY = (0.0, 0.1, 0.5, 1.0), (1.0, 2.5), 6, 23


def logits(seed: int) -> torch.Tensor:
    """[places, vocabulary] float64, some of them nearly certain."""
    drawn = torch.randn(PLACES, VOCABULARY, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn * torch.linspace(0.5, 6.0, PLACES, dtype=torch.float64)[:, None]


def made() -> dict[str, dict[str, list[float]]]:
    warnings.simplefilter("ignore")
    from trl.experimental.gkd import GKDTrainer

    found = {}
    for beta in BETAS:
        for temperature in TEMPERATURES:
            student, teacher = logits(1).requires_grad_(), logits(2)
            loss = GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, temperature=temperature)
            loss.backward()
            gradient = [float(f"{value:.10g}") for value in student.grad[:, :3].flatten().tolist()]
            found[f"{beta} {temperature}"] = {"loss": [float(loss)], "gradient": gradient}
    return found


if __name__ == "__main__":
    libraries = {name: version(name) for name in ("trl", "torch")}
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(each)}" for name, each in made().items())
    head = json.dumps({"made_with": libraries}, indent=1)[:-2]
    Path(__file__).with_name("golden.json").write_text(f'{head},\n "losses": {{\n{lines}\n }}\n}}\n')
