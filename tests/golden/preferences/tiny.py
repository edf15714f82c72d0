"""The tiny model and the rows that TRL and we compute: weights by a formula, so that nothing has to be stored."""

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 32
TARGETS = ("q_proj", "v_proj", "down_proj")
RANK, ALPHA = 2, 4.0
PAIRS = [  # prompt, chosen, rejected; 1 ends an answer
    ([2, 3, 4, 5], [6, 7, 1], [8, 9, 10, 1]),
    ([2, 11, 12], [13, 1], [14, 15, 16, 17, 1]),
    ([2, 3, 18, 19, 20, 21], [22, 23, 24, 1], [25, 1]),
    ([2, 26], [27, 28, 29, 1], [27, 30, 1]),
]
NUMBERS = {"beta": 0.3, "label_smoothing": 0.1, "simpo_gamma": 0.5, "desirable_weight": 1.5, "undesirable_weight": 0.7}


def filled(shape: tuple[int, ...], number: int, size: float) -> Tensor:
    """Numbers of both signs that differ from place to place, and from tensor to tensor."""
    count = torch.Size(shape).numel()
    return (size * torch.sin(torch.arange(count, dtype=torch.float64) * 1.7 + 0.9 * number)).reshape(shape).float()


def tiny_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, attn_implementation="sdpa",
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for number, (name, parameter) in enumerate(model.named_parameters()):
        parameter.data = torch.ones_like(parameter) if "norm" in name else filled(tuple(parameter.shape), number, 0.3)
    return model.eval()


def fill_lora(tensors: dict[str, nn.Parameter]) -> None:
    """A and B of each layer by its name, so that both sides have the same ones; `tensors` are theirs by PEFT's names."""
    for number, name in enumerate(sorted(tensors)):
        tensors[name].data = filled(tuple(tensors[name].shape), number, 0.2)
