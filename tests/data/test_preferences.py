"""Rows that say which answers are preferred, in all forms; and what is judged of them."""

import json
from functools import partial

import pytest

from qgraft.data.preference_samples import build_preferences
from qgraft.data.reading import Accounting, read_dataset, read_preferences
from qgraft.data.tokenizing import IGNORED, resolve_template
from qgraft.errors import DataError

ASK, YES, NO = (
    {"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "good"), ("assistant", "bad"))
)
PAIR = [[("user", "q"), ("assistant", "good")], [("user", "q"), ("assistant", "bad")]]
GPT = [{"from": "human", "value": "q"}], {"from": "gpt", "value": "good"}, {"from": "gpt", "value": "bad"}


def turns(row, labelled=False, **reading):
    (conversations,), _ = read_preferences([row], labelled=labelled, **reading)
    return [[(each.role, each.content) for each in conversation.messages] for conversation in conversations]


def reason(row, labelled=False):
    good = (
        {"prompt": "q", "completion": "a", "label": True}
        if labelled
        else {"prompt": "q", "chosen": "a", "rejected": "b"}
    )
    _, accounting = read_preferences([row, good], labelled=labelled)
    assert accounting.kept == 1 and sum(accounting.dropped.values()) == 1
    return next(iter(accounting.dropped))


@pytest.mark.parametrize(
    "row",
    [{"prompt": "q", "chosen": "good", "rejected": "bad"}, {"question": "q", "chosen": "good", "rejected": "bad"},
     {"prompt": [ASK], "chosen": [YES], "rejected": [NO]}, {"prompt": [ASK], "chosen": YES, "rejected": NO},
     {"prompt": [ASK], "chosen": "good", "rejected": "bad"}, {"chosen": [ASK, YES], "rejected": [ASK, NO]},
     {"prompt": "q", "chosen": [ASK, YES], "rejected": [ASK, NO]}, {"prompt": "q", "chosen": [YES], "rejected": [NO]},
     {"messages": [ASK], "chosen": YES, "rejected": NO}, {"conversations": GPT[0], "chosen": GPT[1], "rejected": GPT[2]},
     {"messages": [ASK, YES], "prompt": "q", "chosen": [ASK, YES], "rejected": [ASK, NO]},
     {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"}],
)  # fmt: skip
def test_pairs_in_all_forms(row):
    assert turns(row) == PAIR


def test_what_stands_in_front_of_pairs():
    row = {
        "instruction": "q",
        "input": "x",
        "system": "s",
        "history": [["a", "b"]],
        "chosen": "good",
        "rejected": "bad",
    }
    front = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "q\nx")]
    assert turns(row) == [[*front, ("assistant", "good")], [*front, ("assistant", "bad")]]
    assert (
        turns(
            {"ask": "q", "won": "good", "lost": "bad"}, columns={"prompt": "ask", "chosen": "won", "rejected": "lost"}
        )
        == PAIR
    )


@pytest.mark.parametrize("label", [True, False, 1, 0, "true", "False", 1.0])
@pytest.mark.parametrize(
    "row",
    [{"prompt": "q", "completion": "a"}, {"prompt": [ASK], "completion": [{"role": "assistant", "content": "a"}]},
     {"messages": [ASK, {"role": "assistant", "content": "a"}]}, {"instruction": "q", "output": "a"}],
)  # fmt: skip
def test_single_answers_in_all_forms(row, label):
    for column in ("label", "kto_tag"):
        (((conversation,),), accounting) = read_preferences([{**row, column: label}], labelled=True)
        assert [(each.role, each.content) for each in conversation.messages] == [("user", "q"), ("assistant", "a")]
        assert conversation.desirable is (str(label).lower() in ("true", "1", "1.0"))
        assert accounting.ignored == {}


@pytest.mark.parametrize(
    ("row", "why"),
    [({"prompt": "q", "chosen": "good"}, "holds no rejected, expected chosen and rejected"),
     ({"prompt": "q", "completion": "a", "label": True}, "holds an answer and a label, which stage kto learns"),
     ({"prompt": "q", "chosen": "same", "rejected": "same"}, "chosen and rejected are the same"),
     ({"chosen": "good", "rejected": "bad"}, "no prompt"),
     ({"prompt": "q", "chosen": [ASK, YES], "rejected": [NO]}, "one of chosen and rejected is a whole conversation"),
     ({"prompt": "other", "chosen": [ASK, YES], "rejected": [ASK, NO]}, "the prompt is not what chosen and rejected begin"),
     ({"chosen": [ASK, YES], "rejected": [ASK, YES, ASK, NO]}, "one is the beginning of the other"),
     ({"prompt": "q", "chosen": [ASK], "rejected": [ASK, NO]}, "does not end in an assistant turn"),
     ({"prompt": [ASK], "chosen": [{"role": "judge", "content": "x"}], "rejected": [NO]}, "unknown role 'judge'"),
     ({"prompt": "q", "chosen": 3.5, "rejected": {}}, "message is"), ([1], "row is a list, not an object")],
)  # fmt: skip
def test_rows_that_hold_no_pair(row, why):
    if row == {"prompt": "q", "chosen": 3.5, "rejected": {}}:
        why = "unknown role"
    assert why in reason(row)


@pytest.mark.parametrize(
    ("row", "why"),
    [({"prompt": "q", "chosen": "a", "rejected": "b"}, "holds a pair (chosen, rejected), which stage dpo learns"),
     ({"prompt": "q", "completion": "a"}, "holds no label, expected true or false"),
     ({"prompt": "q", "completion": "a", "label": "maybe"}, "label is 'maybe', expected true or false"),
     ({"prompt": "q", "completion": "a", "label": 2}, "label is '2', expected true or false"),
     ({"prompt": "q", "label": True}, "no answer")],
)  # fmt: skip
def test_rows_that_hold_no_labelled_answer(row, why):
    assert why in reason(row, labelled=True)


def test_rows_of_another_stage_name_theirs():
    with pytest.raises(DataError, match=r"holds preferences \(chosen, rejected\), which stage dpo learns"):
        read_dataset([{"prompt": "q", "chosen": "a", "rejected": "b"}])
    with pytest.raises(DataError, match="holds no chosen") as error:
        read_preferences([{"prompt": "q", "completion": "a"}])
    assert "stage kto" in error.value.hint


@pytest.mark.parametrize(
    ("read", "row"),
    [(read_dataset, {"prompt": "q", "rejected": "b", "chosen": "a"}),
     (partial(read_preferences, labelled=True), {"prompt": "q", "rejected": "b", "chosen": "a"}),
     (read_preferences, {"prompt": "q", "rejected": "b", "better": "a"}),
     (read_preferences, {"prompt": "q", "worse": "b", "better": "a"})],
)  # fmt: skip
def test_no_hint_takes_a_column_of_a_pair_for_the_answer(read, row):
    with pytest.raises(DataError) as error:
        read([row])
    assert not any(f"response_column {column}" in str(error.value) for column in row)


def test_entries_of_llamafactory(tmp_path):
    entries = {
        "pairs": {"file_name": "pairs.json", "ranking": True, "formatting": "sharegpt",
                  "columns": {"messages": "conversations", "chosen": "won", "rejected": "lost"}},
        "alpaca": {"file_name": "alpaca.json", "ranking": True,
                   "columns": {"prompt": "ask", "query": "more", "chosen": "won", "rejected": "lost"}},
        "kto": {"file_name": "kto.json", "formatting": "sharegpt", "columns": {"messages": "messages", "kto_tag": "good"}},
    }  # fmt: skip
    (tmp_path / "dataset_info.json").write_text(json.dumps(entries))
    (tmp_path / "pairs.json").write_text(json.dumps([{"conversations": GPT[0], "won": GPT[1], "lost": GPT[2]}]))
    (tmp_path / "alpaca.json").write_text(json.dumps([{"ask": "q", "won": "good", "lost": "bad"}]))
    (tmp_path / "kto.json").write_text(
        json.dumps([{"messages": [{"from": "human", "value": "q"}, GPT[1]], "good": False}])
    )
    for name in ("pairs", "alpaca"):
        (found,), _ = read_preferences(name, str(tmp_path))
        assert [[(m.role, m.content) for m in each.messages] for each in found] == PAIR
    (found,), _ = read_preferences("kto", str(tmp_path), labelled=True)
    assert found[0].desirable is False and found[0].messages[-1].content == "good"


def test_what_is_judged(chat_tokenizer):
    """The answers behind what both begin with; not those within it, and not what else stands between."""
    template = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}" \
               "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"  # fmt: skip
    tokenizer = chat_tokenizer(template=template)
    shared = [ASK, {"role": "assistant", "content": "before"}, {"role": "user", "content": "on"}]
    row = {"chosen": [*shared, YES, ASK, {"role": "assistant", "content": "last"}], "rejected": [*shared, NO]}
    rows, accounting = read_preferences([row, {"prompt": "q" * 200, "chosen": "good", "rejected": "bad"}])
    (found,) = build_preferences(tokenizer, rows, accounting, template=resolve_template(tokenizer), max_length=110)
    learned = [tokenizer.decode([label for label in text.labels if label != IGNORED]) for text in found.texts]
    assert learned == ["good<|im_end|>last<|im_end|>", "bad<|im_end|>"]
    assert tokenizer.decode(found.texts[0].input_ids[: found.shared]).endswith("on<|im_end|>\n<|im_start|>assistant\n")
    assert accounting.kept + sum(accounting.dropped.values()) == accounting.read == 2


def test_rows_that_are_cut_until_nothing_is_told_apart_are_dropped(chat_tokenizer):
    tokenizer = chat_tokenizer(template="{% for m in messages %}{{ m.content }}{% endfor %}")
    rows, accounting = read_preferences([{"prompt": "q", "chosen": "same good", "rejected": "same bad"},
                                         {"prompt": "q", "chosen": "x", "rejected": "y"}])  # fmt: skip
    found = build_preferences(tokenizer, rows, accounting, template=resolve_template(tokenizer), max_length=4)
    assert len(found) == 1
    assert "the same within max_length 4" in next(iter(accounting.dropped))
    with pytest.raises(DataError, match="no row is left"):
        build_preferences(
            tokenizer, rows[:1], Accounting(read=1, kept=1), template=resolve_template(tokenizer), max_length=4
        )


TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}


def test_tools_and_keys_of_the_messages_of_answers():
    asked = {"role": "system", "content": "s", "tools": [TOOL]}
    row = {"chosen": [asked, ASK, YES], "rejected": [{**asked, "tools": None}, ASK, {**NO, "score": 1}]}
    ((chosen, rejected),), accounting = read_preferences([row])
    assert chosen.tools == rejected.tools == (TOOL,) and accounting.ignored == {"messages[].score": 1}
    judged = {"prompt": [ASK], "completion": [{**YES, "tools": [TOOL], "score": 1}], "label": True}
    (((found,),), accounting) = read_preferences([judged], labelled=True)
    assert found.tools == (TOOL,) and accounting.ignored == {"messages[].score": 1}
    other = {**TOOL, "function": {"name": "other"}}
    assert reason({**row, "tools": [other]}) == "names other tools in one place than in another"


def test_a_system_text_beside_that_of_the_messages_is_said():
    own = {"role": "system", "content": "own"}
    for row in (
        {"chosen": [own, ASK, YES], "rejected": [own, ASK, NO]},
        {"prompt": [own, ASK], "chosen": YES, "rejected": NO},
    ):
        _, accounting = read_preferences([{**row, "system": "another"}])
        assert accounting.ignored == {"system (beside a system message)": 1}
        assert read_preferences([{**row, "system": "own"}])[1].ignored == {}
