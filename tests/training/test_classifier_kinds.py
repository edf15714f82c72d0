"""Classifiers of every kind of encoder and decoder: qgraft, transformers and PEFT compute the same, files go both ways."""

import pytest
import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

import qgraft
from qgraft.checkpoints.heads import head_state

SHAPE = {
    "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 32,
}  # fmt: skip
DECODER = {**SHAPE, "num_key_value_heads": 2, "pad_token_id": 0}
KINDS = {  # configuration, options, as which class it is published
    "bert": ("BertConfig", SHAPE, "AutoModel"),
    "bert-mlm": ("BertConfig", SHAPE, "AutoModelForMaskedLM"),
    "albert": ("AlbertConfig", {**SHAPE, "embedding_size": 16}, "AutoModelForMaskedLM"),  # layers that are one
    "roberta": ("RobertaConfig", SHAPE, "AutoModelForMaskedLM"),
    "distilbert": (
        "DistilBertConfig",
        {"vocab_size": 60, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 32},
        "AutoModelForMaskedLM",
    ),
    "electra": ("ElectraConfig", {**SHAPE, "embedding_size": 16}, "AutoModel"),
    "qwen2": ("Qwen2Config", DECODER, "AutoModelForCausalLM"),
    "qwen3": ("Qwen3Config", {**DECODER, "head_dim": 8}, "AutoModelForCausalLM"),
    "llama": ("LlamaConfig", DECODER, "AutoModelForCausalLM"),
    "gpt2": (
        "GPT2Config", {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "pad_token_id": 0},
        "AutoModelForCausalLM",
    ),
}  # fmt: skip
CLASSES = {"SEQ_CLS": AutoModelForSequenceClassification, "TOKEN_CLS": AutoModelForTokenClassification}
LABELS = ["a", "b", "c"]


@pytest.mark.slow
@pytest.mark.parametrize("task", CLASSES)
@pytest.mark.parametrize("kind", KINDS)
def test_kind(kind, task, tmp_path):
    config, options, published = KINDS[kind]
    torch.manual_seed(0)
    made = getattr(transformers, published).from_config(getattr(transformers, config)(**options))
    made.save_pretrained(tmp_path / "base")
    batch = {"input_ids": torch.randint(5, 60, (3, 9)), "attention_mask": torch.ones(3, 9, dtype=torch.int64)}
    batch["input_ids"][1, 6:] = made.config.pad_token_id
    batch["attention_mask"][1, 6:] = 0
    model, _ = qgraft.load(tmp_path / "base", task_type=task, labels=LABELS)
    theirs = CLASSES[task].from_pretrained(tmp_path / "base", num_labels=3).eval()
    theirs.load_state_dict(head_state(model), strict=False)  # the rest of it is what the folder holds
    with torch.no_grad():
        assert torch.allclose(model(**batch).logits, theirs(**batch).logits, atol=1e-6)
        qgraft.attach_lora(model, r=4)
        for _, parameter in model.qgraft.adapters["default"].named_parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        ours = model(**batch).logits
        qgraft.save_adapter(model, tmp_path / "adapter")
        bare = CLASSES[task].from_pretrained(tmp_path / "base", num_labels=3)  # another head, drawn anew
        peft = PeftModel.from_pretrained(bare, tmp_path / "adapter").eval()
        assert torch.allclose(ours, peft(**batch).logits, atol=1e-5, rtol=1e-5)
        peft.save_pretrained(tmp_path / "peft")
        again, _ = qgraft.load(tmp_path / "base", task_type=task, labels=LABELS)
        qgraft.load_adapter(again, tmp_path / "peft")
        assert torch.equal(again(**batch).logits, ours)
        qgraft.merge(model)
        qgraft.save(model, tmp_path / "merged")
        folder = CLASSES[task].from_pretrained(tmp_path / "merged").eval()
        assert folder.config.label2id == {"a": 0, "b": 1, "c": 2}
        assert torch.allclose(folder(**batch).logits, ours, atol=1e-4, rtol=1e-4)
        packed, _ = qgraft.load(tmp_path / "base", task_type=task, labels=LABELS, quantize="q8_0")
        qgraft.load_adapter(packed, tmp_path / "peft")
        assert (packed(**batch).logits - ours).norm() < 0.05 * ours.norm()
