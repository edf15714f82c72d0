"""The tokenizer of ChatGLM2-6B, from its sentencepiece file (tokenizer.model) alone.

    text           as sentencepiece has it; nothing in it is special, "</s>" and "[gMASK]" are text
    special ids    [MASK] [gMASK] [sMASK] sop eop, five ids behind the file's pieces
    encode(a)      [gMASK] sop a
    encode(a, b)   [gMASK] sop a b </s>
    prompt         "[Round 1]\\n\\n问：...\\n\\n答：...\\n\\n[Round 2]\\n\\n问：...\\n\\n答：", also of a single question
    sample         [gMASK] sop prompt answer </s>, learned from the answer on
    padding        <unk>, at the left; mask and positions [n]

Where a conversation goes on from a cache, the text of the next round begins with a blank line and is encoded without
special ids; its first id, a blank that sentencepiece puts in front of any text, is dropped.

ChatGLM3 has the same file but another prompt: checkpoints/glm_tokenizer.py. Source: what the released tokenizer makes of
texts, prompts and training rows (tests/golden/tokenizer_chatglm2). The rest is in prompt_tokenizer.py.
"""

from pathlib import Path
from typing import Any

from transformers.utils import PaddingStrategy

from qgraft.models.prompt_tokenizer import PromptTokenizer


class ChatGLM2Tokenizer(PromptTokenizer):
    """Second generation: `ChatGLM2Tokenizer(vocab_file="tokenizer.model")`."""

    vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012
    round_format = "[Round {}]\n\n问：{}\n\n答："
    round_end = "\n\n"
    first_round = 1
    bare_single = False
    spare_length = 1

    # No text is special, so none of these is among transformers' special tokens, which it would look for in texts.
    eos_token, eos_token_id = "</s>", 2
    unk_token, unk_token_id = "<unk>", 0
    pad_token, pad_token_id = "<unk>", 0

    def __init__(self, vocab_file: str | Path, **options: Any) -> None:
        self._special: dict[str, int] = {}
        super().__init__(vocab_file, {"split_special_tokens": True}, options)

    def _problems(self) -> list[str]:
        size = self.sp_model.get_piece_size()
        behind = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
        self._special = {piece: size + number for number, piece in enumerate(behind)}
        self.gmask_token_id, self.sop_token_id = self._special["[gMASK]"], self._special["sop"]
        first = enumerate(("<unk>", "<s>", "</s>"))
        wrong = [(number, piece) for number, piece in first if self._convert_token_to_id(piece) != number]
        problems = [f"id {number} is not {piece!r}" for number, piece in wrong]
        missing = [piece for piece in (f"<0x{byte:02X}>" for byte in range(256)) if not self._has(piece)]
        extra = [piece for piece in ("[gMASK]", "<sop>", "<n>", *behind) if self._has(piece)]
        problems += [f"missing pieces: {', '.join(missing[:4])}{' ...' * (len(missing) > 4)}"] if missing else []
        return problems + ([f"unexpected pieces: {', '.join(dict.fromkeys(extra))}"] if extra else [])

    @property
    def vocab_size(self) -> int:
        """Pieces of the file and the five ids behind them."""
        return int(self.sp_model.get_piece_size()) + len(self._special)

    def get_vocab(self) -> dict[str, int]:
        """Every piece with its id."""
        return {**super().get_vocab(), **self._special}

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return list(self.sp_model.encode(text, out_type=str))

    def _convert_token_to_id(self, token: str) -> int:
        return self._special[token] if token in self._special else super()._convert_token_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        return "" if index <= self.eos_token_id else super()._convert_id_to_token(index)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """[gMASK] sop text, or [gMASK] sop question answer </s>."""
        start = [self.gmask_token_id, self.sop_token_id, *token_ids_0]
        return start if token_ids_1 is None else [*start, *token_ids_1, self.eos_token_id]

    def generated_length(self, max_source_length: int | None, max_target_length: int | None) -> int:
        """Both lengths and one more; the script's own defaults are 1024 and 128."""
        return (max_source_length or 1024) + (max_target_length or 128) + 1

    def _join(
        self, prompt: list[int], answer: list[int], max_source: int | None, max_target: int | None
    ) -> tuple[list[int], list[int]]:
        before = self.build_inputs_with_special_tokens(prompt)[:max_source]  # may cut the final 答： off, as officially
        learned = [*answer[:max_target], self.eos_token_id]
        return before + learned, [self.pad_token_id] * len(before) + learned

    def _pad(
        self,
        encoded_inputs: Any,
        max_length: int | None = None,
        padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
    ) -> dict[str, Any]:
        """Pad ids and mask; positions count from 0 at the first real id and are 0 on padding."""
        n = len(encoded_inputs["input_ids"])
        positions = list(encoded_inputs.pop("position_ids", range(n)))
        side = padding_side or self.padding_side
        padded: dict[str, Any] = super()._pad(encoded_inputs, max_length, padding_strategy, pad_to_multiple_of, side,
                                              return_attention_mask)  # fmt: skip
        zeros = [0] * (len(padded["input_ids"]) - n)
        padded["position_ids"] = zeros + positions if side == "left" else positions + zeros
        return padded
