import gzip
import io
import json
import math

import datasets
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from qgraft.data.messages import Message, as_pairs
from qgraft.data.reading import Accounting, read_dataset
from qgraft.errors import DataError, OptionError

QA = [("user", "q"), ("assistant", "a")]
GOOD = {"instruction": "q", "output": "a"}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Each test runs in an empty folder, so that no `data` of ours is found."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines(*rows: object) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def turns(row: object, **options) -> list[tuple[str, str]]:
    (conversation,), _ = read_dataset([row], **options)
    return as_pairs(conversation.messages)


def reason(row: object, **options) -> str:
    """Why this row is dropped."""
    options.setdefault("columns", None)
    _, accounting = read_dataset([row, {"messages": [{"role": r, "content": c} for r, c in QA]}], **options)
    assert (accounting.read, accounting.kept) == (2, 1)
    ((why, places),) = accounting.examples.items()
    assert places == ["rows:1"]
    return why


# Formats


def messages(*pairs: tuple[str, object], role: str = "role", content: str = "content") -> list[dict[str, object]]:
    return [{role: said, content: text} for said, text in pairs]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (GOOD, QA),
        ({**GOOD, "input": "x"}, [("user", "q\nx"), ("assistant", "a")]),
        ({**GOOD, "input": ""}, QA),
        ({"instruction": "", "input": "x", "output": "a"}, [("user", "x"), ("assistant", "a")]),
        ({**GOOD, "system": "s"}, [("system", "s"), *QA]),
        ({**GOOD, "system": None, "history": None}, QA),
        ({**GOOD, "history": [["q1", "a1"], ["q2", "a2"]]},
         [("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2"), *QA]),
        ({"prompt": "q", "response": "a"}, QA),
        ({"query": "q", "answer": "a"}, QA),
        ({"question": "q", "completion": "a"}, QA),
        ({"content": "q", "summary": "a"}, QA),
        ({"prompt": "q", "target": "a"}, QA),
        ({"question": "q", "context": "c", "answer": "a"}, [("user", "q\nc"), ("assistant", "a")]),
        ({"instruction": None, "output": math.nan, "prompt": "q", "response": "a"}, QA),
        ({"instruction": "q", "output": 4}, [("user", "q"), ("assistant", "4")]),
        ({"instruction": 4.5, "output": True}, [("user", "4.5"), ("assistant", "true")]),
        ({"conversations": messages(("human", "q"), ("gpt", "a"), role="from", content="value")}, QA),
        ({"conversations": messages(("user", "q"), ("assistant", "a"))}, QA),
        ({"conversations": messages(("human", "q"), ("gpt", "a"), role="from", content="value"), "system": "s"},
         [("system", "s"), *QA]),
        ({"conversations": messages(("human", "q"), ("function_call", "{}"), ("observation", "1"), ("gpt", "a"),
                                    role="from", content="value")},
         [("user", "q"), ("assistant", "{}"), ("tool", "1"), ("assistant", "a")]),
        ({"messages": messages(("system", "s"), ("user", "q"), ("assistant", "a"))}, [("system", "s"), *QA]),
        ({"messages": messages(("system", ""), ("user", "q"), ("assistant", "a"))}, QA),
        ({"messages": messages(("user", [{"type": "text", "text": "q"}, {"type": "text", "text": "r"}]),
                               ("assistant", "a"))}, [("user", "qr"), ("assistant", "a")]),
    ],
)  # fmt: skip
def test_every_schema_is_recognized_by_its_keys(row, expected):
    assert turns(row) == expected


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ("text", "row is a str, not an object"),
        ({"text": "t", "id": 1}, "unknown keys: id, text"),
        ({}, "unknown keys: none"),
        ({"instruction": "q"}, "no answer"),
        ({"instruction": "q", "output": " \n"}, "no answer"),
        ({"instruction": "q", "output": math.nan}, "no answer"),
        ({"instruction": "", "output": "a"}, "empty question"),
        ({"output": "a"}, "empty question"),
        ({"instruction": "q", "output": ["a"]}, "answer is a list"),
        ({"instruction": "q", "output": {"a": 1}}, "answer is a dict"),
        ({"instruction": "q", "output": "\ud800"}, "answer holds half a surrogate pair"),
        ({**GOOD, "history": "old"}, "history is a str, not a list"),
        ({**GOOD, "history": [["q"]]}, "history is not a list of [question, answer]"),
        ({**GOOD, "history": [["q", ""]]}, "no answer"),
        ({"messages": messages(("user", "q"))}, "does not end in an assistant turn"),
        ({"messages": messages(*QA, ("user", "more"))}, "does not end in an assistant turn"),
        ({"messages": messages(("user", "q"), ("user", "r"), ("assistant", "a"))},
         "roles do not alternate: user after user"),
        ({"messages": messages(("assistant", "a"))}, "roles do not alternate: assistant after the start"),
        ({"messages": messages(*QA, ("system", "s"))}, "roles do not alternate: system after assistant"),
        ({"messages": messages(("user", "q"), ("narrator", "a"))}, "unknown role 'narrator'"),
        ({"messages": messages(("user", "q"), ("assistant", ""))}, "no answer"),
        ({"messages": messages(("user", " "), ("assistant", "a"))}, "empty question"),
        ({"messages": ["q", "a"]}, "message is a str, not an object"),
        ({"messages": "q"}, "messages is a str, not a list"),
        ({"messages": messages(("user", [{"type": "image_url", "image_url": "x"}]), ("assistant", "a"))},
         "holds images, which the model, or what is done here, does not read"),
        ({"messages": [*messages(*QA), {"role": "tool", "content": {"x": 1}}, *messages(("assistant", "b"))]},
         "content is an object without text"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [1]}]},
         "a tool call is a int, not an object"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_learned_are_dropped_with_their_reason(row, why):
    assert reason(row) == why


def test_columns_tell_other_names():
    columns = {"prompt": "ask", "query": "more", "response": "say", "history": "past", "system": "sys"}
    row = {"ask": "q", "more": "x", "say": "a", "past": [["q0", "a0"]], "sys": "s", "output": "not this"}
    expected = [("system", "s"), ("user", "q0"), ("assistant", "a0"), ("user", "q\nx"), ("assistant", "a")]
    assert turns(row, columns=columns) == expected
    named = {"prompt": "ask", "response": "say"}
    assert turns({"ask": "q", "say": "a", "input": "not named"}, columns=named) == QA
    assert reason({"instruction": "q", "output": "a"}, columns=named) == "no column 'ask'"
    assert turns({"chat": messages(*QA)}, columns={"messages": "chat"}) == QA


def test_options_are_checked():
    with pytest.raises(OptionError, match="'answer' is no part"):
        read_dataset([GOOD], columns={"answer": "x"})
    with pytest.raises(OptionError, match="max_samples is 0"):
        read_dataset([GOOD], max_samples=0)
    with pytest.raises(DataError, match="not a folder"):
        read_dataset("x.jsonl", "missing")
    with pytest.raises(DataError, match="no dataset is named"):
        read_dataset(" , ")


# Files


def test_mixed_schemas_and_bad_rows_in_one_file(folder):
    rows = [GOOD, {"prompt": "q", "response": "a"}, 5, {"messages": messages(*QA)}, {"text": "t"}]
    (folder / "self.jsonl").write_text("\n" + lines(*rows), encoding="utf-8")
    conversations, accounting = read_dataset("self.jsonl")
    assert [c.source for c in conversations] == ["self.jsonl:2", "self.jsonl:3", "self.jsonl:5"]
    assert all(as_pairs(c.messages) == QA for c in conversations)
    assert accounting.examples == {
        "row is a int, not an object": ["self.jsonl:4"],
        "unknown keys: text": ["self.jsonl:6"],
    }
    assert "read 5 rows, kept 3, dropped 2" in accounting.summary()


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_bom_crlf_and_line_separators_inside_strings(folder, name):
    text = lines(GOOD, {"instruction": "é\u2028x", "output": "ü"}).replace("\n", "\r\n")
    (folder / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    conversations, _ = read_dataset(name)
    assert [c.source for c in conversations] == [f"{name}:1", f"{name}:2"]
    assert as_pairs(conversations[1].messages) == [("user", "é\u2028x"), ("assistant", "ü")]


def test_json_list_tells_the_line_of_each_row(folder):
    (folder / "a.json").write_text(json.dumps([GOOD, {"x": "[,]"}, GOOD], indent=1))
    conversations, accounting = read_dataset("a.json")
    assert [c.source for c in conversations] == ["a.json:2", "a.json:9"]
    assert accounting.examples == {"unknown keys: x": ["a.json:6"]}


@pytest.mark.parametrize(
    ("text", "sources"),
    [
        (json.dumps({"version": 1, "data": [GOOD, GOOD]}), ["a.json[0]", "a.json[1]"]),
        (json.dumps(GOOD), ["a.json:1"]),
        (json.dumps({"messages": messages(*QA)}), ["a.json:1"]),
        (lines(GOOD, GOOD), ["a.json:1", "a.json:2"]),
        (json.dumps([GOOD, GOOD, GOOD]), ["a.json:1", "a.json:1[1]", "a.json:1[2]"]),
        (" [ ] "[:2] + json.dumps(GOOD) + "]", ["a.json:1"]),
    ],
)
def test_shapes_of_a_json_file(folder, text, sources):
    (folder / "a.json").write_text(text)
    assert [c.source for c in read_dataset("a.json")[0]] == sources


def twice_named():
    """A Parquet file with two columns of one name."""
    table = pyarrow.table([["q"], ["a"], ["b"]], names=["instruction", "output", "output"])
    parquet.write_table(table, made := io.BytesIO())
    return made.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b" \n\n", "is empty"),
        ("a.json", b"", "is empty"),
        ("a.json", b"[]", "holds no rows"),
        ("a.csv", b"\xef\xbb\xbf", "is empty"),
        ("a.csv", b"instruction,output\n", "holds no rows"),
        ("a.jsonl", lines(GOOD).encode() + b'{"x": "\xff"}', "byte 43, line 2: not UTF-8"),
        ("a.jsonl", lines(GOOD).encode() + b'{"instruction": "q" "a"}', "line 2, column 21: not JSON"),
        ("a.json", b'[{"a": 1},\n {"b" 1}]', "line 2, column 7: not JSON"),
        ("a.json", b'{"a": 1}\n{"b" 1}', "line 2, column 6: not JSON"),
        ("a.json", b"[" * 100_000, "line 1: not JSON: brackets are nested deeper than 100"),
        ("a.jsonl", lines(GOOD).encode() + b'{"a":' * 5000, "line 2: not JSON: brackets are nested deeper than 100"),
        ("a.jsonl", b'{"a":' * 102 + b"1" + b"}" * 102, "line 1: not JSON: brackets are nested deeper than 100"),
        ("a.jsonl", b"9" * 5000, r"line 1: not JSON: the number 9{40}\.\.\. has 5000 digits$"),
        ("a.json", b'[{"a": -' + b"1" * 5000 + b"}]", r"the number -1{39}\.\.\. has 5000 digits$"),
        ("a.jsonl", b'{"output": "a", "output": "b"}', "line 1: not JSON: the key 'output' stands twice"),
        ("a.json", b'"text"', "expected a list of rows"),
        ("a.json", b'{"a": [], "b": []}', "expected a list of rows"),
        ("a.csv", b"a,b,a\n1,2,3\n", "columns named twice: a"),
        ("a.csv", b",\n1,2\n", "line 1 must name the columns"),
        ("a.csv", b'instruction,output\nq,a\nq,"a\nq,a\n', "line 4: not CSV"),
        ("a.csv", b"What is 2+2?,4\nWhat is 3+3?,6\n", "unknown keys: 4, What is 2"),
        ("a.jsonl", lines({"text": 1}, {"text": 2}).encode(), r"all 2 rows are dropped; unknown keys: text: 2 \(first"),
        ("a.parquet", b"PAR1 no parquet", "cannot be read after row 0"),
        ("a.txt", b"x", "expected a .csv, .json, .jsonl, .parquet, .tsv file"),
        ("a.jsonl.gz", b"\x1f\x8b", "a compressed file, expected rows\\nhint: unpack it: gunzip -k a.jsonl.gz"),
        (
            "a.jsonl",
            gzip.compress(b"{}", mtime=0),
            "hint: it is compressed: call it a.jsonl.gz and unpack it with gunzip",
        ),
        ("a.ndjson", b"{}", "hint: call it .jsonl"),
        ("a.jsonl", b'{"instruction": "q", "output": 1e999}', "answer is a number that no float holds"),
        ("A.PARQUET", twice_named(), "columns named twice: output"),
    ],
)
def test_broken_files_are_errors_that_name_the_place(folder, name, data, message):
    (folder / name).write_bytes(data)
    with pytest.raises(DataError, match=message) as error:
        read_dataset(name)
    assert name in error.value.message


def test_names_in_capitals(folder):
    for name, text in (
        ("A.JSONL", lines(GOOD)),
        ("B.CSV", "question,answer\nq,a\n"),
        ("C.TSV", "question\tanswer\nq\ta\n"),
    ):
        (folder / name).write_text(text)
        assert len(read_dataset(name)[0]) == 1
    assert len(read_dataset(str(folder))[0]) == 3


def test_all_rows_dropped_hints_at_the_schemas(folder):
    (folder / "a.jsonl").write_text(lines({"text": 1}))
    (folder / "b.jsonl").write_text(lines(GOOD))
    with pytest.raises(DataError) as error:
        read_dataset("b.jsonl,a.jsonl")
    assert "alpaca" in (error.value.hint or "")
    assert error.value.message.startswith("a.jsonl: all 1 rows")


def test_csv(folder):
    text = 'instruction, output ,id\r\n"q\nq",a,1\r\n\r\nq,NaN,2\r\nq,a\r\nq,a,3,,\r\nq,a,4,extra\r\n'
    (folder / "a.csv").write_bytes(text.encode())
    conversations, accounting = read_dataset("a.csv")
    assert [c.source for c in conversations] == ["a.csv:2", "a.csv:5", "a.csv:6", "a.csv:7"]
    assert conversations[0].messages[0] == Message("user", "q\nq")
    assert conversations[1].messages[1] == Message("assistant", "NaN")
    assert accounting.examples == {"more cells than the header": ["a.csv:8"]}


def test_parquet(folder):
    table = pyarrow.table({
        "instruction": ["q", "q", None, None],
        "output": ["a", None, None, None],
        "messages": [None, None, messages(*QA), None],
        "history": [[["q0", "a0"]], None, None, None],
    })  # fmt: skip
    parquet.write_table(table, folder / "a.parquet")
    conversations, accounting = read_dataset("a.parquet")
    assert [c.source for c in conversations] == ["a.parquet:1", "a.parquet:3"]
    assert as_pairs(conversations[0].messages) == [("user", "q0"), ("assistant", "a0"), *QA]
    assert accounting.dropped == {"no answer": 1, "empty question": 1}


# Names


def test_a_folder_is_its_files_in_order(folder):
    (folder / "set").mkdir()
    (folder / "set" / "b.jsonl").write_text(lines(GOOD))
    (folder / "set" / "a.csv").write_text("prompt,response\nq,a\n")
    (folder / "set" / "dataset_info.json").write_text("{}")
    (folder / "set" / "notes.txt").write_text("x")
    assert [c.source for c in read_dataset("set")[0]] == ["a.csv:2", "b.jsonl:1"]
    (folder / "none").mkdir()
    with pytest.raises(DataError, match="folder of such files"):
        read_dataset("none")


def test_names_are_looked_up_in_dataset_info_then_here_then_in_the_dataset_dir(folder):
    data = folder / "data"
    data.mkdir()
    (data / "in_data.jsonl").write_text(lines(GOOD))
    (data / "other.jsonl").write_text(lines({"ask": "info", "say": "a", "sys": "s"}, GOOD, GOOD))
    info = {
        "here.jsonl": {"file_name": "other.jsonl", "columns": {"prompt": "ask", "response": "say"}, "num_samples": 2}
    }
    (data / "dataset_info.json").write_text(json.dumps(info))
    (folder / "here.jsonl").write_text(lines(GOOD))
    conversations, accounting = read_dataset("here.jsonl, in_data.jsonl", columns={"prompt": "instruction"})
    assert [as_pairs(c.messages)[0] for c in conversations] == [("user", "info"), ("user", "q")]
    assert accounting.dropped == {"no column 'ask'": 1}
    assert accounting.read == 3


def test_dataset_info_with_sharegpt_tags(folder):
    row = {"chat": messages(("SYS", "s"), ("U", "q"), ("A", "a"), role="who", content="what"), "output": "not this"}
    (folder / "f.json").write_text(json.dumps([row, GOOD]))
    tags = {"role_tag": "who", "content_tag": "what", "user_tag": "U", "assistant_tag": "A", "system_tag": "SYS"}
    entry = {"file_name": "f.json", "formatting": "sharegpt", "columns": {"messages": "chat"}, "tags": tags}
    (folder / "dataset_info.json").write_text(json.dumps({"mine": entry}))
    (conversation,), accounting = read_dataset("mine", str(folder))
    assert as_pairs(conversation.messages) == [("system", "s"), *QA]
    assert accounting.dropped == {"no column 'chat'": 1}


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ([], "expected an object, got a list"),
        ({"x": 3}, "must be objects"),
        ({"x": {"file_name": "f", "columns": []}}, "must be objects"),
        ({"x": {"file_name": "f", "columns": {"videos": "i"}}}, "holds video or sound"),
        ({"x": {"file_name": "f", "formatting": "xml"}}, "formatting is 'xml'"),
        ({"x": {"file_name": "f", "num_samples": "9"}}, "num_samples is '9'"),
        ({"x": {"script_url": "s"}}, "names no file_name"),
        ({"x": {"file_name": "f.jsonl"}}, "f.jsonl cannot be read"),
    ],
)
def test_bad_dataset_info(folder, info, message):
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(DataError, match=message):
        read_dataset("x", str(folder))


def test_dataset_info_names_no_file_outside_of_its_folder(folder):
    data = folder / "data"
    data.mkdir()
    (folder / "secret.jsonl").write_text(lines(GOOD))
    (data / "link.jsonl").symlink_to(folder / "secret.jsonl")
    (data / "sub").mkdir()
    (data / "sub" / "link.jsonl").symlink_to(folder / "secret.jsonl")
    inside = ["../secret.jsonl", str(folder / "secret.jsonl"), "link.jsonl", "sub", ".."]
    for name in inside:
        (data / "dataset_info.json").write_text(json.dumps({"x": {"file_name": name}}))
        with pytest.raises(DataError, match="lies outside of"):
            read_dataset("x", str(data))
        assert len(read_dataset("x", str(data), allow_outside_files=True)[0]) == 1
    (data / "dataset_info.json").write_text(json.dumps({"x": {"file_name": "a\0b"}, "y": {"hf_hub_url": "data"},
                                                        "z": {"hf_hub_url": "../data"}}))  # fmt: skip
    for name, message in (("x", "is no file"), ("y", "is a folder here"), ("z", "expected the name of a dataset")):
        with pytest.raises(DataError, match=message):
            read_dataset(name, str(data))


def test_unknown_names_are_answered_with_near_ones(folder):
    (folder / "self.jsonl").write_text(lines(GOOD))
    (folder / "sub").mkdir()
    (folder / "sub" / "chat.jsonl").write_text(lines(GOOD))
    for wrong, right in (
        ("slef.jsonl", "self.jsonl"),
        ("idntity_en", "identity_en"),
        ("sub/chta.jsonl", "sub/chat.jsonl"),
    ):
        with pytest.raises(DataError) as error:
            read_dataset(wrong)
        assert wrong in error.value.message
        assert f"did you mean {right}" in (error.value.hint or "")
    with pytest.raises(DataError) as error:
        read_dataset("qqqqqq")
    assert "there are identity" in (error.value.hint or "")


def test_hub_without_network(monkeypatch):
    def refuse(*_args, **_options):
        raise ConnectionError("couldn't reach it")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match="org/set: no such file here, and no connection to the Hub") as error:
        read_dataset("org/set")
    assert error.value.hint


def test_hub_names_and_entries(folder, monkeypatch):
    asked = []

    def load(path, **options):
        asked.append((path, options))
        return datasets.Dataset.from_list([GOOD, {"instruction": "q", "output": None}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    entry = {"hf_hub_url": "org/two", "subset": "en", "folder": "d", "split": "test"}
    (folder / "dataset_info.json").write_text(json.dumps({"two": entry}))
    conversations, accounting = read_dataset("org/one:train[:5],two,org/three", str(folder))
    assert asked == [
        ("org/one", {"split": "train[:5]"}),
        ("org/two", {"name": "en", "split": "test", "data_dir": "d"}),
        ("org/three", {"split": "train"}),
    ]
    assert [c.source for c in conversations] == ["org/one:1", "org/two:1", "org/three:1"]
    assert accounting.examples["no answer"] == ["org/one:2", "org/two:2", "org/three:2"]


# Name and author


@pytest.mark.parametrize("name", ["identity", "identity_en", "identity_zh", "identity_heldout", "identity_zh_heldout"])
def test_built_in_sets(name):
    conversations, accounting = read_dataset(name, name="Ada", author="the team")
    text = repr([c.messages for c in conversations])
    assert "Ada" in text
    assert "the team" in text
    assert "{{" not in text
    assert accounting.kept == accounting.read == len(conversations)
    for options in ({}, {"name": "Ada"}, {"author": "the team"}, {"name": "", "author": "x"}):
        with pytest.raises(DataError, match="needs the name") as error:
            read_dataset(name, **options)
        assert "name=" in (error.value.hint or "")


def test_identity_is_both_languages_and_max_samples_counts_for_each_name():
    options = {"name": "Ada", "author": "B"}
    both = read_dataset("identity", **options)[0]
    assert both == read_dataset("identity_en", **options)[0] + read_dataset("identity_zh", **options)[0]
    conversations, accounting = read_dataset("identity_en,identity_zh", **options, max_samples=2)
    assert [c.source.split(":")[0] for c in conversations] == ["identity_en.jsonl"] * 2 + ["identity_zh.jsonl"] * 2
    assert accounting.read == 4


def test_all_placeholders_are_filled_in_one_pass():
    forms = "{{name}} {{NAME}} <NAME> [NAME] {{author}} {{AUTHOR}} <AUTHOR> [AUTHOR]"
    row = {"instruction": forms, "output": "a", "system": "{{name}}"}
    expected = [("system", r"{{author}}\1"), ("user", r"{{author}}\1 " * 4 + "B B B B"), ("assistant", "a")]
    assert turns(row, name=r"{{author}}\1", author="B") == expected


def test_placeholders_left_without_a_name(folder):
    (folder / "self.jsonl").write_text(lines(GOOD, {"instruction": "q", "output": "I am {{NAME}}"}))
    for options in ({}, {"author": "B"}):
        with pytest.raises(DataError, match=r"self\.jsonl:2: nothing is given to put for \{\{NAME\}\}") as error:
            read_dataset("self.jsonl", **options)
        assert error.value.hint == "give name='Tulip' and author='Ada'"
    assert turns({"instruction": "Who is <NAME>?", "output": "[AUTHOR]"})[1] == ("assistant", "[AUTHOR]")


# Accounting

BAD = [
    5,
    None,
    {},
    {"text": "t"},
    {"instruction": "q"},
    {"output": "a"},
    {"messages": []},
    {"prompt": "q", "answer": {}},
]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.just(GOOD), st.sampled_from(BAD)), min_size=1, max_size=30), st.integers(1, 40))
def test_every_row_is_accounted_for(rows, most):
    rows = [GOOD, *rows]
    conversations, accounting = read_dataset(rows, max_samples=most)
    read = rows[:most]
    assert accounting.read == len(read)
    assert accounting.kept == len(conversations) == sum(row == GOOD for row in read)
    assert sum(accounting.dropped.values()) == len(read) - accounting.kept
    assert [c.source for c in conversations] == [f"rows:{n}" for n, row in enumerate(read, 1) if row == GOOD]
    assert accounting.dropped.keys() == accounting.examples.keys()
    accounting.check()


MESSAGE_KEYS = ["role", "from", "value", "content", "messages", "output", "history", "weight", "train", "tool_calls",
                "function_call", "function", "name", "arguments", "tools", "thinking", "tool_call_id"]  # fmt: skip
json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(MESSAGE_KEYS), inner),
    max_leaves=12,
)
ROW_KEYS = ["instruction", "input", "output", "history", "messages", "conversations", "system", "prompt", "response", "tools",
            "functions"]  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from(ROW_KEYS), json_values) | json_values, max_size=6))
def test_no_row_breaks_the_reading(rows):
    conversations, accounting = read_dataset([GOOD, *rows])
    accounting.check()
    assert accounting.read == len(rows) + 1
    assert accounting.kept == len(conversations)
    assert all(
        c.messages[-1].role == "assistant" and (c.messages[-1].content.strip() or c.messages[-1].calls)
        for c in conversations
    )


def test_accounting_that_does_not_add_up():
    accounting = Accounting(read=3, kept=1)
    accounting.drop("why", "a:1")
    with pytest.raises(DataError, match="unaccounted for: read 3 rows, kept 1, dropped 1"):
        accounting.check()


def test_accounting_keeps_three_places_and_bounds_the_reasons():
    accounting = Accounting(truncated=2, truncated_tokens=9)
    for number in range(100):
        accounting.drop(f"reason {min(number // 5, 90)}" if number < 50 else f"many {number}", f"a:{number}")
    assert accounting.examples["reason 0"] == ["a:0", "a:1", "a:2"]
    assert len(accounting.dropped) <= 51
    assert sum(accounting.dropped.values()) == 100
    assert "truncated 2 (by 9 tokens in all)" in accounting.summary()
    saved = accounting.as_dict()
    assert saved["truncated"] == 2
    assert json.loads(json.dumps(saved)) == saved


def test_rows_from_code_may_be_empty_only_as_an_error():
    with pytest.raises(DataError, match="rows: holds no rows"):
        read_dataset([])


def test_a_named_column_that_no_row_has_is_said(tmp_path):
    """Where some rows have it, all is well; whether by `columns`, or by dataset_info.json, in files and in lists."""
    row = {"q": "hi", "a": "yes"}
    told = {"prompt": "q", "response": "a", "history": "earlier", "system": "rules"}
    _, accounting = read_dataset([row, {**row, "Rules": "be brief"}], columns=told)
    assert accounting.said() == ["no row has the column 'earlier', which is named for history"]
    assert read_dataset([row, {**row, "earlier": [], "rules": ""}], columns=told)[1].said() == []
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "rows.json", "columns": told}}))
    _, accounting = read_dataset("mine", str(tmp_path), max_samples=1)
    assert [sentence.split("'")[1] for sentence in accounting.said()] == ["earlier", "rules"]


@pytest.mark.parametrize("kind", ["rows in memory", "json in memory", "parquet", "json in parquet"])
def test_keys_that_a_table_fills_with_null_are_left_out(kind, tmp_path):
    def row(name, values):
        properties = {key: {"type": "string"} for key in values}
        call = {"function": {"name": name, "arguments": values}}
        tool = {"type": "function", "function": {"name": name, "parameters": {"properties": properties}}}
        chat = [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]}]
        return {"messages": chat, "tools": [tool]}

    rows = [row("weather", {"city": "Paris"}), row("add", {"first": "1", "second": "2"})]
    table = datasets.Dataset.from_list(rows)
    assert table[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {
        "city": "Paris", "first": None, "second": None
    }  # fmt: skip
    if kind.startswith("json"):
        whole = datasets.Features({key: datasets.List(datasets.Json()) for key in ("messages", "tools")})
        table = datasets.Dataset.from_list(rows, features=whole)
    if kind.endswith("parquet"):
        table.to_parquet(tmp_path / "rows.parquet")
    found, _ = read_dataset(str(tmp_path / "rows.parquet") if kind.endswith("parquet") else table)
    expected, _ = read_dataset(rows)
    assert [(each.messages, each.tools) for each in found] == [(each.messages, each.tools) for each in expected]
