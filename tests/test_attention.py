"""Both attention functions against softmax attention written out in float64, in values and gradients."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

from qgraft.attention import Prefix, attend_samples, attend_with_prefix, note_mask

HEADS, DIM, SCALE = 4, 8, 0.3


class Layer(nn.Module):
    """As much of an attention layer as these functions look at."""

    layer_idx = 1

    def __init__(self, kv_heads: int) -> None:
        super().__init__()
        self.num_key_value_groups = HEADS // kv_heads
        self.eval()


def random_inputs(kv_heads: int, tokens: int, keys: int | None = None, batch: int = 1) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(HEADS, tokens), (kv_heads, keys or tokens), (kv_heads, keys or tokens)]
    return [torch.randn(batch, *shape, DIM, dtype=torch.float64, requires_grad=True) for shape in shapes]


def random_prefix(kv_heads: int, length: int, batch: int = 1) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(batch, kv_heads, length, DIM, dtype=torch.float64, requires_grad=True) for _ in range(2)]


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, softcap: float | None = None) -> Tensor:
    """The formula, head by head: queries [B, H, T, D] see the keys that `visible` [B, T, K] allows."""
    heads = []
    for head in range(HEADS):
        group = head * k.shape[1] // HEADS
        scores = SCALE * torch.einsum("btd,bkd->btk", q[:, head], k[:, group])
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        weights = torch.exp(scores) * visible
        heads.append((weights / weights.sum(-1, keepdim=True)) @ v[:, group])
    return torch.stack(heads, dim=2)


def same_with_gradients(got: Tensor, expected: Tensor, inputs: Sequence[Tensor], tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    weights = torch.randn_like(expected)
    grads = torch.autograd.grad((got * weights).sum(), inputs)
    references = torch.autograd.grad((expected * weights).sum(), inputs)
    for grad, reference in zip(grads, references, strict=True):
        torch.testing.assert_close(grad, reference, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize(
    ("window", "contexts"), [(None, None), (1, None), (3, None), (100, None), (None, [1, 3, 4, 0])]
)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_samples_of_a_row_attend_to_the_prefix_and_to_themselves(
    kv_heads: int, window: int | None, contexts: list[int] | None, prefix: int
) -> None:
    lengths = [1, 7, 4, 12]
    total = sum(lengths)
    inputs = random_inputs(kv_heads, total)
    front = random_prefix(kv_heads, prefix) if prefix else []
    sample = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    start = torch.tensor([0, 1, 8, 12])[sample]
    distance = torch.arange(total)[:, None] - torch.arange(total)
    visible = (distance >= 0) & (distance < (window or total))
    if contexts is not None:
        visible |= torch.arange(total) - start < torch.tensor(contexts)[sample]
    visible &= sample[:, None] == sample
    visible = torch.cat([torch.ones(total, prefix, dtype=torch.bool), visible], dim=1)
    q, k, v = inputs
    if front:
        k, v = torch.cat([front[0], k], dim=2), torch.cat([front[1], v], dim=2)
    got, _ = attend_samples(
        Layer(kv_heads), *inputs, noted(total, window) if contexts is None else None, scaling=SCALE,
        cu_seq_lens_q=torch.tensor([0, 1, 8, 12, 24]),
        context_lens=None if contexts is None else torch.tensor(contexts),
        prefix=Prefix({1: (front[0], front[1])}) if front else None,
    )  # fmt: skip
    same_with_gradients(got, softmax_attention(q, k, v, visible[None]), [*inputs, *front])


def noted(tokens: int, window: int | None = None, visible: Any = causal_mask_function) -> Tensor:
    """What transformers' own functions for masks would make, seen by SAMPLES."""
    if window is not None:
        visible = sliding_window_causal_mask_function(window)
    return note_mask(1, tokens, tokens, visible, local_size=window)


@pytest.mark.parametrize(
    ("visible", "local_size"),
    [
        (bidirectional_mask_function, None),
        (causal_mask_function, 3),
        (sliding_window_causal_mask_function(3), None),
        (sliding_window_causal_mask_function(3), 4),
        (sliding_window_bidirectional_mask_function(3), 3),
        (chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.long)), 4),
        (lambda batch, head, query, key: key <= query - 1, None),
    ],
)
def test_samples_refuse_other_masks(visible: Any, local_size: int | None) -> None:
    mask = note_mask(1, 24, 24, visible, local_size=local_size)
    with pytest.raises(ValueError, match="neither causal nor a sliding window"):
        attend_samples(Layer(2), *random_inputs(2, 24), mask, cu_seq_lens_q=torch.tensor([0, 1, 8, 12, 24]))


def test_samples_refuse_a_mask_that_was_changed_or_made() -> None:
    for mask in (noted(5)[:, :, :, :5].clone(), torch.ones(1, 1, 5, 5, dtype=torch.bool)):
        with pytest.raises(ValueError, match="within samples of a padding-free batch only"):
            attend_samples(Layer(2), *random_inputs(2, 5), mask, cu_seq_lens_q=torch.tensor([0, 5]))
    for changed in ({"batch_size": 2}, {"attention_mask": torch.ones(1, 5)}, {"kv_length": 6}, {"q_offset": 1}):
        with pytest.raises(ValueError, match="one row of samples"):
            note_mask(
                **{"batch_size": 1, "q_length": 5, "kv_length": 5, "mask_function": causal_mask_function} | changed
            )


def test_samples_attend_under_autocast_as_torchs_own_attention_does() -> None:
    """Queries and keys that were rotated in float32, values in half precision."""
    q, k, v = (part.detach().float() for part in random_inputs(2, 12))
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = attend_samples(
            Layer(2), q, k, v.bfloat16(), noted(12), scaling=SCALE, cu_seq_lens_q=torch.tensor([0, 12])
        )
        expected = nn.functional.scaled_dot_product_attention(
            q, k, v.bfloat16(), is_causal=True, scale=SCALE, enable_gqa=True
        )
    assert got.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(got, expected.transpose(1, 2))


def causal(tokens: int, keys: int) -> Tensor:
    return (torch.arange(keys - tokens, keys)[:, None] >= torch.arange(keys))[None]


def additive(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)


@pytest.mark.spread(38)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    ("tokens", "keys", "form"),
    [(6, 6, "none"), (6, 6, "bool"), (6, 6, "float"), (1, 9, "none"), (1, 9, "bool"), (4, 9, "bool"), (4, 9, "float")],
)
@pytest.mark.parametrize("lengths", [[3, 3], [0, 3], [2, 3]])
def test_all_tokens_see_the_prefix_of_their_row(
    lengths: list[int], tokens: int, keys: int, form: str, kv_heads: int, softcap: float | None
) -> None:
    inputs, front = random_inputs(kv_heads, tokens, keys, batch=2), random_prefix(kv_heads, 3, batch=2)
    visible = causal(tokens, keys).expand(2, -1, -1).clone()
    if form != "none":
        visible[0, :, 1] = False  # something that is no triangle
    mask = {"none": None, "bool": visible[:, None], "float": additive(visible[:, None])}[form]
    seen = torch.arange(3) < torch.tensor(lengths)[:, None]
    prefix = Prefix({1: (front[0], front[1])}, None if lengths == [3, 3] else seen)
    got, _ = attend_with_prefix(Layer(kv_heads), *inputs, mask, prefix=prefix, softcap=softcap, scaling=SCALE)
    q, k, v = inputs
    k, v = torch.cat([front[0], k], dim=2), torch.cat([front[1], v], dim=2)
    visible = torch.cat([seen[:, None].expand(-1, tokens, -1), visible], dim=-1)
    tolerance = 1e-9 if softcap is None else 1e-5  # as in the models that cap, the softmax is float32
    same_with_gradients(got, softmax_attention(q, k, v, visible, softcap), [*inputs, *front], tolerance)


def test_one_prefix_serves_every_row() -> None:
    inputs, (keys, values) = random_inputs(2, 5, batch=3), random_prefix(2, 4)
    got, _ = attend_with_prefix(Layer(2), *inputs, None, prefix=Prefix({1: (keys, values)}), scaling=SCALE)
    for row in range(3):
        alone, _ = attend_with_prefix(
            Layer(2), *(x[row : row + 1] for x in inputs), None, prefix=Prefix({1: (keys, values)}), scaling=SCALE
        )
        torch.testing.assert_close(got[row : row + 1], alone)


def test_an_empty_place_of_a_cache_is_not_seen() -> None:
    """A cache of a fixed size, at the first step: more keys than tokens, and no mask, since attention is causal."""
    inputs, (keys, values) = random_inputs(2, 5, 8), random_prefix(2, 3)
    got, _ = attend_with_prefix(Layer(2), *inputs, None, prefix=Prefix({1: (keys, values)}), scaling=SCALE)
    q, k, v = (
        inputs[0],
        *(torch.cat(pair, dim=2) for pair in ((keys, inputs[1][:, :, :5]), (values, inputs[2][:, :, :5]))),
    )
    visible = torch.cat([torch.ones(1, 5, 3, dtype=torch.bool), causal(5, 5)], dim=-1)
    torch.testing.assert_close(got, softmax_attention(q, k, v, visible))


@pytest.mark.parametrize("masked", [False, True])
def test_without_a_prefix_it_is_transformers_own_attention_bit_by_bit(masked: bool) -> None:
    inputs = random_inputs(2, 6)
    mask = causal(6, 6)[:, None] if masked else None
    expected, _ = sdpa_attention_forward(Layer(2), *inputs, mask, scaling=SCALE)
    assert torch.equal(attend_with_prefix(Layer(2), *inputs, mask, scaling=SCALE)[0], expected)


def test_capped_attention_drops_weights_in_training() -> None:
    inputs: Any = random_inputs(2, 6)
    torch.manual_seed(0)
    kept = attend_with_prefix(Layer(2), *inputs, None, softcap=2.0, scaling=SCALE)[0]
    dropped = attend_with_prefix(Layer(2), *inputs, None, softcap=2.0, scaling=SCALE, dropout=0.5)[0]
    assert not torch.allclose(kept, dropped)
    mean = sum(
        attend_with_prefix(Layer(2), *inputs, None, softcap=2.0, scaling=SCALE, dropout=0.5)[0].detach()
        for _ in range(3000)
    )
    torch.testing.assert_close(mean / 3000, kept.detach(), rtol=0, atol=0.12)


def test_keys_take_the_dtype_of_the_layer() -> None:
    query, key, value = (x.detach().bfloat16() for x in random_inputs(2, 5))
    keys, values = (x.detach().float() for x in random_prefix(2, 3))
    got, _ = attend_with_prefix(Layer(2), query, key, value, None, prefix=Prefix({1: (keys, values)}))
    assert got.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "given",
    [
        {"attention_mask": torch.ones(1)}, {"cu_seq_lens_q": None}, {"softcap": 1.0}, {"s_aux": torch.ones(2)},
        {"indices": torch.zeros(1, 5, 2)},
    ],
)  # fmt: skip
def test_samples_refuse_what_they_do_not_compute(given: dict[str, Any]) -> None:
    arguments = {"attention_mask": noted(5), "cu_seq_lens_q": torch.tensor([0, 5]), **given}
    with pytest.raises(ValueError, match="within samples of a padding-free batch only"):
        attend_samples(Layer(2), *random_inputs(2, 5), **arguments)


@pytest.mark.parametrize("name", ["s_aux", "indices"])
def test_a_prefix_is_refused_where_attention_has_more_than_keys_and_values(name: str) -> None:
    with pytest.raises(ValueError, match=f"attends without {name}"):
        attend_with_prefix(Layer(2), *random_inputs(2, 5), None, **{name: torch.ones(1)})
    attend_with_prefix(Layer(2), *random_inputs(2, 5), None, **{name: None, "position_ids": torch.arange(5)[None]})
