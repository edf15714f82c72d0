"""Where an answer ends: the tokens that end generation, and behind which nothing is learned, printed or remembered.

Files are often wrong about it. A base model's `</s>` stays the end token of a chat model whose template ends turns with
`<|im_end|>`; Llama 3 has one token for the end of a text and another for the end of a turn; converters forget the keys.
Generation then runs on through made-up questions. So an end token is what any of three sources says:

    ids      of the file's keys (eos, eot, eom), generation_config.json, config.json and the tokenizer
    texts    tokens that are ends by their names; the list is llama.cpp's (llama-vocab.cpp, special_eog_ids), but for its
             tokens of filling in the middle, which end no turn; and the starts of a next turn that GLM's models write
    template the first token of its own that the chat template writes behind an answer: the end of the turn, or where it
             writes none, the start of the next one; nothing where an end that is known stands there

A text counts only where it is a token of its own (special or user-defined), never a word that merges make.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from qgraft.data.messages import ConversationError, Message
from qgraft.data.rendering import Writer
from qgraft.data.templates import ChatTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ENDS = (
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>", "<end_of_turn>", "<|end|>", "<turn|>",
    "<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "<|tool_response>", "<end_of_utterance>", "<EOT>", "_<EOT>",
    "[EOT]", "[EOS]", "<eos>", "</s>", "<｜end▁of▁sentence｜>", "[e~[",
)  # fmt: skip
STARTS = ("<|user|>", "<|observation|>")
_QUESTION, _ANSWER = "Is this the question?", "This is the answer."


def end_token_ids(
    tokenizer: "PreTrainedTokenizerBase",
    stated: int | Iterable[int] | None = None,
    template: ChatTemplate | None = None,
) -> list[int]:
    """The ids of the tokens that end an answer, the tokenizer's own end token first.

    Args:
        stated: what the model's configuration says, one or several.
        template: the chat template; None, or one without text, for a tokenizer that writes prompts itself.
    """
    told = [stated] if isinstance(stated, int) else list(stated or ())
    ids = [tokenizer.eos_token_id, *told, *_by_text(tokenizer)]
    starts = {tokenizer.get_added_vocab().get(text) for text in STARTS}
    ids.append(_by_template(tokenizer, template, {*ids} - starts) if template and template.text else None)
    return list(dict.fromkeys(int(token) for token in ids if token is not None))


def until_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    """The ids before the first end token."""
    return ids[: next((index for index, token in enumerate(ids) if token in ends), len(ids))]


def _by_text(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    own = tokenizer.get_added_vocab()
    ends = dict.fromkeys(text for text in (*ENDS, *STARTS) if text in own)
    if ends.keys() & {"<|return|>", "<|flush|>"} and ends.keys() & {"<|call|>", "<|calls|>"}:
        ends.pop("<|end|>", None)  # ends a part of the answer there, not the answer (gpt-oss, Solar Open)
    if "<|tool_response>" in ends:
        ends.pop("</s>", None)  # Gemma 4's vocabulary has it as a word among others
    return [own[text] for text in ends]


def _by_template(
    tokenizer: "PreTrainedTokenizerBase", template: ChatTemplate, known: Collection[int | None]
) -> int | None:
    """The token of its own that the template writes right behind an answer; None where it writes a word, or fails.

    None, too, where the end is `known` without it: the last answer's own (gpt-oss, whose later prompts have <|end|> in its
    place, the token that ends what it thinks), or one right behind (Command R7B: <|END_RESPONSE|><|END_OF_TURN_TOKEN|>).
    """
    turns = [Message("user", "Hello."), Message("assistant", _ANSWER), Message("user", _QUESTION)]
    writer = Writer(tokenizer, template)
    try:
        text = writer.prompt(turns)
    except ConversationError:  # what is wrong with it is said where a prompt is written
        return None
    between = _own_at(tokenizer, text.partition(_ANSWER)[2].partition(_QUESTION)[0])
    if not between or {*between, *_own_at(tokenizer, writer.tail or "")[:1]} & {*known}:
        return None
    return between[0]


def _own_at(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """The tokens of its own that stand one behind the other at the beginning of a text, blanks before them aside."""
    own, found, text = tokenizer.get_added_vocab(), list[int](), text.lstrip()
    while token := max((each for each in own if each and text.startswith(each)), key=len, default=""):
        found.append(own[token])
        text = text[len(token) :]
    return found
