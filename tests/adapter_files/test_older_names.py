"""Adapters whose files call the layers as older releases of transformers did, or as the model that also sees does."""

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import qgraft
from qgraft.adapter_files.folder import WEIGHTS
from qgraft.errors import AdapterError

TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
SEES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14}  # fmt: skip
IDS = torch.tensor([[5, 9, 17, 33, 40, 7]])
STEM = "base_model.model."


def llava():
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT), image_token_index=60,
        vision_config=transformers.CLIPVisionConfig(projection_dim=32, **SEES),
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config)


def qwen2_vl():
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    sees = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2}
    config = transformers.Qwen2VLConfig(text_config={**TEXT, "rope_parameters": rope}, vision_config=sees,
                                        image_token_id=60, video_token_id=61)  # fmt: skip
    return transformers.Qwen2VLForConditionalGeneration(config)


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT))


def made(model, folder: Path, **options):
    """PEFT's logits of a random adapter on the model; its folder."""
    torch.manual_seed(1)
    theirs = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", **options)
    )
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.3)
    theirs.save_pretrained(folder)
    return theirs.eval()(IDS).logits.detach()


def rename(folder: Path, old: dict[str, str], **options) -> None:
    state = load_file(folder / WEIGHTS)
    named = {}
    for key, tensor in state.items():
        path = key.removeprefix(STEM)
        new = next((name for name in old if path.startswith(name)), "")
        named[STEM + old.get(new, "") + path.removeprefix(new)] = tensor
    save_file(named, folder / WEIGHTS)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | options))


def close(got, expected) -> bool:
    return float((got.detach() - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize(
    ("make", "old"),
    [
        pytest.param(
            llava, {"model.language_model.": "language_model.model.", "model.vision_tower.": "vision_tower."},
            marks=pytest.mark.slow,
        ),
        (qwen2_vl, {"model.language_model.": "model."}),
        pytest.param(qwen2_vl, {"model.language_model.": "language_model.model."}, marks=pytest.mark.slow),
        (llama, {"model.": "model.language_model."}),  # trained with the tower; the base is the decoder alone
        (llama, {"model.": "language_model.model.", "lm_head": "language_model.lm_head"}),
        (llama, {"model.": ""}),  # trained on the decoder without its output layer
    ],
)  # fmt: skip
def test_layers_are_found_by_the_names_of_then(make, old, tmp_path):
    torch.manual_seed(0)
    model = make().eval()
    targets = ["q_proj", "v_proj", "up_proj", *(["lm_head"] if "lm_head" in old else [])]
    expected = made(model, tmp_path / "a", target_modules=targets)
    rename(tmp_path / "a", old)
    if make is llava:  # the only one of these that PEFT finds
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "a").eval()
        assert close(theirs(IDS).logits, expected)
    base = model(IDS).logits
    report = qgraft.load_adapter(model, tmp_path / "a")
    assert report.applied == report.total and any("are called otherwise here" in note for note in report.notes)
    assert close(model(IDS).logits, expected) and not close(base, expected)
    qgraft.save_adapter(model, tmp_path / "again")  # by the names of now
    assert not any("otherwise" in note for note in qgraft.load_adapter(model, tmp_path / "again", "again").notes)


def test_patterns_go_by_the_names_of_then(tmp_path):
    model, now = llama().eval(), "model.layers.1.self_attn.q_proj"
    patterns = {"rank_pattern": {f"^{now}": 3}, "alpha_pattern": {f"^{now}": 9, "layers.0.self_attn.v_proj": 1}}
    expected = made(model, tmp_path / "a", target_modules=["q_proj", "v_proj"], **patterns)
    then = {key: {f"^{now}".replace("model.", "language_model.model."): table[f"^{now}"], **table}
            for key, table in patterns.items()}  # fmt: skip
    for table in then.values():
        table[f"^{now}"] = 7  # a layer of no such name was in the model
    rename(tmp_path / "a", {"model.": "language_model.model."}, **then, target_modules=r"language_model\..*(q|v)_proj")
    qgraft.load_adapter(model, tmp_path / "a")
    assert close(model(IDS).logits, expected)


def test_what_is_told_apart_by_nothing_is_refused(tmp_path):
    model = llama().eval()
    made(model, tmp_path / "a", target_modules=["q_proj"])
    state = load_file(tmp_path / "a" / WEIGHTS)
    other = {
        key.replace("model.layers", "model.language_model.layers"): tensor.clone() for key, tensor in state.items()
    }
    save_file(state | other, tmp_path / "a" / WEIGHTS)  # both
    with pytest.raises(AdapterError, match=r"the model has no layer model\.language_model\.layers\.0"):
        qgraft.load_adapter(model, tmp_path / "a")
    rename(
        tmp_path / "a", {"model.layers": "model.vision_tower.layers", "model.language_model": "model.language_model"}
    )
    with pytest.raises(AdapterError, match=r"no layer model\.vision_tower\.layers\.0"):
        qgraft.load_adapter(model, tmp_path / "a")
