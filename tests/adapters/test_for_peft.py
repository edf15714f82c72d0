"""PEFT's LoRAs on packed layers against PEFT's on the same weights in float."""

import copy
import warnings

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import qgraft
from qgraft.adapters.peft_layers import PeftEmbedding, PeftLinear
from qgraft.errors import AdapterError, OptionError, UnsupportedError
from qgraft.linear import QuantizedLinear

TARGETS = ["q_proj", "down_proj", "embed_tokens"]


@pytest.fixture
def pair(tiny_gguf):
    """(packed, float) models of one file."""

    def make(architecture="llama", **options):
        made = tiny_gguf(architecture, **options)
        return qgraft.load(made.path)[0], copy.deepcopy(made.model)

    return make


def config(**options):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "init_lora_weights": False, **options})


def both(packed, plain, **options):
    """The two wrapped by PEFT, with the same adapter."""
    ours = get_peft_model(packed, qgraft.peft_config(packed, config(**options)))
    theirs = get_peft_model(plain, config(**options))
    copy_loras(ours, theirs)
    return ours.eval(), theirs.eval()


def copy_loras(ours, theirs):
    values = {name: p for name, p in theirs.named_parameters() if "lora_" in name}
    mine = {name: p for name, p in ours.named_parameters() if "lora_" in name}
    assert mine.keys() == values.keys()
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(values[name] * 0.1)
            values[name].mul_(0.1)


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gemma"])
@pytest.mark.spread(2)
def test_logits_and_gradients_are_those_on_float_weights(pair, random_ids, architecture):
    ours, theirs = both(*pair(architecture))
    ids = random_ids(theirs.get_base_model()) if callable(random_ids) else random_ids
    losses = [model(input_ids=ids, labels=ids) for model in (ours, theirs)]
    close(losses[0].logits, losses[1].logits)
    for each in losses:
        each.loss.backward()
    grads = [{n: p.grad for n, p in model.named_parameters() if p.requires_grad} for model in (ours, theirs)]
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) == 2 * 5
    for name, grad in grads[1].items():
        assert grad.abs().max() > 0
        torch.testing.assert_close(grads[0][name], grad, atol=1e-5, rtol=1e-3)
    kinds = {type(m) for m in ours.modules() if hasattr(m, "adapter_layer_names")}
    assert kinds == {PeftLinear, PeftEmbedding}
    with ours.disable_adapter(), theirs.disable_adapter():
        close(ours(ids).logits, theirs(ids).logits)


def test_several_adapters_are_added_chosen_mixed_and_deleted(pair, random_ids):
    packed, plain = pair()
    ours, theirs = both(packed, plain)
    ids = random_ids(plain)
    for model in (ours, theirs):
        model.add_adapter("two", config(r=2, use_rslora=True))
    copy_loras(ours, theirs)
    for names in ("two", "default"):
        ours.set_adapter(names), theirs.set_adapter(names)
        close(ours(ids).logits, theirs(ids).logits)
    rows = ["two", "__base__"]
    close(ours(ids, adapter_names=rows).logits, theirs(ids, adapter_names=rows).logits)
    ours.delete_adapter("default"), theirs.delete_adapter("default")
    ours.set_adapter("two"), theirs.set_adapter("two")
    close(ours(ids).logits, theirs(ids).logits)
    assert isinstance(ours.unload().model.layers[0].self_attn.q_proj, QuantizedLinear)


def test_adapters_go_from_peft_to_qgraft_and_back(pair, random_ids, tmp_path):
    packed, plain = pair()
    ours, _ = both(packed, plain)
    ids = random_ids(plain)
    expected = ours(ids).logits.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours.save_pretrained(tmp_path / "peft")
    base = ours.unload()
    assert (base(ids).logits - expected).abs().max() > 1e-3
    qgraft.load_adapter(base, tmp_path / "peft")
    close(base(ids).logits, expected)
    qgraft.save_adapter(base, tmp_path / "qgraft")
    qgraft.detach_adapter(base)
    stored = qgraft.peft_config(base, LoraConfig.from_pretrained(tmp_path / "qgraft"))
    again = PeftModel.from_pretrained(base, tmp_path / "qgraft", config=stored)
    close(again(ids).logits, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_stay_in_float32_on_a_model_of_half_precision(pair, random_ids, dtype):
    packed, plain = pair()
    packed.to(dtype)
    ours = get_peft_model(packed, qgraft.peft_config(packed, config()))
    out = ours(random_ids(plain))
    assert out.logits.dtype == dtype and out.logits.isfinite().all()
    assert {p.dtype for n, p in ours.named_parameters() if "lora_" in n} == {torch.float32}


@pytest.mark.parametrize("architecture", ["gemma3n", "gpt2"])  # layers whose weights the model reads; Conv1D
def test_all_linear_is_what_peft_means(pair, architecture):
    packed, plain = pair(architecture)
    ours = get_peft_model(packed, qgraft.peft_config(packed, config(target_modules="all-linear")))
    theirs = get_peft_model(plain, config(target_modules="all-linear"))
    assert set(ours.targeted_module_names) == set(theirs.targeted_module_names)


@pytest.mark.parametrize(
    "options",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"trainable_token_indices": [1]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["mlp"]},  # its layers are packed
        {"modules_to_save": ["head"]},  # PEFT takes the end of any name
        {"bias": "all"},  # which would be trained in the base
        {"ensure_weight_tying": True},
        {"target_parameters": ["q_proj.weight"]},
    ],
)
def test_what_peft_does_to_float_weights_is_refused(pair, options):
    packed, _ = pair()
    with pytest.raises(OptionError, match=r"packed[\s\S]*hint:"):
        qgraft.peft_config(packed, config(**options))
    ours = get_peft_model(packed, qgraft.peft_config(packed, config()))
    with pytest.raises(OptionError, match=r"packed[\s\S]*hint:"):
        ours.add_adapter("two", config(**options))


@pytest.mark.parametrize("options", [{"use_dora": True}, {"init_lora_weights": "mica"}])
@pytest.mark.parametrize("architecture", ["llama", "gemma"])
@pytest.mark.spread(2)
def test_peft_reads_the_weight_where_it_only_reads_it(pair, random_ids, architecture, options):
    packed, plain = pair(architecture)
    ours = get_peft_model(packed, qgraft.peft_config(packed, config(**options)))
    theirs = get_peft_model(plain, config(**options))
    magnitudes = [p for name, p in theirs.named_parameters() if "magnitude" in name]
    for parameter in magnitudes:
        parameter.data.mul_(1.1)
    mine, values = (dict(model.named_parameters()) for model in (ours, theirs))
    assert {name for name, p in mine.items() if p.requires_grad} == {n for n, p in values.items() if p.requires_grad}
    for name in (name for name in values if "lora_" in name):
        if "use_dora" not in options and ("lora_B" in name or "embedding_B" in name):
            close(mine[name].abs(), values[name].abs())  # MiCA's start: singular vectors of the weight
        mine[name].data.copy_(values[name])
    ids = random_ids(plain)
    losses = [model(input_ids=ids, labels=ids) for model in (ours, theirs)]
    close(losses[0].logits, losses[1].logits)
    for each in losses:
        each.loss.backward()
    for name, p in values.items():
        if p.requires_grad:
            torch.testing.assert_close(mine[name].grad, p.grad, atol=1e-5, rtol=1e-3)


def test_a_second_adapter_may_be_on_other_layers(pair, random_ids):
    packed, plain = pair()
    ours, theirs = both(packed, plain, target_modules=["q_proj", "lm_head"])
    ours.add_adapter("two", qgraft.peft_config(ours, config(target_modules="all-linear")))
    theirs.add_adapter("two", config(target_modules="all-linear"))
    assert set(ours.base_model.targeted_module_names) == set(theirs.base_model.targeted_module_names)
    copy_loras(ours, theirs)
    ids = random_ids(plain)
    for model in (ours, theirs):
        model.base_model.set_adapter(["default", "two"])
    close(ours(ids).logits, theirs(ids).logits)


def test_nothing_is_learned_for_the_padding_token(pair, random_ids, tmp_path):
    pad = {"config": {"pad_token_id": 3}, "metadata": {"tokenizer.ggml.padding_token_id": 3}}
    ours, theirs = both(*pair(**pad), target_modules=["embed_tokens"])
    ids = random_ids(theirs.get_base_model())
    ids[:, 2:4] = 3
    for model in (ours, theirs):
        model(input_ids=ids, labels=ids).loss.backward()
    grads = [next(p.grad for n, p in model.named_parameters() if "embedding_A" in n) for model in (ours, theirs)]
    assert not grads[1][:, 3].any() and grads[1].any()
    close(*grads)
    ours.save_pretrained(tmp_path, save_embedding_layers=False)
    base = ours.unload()
    qgraft.load_adapter(base, tmp_path)
    a = next(p.requires_grad_() for n, p in base.named_parameters() if n.endswith("lora_A"))
    base(input_ids=ids, labels=ids).loss.backward()
    close(a.grad, grads[1])


def test_another_table_in_a_file_is_refused(pair, tmp_path):
    packed, plain = pair()
    theirs = get_peft_model(plain, config(target_modules=["q_proj"]))
    for changed in (False, True):
        if changed:
            theirs.get_input_embeddings().weight.data.mul_(2)
        theirs.save_pretrained(tmp_path, save_embedding_layers=True)
        stored = qgraft.peft_config(packed, LoraConfig.from_pretrained(tmp_path))
        if not changed:
            packed = PeftModel.from_pretrained(packed, tmp_path, config=stored).unload()
            continue
        with pytest.raises(RuntimeError, match=r"embed_tokens: the copy of the base's weight is another"):
            PeftModel.from_pretrained(packed, tmp_path, config=stored)


def test_all_linear_does_not_mean_packed_experts_in_silence(tiny_gguf):
    model = qgraft.load(tiny_gguf("qwen3moe").path)[0]
    with pytest.raises(OptionError, match=r"experts[\s\S]*hint: .*q_proj"):
        qgraft.peft_config(model, config(target_modules="all-linear"))


def test_merges_by_peft_are_refused_with_the_way_to_ours(pair):
    packed, _ = pair()
    before = packed.model.layers[0].self_attn.q_proj.dequantize()
    ours = get_peft_model(packed, qgraft.peft_config(packed, config()))
    for merge in (ours.merge_adapter, ours.merge_and_unload):
        with pytest.raises(UnsupportedError, match=r"hint: .*qgraft\.merge"):
            merge()
    assert torch.equal(ours.unload().model.layers[0].self_attn.q_proj.dequantize(), before)


def test_our_functions_refuse_a_model_that_peft_has_wrapped(pair, tmp_path):
    packed, _ = pair()
    ours = get_peft_model(packed, qgraft.peft_config(packed, config()))
    calls = (
        qgraft.attach_lora,
        qgraft.adapter_names,
        qgraft.merge,
        lambda model: qgraft.save_adapter(model, tmp_path / "a"),
        lambda model: qgraft.save(model, tmp_path / "merged.gguf"),
    )
    for model in (ours, packed):
        for call in calls:
            with pytest.raises(AdapterError, match=r"PEFT[\s\S]*hint: .*unload"):
                call(model)
    qgraft.attach_lora(ours.unload())


def test_only_a_lora_config_and_a_model_without_our_adapters_are_taken(pair):
    packed, _ = pair()
    with pytest.raises(OptionError, match="LoraConfig"):
        qgraft.peft_config(packed, peft.LoHaConfig())
    qgraft.attach_lora(packed)
    with pytest.raises(AdapterError, match="detach_adapter"):
        qgraft.peft_config(packed, config())


def of_trl(kind, model, adapter, tokenizer, folder):
    """The losses of 20 steps of one of TRL's trainers."""
    trl = pytest.importorskip("trl")
    words = [f"the cat {n} sat on the mat {n * 7}" for n in range(40)]
    options = {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 20, "seed": 3,
        "logging_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 5e-3, "max_length": 48,
    }  # fmt: skip
    if kind == "sft":
        rows, args, trainer = [{"text": text} for text in words], trl.SFTConfig(**options), trl.SFTTrainer
    else:
        rows = [{"prompt": text, "chosen": " good", "rejected": " bad"} for text in words]
        args, trainer = trl.DPOConfig(**options), trl.DPOTrainer
    data = pytest.importorskip("datasets").Dataset.from_list(rows)
    run = trainer(model=model, args=args, train_dataset=data, processing_class=tokenizer, peft_config=adapter)
    run.train()
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_trl_learns_on_packed_layers_as_on_float_ones(tiny_gguf, tmp_path, kind):
    made = tiny_gguf()
    packed, tokenizer = qgraft.load(made.path)
    options = {"target_modules": "all-linear", "init_lora_weights": True, "task_type": "CAUSAL_LM"}
    adapter = qgraft.peft_config(packed, config(**options))
    ours = of_trl(kind, packed, adapter, tokenizer, tmp_path / "a")
    theirs = of_trl(kind, copy.deepcopy(made.model), config(**options), tokenizer, tmp_path / "b")
    assert len(ours) == 20 and ours[-1] < ours[0]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_the_output_layer_gives_its_weight_to_those_who_multiply_by_it(pair):
    packed, plain = pair()
    assert packed.lm_head.weight.isnan().all()
    qgraft.peft_config(packed, config())
    close(packed.lm_head.weight, plain.lm_head.weight)
