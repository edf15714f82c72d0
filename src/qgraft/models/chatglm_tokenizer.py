"""The tokenizer of ChatGLM-6B, from its sentencepiece file (ice_text.model) alone.

    text           "\\n", tab and runs of 2 to 80 blanks become pieces of their own: <n>, <|tab|>, <|blank_k|>;
                   <sop> <eop> <unk> <pad> [MASK] in it are the special ids, without the white space beside them
    encode(a)      a [gMASK] <sop>
    encode(a, b)   a [gMASK] <sop> b <eop>
    prompt         the bare question; with history "[Round 0]\\n问：...\\n答：...\\n[Round 1]\\n问：...\\n答："
    sample         prompt [gMASK] <sop> answer <eop>, learned from <sop> on
    padding        at the left; mask [1, n, n], true where a key is hidden, positions [2, n]

Source: what the released tokenizer makes of texts, prompts and training rows (tests/golden/tokenizer_chatglm). The rest
is in prompt_tokenizer.py.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AddedToken
from transformers.utils import PaddingStrategy

from qgraft.errors import DataError
from qgraft.models.prompt_tokenizer import IGNORED, PromptTokenizer


class ChatGLMTokenizer(PromptTokenizer):
    """First generation: `ChatGLMTokenizer(vocab_file="ice_text.model")`.

    Sentencepiece normalizes the text (full-width punctuation, letters and digits become ASCII), so that decoding an
    encoded text gives the normalized one. Decoding takes the blanks before punctuation out, as the release does.
    """

    vocab_files_names = {"vocab_file": "ice_text.model"}  # noqa: RUF012
    round_format = "[Round {}]\n问：{}\n答："
    round_end = "\n"
    first_round = 0
    bare_single = True
    spare_length = 0

    def __init__(self, vocab_file: str | Path, **options: Any) -> None:
        names = {"bos_token": "<sop>", "eos_token": "<eop>", "unk_token": "<unk>", "pad_token": "<pad>",
                 "mask_token": "[MASK]"}  # fmt: skip
        tokens = {key: AddedToken(text, lstrip=True, rstrip=True, normalized=False, special=True)
                  for key, text in names.items()}  # fmt: skip
        super().__init__(vocab_file, {**tokens, "clean_up_tokenization_spaces": True}, options)
        self.gmask_token_id = self._convert_token_to_id("[gMASK]")

    def _problems(self) -> list[str]:
        blanks = [f"<|blank_{k}|>" for k in range(2, 81)]
        special = ["<unk>", "<pad>", "<n>", "[MASK]", "[gMASK]", "<sop>", "<eop>", "<|tab|>", *blanks]
        missing = [piece for piece in special if not self._has(piece)]
        return [f"missing pieces: {', '.join(missing[:8])}{' ...' * (len(missing) > 8)}"] if missing else []

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
        text = re.sub(" {2,80}", lambda run: f"<|blank_{len(run[0])}|>", text)
        return list(self.sp_model.encode(text, out_type=str))

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """The text of pieces, without padding and with white space as it was."""
        text = super().convert_tokens_to_string([token for token in tokens if token != self.pad_token])
        text = text.replace("<n>", "\n").replace("<|tab|>", "\t")
        return re.sub(r"<\|blank_([2-9]|[1-7]\d|80)\|>", lambda run: " " * int(run[1]), text)

    def clean_answer(self, text: str) -> str:
        """The answer with full-width punctuation beside Chinese characters, which the vocabulary does not have."""
        text = super().clean_answer(text)
        for narrow, wide in zip(",!:;?", "，！：；？", strict=True):
            text = re.sub(rf"(?<=[\u4e00-\u9fff])\{narrow}|\{narrow}(?=[\u4e00-\u9fff])", wide, text)
        return text

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Text [gMASK] <sop>, or question [gMASK] <sop> answer <eop>."""
        start = [*token_ids_0, self.gmask_token_id, self.bos_token_id]
        return start if token_ids_1 is None else [*start, *token_ids_1, self.eos_token_id]

    def _context_ids(self, text: str) -> list[int]:
        ids = super()._context_ids(text)
        if self.bos_token_id in ids:
            raise DataError(
                "a question or its history holds <sop>, which ends a prompt wherever it stands",
                hint='write it differently, as "< sop >"; in the last answer it does no harm',
            )
        return ids

    def generated_length(self, max_source_length: int | None, max_target_length: int | None) -> int:
        """512, whatever the lengths are."""
        return 512

    def _join(
        self, prompt: list[int], answer: list[int], max_source: int | None, max_target: int | None
    ) -> tuple[list[int], list[int]]:
        before = [*prompt[: None if max_source is None else max_source - 1], self.gmask_token_id]
        cut = answer[: None if max_target is None else max_target - 2]
        learned = [self.bos_token_id, *cut, self.eos_token_id]  # <sop> is predicted too, at [gMASK]
        return before + learned, [IGNORED] * len(before) + learned

    def _pad(
        self,
        encoded_inputs: Any,
        max_length: int | None = None,
        padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
    ) -> dict[str, Any]:
        """Pad the ids. Mask and positions come only where a length is asked for: a model finds both in the ids."""
        ids = list(encoded_inputs["input_ids"])
        given = {key: encoded_inputs.pop(key) for key in ("attention_mask", "position_ids") if key in encoded_inputs}
        side = padding_side or self.padding_side
        padded: dict[str, Any] = super()._pad(encoded_inputs, max_length, padding_strategy, pad_to_multiple_of, side,
                                              return_attention_mask=False)  # fmt: skip
        if max_length is None and padding_strategy is PaddingStrategy.DO_NOT_PAD and not given:
            return padded
        missing = len(padded["input_ids"]) - len(ids)
        room = (missing, 0) if side == "left" else (0, missing)
        hidden_1QK, positions_2Q = self._mask_and_positions(ids)
        hidden_1QK = np.asarray(given.get("attention_mask", hidden_1QK), dtype=bool)
        positions_2Q = np.asarray(given.get("position_ids", positions_2Q))
        if return_attention_mask is not False:
            padded["attention_mask"] = np.pad(hidden_1QK, ((0, 0), room, room), constant_values=True).tolist()
        padded["position_ids"] = np.pad(positions_2Q, ((0, 0), room)).tolist()
        return padded

    def _mask_and_positions(self, ids: list[int]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Before <sop> every query sees every key; from it on, causal. Row 0 stops at the mask, row 1 counts from <sop>.

        The mask is [gMASK] where there is one, as for the model: THUDM's tokenizer takes a [MASK] in the text instead, so
        that with its model a row means one thing alone and another in a padded batch.
        """
        n = len(ids)
        context = ids.index(self.bos_token_id) if self.bos_token_id in ids else n
        hidden_QK = ~np.tril(np.ones((n, n), dtype=bool))
        hidden_QK[:, :context] = False
        positions_2Q = np.stack([np.arange(n), np.maximum(np.arange(n) - context + 1, 0)])
        mask = self.gmask_token_id if self.gmask_token_id in ids else self.mask_token_id
        if mask in ids:
            positions_2Q[0, context:] = ids.index(mask)
        return hidden_QK[None], positions_2Q
