"""Which layers of the decoder get an adapter: what can be said, and that PEFT reads it the same way."""

from types import SimpleNamespace

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists

import qgraft
from qgraft.adapters.base import find_adapter
from qgraft.adapters.layer_choice import layer_number, parse_layers
from qgraft.adapters.targets import find_targets
from qgraft.errors import AdapterError, OptionError


@pytest.mark.parametrize(
    ("said", "meant"),
    [("15-17", (15, 16, 17)), ("3", (3,)), ("2,0, 5-6,5", (0, 2, 5, 6)), (4, (4,)), ([2, 1, 2], (1, 2)), ((0,), (0,))],
)
def test_layers_are_named_one_by_one_or_from_to(said, meant):
    assert parse_layers(said) == meant


@pytest.mark.parametrize("said", ["", "a", "5-3", "1,,2", "-1", "15-", [], [-1], [1.5], -3, [True]])
def test_what_names_no_layer_is_refused(said):
    with pytest.raises(OptionError, match="layers_to_transform="):
        parse_layers(said)


names = st.sampled_from(["model", "layers", "h", "0", "3", "12", "experts", "transformer", "encoder", "q_proj", "x.y"])


@given(st.lists(names, min_size=1, max_size=7), st.sampled_from([None, "layers", ["h", "layers"], []]))
def test_the_layer_of_a_path_is_what_peft_takes_for_it(parts, patterns):
    path = ".".join(parts) + ".leaf"
    number = layer_number(path, patterns)
    for index in (0, 3, 12):
        config = SimpleNamespace(target_modules=["leaf"], layers_to_transform=[index], layers_pattern=patterns)
        assert bool(check_target_module_exists(config, path)) == (number == index)


def test_only_the_named_layers_are_wrapped_and_peft_loads_the_file(tiny_gguf, tmp_path, random_ids):
    tiny = tiny_gguf("llama")
    model, _ = qgraft.load(tiny.path)
    config = qgraft.attach_lora(model, r=2, layers_to_transform="1")
    assert config.layers_to_transform == (1,)
    paths = list(find_adapter(model, "default").parts)
    assert paths == [path for path in find_targets(model, "all-linear") if ".layers.1." in path]
    for lora in find_adapter(model, "default").parts.values():
        torch.nn.init.normal_(lora.lora_B)
    qgraft.save_adapter(model, tmp_path / "upper")
    said = qgraft.adapter_files.folder.read_peft_config(tmp_path / "upper")
    assert said["layers_to_transform"] == [1]
    assert set(said["target_modules"]) == {path.rsplit(".", 1)[-1] for path in paths}
    theirs = peft.PeftModel.from_pretrained(type(tiny.model).from_pretrained(None, config=tiny.model.config,
                                            state_dict=tiny.model.state_dict()), tmp_path / "upper").eval()  # fmt: skip
    again, _ = qgraft.load(tiny.path)
    assert qgraft.load_adapter(again, tmp_path / "upper").total == len(paths)
    ids = random_ids(model)
    with torch.no_grad():
        ours, loaded, expected, base = (m(ids).logits for m in (model, again, theirs, qgraft.load(tiny.path)[0]))
    assert torch.equal(ours, loaded)
    assert (ours - expected).abs().max() < 1e-4 * expected.abs().max() < 1e-2 * (base - expected).abs().max()


def test_a_file_that_says_other_layers_than_it_holds_is_refused(tiny_gguf, tmp_path):
    model, _ = qgraft.load(tiny_gguf("llama").path)
    qgraft.attach_lora(model, r=2, layers_to_transform=[1])
    qgraft.save_adapter(model, tmp_path / "upper")
    (tmp_path / "upper" / "qgraft.json").unlink()  # the seal knows that the file was changed
    path = tmp_path / "upper" / "adapter_config.json"
    path.write_text(path.read_text().replace("[\n    1\n  ]", "[0, 1]"))
    other, _ = qgraft.load(tiny_gguf("llama").path)
    with pytest.raises(AdapterError, match=r"missing tensors of model\.layers\.0"):
        qgraft.load_adapter(other, tmp_path / "upper")
    path.write_text(path.read_text().replace("[0, 1]", '"all"'))
    with pytest.raises(AdapterError, match="layers_to_transform: got 'all'"):
        qgraft.load_adapter(other, tmp_path / "upper")


def test_a_layer_that_is_not_there_is_refused(tiny_gguf):
    model, _ = qgraft.load(tiny_gguf("llama").path)
    with pytest.raises(OptionError, match=r"no target layer in 2, 3; there are targets in layers 0 to 1"):
        qgraft.attach_lora(model, layers_to_transform="1-3")
    with pytest.raises(
        OptionError, match=r"no target layer in 2, 3, 4, 5, 6, 7, 8, 9, \.\.\. \(98 in all\); there are"
    ):
        qgraft.attach_lora(model, layers_to_transform="0-99")
    assert qgraft.adapter_names(model) == []


@pytest.mark.parametrize("given_", ["1", 1, [1], "1-1"])
def test_a_run_takes_them_from_flags_and_from_files(given_):
    from qgraft.training.arguments import arguments_from_dict

    arguments = arguments_from_dict({"output_dir": "x", "use_cpu": True, "layers_to_transform": given_})
    assert parse_layers(arguments.layers_to_transform) == (1,)
    with pytest.raises(OptionError, match="layers_to_transform='upper'"):
        arguments_from_dict({"output_dir": "x", "use_cpu": True, "layers_to_transform": "upper"})


def test_groups_of_a_pattern_are_no_numbers() -> None:
    assert layer_number("model.layers.3.mlp", "layers") == 3
    assert layer_number("model.layers.3.mlp", ["h", "layers"]) == 3
    for pattern in ("(layers)", "(h)?layers", "(?:h|layers)(x)?"):
        assert layer_number("model.layers.3.mlp", pattern) is None
