"""Tokens by which a model that sees or hears finds images, videos and sounds in a text: nobody's words may hold one.

A chat template writes words as they are, and a tokenizer reads `<|image_pad|>` among them as the token: the model would look
for an image that is not there, or take the place of another one for it.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qgraft.data.messages import ConversationError, Message, Tool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def marker_texts(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> tuple[str, ...]:
    """How these ids are written; those left out that are no added tokens, such as another vocabulary's in a configuration."""
    added = tokenizer.added_tokens_decoder if ids else {}
    return tuple(dict.fromkeys(added[token].content for token in ids if token in added))


def refuse_markers(texts: Sequence[str], messages: Sequence[Message], tools: Sequence[Tool] = ()) -> None:
    """Raise ConversationError where what somebody says, or a tool is called, holds one of these."""
    if not texts:
        return
    said = [word for each in messages for word in (each.content, each.reasoning, *map(str, each.calls))]
    for text in texts:
        if any(text in word for word in (*said, *map(str, tools))):
            raise ConversationError(
                f"a text holds {text!r}, which this model takes for images, videos or sounds",
                hint="write that otherwise; an image is named in a row's column images, or by --image of chat",
            )
