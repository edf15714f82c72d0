"""Rows of single tokens beside the packed tables: PEFT's trainable_token_indices is the judge."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import qgraft
from qgraft.adapters.base import find_adapter
from qgraft.adapters.token_rows import TokenEmbedding, TokenHead, unknown_tokens
from qgraft.checkpoints.gguf_model import load_gguf
from qgraft.data.batches import collate
from qgraft.data.tokenizing import Sample
from qgraft.errors import AdapterError, OptionError, UnsupportedError
from qgraft.passes.decoding import fast_decoding
from qgraft.passes.loss import batch_loss

Maker = Callable[..., Any]
TARGETS = ["q_proj", "up_proj"]
END = 294  # of the vocabulary of the tiny models
BOTH = {"embed_tokens": [5, END, END + 1], "lm_head": [END, 7, END + 1]}


def load_base(tiny: Any) -> PreTrainedModel:
    return load_gguf(tiny.path, torch.float32)[0]


def by_peft(tiny: Any, indices: Any, end: int = END) -> peft.PeftModel:
    """The float model with as many rows as `end` asks for, and PEFT's adapter on it, all of it random."""
    model = copy.deepcopy(tiny.model).eval()
    if end > model.config.vocab_size:
        model.resize_token_embeddings(end, mean_resizing=False)
    options = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, trainable_token_indices=indices)
    theirs = peft.get_peft_model(model, options)
    torch.manual_seed(1)
    with torch.no_grad():
        for _, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)
    return theirs


def take_from(ours: nn.Module, theirs: peft.PeftModel) -> None:
    """Put PEFT's numbers into ours; its names are ours but for the adapter's."""
    state = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
    qgraft.load_lora_state_dict(ours, {name: tensor.detach() for name, tensor in state.items()})


def logits(model: nn.Module, ids: Sequence[int], **options: Any) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([list(ids)]), **options).logits[0]


CASES = [
    ("llama", False, [5, 7], END),  # of the input embedding alone
    ("llama", False, BOTH, END + 2),
    ("qwen2", True, [END, 5, END + 1], END + 2),
    ("qwen2", True, {"embed_tokens": [5, 6], "lm_head": [5, 7]}, END),  # no longer the same rows
    ("gemma", True, [5, END - 1], END),  # a table that is scaled, and has a row less
]


@pytest.mark.spread(2)
@pytest.mark.parametrize(("architecture", "tied", "indices", "end"), CASES)
def test_logits_are_those_of_peft(tiny_gguf: Maker, architecture: str, tied: bool, indices: Any, end: int) -> None:
    tiny = tiny_gguf(architecture, tied=tied)
    theirs, ours = by_peft(tiny, indices, end), load_base(tiny)
    qgraft.attach_lora(ours, r=4, lora_alpha=8, target_modules=TARGETS, trainable_token_indices=indices)
    take_from(ours, theirs)
    count = tiny.model.config.vocab_size
    ids = [3, 5, 6, 7, *range(count, end), 9]
    got, expected = logits(ours, ids), logits(theirs, ids)
    assert got.shape == expected.shape == (len(ids), end)
    assert float((got - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    assert ours.config.vocab_size == end
    without = logits(ours, [3, 5, 9], adapter_names=["__base__"])
    assert torch.allclose(without[:, :count], logits(load_base(tiny), [3, 5, 9]))


@pytest.mark.parametrize(
    ("architecture", "tied", "steps"),
    [
        ("qwen2", True, 3),
        *(pytest.param(*case, 20, marks=pytest.mark.slow) for case in (("llama", False), ("qwen2", True))),
    ],
)
def test_steps_are_those_of_peft(tiny_gguf: Maker, architecture: str, tied: bool, steps: int) -> None:
    """By the loss that a run learns, which computes its gradients in chunks; of a tied model a row has two."""
    tiny, indices = (
        tiny_gguf(architecture, tied=tied),
        [END, 5] if tied else {"embed_tokens": [END, 5], "lm_head": [END]},
    )
    theirs, ours = by_peft(tiny, indices, END + 1), load_base(tiny)
    qgraft.attach_lora(ours, r=4, lora_alpha=8, target_modules=TARGETS, trainable_token_indices=indices)
    take_from(ours, theirs)
    optimizers = [
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3) for model in (ours, theirs)
    ]
    torch.manual_seed(2)
    curves: list[list[float]] = [[], []]
    for _ in range(steps):
        ids = torch.randint(3, 12, (10,)).tolist()
        ids[3], ids[6] = END, END
        losses = (
            batch_loss(ours, collate([Sample(ids, ids, "")])) / 9,
            theirs(torch.tensor([ids]), labels=torch.tensor([ids])).loss,
        )
        for curve, optimizer, loss in zip(curves, optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(float(loss.detach()))
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    assert steps < 20 or curves[0][-1] < curves[0][0]


def test_a_tables_padding_token_learns_nothing_as_with_peft(tiny_gguf: Maker) -> None:
    tiny, ids = tiny_gguf("llama", tied=False), torch.tensor([[3, 7, 5, 7, 9]])
    theirs, ours = by_peft(tiny, [5, 7]), load_base(tiny)
    theirs.get_input_embeddings().original_module.padding_idx = ours.get_input_embeddings().padding_idx = 7
    qgraft.attach_lora(ours, r=4, lora_alpha=8, target_modules=TARGETS, trainable_token_indices=[5, 7])
    take_from(ours, theirs)
    for model in (ours, theirs):
        model(ids, labels=ids).loss.backward()
    (expected,) = (p.grad for name, p in theirs.named_parameters() if "trainable_tokens_delta" in name)
    got = find_adapter(ours, "default").parts["model.embed_tokens"].rows.grad
    assert not expected[1].any() and not got[1].any()
    assert torch.allclose(got[0], expected[0], rtol=1e-4, atol=1e-7) and got[0].any()


def with_new_tokens(tiny: Any, name: str = "new", seed: int = 3) -> PreTrainedModel:
    model = load_base(tiny)
    ids = [5, END]
    attached = qgraft.adapters.attach.attach_lora
    attached(
        model, r=2, target_modules=TARGETS, name=name, trainable_token_indices={"embed_tokens": ids, "lm_head": ids}
    )
    torch.manual_seed(seed)
    with torch.no_grad():
        for _, parameter in find_adapter(model, name).named_parameters():
            parameter.normal_(0, 0.2)
    return model


def test_each_row_of_a_batch_has_its_own_tokens(tiny_gguf: Maker) -> None:
    model = with_new_tokens(tiny_gguf("llama"))
    mixed = torch.tensor([[3, END, 5], [3, 4, 5], [5, 5, END]])
    with torch.no_grad():
        got = model(mixed, adapter_names=["new", None, "new"]).logits
        for row, name in enumerate(["new", None, "new"]):
            qgraft.use_adapter(model, name)
            assert torch.allclose(got[row], model(mixed[row : row + 1]).logits[0], atol=1e-5)
    assert (got[1, :, END:] == torch.finfo(got.dtype).min).all()  # for the base the token is not there
    assert (got[0, :, END:] > -1e3).all()


def test_a_new_token_is_refused_where_its_adapter_is_not_active(tiny_gguf: Maker) -> None:
    model = with_new_tokens(tiny_gguf("llama"))
    assert unknown_tokens(model, ["new"], [1, END, END + 1, -1]) == [-1, END + 1]
    assert unknown_tokens(model, [], [1, END]) == [END]
    with qgraft.adapters_off(model), pytest.raises(AdapterError, match=rf"token {END} has no row here"):
        model(torch.tensor([[3, END]]))
    with pytest.raises(AdapterError, match="no row here"):
        model(torch.tensor([[3, END + 1]]))


def test_the_model_is_as_before_when_the_adapter_is_taken_off(tiny_gguf: Maker) -> None:
    model, ids = with_new_tokens(tiny_gguf("llama")), [3, 5, 9]
    assert isinstance(model.get_input_embeddings(), TokenEmbedding)
    assert isinstance(model.get_output_embeddings(), TokenHead)
    copied = copy.deepcopy(model)
    qgraft.detach_adapter(model)
    assert model.config.vocab_size == END
    assert logits(model, ids).equal(logits(load_base(tiny_gguf("llama")), ids))
    assert logits(copied, [3, END]).shape == (2, END + 1)  # a copy has its own


def test_texts_decoded_by_kernels_are_those_of_the_model(tiny_gguf: Maker) -> None:
    model, ids = with_new_tokens(tiny_gguf("llama")), torch.tensor([[3, END, 5]])
    plain = model.generate(ids, max_new_tokens=6, do_sample=False)
    with fast_decoding(model):
        assert model.generate(ids, max_new_tokens=6, do_sample=False).equal(plain)


def test_rows_begin_as_their_tokens_are(tiny_gguf: Maker) -> None:
    tiny = tiny_gguf("llama")
    model = load_base(tiny)
    qgraft.attach_lora(model, trainable_token_indices={"embed_tokens": [5, END], "lm_head": [END]})
    state = qgraft.lora_state_dict(model)
    table, head = tiny.model.get_input_embeddings().weight, tiny.model.get_output_embeddings().weight
    name = "base_model.model.{}.token_adapter.trainable_tokens_delta"
    torch.testing.assert_close(
        state[name.format("model.embed_tokens")], torch.stack([table[5], table.mean(0)]).detach()
    )
    torch.testing.assert_close(state[name.format("lm_head")][0], head.mean(0).detach())


def refused(model: nn.Module, error: type[Exception], match: str, indices: Any, **options: Any) -> None:
    before = qgraft.adapter_names(model)
    with pytest.raises(error, match=match):
        qgraft.attach_lora(model, name="wrong", trainable_token_indices=indices, **options)
    assert qgraft.adapter_names(model) == before


def test_what_has_no_meaning_is_refused(tiny_gguf: Maker) -> None:
    model = load_base(tiny_gguf("llama"))
    refused(model, AdapterError, "rows in both: none are given for lm_head", [END])
    refused(model, AdapterError, "'up_proj' is neither", {"up_proj": [1]})
    refused(model, AdapterError, "token 3 is there twice", [3, 3])
    refused(model, AdapterError, "expected a list of token ids", [-1])
    refused(model, AdapterError, "expected a list of token ids", [])
    refused(model, AdapterError, "not there together", {"lm_head": [3]}, target_modules="lm_head")
    refused(model, AdapterError, "rows behind the end", [1 << 30])
    capped = load_base(tiny_gguf("gemma2", tied=True))
    refused(capped, UnsupportedError, "caps its logits", [END])
    qgraft.attach_lora(model, name="a", trainable_token_indices=[3])
    qgraft.attach_lora(model, name="b", trainable_token_indices=[3])
    with pytest.raises(AdapterError, match="both have a row of token 3"):
        qgraft.use_adapter(model, {"a": 1.0, "b": 1.0})
    with pytest.raises(AdapterError, match="expected 1"):
        qgraft.use_adapter(model, {"a": 0.5})
    with pytest.raises(UnsupportedError, match="rows of single tokens"):
        qgraft.combine(model, {"a": 1.0}, "c")
    with pytest.raises((AdapterError, OptionError), match=r"no linear layer is named|rows of single tokens"):
        qgraft.attach_lora(model, name="h", target_modules="embed_tokens")
