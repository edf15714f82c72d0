"""Rows of recordings with their texts: what models that hear learn.

    {"audio": ..., "text": "..."}     the recording (sounds.py), and what is said in it, or its translation
    text                              also sentence, transcription, transcript, or a name of an answer (rows.COLUMNS)

Other columns are named with prompt_column, which holds the recording, and response_column.
"""

from collections.abc import Sequence

from qgraft.data.calls import RowError
from qgraft.data.labelled import checked_row, column_of
from qgraft.data.messages import Message
from qgraft.data.pictures import MARK
from qgraft.data.rows import COLUMNS, Read, RowLayout, is_empty, text_of, unread
from qgraft.data.sounds import sound_of

RECORDINGS = ("audio", "audios")
TEXTS = ("text", "sentence", "transcription", "transcript", *COLUMNS["response"])
SPOKEN = (
    'rows hold a recording and its text ({"audio": "a.wav", "text": ...}); other columns are named with prompt_column (of '
    "the recording) and response_column"
)


def read_spoken(row: object, layout: RowLayout) -> Sequence[Read]:
    """A recording, in a question of its own, and its text as the answer. Raises RowError."""
    row = checked_row(row)
    audio = column_of(row, layout, "prompt", RECORDINGS, "recording")
    text = column_of(row, layout, "response", TEXTS)
    if is_empty(row[text]):
        raise RowError("no text")
    messages = [Message("user", MARK, images=(sound_of(row[audio]),)), Message("assistant", text_of(row[text], "text"))]
    return [Read(messages, ignored=frozenset(unread(row, (audio, text))))]
