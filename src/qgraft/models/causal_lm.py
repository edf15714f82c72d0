"""What both ChatGLMs do with the states of their decoder: logits, and the loss where there are labels; and what is asked
of them under the names of their releases and of the tutorials on them.
"""

from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from qgraft.compat import cache_in, takes_cache

_CHAT = (
    "the conversation is the tokenizer's: tokenizer.prompt_ids([('user', text)]) and model.generate(), or `qgraft chat`"
)
INSTEAD = {  # names of the released code and of the tutorials on its QuantizedLinear -> what there is for them
    "chat": _CHAT,
    "stream_chat": f"{_CHAT}; generate() takes a streamer",
    "quantize": "qgraft.quantize(model, 'chatglm-int4'), or load(folder, quantize='chatglm-int4')",
    "lora_attached": "qgraft.adapter_names(model)",
}


class CausalLM:
    """forward() of a language model: its decoder is `transformer`, its output layer that of get_output_embeddings()."""

    def __getattr__(self, name: str) -> Any:
        """Parameters and modules, as torch has it. AttributeError for what the releases' models have names what there is."""
        if name in INSTEAD:
            raise AttributeError(f"{type(self).__name__} has no {name!r}; instead: {INSTEAD[name]}")
        return super().__getattr__(name)  # type: ignore[misc]

    @takes_cache
    @can_return_tuple
    def forward(
        self: Any,  # a PreTrainedModel
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [batch, tokens, vocabulary]; the arguments are those of the decoder, and:

        Args:
            labels: [batch, tokens], aligned with input_ids, -100 = not learned; the loss is computed in float32.
            logits_to_keep: only of the last so many tokens, or of these indices; 0 for all.
        """
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.get_output_embeddings()(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss, logits, cache_in(outputs), outputs.hidden_states, outputs.attentions)
