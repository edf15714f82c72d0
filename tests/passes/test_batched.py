"""Texts that share passes: each as alone, to rounding; and models for which that is not so are told apart."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import transformers

from qgraft.adapters.attach import attach_lora
from qgraft.adapters.base import find_adapter
from qgraft.adapters.choose import use_adapter
from qgraft.attention import attending, attention_of
from qgraft.errors import UnsupportedError
from qgraft.passes.batched import CACHED, Piece, next_logits
from qgraft.passes.batched_trial import why_not_batched, why_not_own
from qgraft.passes.key_values import BLOCK, KeyValues, slots_of
from qgraft.passes.own_passes import OwnPasses

SMALL = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def small(name: str = "Llama", **options: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SMALL, **options)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.mul_(6)  # so that attention is not nearly even
    return model


def adapted(model: Any) -> Any:
    for name in ("law", "med"):
        attach_lora(model, r=2, name=name, target_modules=r".*_proj|lm_head")
        for lora in find_adapter(model, name).parts.values():
            torch.nn.init.normal_(lora.lora_B, 0, 0.2)
    use_adapter(model, None)
    return model


def alone(model: Any, ids: list[int], mix: Mapping[str, float]) -> torch.Tensor:
    use_adapter(model, dict(mix))
    with torch.no_grad():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
    use_adapter(model, None)
    return logits


def test_windows_longer_than_the_trial_and_every_mix() -> None:
    model = adapted(small("Mistral", sliding_window=30))
    assert why_not_batched(model) is None
    texts = [torch.randint(4, 40, (length,)).tolist() for length in (50, 33, 7, 29)]
    mixes: list[dict[str, float]] = [{"law": 1.0}, {}, {"law": 0.5, "med": -1.0}, {"med": 1.0}]
    memory = KeyValues(20 * BLOCK)
    blocks = [[5, 0, 9, 2], [3, 7, 1], [4], [11, 6]]
    past = [0, 0, 0, 0]
    with torch.inference_mode(), attending(model, CACHED):
        for stops in ((20, 33, 1, 28), (48, 33, 2, 28), (49, 33, 6, 29), (50, 33, 7, 29)):
            pieces = [
                Piece(texts[n][:stop], past[n], slots_of(blocks[n], stop), loras=mixes[n])
                for n, stop in enumerate(stops)
                if stop > past[n]
            ]
            got = next_logits(model, memory, pieces)
            past = list(stops)
            with attending(model, "sdpa"):
                expected = torch.stack([alone(model, list(piece.text), piece.loras) for piece in pieces])
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(alone(model, texts[0], {}), alone(model, texts[0], {"law": 1.0}), atol=0.1)


def test_models_whose_texts_cannot_share_passes_are_told() -> None:
    bloom = transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=40, hidden_size=32, n_layer=2, n_head=4)
    ).eval()
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    sinks = small("GptOss", num_local_experts=4, num_experts_per_tok=2, head_dim=8, sliding_window=4)
    for model, why in (
        (bloom, "told positions"), (small(rope_parameters=rope), "longest text of a pass"), (sinks, "s_aux"),
    ):  # fmt: skip
        before = attention_of(model)
        assert why in str(why_not_batched(model)) and why_not_own(model) is None and attention_of(model) == before
    rwkv = transformers.RwkvForCausalLM(
        transformers.RwkvConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2)
    ).eval()
    assert "in its modules" in str(why_not_own(rwkv))


def test_a_head_that_does_more_is_found_out() -> None:
    class Doubled(transformers.LlamaForCausalLM):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 2
            return output

    torch.manual_seed(0)
    model = Doubled(transformers.LlamaConfig(**SMALL)).eval()
    assert "come out otherwise in pieces" in str(why_not_batched(model)) and why_not_own(model) is None


def test_experts_that_see_some_tokens_refuse_a_mixed_row_alone() -> None:
    from torch import nn

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.inner(x[:, :1]), x[:, 1:]], dim=1)

    model = small()
    model.model.layers[0].mlp = Half()
    attach_lora(model, r=2, name="law")
    memory = KeyValues(4 * BLOCK)
    first = Piece([5, 6, 7], 0, slots_of([0], 3), loras={"law": 1.0})
    with torch.inference_mode(), attending(model, CACHED):
        with pytest.raises(UnsupportedError, match="cannot share a pass"):
            next_logits(model, memory, [first, Piece([5, 6], 0, slots_of([1], 2))])
        assert next_logits(model, memory, [first]).shape == (1, 40)


def test_own_passes_go_on_from_a_cache() -> None:
    model = adapted(small())
    text = torch.randint(4, 40, (12,)).tolist()
    own = OwnPasses(model)
    with torch.inference_mode():
        for stop in (5, 6, 12):
            got = own.next_logits(text[:stop], {"law": 0.5})
            torch.testing.assert_close(got, alone(model, text[:stop], {"law": 0.5}), rtol=1e-4, atol=1e-4)
