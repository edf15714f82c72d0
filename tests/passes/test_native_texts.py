"""Texts that share a pass in C: each as transformers' own pass over it alone, and as the facade's over the same memory."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import transformers

import qgraft
from qgraft.adapters.attach import attach_lora, detach_adapter
from qgraft.adapters.base import find_adapter
from qgraft.adapters.choose import use_adapter
from qgraft.attention import attending
from qgraft.kernels import native_status
from qgraft.passes.batched import CACHED, Piece, next_logits
from qgraft.passes.key_values import BLOCK, KeyValues, slots_of
from qgraft.passes.native_texts import NativeTexts

pytestmark = pytest.mark.skipif(not native_status()[0], reason="the native kernels are not built")
SHAPE = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "Llama": {"tie_word_embeddings": True},
    "Mistral": {"sliding_window": 30},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1},
    "Qwen3": {"head_dim": 32},
}
MIXES: list[dict[str, float]] = [{"law": 1.0}, {}, {"law": 0.5, "med": -1.0}, {"med": 1.0}]
STOPS = ((20, 33, 1, 28), (48, 33, 2, 28), (49, 33, 6, 29), (50, 33, 7, 29))  # of the texts, pass by pass
BLOCKS = [[5, 0, 9, 2], [3, 7, 1], [4], [11, 6]]


def packed(kind: str) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SHAPE, **KINDS[kind])
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.mul_(6)  # so that attention is not nearly even
    qgraft.quantize(model, "q8_0")
    for name, targets in (("law", r".*_proj|lm_head"), ("med", r".*_proj|.*embed_tokens")):
        add(model, name, target_modules=targets)
    use_adapter(model, None)
    return model


def add(model: Any, name: str, **options: Any) -> None:
    attach_lora(model, r=2, name=name, **options)
    for lora in find_adapter(model, name).parts.values():
        torch.nn.init.normal_(lora.lora_B, 0, 0.2)


def alone(model: Any, ids: list[int], mix: Mapping[str, float]) -> torch.Tensor:
    use_adapter(model, dict(mix))
    with torch.no_grad(), attending(model, "sdpa"):
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
    use_adapter(model, None)
    return logits


@pytest.mark.parametrize("turns", [False, True], ids=["in C", "by turns"])
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_windows_and_every_mix(kind: str, turns: bool) -> None:
    """Prompts whole and in parts, single tokens, in scattered blocks; all in C, or with the facade's pass by turns."""
    model = packed(kind)
    texts = [torch.randint(4, 64, (length,)).tolist() for length in (50, 33, 7, 29)]
    memory, native, past = KeyValues(20 * BLOCK), NativeTexts(model), [0, 0, 0, 0]
    with torch.inference_mode(), attending(model, CACHED):
        for number, stops in enumerate(STOPS):
            pieces = [
                Piece(texts[n][:stop], past[n], slots_of(BLOCKS[n], stop), loras=MIXES[n])
                for n, stop in enumerate(stops)
                if stop > past[n]
            ]
            past = list(stops)
            in_c = number % 2 == 0 or not turns
            got = native.next_logits(memory, pieces) if in_c else next_logits(model, memory, pieces)
            assert got is not None
            expected = torch.stack([alone(model, list(piece.text), piece.loras) for piece in pieces])
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    assert native.steps == (2 if turns else 4)
    assert not torch.allclose(alone(model, texts[0], {}), alone(model, texts[0], {"law": 1.0}), atol=0.1)


def test_a_prefix_in_front_is_seen_from_beyond_every_window() -> None:
    """As by the facade's pass, which tests/serving compares with the model's own."""
    model = packed("Mistral")
    memory, native = KeyValues(6 * BLOCK), NativeTexts(model)
    text = torch.randint(4, 64, (40,)).tolist()
    front = torch.arange(5 * BLOCK, 5 * BLOCK + 5)
    with torch.inference_mode(), attending(model, CACHED):
        for layer in range(2):
            memory.put(layer, front, torch.randn(2, 5, 16) * 3, torch.randn(2, 5, 16))
        results = []
        for passes in (native.next_logits, lambda memory, pieces: next_logits(model, memory, pieces)):
            for past, stop in ((0, 38), (38, 39), (39, 40)):
                slots = torch.cat([front, slots_of([2, 0, 1], stop)])
                got = passes(memory, [Piece(text[:stop], past, slots, prefix=5, shift=5)])
            results.append(got)
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3 * float(results[0].abs().max()))


def test_what_is_attached_and_taken_off_is_noticed_and_what_is_said_to_be_changed() -> None:
    model = packed("Llama")
    memory, native = KeyValues(4 * BLOCK), NativeTexts(model)

    def passed(mix: dict[str, float]) -> torch.Tensor:
        with torch.inference_mode():
            got = native.next_logits(memory, [Piece([5, 6, 7], 0, slots_of([1], 3), loras=mix)])
        assert got is not None
        expected = alone(model, [5, 6, 7], mix)[None]
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
        return got

    before = passed({"law": 1.0})
    detach_adapter(model, "law")
    add(model, "law")
    use_adapter(model, None)
    assert not torch.allclose(passed({"law": 1.0}), before, rtol=0.1)
    base = passed({})
    layer = model.model.layers[0].mlp.up_proj.base
    layer.replace(qgraft.formats.quantize(torch.randn(96, 64), "q8_0"))
    native.changed = True
    assert not torch.allclose(passed({}), base, rtol=0.1)


def test_decoders_and_adapters_that_c_does_not_compute_are_left_to_the_facade() -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).eval()  # float weights
    piece = Piece([5], 0, slots_of([0], 1))
    assert NativeTexts(model).next_logits(KeyValues(BLOCK), [piece]) is None
    model = packed("Llama")
    native, memory = NativeTexts(model), KeyValues(BLOCK)
    memory.put(0, torch.arange(1), torch.zeros(2, 1, 16, dtype=torch.float16), torch.zeros(2, 1, 16))
    with torch.inference_mode():
        assert native.next_logits(memory, [piece]) is None  # what the facade has laid out otherwise
        assert native.next_logits(KeyValues(BLOCK), [piece]) is not None
        model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
        native.changed = True
        assert native.next_logits(KeyValues(BLOCK), [piece]) is None
