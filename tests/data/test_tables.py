"""Tables as spreadsheets write them: text stays text, the separator is found, columns are found by their names."""

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraft.data.messages import as_pairs
from qgraft.data.reading import read_dataset
from qgraft.data.rows import COLUMNS
from qgraft.data.tables import SEPARATORS, table_rows
from qgraft.errors import DataError, flags_spoken

KNOWN = [name for names in COLUMNS.values() for name in names]
TEXTS = [
    "null",
    "NA",
    "None",
    "nan",
    "NaN",
    "N/A",
    "007",
    "1.0",
    "true",
    "-",
    "1e5",
    "0",
    "  x ",
    '"',
    "a;b,c\td|e",
    "=1+1",
]


def written(rows: list[list[str]], separator: str) -> str:
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=separator, quoting=csv.QUOTE_MINIMAL).writerows(rows)
    return out.getvalue()


def pairs(path: Path, **options: object) -> list[list[tuple[str, str]]]:
    conversations, accounting = read_dataset(str(path), **options)  # type: ignore[arg-type]
    assert accounting.kept + sum(accounting.dropped.values()) == accounting.read
    return [as_pairs(each.messages) for each in conversations]


@pytest.mark.parametrize("separator", SEPARATORS)
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_cells_are_the_text_that_stands_there(tmp_path: Path, suffix: str, separator: str) -> None:
    path = tmp_path / f"a{suffix}"
    rows = [["Instruction", "Output"], *([f"label {i}?", text] for i, text in enumerate(TEXTS))]
    path.write_bytes(b"\xef\xbb\xbf" + written(rows, separator).encode())
    assert [turns[1][1] for turns in pairs(path)] == TEXTS
    _, accounting = read_dataset(str(path))
    said = [f"a{suffix}: its columns are separated by {SEPARATORS[separator]}"]
    assert accounting.notes == ([] if separator == {".csv": ",", ".tsv": "\t"}[suffix] else said)


cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(cells, cells, cells), max_size=6), st.sampled_from(sorted(SEPARATORS)))
def test_what_csv_writes_comes_back(rows: list[tuple[str, str, str]], separator: str) -> None:
    text = written([["id", "prompt", "response"], *map(list, rows)], separator)
    got = [row for row, _ in table_rows(text, Path("a.csv"), KNOWN, [])]
    assert got == [dict(zip(("id", "prompt", "response"), row, strict=True)) for row in rows]


def test_excels_own_line_says_the_separator(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("sep=|\r\nprompt|response\r\na,b|c;d\r\n", encoding="utf-8")
    assert pairs(tmp_path / "a.csv") == [[("user", "a,b"), ("assistant", "c;d")]]
    conversations, _ = read_dataset(str(tmp_path / "a.csv"))
    assert conversations[0].source == "a.csv:3"


def test_commas_in_texts_do_not_hide_semicolons(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("Frage;Antwort, kurz\nWer, wie, was?;der, die, das\nUnd?;x, y\n", encoding="utf-8")
    assert pairs(tmp_path / "a.csv", columns={"prompt": "frage", "response": "Antwort, kurz"})[0] == [
        ("user", "Wer, wie, was?"), ("assistant", "der, die, das"),
    ]  # fmt: skip


NAMES = [
    ("Question", "Answer"), ("PROMPT", "Completion"), (" instruction ", "RESPONSE"), ("Prompt", "Response"),
    ("QUERY", "Target"),
]  # fmt: skip


@pytest.mark.parametrize("names", NAMES, ids="-".join)
def test_names_are_found_in_any_case(tmp_path: Path, names: tuple[str, str]) -> None:
    (tmp_path / "a.csv").write_text(f"{names[0]},{names[1]}\nq,a\n", encoding="utf-8")
    assert pairs(tmp_path / "a.csv") == [[("user", "q"), ("assistant", "a")]]


@pytest.mark.parametrize(
    ("header", "flags"),
    [
        ("Frage,Antwort", "--prompt_column Frage --response_column Antwort"),
        ("Question,Reply text", "--prompt_column Question --response_column 'Reply text'"),
        ("Ask,Answer,note", "--prompt_column Ask --response_column Answer"),
    ],
)
def test_an_unknown_header_is_answered_with_the_flags(tmp_path: Path, header: str, flags: str) -> None:
    (tmp_path / "a.csv").write_text(f"{header}\n{','.join('x' * len(header.split(',')))}\n", encoding="utf-8")
    with pytest.raises(DataError) as caught, flags_spoken():
        read_dataset(str(tmp_path / "a.csv"))
    assert f"the columns are {header.replace(',', ', ')}; name those to learn: {flags}" in str(caught.value)


def test_preferences_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("Chosen,Rejected\na,b\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"holds preferences \(chosen, rejected\), which stage dpo learns"):
        read_dataset(str(tmp_path / "a.csv"))


TEXT = "instruction,output\nqué tal,muy bien señor\n"
WRONG = {
    "cp1252": (TEXT.encode("cp1252"), "a.csv", "iconv -f CP1252 -t UTF-8 a.csv > utf8.csv"),
    "gbk": ("instruction,output\n你好吗,我很好谢谢\n".encode("gbk"), "a.csv", "iconv -f GB18030 -t UTF-8 a.csv"),
    "utf-16": (TEXT.encode("utf-16"), "a.csv", 'it is UTF-16: open it and save it as "CSV UTF-8"'),
    "xlsx under another name": (b"PK\x03\x04\xff\xfe", "a.csv", "it is a zip archive, such as an .xlsx"),
    "xlsx": (b"PK\x03\x04\xff\xfe", "a.xlsx", 'a spreadsheet, expected text\nhint: open it and save it as "CSV UTF-8"'),
    "ods": (b"PK\x03\x04\xff\xfe", "a.ods", "a spreadsheet, expected text"),
}


@pytest.mark.parametrize("case", WRONG)
def test_other_files_are_told_how_to_become_one(tmp_path: Path, case: str) -> None:
    data, name, words = WRONG[case]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as caught:
        read_dataset(str(tmp_path / name))
    assert words in str(caught.value)


def test_a_document_fits_into_a_cell(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"prompt,response\nq,{'long ' * 50_000}\n", encoding="utf-8")
    assert len(pairs(tmp_path / "a.csv")[0][1][1]) == 250_000


def test_tables_in_a_folder_may_differ(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt;response\nq;a\n", encoding="utf-8")
    (tmp_path / "b.tsv").write_text("Question\tAnswer\nq\tb\n", encoding="utf-8")
    assert [turns[1][1] for turns in pairs(tmp_path)] == ["a", "b"]
