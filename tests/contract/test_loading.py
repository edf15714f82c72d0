"""How transformers builds models and configurations, and what it says of a checkpoint's names."""

import inspect
import json
from typing import Any

import pytest
import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs


def test_an_empty_model_has_parameters_on_meta_and_computed_buffers(tiny):
    config = tiny("llama").config
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
    assert all(parameter.is_meta and parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    rotary = model.base_model.rotary_emb.inv_freq
    assert not rotary.is_meta and rotary.dtype == torch.float32
    torch.testing.assert_close(rotary, 10000.0 ** (-torch.arange(0, 8, 2) / 8))


def test_a_class_makes_a_model_of_a_configuration_in_a_dtype(tiny):
    model = transformers.LlamaForCausalLM._from_config(tiny("llama").config, dtype=torch.float16)
    assert model.dtype == torch.float16


def test_ties_are_named_in_two_attributes_that_may_be_emptied(tiny):
    model = tiny("llama", tie_word_embeddings=True)
    assert model._tied_weights_keys and model.all_tied_weights_keys
    model._tied_weights_keys, model.all_tied_weights_keys = {}, {}
    other = nn.Linear(32, 40, bias=False)
    model.set_submodule("lm_head", other)
    model.tie_weights()
    assert model.get_output_embeddings() is other and other.weight is not model.get_input_embeddings().weight


def test_gemmas_embedding_says_its_scale(tiny):
    embedding = tiny("gemma3_text").get_input_embeddings()
    assert type(embedding) is not nn.Embedding and embedding.scalar_embed_scale == pytest.approx(32**0.5)


def test_models_say_which_names_of_a_checkpoint_to_pass_over(tiny):
    assert hasattr(tiny("llama"), "_keys_to_ignore_on_load_unexpected")
    assert r"transformer.wte" not in (transformers.GPT2LMHeadModel._keys_to_ignore_on_load_unexpected or [])


@pytest.mark.parametrize("value", [-1, "four", [4]])
def test_a_configuration_of_wrong_types_raises_one_of_these(value, tmp_path):
    broken = {"model_type": "llama", "num_hidden_layers": value, "hidden_size": "wide"}
    (tmp_path / "config.json").write_text(json.dumps(broken))
    with pytest.raises((StrictDataclassError, ArithmeticError, AttributeError, KeyError, TypeError, ValueError)):
        AutoConfig.from_pretrained(tmp_path)


def test_errors_of_the_hub_have_these_names():
    assert issubclass(LocalEntryNotFoundError, OSError | HfHubHTTPError)
    assert issubclass(HFValidationError, ValueError)


def test_a_tokenizer_that_cannot_be_built_raises_exception_itself_or_one_of_the_usual(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    usual = (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError)
    with pytest.raises(Exception) as caught:
        transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert caught.type is Exception or issubclass(caught.type, usual)


class Config(PreTrainedConfig):
    """Of a model that is not transformers' own, as ChatGLM is here."""

    model_type = "contract"
    attribute_map = {"num_hidden_layers": "num_layers"}  # noqa: RUF012

    def __init__(self, **kwargs: Any) -> None:
        self.hidden_size, self.num_layers, self.vocab_size, self.use_cache = 8, 2, 11, True
        super().__init__(**kwargs)


class Layer(GradientCheckpointingLayer):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, mask: Any = None) -> torch.Tensor:
        return x + self.inner(x)


class Base(PreTrainedModel):
    config_class = Config
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _can_record_outputs = {"hidden_states": Layer}  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(self, input_ids: Any = None, use_cache: Any = None, **kwargs: Any) -> Any:
        self.used = use_cache
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x, mask=None)
        return transformers.modeling_outputs.BaseModelOutputWithPast(x)


def test_decorators_fill_in_defaults_of_the_configuration_and_collect_states():
    model = Base(Config())
    output = model(torch.tensor([[1, 2]]), output_hidden_states=True)
    assert model.used is True, "merge_with_config_defaults no longer fills in use_cache"
    assert len(output.hidden_states) == 3 and torch.equal(output.hidden_states[-1], output.last_hidden_state)
    assert isinstance(model(torch.tensor([[1, 2]]), return_dict=False), tuple)


def test_a_layer_of_a_model_that_is_not_transformers_own_can_be_checkpointed():
    model = Base(Config()).train()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    calls = []
    model.layers[0].inner.register_forward_pre_hook(lambda *call: calls.append(call) and None)
    model(torch.tensor([[1, 2]])).last_hidden_state.sum().backward()
    assert len(calls) == 2, "a checkpointed layer is not run again in the backward pass"


def test_an_attribute_map_gives_configurations_the_usual_names():
    config = Config(num_hidden_layers=5)
    assert config.num_layers == config.num_hidden_layers == 5 == config.get_text_config().num_hidden_layers


def test_generation_is_a_mixin_beside_the_model():
    assert not issubclass(PreTrainedModel, GenerationMixin)
    assert transformers.LlamaForCausalLM.can_generate()


def test_a_causal_mask_is_made_of_configuration_states_mask_and_cache(tiny):
    names = inspect.signature(create_causal_mask).parameters
    assert {"config", "inputs_embeds", "attention_mask"} <= names.keys()
    assert {"past_key_values", "cache"} & names.keys()


def test_the_names_of_causal_models_are_mapped_from_configurations():
    assert AutoModelForCausalLM._model_mapping[transformers.LlamaConfig] is transformers.LlamaForCausalLM
