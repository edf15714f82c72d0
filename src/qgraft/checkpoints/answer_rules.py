"""Rules of a model's files about the tokens of an answer, beside those that may never come (passes/limits.py).

generation_config.json may say that words are never written, or are likelier, that nothing is said twice in a row, how short
an answer may not be, what its first token is not, and which one ends it where there is no more room. transformers' generate()
goes by its own LogitsProcessors for these; they are what is used here, for one answer at a time.

    key                                the processor
    sequence_bias                      SequenceBias
    no_repeat_ngram_size               NoRepeatNGram
    bad_words_ids                      NoBadWords
    min_length, min_new_tokens         MinLength, MinNewTokensLength: no end token before
    forced_bos_token_id                ForcedBOS: of a prompt of one token, the first of the answer
    forced_eos_token_id                ForcedEOS: the last token that there is room for
    exponential_decay_length_penalty   ExponentialDecayLengthPenalty: an end becomes likelier with each token
    begin_suppress_tokens              SuppressTokensAtBegin: not the first token
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

KEYS = (
    "sequence_bias", "no_repeat_ngram_size", "bad_words_ids", "min_length", "min_new_tokens", "forced_bos_token_id",
    "forced_eos_token_id", "exponential_decay_length_penalty", "begin_suppress_tokens",
)  # fmt: skip


class AnswerRules:
    """The rules of one answer.

    Args:
        processors: in transformers' order.
        prompt: ids.
    """

    def __init__(self, processors: Sequence[Any], prompt: Sequence[int]) -> None:
        self._processors, self._ids = processors, list(prompt)

    def push(self, token: int) -> None:
        """One more token of the answer."""
        self._ids.append(token)

    def __call__(self, scores_V: Tensor) -> Tensor:
        """The scores of the next token, float32 on the CPU, as the rules leave them."""
        if not self._processors:
            return scores_V
        ids_1N, scores_1V = torch.tensor([self._ids]), scores_V[None]
        for processor in self._processors:
            scores_1V = processor(ids_1N, scores_1V)
        return scores_1V[0]


def rules_of(model: PreTrainedModel, prompt: Sequence[int], longest: int, ends: Collection[int]) -> AnswerRules:
    """What the model's files say of an answer to a prompt.

    Args:
        longest: how many tokens the prompt and the answer have at most.
        ends: the end tokens.
    """
    config = model.generation_config
    return AnswerRules([] if config is None else processors_of(config, len(prompt), longest, ends), prompt)


def processors_of(config: GenerationConfig, prompt: int, longest: int, ends: Collection[int]) -> list[Any]:
    """transformers' processors for a prompt of so many tokens; raises what these raise for values that are none."""
    said = {key: value for key in KEYS if (value := getattr(config, key, None)) is not None}
    stops, found = sorted(ends), list[Any]()
    if biased := said.get("sequence_bias"):
        found.append(transformers.SequenceBiasLogitsProcessor(biased))
    if size := said.get("no_repeat_ngram_size"):
        found.append(transformers.NoRepeatNGramLogitsProcessor(size))
    if words := said.get("bad_words_ids"):
        found.append(transformers.NoBadWordsLogitsProcessor(words, stops or None))
    if stops and (least := said.get("min_length")):
        found.append(transformers.MinLengthLogitsProcessor(least, stops))
    if stops and (least := said.get("min_new_tokens")):
        found.append(transformers.MinNewTokensLengthLogitsProcessor(prompt, least, stops))
    if (first := said.get("forced_bos_token_id")) is not None:
        found.append(transformers.ForcedBOSTokenLogitsProcessor(first))
    if (last := said.get("forced_eos_token_id")) is not None:
        found.append(transformers.ForcedEOSTokenLogitsProcessor(longest, last))
    if stops and (decay := said.get("exponential_decay_length_penalty")) is not None:
        found.append(transformers.ExponentialDecayLengthPenalty(tuple(decay), stops, prompt))
    if tokens := said.get("begin_suppress_tokens"):
        begin = prompt if prompt > 1 or first is None else prompt + 1
        found.append(transformers.SuppressTokensAtBeginLogitsProcessor(tokens, begin))
    return found
