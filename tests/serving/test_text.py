"""What is shown of an answer stays, adds up to the answer, and never holds a stop string."""

import re
from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from qgraft.serving.blocks import Blocks
from qgraft.serving.text import AnswerText, joined_ids


def by_bytes(ids: list[int]) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


def shown(
    decode: Callable[[list[int]], str], ids: list[int], stop: tuple[str, ...] = (), rewrites: bool = False
) -> AnswerText:
    text = AnswerText(decode, stop, rewrites)
    pieces = []
    for token in ids:
        if text.stopped is None:
            pieces.append(text.push(token))
    pieces.append(text.end())
    assert "".join(pieces) == text.text
    return text


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60))
def test_characters_of_several_ids_come_whole(text: str) -> None:
    answer = AnswerText(by_bytes)
    pieces = [answer.push(byte) for byte in text.encode("utf-8", "replace")]
    assert "".join(pieces) + answer.end() == text.encode("utf-8", "replace").decode()
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text


def of_bytes() -> PreTrainedTokenizerFast:
    """A vocabulary as sentencepiece's with a piece for each byte: ids 3 to 258, then words."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "b", "你", "\u200d"]
    made = Tokenizer(models.BPE(dict(zip(pieces, range(264), strict=True)), [], byte_fallback=True, unk_token="<unk>"))
    spaces, strip = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    made.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), strip])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


BYTES = of_bytes()


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.integers(0, 263).map(lambda id: [id])
        | st.sampled_from(["👨\u200d👩", "é", "e\u0301", "你好", "\n"]).map(lambda text: [3 + b for b in text.encode()])
        | st.just([2] * 80),
        max_size=30,
    ),
    st.booleans(),
)
def test_a_stream_of_any_ids_is_what_all_of_them_decode_to(parts: list[list[int]], skip: bool) -> None:
    ids = [id for part in parts for id in part]

    def decode(ids: list[int]) -> str:
        return str(BYTES.decode(ids, skip_special_tokens=skip))

    text = AnswerText(decode, joined=joined_ids(BYTES, skip))
    assert "".join(map(text.push, ids)) + text.end() == decode(ids)


def test_a_stop_string_of_bytes_is_not_waited_for() -> None:
    text = AnswerText(lambda ids: str(BYTES.decode(ids)), ("\n",), joined=joined_ids(BYTES))
    told = [text.push(id) for id in (260, 3 + 0xC3, 3 + 0xA9, 3 + 10)]
    assert told == ["a", "", "", "é"] and text.stopped == "\n" and text.text == "aé"
    assert not joined_ids(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, []))))


def cleaned(text: str) -> str:
    """As ChatGLM's chat() does, in other words."""
    text = text.strip().replace("[[训练时间]]", "2023年")
    return re.sub(r"(?<=[\u4e00-\u9fff]),|,(?=[\u4e00-\u9fff])", "，", text)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from(["你", ",", " ", "a", "[[训练时间]]", "[[训练", "\n", "2", "好," * 30, " " * 40]), max_size=12
    )
)
def test_a_cleaned_answer_is_the_same_piece_by_piece(pieces: list[str]) -> None:
    text = "".join(pieces)
    for stop in ((), ("，a",)):
        answer = AnswerText(by_bytes, stop, clean=cleaned)
        told = [answer.push(byte) for byte in text.encode()]
        assert "".join(told) + answer.end() == answer.text
        whole = cleaned(text)
        assert answer.text == (whole.partition(stop[0])[0] if stop else whole)
        assert len("".join(told)) >= len(whole) - 16 or stop or len(text) - len(text.rstrip()) > 0


def test_long_answers_forget_what_is_settled() -> None:
    text = "Grüße, 世界! " * 60
    answer = AnswerText(by_bytes)
    assert "".join(map(answer.push, text.encode())) + answer.end() == text and len(answer._ids) < 100


@settings(max_examples=100, deadline=None)
@given(st.text("ab\n", max_size=300), st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3))
def test_an_answer_ends_before_its_first_stop_string(text: str, stop: list[str]) -> None:
    answer = shown(by_bytes, list(text.encode()), tuple(stop))
    ends = [text.find(each) + len(each) for each in stop if each in text]
    if not ends:
        assert answer.text == text and answer.stopped is None
    else:  # the one that is complete first, where several begin there the one that begins first
        assert answer.stopped in stop and text.startswith(answer.text + str(answer.stopped))
        assert len(answer.text) + len(str(answer.stopped)) == min(ends) and not any(
            each in answer.text for each in stop
        )


def test_a_tokenizer_that_takes_blanks_out_again_is_waited_for() -> None:
    words = {1: "it", 2: " '", 3: "s", 4: " here", 5: " ."}

    def decode(ids: list[int]) -> str:
        return "".join(words[token] for token in ids).replace(" 's", "'s").replace(" .", ".")

    text = AnswerText(decode, rewrites=True)
    assert [text.push(token) for token in (1, 2, 3, 4, 5)] == ["", "it", "", "'s", ""]
    assert text.end() == " here." and text.text == "it's here."


def test_blocks_are_known_by_what_is_before_them_and_given_away_when_there_are_no_others() -> None:
    blocks = Blocks(6)
    ids = list(range(64))
    first = blocks.begin("law", ids)
    first.blocks += blocks.take(4) or []
    blocks.tell(first, ids, 64)
    second = blocks.begin("law", [*ids[:40], 99])
    assert second.blocks == first.blocks[:2] and blocks.available == 2
    assert blocks.begin("med", ids).blocks == [] and blocks.begin("law", ids[16:]).blocks == []
    blocks.release(first.blocks)
    assert blocks.available == 4 and blocks.take(5) is None
    taken = blocks.take(4)
    assert taken is not None and not set(taken) & set(second.blocks)
    assert blocks.begin("law", ids).blocks == second.blocks  # the end was forgotten first
