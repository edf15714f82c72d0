"""Labelled rows: which columns are read, what their labels are, and what is refused."""

import pytest

from qgraft.data.label_schemes import NUMBER, SEVERAL, SINGLE, LabelScheme, _sorted, label_note, scheme_of
from qgraft.data.reading import read_labels
from qgraft.errors import DataError


def labels_of(rows, tokens=False, **options):
    return scheme_of(read_labels(rows, tokens=tokens)[0], tokens=tokens, **options)


def texts(*labels):
    return [{"text": f"text {number}", "label": label} for number, label in enumerate(labels)]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (("b", "a", "b"), LabelScheme(("a", "b"))),
        ((10, 2, "2"), LabelScheme(("2", "10"))),  # a number is its text
        ((1.0, 0.0), LabelScheme(("0", "1"))),  # as tables write whole numbers beside missing ones
        ((True, False), LabelScheme(("false", "true"))),
        ((["x"], ["y", "x"], []), LabelScheme(("x", "y"), SEVERAL)),
        (({"x": 1, "y": 0}, {"x": 0, "y": 0}), LabelScheme(("x", "y"), SEVERAL)),
        ((0.5, 2), LabelScheme(("LABEL_0",), NUMBER)),
    ],
)
def test_what_labels_are(labels, expected):
    assert labels_of(texts(*labels)) == expected


def test_whole_floats_are_what_somebody_says_they_are():
    rows = texts(1.0, 5.0, 2.0, 5.0)
    assert (
        labels_of(rows, names=["1", "2", "5"]) == labels_of(rows, problem_type=SINGLE) == LabelScheme(("1", "2", "5"))
    )
    assert labels_of(rows, problem_type=NUMBER).problem_type == NUMBER


def test_targets():
    several = LabelScheme(("x", "y", "z"), SEVERAL)
    assert several.target(["z", "x"]) == [1.0, 0.0, 1.0]
    assert several.target({"y": True, "x": False}) == [0.0, 1.0, 0.0]
    assert LabelScheme(("a", "b")).target("b") == [1]
    assert LabelScheme(("LABEL_0", "LABEL_1")).target(1) == [1]  # as PEFT's files have them, without names
    assert LabelScheme(("LABEL_0",), NUMBER).target("1.5") == [1.5]
    with pytest.raises(DataError, match="does not know: c"):
        LabelScheme(("a", "b")).target("c")
    with pytest.raises(DataError, match="2 labels"):
        LabelScheme(("a", "b")).target(["a", "b"])


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        (texts("a", "a"), "same label"),
        (texts(*map(str, range(30))), "label of its own"),
        (texts([0, 1], [1, 0]), "may be ids, or say yes and no"),
        (texts("0.5", "1.5"), "numbers with fractions"),
        (texts(1.0, 5.0, 2.0, 5.0), "labels are 1.0, 2.0, 5.0 ...: names of 3 kinds, or amounts"),
    ],
)
def test_what_can_be_read_in_two_ways_is_refused(rows, match):
    with pytest.raises(DataError, match=match):
        labels_of(rows)


def test_every_row_is_accounted_for():
    rows = [
        *texts("a", None, float("nan"), "b"),
        {"text": " ", "label": "a"},
        {"label": "a"},
        {"text": "x", "label": [1, 1, 0]},
    ]
    found, accounting = read_labels(rows)
    assert [row.label for row in found] == ["a", "b"]
    assert accounting.read == 7 and accounting.kept == 2
    assert accounting.dropped["no label"] == 2 and accounting.dropped["empty text"] == 1
    assert any(reason.startswith("a label stands twice") for reason in accounting.dropped)


def test_pairs_and_named_columns():
    found, _ = read_labels([{"premise": "p", "hypothesis": "h", "label": 0}])
    assert [message.content for message in found[0].messages] == ["p", "h"]
    found, accounting = read_labels(
        [{"q": "p", "a": "h", "gold": 1, "id": 7}], columns={"prompt": "q, a", "label": "gold"}
    )
    assert [message.content for message in found[0].messages] == ["p", "h"] and found[0].label == 1
    assert accounting.ignored == {"id": 1}
    with pytest.raises(DataError, match="no column 'gold'"):
        read_labels(texts("a"), columns={"label": "gold"})


def test_words():
    rows = [{"tokens": ["Ada", "lives"], "ner_tags": ["B-PER", "O"]}, {"tokens": ["a"], "ner_tags": ["O", "O"]}]
    found, accounting = read_labels(rows, tokens=True)
    assert [message.content for message in found[0].messages] == ["Ada", "lives"]
    assert accounting.dropped == {"1 tokens and 2 ner_tags": 1}
    scheme = scheme_of(found, tokens=True)
    assert scheme == LabelScheme(("B-PER", "O"), SINGLE)
    assert label_note(found, scheme, tokens=True) == "2 labels: B-PER 1, O 1"


def test_a_word_whose_label_is_minus_100_has_none():
    rows, _ = read_labels(
        [{"tokens": ["a", "b"], "ner_tags": [1, -100]}, {"tokens": ["c"], "ner_tags": [0]}], tokens=True
    )
    scheme = scheme_of(rows, tokens=True)
    assert scheme.names == ("0", "1") and label_note(rows, scheme, tokens=True) == "2 labels: 1 1, 0 1"
    none, _ = read_labels([{"tokens": ["a"], "ner_tags": [-100]}], tokens=True)
    with pytest.raises(DataError, match="no word has a label"):
        scheme_of(none, tokens=True)


def test_the_order_of_names_that_are_one_number_does_not_hang_on_hashes():
    names = {f"{'0' * zeros}1" for zeros in range(9)}
    assert LabelScheme(_sorted(names)).names == tuple(sorted(names))
