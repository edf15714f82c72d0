"""Both tokenizers: what the released ones made of the same texts, and the same logic on tiny vocabularies."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TextStreamer

from qgraft.errors import CheckpointError, DataError, OptionError
from qgraft.models.chatglm2_tokenizer import ChatGLM2Tokenizer
from qgraft.models.chatglm_tokenizer import ChatGLMTokenizer
from qgraft.models.prefix_lm import Marks, context_positions

ROOT = Path(__file__).parents[2]
CLASSES = {"ice_text.model": ChatGLMTokenizer, "tokenizer.model": ChatGLM2Tokenizer}
FOLDERS = {"ice_text.model": "tokenizer_chatglm", "tokenizer.model": "tokenizer_chatglm2"}
CHAT = [("user", "你好"), ("assistant", "Hello!"), ("user", "1+1?")]
IGNORED = -100


@pytest.fixture(scope="module", params=CLASSES)
def real(request):
    """(tokenizer of the released vocabulary, reader of its golden files)"""
    folder = FOLDERS[request.param]
    path = ROOT.parent / "shared" / "golden" / folder / request.param
    if not path.is_file():
        pytest.skip(f"the released vocabulary is not in {path.parent}")
    golden = ROOT / "tests" / "golden" / folder
    return CLASSES[request.param](vocab_file=path), lambda name: json.loads((golden / f"{name}.json").read_text())


@pytest.fixture(scope="module", params=CLASSES)
def tiny(request, tiny_vocabulary):
    return CLASSES[request.param](vocab_file=tiny_vocabulary(request.param))


@pytest.fixture(scope="module")
def first(tiny_vocabulary):
    return ChatGLMTokenizer(vocab_file=tiny_vocabulary("ice_text.model"))


@pytest.fixture(scope="module")
def second(tiny_vocabulary):
    return ChatGLM2Tokenizer(vocab_file=tiny_vocabulary("tokenizer.model"))


def text_ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def as_dicts(messages):
    return [{"role": role, "content": content} for role, content in messages]


def test_golden_texts(real):
    tokenizer, golden = real
    for case in golden("tokenize"):
        whole = tokenizer(case["text"])["input_ids"]
        assert tokenizer.tokenize(case["text"]) == case["pieces"]
        assert text_ids(tokenizer, case["text"]) == case["ids"]
        assert whole == case["ids_with_special"]
        assert tokenizer.decode(case["ids"]) == case["decoded"]
        assert tokenizer.batch_decode([whole]) == [case["decoded_with_special"]]
        assert tokenizer.decode(whole, skip_special_tokens=True) == case["decoded_skip_special"]
    for case in golden("pairs"):
        assert tokenizer(case["a"], case["b"])["input_ids"] == case["ids"]


@pytest.mark.parametrize(
    ("case", "options"),
    [("longest", {"padding": True}), ("max_length", {"padding": "max_length", "max_length": 12, "truncation": True})],
)
def test_golden_batches(real, case, options):
    tokenizer, golden = real
    expected = golden("batch")[case]
    lists = tokenizer(expected["texts"], **options)
    tensors = tokenizer(expected["texts"], return_tensors="pt", **options)
    for key in tokenizer.model_input_names:
        assert lists[key] == tensors[key].tolist() == expected[key]


def test_golden_truncation(real):
    tokenizer, golden = real
    case = golden("batch")["truncate"]
    assert [tokenizer(case["text"], truncation=True, max_length=case["max_length"])["input_ids"]] == case["input_ids"]


def test_golden_prompts(real):
    tokenizer, golden = real
    prompts = golden("prompts")
    for case in prompts["chat"]:
        rounds = [turn for asked, said in case["history"] for turn in (("user", asked), ("assistant", said))]
        messages = [*rounds, ("user", case["query"])]
        assert tokenizer.prompt_text(messages) == case["prompt"]
        assert tokenizer.prompt_ids(messages) == case["ids"]
        assert tokenizer.apply_chat_template(as_dicts(messages))["input_ids"] == case["ids"]
    if more := prompts["continuation"]:
        assert text_ids(tokenizer, more["text"]) == more["ids_full"]
        assert more["ids_full"][1:] == more["ids_used"]


def test_golden_special_ids(real):
    tokenizer, golden = real
    special = golden("special")
    info = special["info"]
    assert {piece: tokenizer.convert_tokens_to_ids(piece) for piece in special["ids"]} == special["ids"]
    assert {i: tokenizer.convert_ids_to_tokens(int(i)) for i in special["id_to_token"]} == special["id_to_token"]
    assert len(tokenizer) == info.pop("len")
    assert sorted(tokenizer.added_tokens_encoder) == info.pop("no_split_tokens")
    info.pop("end_token_id", None)  # of the original class only: </s>, which the first generation does not use
    assert {key: getattr(tokenizer, key) for key in info} == info


def test_the_released_vocabularies_are_not_taken_for_each_other(real):
    tokenizer, _ = real
    other = next(each for each in CLASSES.values() if each is not type(tokenizer))
    with pytest.raises(CheckpointError, match=r"(?s)pieces.*other generation"):
        other(vocab_file=tokenizer.vocab_file)


def test_special_ids_of_the_second_generation_lie_behind_the_file(second):
    pieces = second.sp_model.get_piece_size()
    names = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"]
    assert second.convert_tokens_to_ids(names) == list(range(pieces, pieces + 5))
    assert len(second) == second.vocab_size == len(second.get_vocab()) == pieces + 5
    assert (second.pad_token_id, second.eos_token_id, second.bos_token_id) == (0, 2, None)


def test_special_ids_of_the_first_generation_are_pieces_of_the_file(first):
    assert len(first) == first.vocab_size == len(first.get_vocab()) == first.sp_model.get_piece_size()
    vocabulary = first.get_vocab()
    names = ["<sop>", "<eop>", "<pad>", "[gMASK]", "[MASK]"]
    ids = [first.bos_token_id, first.eos_token_id, first.pad_token_id, first.gmask_token_id, first.mask_token_id]
    assert ids == [vocabulary[name] for name in names]


def test_special_strings_in_a_text(first, second):
    assert text_ids(first, "a <eop>\nb") == [*text_ids(first, "a"), first.eos_token_id, *text_ids(first, "b")]
    assert first.gmask_token_id not in text_ids(first, "[gMASK]")
    for name in ("[MASK]", "[gMASK]", "sop", "eop", "</s>", "<unk>"):
        assert second.decode(text_ids(second, name)) == name
        assert second.convert_tokens_to_ids(name) not in text_ids(second, name)


def test_ids_that_no_text_has_decode_to_nothing(tiny):
    hello = text_ids(tiny, "Hello")
    padded_rows = [len(tiny), len(tiny) + 100]
    assert tiny.decode([tiny.pad_token_id] * (tiny.pad_token != "<unk>") + hello + padded_rows) == "Hello"
    assert tiny.decode(tiny("Hello")["input_ids"] + [tiny.eos_token_id]) == "Hello"
    assert tiny.convert_ids_to_tokens(len(tiny) + 7) == ""


def test_prompts_of_the_first_generation(first):
    assert first.prompt_text([("user", "{你好}")]) == "{你好}"
    assert first.prompt_text([("user", "你好")], numbered=True) == "[Round 0]\n问：你好\n答："
    assert first.prompt_text(CHAT) == "[Round 0]\n问：你好\n答：Hello!\n[Round 1]\n问：1+1?\n答："
    ids = first.prompt_ids(CHAT)
    assert ids == [*text_ids(first, first.prompt_text(CHAT)), first.gmask_token_id, first.bos_token_id]


def test_prompts_of_the_second_generation(second):
    assert second.prompt_text([("user", "{你好}")]) == "[Round 1]\n\n问：{你好}\n\n答："
    assert second.prompt_text(CHAT) == "[Round 1]\n\n问：你好\n\n答：Hello!\n\n[Round 2]\n\n问：1+1?\n\n答："
    ids = second.prompt_ids(CHAT)
    assert ids == second.convert_tokens_to_ids(["[gMASK]", "sop"]) + text_ids(second, second.prompt_text(CHAT))


def test_a_system_text_stands_in_front_of_the_first_question(tiny):
    joined = [("user", "Be brief.\n\n你好"), *CHAT[1:]]
    assert tiny.prompt_ids([("system", "Be brief."), *CHAT]) == tiny.prompt_ids(joined)


@pytest.mark.parametrize(
    "messages",
    [[], CHAT[:2], [("assistant", "a"), ("user", "q")], [("user", "q"), ("user", "q")], [*CHAT[:1], ("tool", "t")],
     [("user", "q"), ("assistant", "a"), ("system", "s")]],
)  # fmt: skip
def test_other_roles_and_orders_are_refused(tiny, messages):
    with pytest.raises(DataError, match="ending in user"):
        tiny.prompt_ids(messages)


def test_a_chat_template_is_the_prompt(tiny):
    chat = as_dicts(CHAT)
    assert tiny.apply_chat_template(chat, return_dict=False) == tiny.prompt_ids(CHAT)
    assert tiny.apply_chat_template(chat, tokenize=False) == tiny.prompt_text(CHAT)
    batch = tiny.apply_chat_template([chat, chat[:1]], padding=True, return_tensors="pt")
    assert batch["input_ids"][0].tolist() == tiny.prompt_ids(CHAT)
    assert batch["input_ids"][1].tolist()[-4:] == tiny.prompt_ids(CHAT[:1])[-4:]
    assert tiny.apply_chat_template(chat[:2])["input_ids"] == tiny.sample_ids(CHAT[:2])[0]
    assert tiny.apply_chat_template(chat[:2], tokenize=False) == tiny.prompt_text(CHAT[:1]) + "Hello!"


@pytest.mark.parametrize(
    "options", [{"tools": [{"name": "f"}]}, {"chat_template": "{{ messages }}"}, {"continue_final_message": True}]
)
def test_what_only_a_template_can_do_is_refused(tiny, options):
    with pytest.raises(ValueError, match="writes prompts itself"):
        tiny.apply_chat_template(as_dicts(CHAT), **options)
    with pytest.raises(ValueError, match="or none"):
        tiny.apply_chat_template([as_dicts(CHAT), as_dicts(CHAT[:2])])


def hidden(ids, tokenizer, padding):
    """The rule of the first generation, element by element: is key k hidden from query q?"""
    sop = ids.index(tokenizer.bos_token_id) if tokenizer.bos_token_id in ids else len(ids)
    return [[[q < padding or k < padding or (k >= sop and k > q) for k in range(len(ids))] for q in range(len(ids))]]


def positions(ids, tokenizer, padding):
    """The rule of the first generation: both counters start behind the padding."""
    rows, blocks, marked, counting = [], [], None, 0
    for at, token in enumerate(ids[padding:]):
        counting += token == tokenizer.bos_token_id or counting > 0
        rows.append(marked if counting else at)
        blocks.append(counting)
        marked = at if token == tokenizer.gmask_token_id else marked
    return [[0] * padding + rows, [0] * padding + blocks]


@given(texts=st.lists(st.text("你好 ab\n", max_size=8), min_size=1, max_size=3), multiple=st.sampled_from([None, 4]))
def test_padding_of_the_first_generation(first, texts, multiple):
    batch = first(texts, padding=True, pad_to_multiple_of=multiple)
    for text, ids, mask, places in zip(texts, *(batch[key] for key in first.model_input_names), strict=True):
        padding = len(ids) - len(first(text)["input_ids"])
        assert ids == [first.pad_token_id] * padding + first(text)["input_ids"]
        assert mask == hidden(ids, first, padding)
        assert places == positions(ids, first, padding)
    assert multiple is None or len(batch["input_ids"][0]) % multiple == 0


@given(
    texts=st.lists(st.text("你好 ab\n", max_size=8), min_size=1, max_size=3), side=st.sampled_from(["left", "right"])
)
def test_padding_of_the_second_generation(second, texts, side):
    batch = second(texts, padding=True, padding_side=side)
    for text, ids, mask, places in zip(texts, *(batch[key] for key in second.model_input_names), strict=True):
        real = second(text)["input_ids"]
        place = slice(len(ids) - len(real), None) if side == "left" else slice(len(real))
        assert ids[place] == real and mask[place] == [1] * len(real) and places[place] == list(range(len(real)))
        assert sum(mask) == len(real) and sum(places) == sum(range(len(real)))


def test_encodings_can_be_padded_later(tiny):
    texts = ["你好", "Hello, world!"]
    direct = tiny(texts, padding=True)
    later = tiny.pad([tiny(text, padding=True) for text in texts])
    assert {key: later[key] for key in direct} == dict(direct)
    assert np.array_equal(tiny(texts, padding=True, return_tensors="np")["attention_mask"], direct["attention_mask"])


@pytest.mark.parametrize("text", ["a [MASK] in the text", "[MASK]", "你好"])
def test_padding_counts_positions_as_the_model_does(first, text):
    """THUDM's tokenizer stops at a [MASK] in the text, its model at [gMASK]: alone and in a batch a row would differ."""
    ids = first(text)["input_ids"]
    batch = first([text, "晚上睡不着应该怎么办？多运动，少喝咖啡。" * 2], padding=True)
    own = context_positions(torch.tensor([ids]), Marks(first.bos_token_id, first.gmask_token_id, first.mask_token_id))
    assert [row[-len(ids) :] for row in batch["position_ids"][0]] == own[0].tolist()


def test_an_encoding_without_padding_has_no_mask_in_the_first_generation(first, second):
    assert list(first("你好")) == ["input_ids"]
    assert list(second("你好")) == ["input_ids", "attention_mask", "position_ids"]
    assert "attention_mask" not in second("你好", return_attention_mask=False)
    assert "attention_mask" not in first("你好", padding="max_length", max_length=9, return_attention_mask=False)


def test_without_sop_every_query_sees_every_key(first):
    one = first(["Hello"], add_special_tokens=False, padding=True)
    n = len(one["input_ids"][0])
    assert not np.any(one["attention_mask"])
    assert one["position_ids"] == [[list(range(n)), [0] * n]]


@given(st.text(st.characters(codec="utf-8", exclude_characters="\u2581\0")))
def test_second_generation_round_trip(second, text):
    assert second.decode(text_ids(second, text)) == text


@given(st.text("你好问答 ab1\n\t", max_size=200))
def test_first_generation_round_trip(first, text):
    assert first.decode(text_ids(first, text), clean_up_tokenization_spaces=False) == text


@given(st.integers(0, 300))
def test_runs_of_blanks_are_as_few_pieces_as_can_be(first, count):
    pieces = first.tokenize("a" + " " * count + "b")
    runs = [int(piece[8:-2]) for piece in pieces if piece.startswith("<|blank_")]
    left = count % 80
    assert runs == [80] * (count // 80) + [left] * (left > 1)


def test_english_clean_up_belongs_to_the_first_generation(first, second):
    text = "Hello , world . it 's"
    assert first.decode(text_ids(first, text)) == "Hello, world. it's"
    assert second.decode(text_ids(second, text)) == text


@pytest.mark.parametrize("text", ["你好，world 1+1\n问答 \u00e9\U0001f44b!", "one two\nthree", ""])
def test_streamed_text_is_the_decoded_text(tiny, text):
    printed = []

    class Streamer(TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            printed.append(text)

    ids = [*text_ids(tiny, text), tiny.eos_token_id]
    streamer = Streamer(tiny, skip_special_tokens=True)
    for token in ids:
        streamer.put(np.array([token]))
    streamer.end()
    assert "".join(printed) == tiny.decode(ids)


def test_answers_are_cleaned_as_the_released_chat_does(first, second):
    answer = "  你好,世界!1,2 [[训练时间]]?a:b;中\n"
    assert second.clean_answer(answer) == "你好,世界!1,2 2023年?a:b;中"
    assert first.clean_answer(answer) == "你好，世界！1,2 2023年？a:b；中"


def test_a_saved_tokenizer_is_the_same(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    name = tiny.vocab_files_names["vocab_file"]
    assert (tmp_path / name).read_bytes() == Path(tiny.vocab_file).read_bytes()
    text = "a <eop> 你好\n  b"
    for again in (type(tiny)(vocab_file=tmp_path / name), type(tiny).from_pretrained(tmp_path)):
        assert again(text) == tiny(text)
        assert again.get_vocab() == tiny.get_vocab()
        assert again.all_special_tokens == tiny.all_special_tokens


def test_a_released_tokenizer_config_changes_nothing(tiny, tmp_path):
    tiny.save_vocabulary(str(tmp_path))
    config = {"tokenizer_class": "Other", "do_lower_case": True, "gmask_token": "[gMASK]", "eos_token": "a",
              "padding_side": "left", "added_tokens_decoder": {}}  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    again = type(tiny).from_pretrained(tmp_path)
    assert again("[gMASK] a A")["input_ids"] == tiny("[gMASK] a A")["input_ids"]
    assert again.eos_token_id == tiny.eos_token_id


@pytest.mark.parametrize("damage", ["text", "empty", "cut", "absent", "other"])
def test_a_file_that_is_no_vocabulary_is_refused(tiny, tiny_vocabulary, tmp_path, damage):
    path = tmp_path / "some.model"
    good = Path(tiny.vocab_file).read_bytes()
    other = next(name for name, each in CLASSES.items() if each is not type(tiny))
    contents = {"text": b'{"a": 1}', "empty": b"", "cut": good[: len(good) // 2]}
    contents["other"] = tiny_vocabulary(other).read_bytes()
    if damage != "absent":
        path.write_bytes(contents[damage])
    with pytest.raises(CheckpointError, match=r"some\.model") as error:
        type(tiny)(vocab_file=path)
    assert error.value.hint


def test_labels_of_the_first_generation_begin_with_sop(first):
    ids, labels = first.sample_ids(CHAT[:2])
    answer = [first.bos_token_id, *text_ids(first, "Hello!"), first.eos_token_id]
    assert ids == [*text_ids(first, "你好"), first.gmask_token_id, *answer]
    assert labels == [IGNORED] * (len(ids) - len(answer)) + answer


def test_labels_of_the_second_generation_begin_with_the_answer(second):
    ids, labels = second.sample_ids(CHAT[:2])
    answer = [*text_ids(second, "Hello!"), second.eos_token_id]
    assert ids == second.prompt_ids(CHAT[:1]) + answer
    assert labels == [IGNORED] * (len(ids) - len(answer)) + answer


@given(st.integers(3, 40), st.integers(3, 12), st.integers(0, 2))
def test_prompt_and_answer_are_cut_to_their_lengths(tiny, source, target, rounds):
    messages = [*CHAT[:2] * rounds, ("user", "晚上睡不着应该怎么办"), ("assistant", "多运动，少喝咖啡。")]
    whole, _ = tiny.sample_ids(messages)
    ids, labels = tiny.sample_ids(messages, source, target)
    learned = [label for label in labels if label != IGNORED]
    before = len(ids) - len(learned)
    assert before <= source and len(learned) <= target + tiny.spare_length
    assert ids[before:] == learned and learned[-1] == tiny.eos_token_id
    kept = source - 1 if isinstance(tiny, ChatGLMTokenizer) else source
    assert ids[: min(kept, before)] == whole[: min(kept, before)]
    assert tiny.sample_ids(messages, 500, 500)[0] == whole


def test_learned_padding_fills_both_lengths(tiny):
    ids, labels = tiny.sample_ids(CHAT[:2], 30, 20)
    padded, learned = tiny.sample_ids(CHAT[:2], 30, 20, learn_padding=True)
    room = 30 + 20 + tiny.spare_length - len(ids)
    assert padded == ids + [tiny.pad_token_id] * room
    assert learned[len(ids) :] == [tiny.pad_token_id] * room
    unlearned = IGNORED if isinstance(tiny, ChatGLMTokenizer) else tiny.pad_token_id  # 2: it learns to predict <unk>
    assert learned[: len(ids)] == [unlearned if label == IGNORED else label for label in labels]
    with pytest.raises(OptionError, match="max_target_length"):
        tiny.sample_ids(CHAT[:2], 30, learn_padding=True)
    with pytest.raises(DataError, match="assistant"):
        tiny.sample_ids(CHAT)
