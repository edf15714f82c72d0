"""accelerate, PEFT, torch, Python: what is not in their documentation, or has moved before; how transformers draws a head."""

import importlib
import inspect
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    BertConfig,
    BertForSequenceClassification,
)


@pytest.mark.parametrize("kind", [PartialState, AcceleratorState, GradientState])
def test_accelerate_keeps_its_state_in_one_dictionary_of_each_class(kind):
    Accelerator(cpu=True)
    assert isinstance(kind._shared_state, dict) and kind._shared_state
    kept = dict(kind._shared_state)
    kind._shared_state.clear()
    kind._shared_state.update(kept)
    assert all(getattr(kind(), name) is value for name, value in kept.items() if not name.startswith("_"))


def test_accelerate_divides_a_loss_by_the_steps_of_its_own_accumulation_only():
    weight = torch.ones(1, requires_grad=True)
    accelerator = Accelerator(cpu=True)
    assert accelerator.gradient_accumulation_steps == 1 and accelerator.scaler is None
    accelerator.backward(weight.sum())
    assert weight.grad.item() == 1.0


def test_the_trainer_is_imported_without_datasets_and_peft_where_these_cannot_be():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('datasets', 'peft')))\n"
        "import transformers; transformers.Trainer\n"
        "assert sys.modules['datasets'] is None and sys.modules['peft'] is None\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"the Trainer cannot be imported without `datasets` any more: {done.stderr[-500:]}"


MERGES = {"ties": (0.5,), "dare_linear": (1.0,), "magnitude_prune": (0.5,)}


@pytest.mark.parametrize("name", MERGES)
@pytest.mark.filterwarnings("ignore:The density")
def test_peft_merges_tensors_by_functions_of_tensors_weights_and_density(name):
    merge_utils = pytest.importorskip("peft.utils.merge_utils")
    function = getattr(merge_utils, name)
    assert list(inspect.signature(function).parameters)[:3] == ["task_tensors", "weights", "density"]
    tensors = [torch.tensor([[4.0, -0.1], [0.2, -3.0]]), torch.tensor([[2.0, 0.1], [-0.2, 1.0]])]
    merged = function(tensors, torch.tensor([1.0, 0.5]), *MERGES[name])
    expected = {
        "ties": [[2.5, 0.0], [0.0, -3.0]],  # trimmed to the largest half, signs elected, mean of those that agree
        "dare_linear": [[5.0, -0.05], [0.1, -2.5]],  # density 1 drops nothing
        "magnitude_prune": [[5.0, 0.0], [0.0, -2.5]],
    }
    torch.testing.assert_close(merged, torch.tensor(expected[name]))


def test_modules_keep_children_parameters_and_buffers_in_these_dictionaries():
    module = nn.BatchNorm1d(3)
    parent = nn.Sequential(module)
    assert parent._modules["0"] is module and module._parameters["weight"] is module.weight
    assert module._buffers["running_mean"] is module.running_mean
    handle = module.register_forward_pre_hook(lambda *_: None)
    assert len(module._forward_pre_hooks) == 1 and not module._forward_hooks
    handle.remove()


def test_a_forward_on_an_instance_is_called_and_can_be_taken_off():
    module = nn.Linear(2, 2)
    module.forward = lambda x: x + 1
    assert torch.equal(module(torch.zeros(1)), torch.ones(1))
    del module.forward
    assert module(torch.zeros(2)).shape == (2,)


def test_hooks_run_in_front_of_others_and_after_errors_if_asked():
    module, order = nn.Identity(), []
    module.register_forward_pre_hook(lambda *_: order.append("later"))
    module.register_forward_pre_hook(lambda *_: order.append("first"), prepend=True)
    module.register_forward_hook(lambda *_: order.append("always"), always_call=True)
    with pytest.raises(TypeError):
        module()
    assert order == ["first", "later", "always"]


@pytest.mark.parametrize("name", ["_is_avx512_bf16_supported", "_is_amx_tile_supported"])
def test_torch_says_what_the_cpu_has(name):
    assert getattr(torch.cpu, name)() in (True, False)


def test_every_op_goes_through_a_dispatch_mode_and_a_storage_has_an_address():
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    a = torch.ones(2)
    with Mode():
        b = a + 1
    assert seen == ["aten.add.Tensor"]
    assert a.untyped_storage()._cdata == a.view(1, 2).untyped_storage()._cdata != b.untyped_storage()._cdata


def test_trees_are_tuples_lists_and_dictionaries():
    tree = {"a": [1, (2, 3)], "b": 4}
    assert tree_leaves(tree) == [1, 2, 3, 4]
    assert tree_map(lambda x: x + 1, tree) == {"a": [2, (3, 4)], "b": 5}


def test_an_entry_of_none_in_sys_modules_fails_an_import(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("datasets")


def test_a_model_of_transformers_draws_the_modules_that_it_is_given():
    options = {
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 8,
        "vocab_size": 9,
    }
    model = BertForSequenceClassification(BertConfig(**options, initializer_range=0.5))
    layer = nn.Linear(64, 64)
    model._init_weights(layer)
    assert 0.4 < float(layer.weight.detach().std()) < 0.6 and not layer.bias.any()
    assert (
        BertConfig in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING and BertConfig in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING
    )
