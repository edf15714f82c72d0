"""Rows near those of a task hold the same answers, behind prompts of which some words are others."""

from hypothesis import given, settings
from hypothesis import strategies as st

from qgraft.data.tokenizing import IGNORED, Sample
from qgraft.merging.near_rows import near_rows

START, USER, END = 1, 2, 3  # of a template
WORDS, ANSWERS = range(100, 1000), range(2000, 3000)

TURNS = st.tuples(st.lists(st.sampled_from(WORDS), min_size=1, max_size=12, unique=True),
                  st.lists(st.sampled_from(ANSWERS), min_size=1, max_size=12))  # fmt: skip


def sample(turns: list[tuple[list[int], list[int]]], name: int = 0) -> Sample:
    ids, labels, weights = [START], [IGNORED], [0.0]
    for question, answer in turns:
        asked = [USER, *question, END]
        ids += [*asked, *answer, END]
        labels += [*[IGNORED] * len(asked), *answer, END]
        weights += [*[0.0] * len(asked), *[0.5] * len(answer), 1.0]
    return Sample(ids, labels, f"rows {name}", weights, 3)


def learned(row: Sample) -> list[tuple[int, float]]:
    assert row.weights is not None and len(row.weights) == len(row.labels) == len(row.input_ids)
    kept = zip(row.input_ids, row.labels, row.weights, strict=True)
    return [(label, weight) for token, label, weight in kept if label != IGNORED and token == label]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(TURNS, min_size=1, max_size=3), min_size=4, max_size=12), st.integers(0, 9))
def test_answers_and_the_words_of_the_template_stay(rows: list[list[tuple[list[int], list[int]]]], seed: int) -> None:
    samples = [sample(turns, name) for name, turns in enumerate(rows)]
    near = near_rows(samples, seed)
    assert near == near_rows(samples, seed)
    by_source = {each.source: each for each in samples}
    asked = {word for turns in rows for question, _ in turns for word in question}
    for row in near:
        of = by_source[row.source]
        assert learned(row) == learned(of) and row.part == of.part
        assert [each for each in row.input_ids if each < 100] == [each for each in of.input_ids if each < 100]
        assert {each for each in row.input_ids if each in WORDS} <= asked
        assert row.length <= max(each.length for each in samples)


def test_about_as_many_words_are_others_as_are_said() -> None:
    samples = [sample([(list(range(100 + 40 * n, 140 + 40 * n)), [2000 + n])], n) for n in range(20)]
    samples += [sample([(list(range(900, 990)), [2100])], 20)]  # the longest, so that none is too long
    near = near_rows(samples, 1)
    assert [row.source for row in near][:20] == [row.source for row in samples][:20]
    stayed = sum(len({*row.input_ids} & {*of.input_ids} & {*WORDS})
                 for row, of in zip(near, samples, strict=False))  # fmt: skip
    assert 0.75 < stayed / sum(len({*row.input_ids} & {*WORDS}) for row in samples[: len(near)]) < 0.85
    lengths = [row.length for row in near]
    assert min(lengths) < samples[0].length < max(lengths[:20])


def test_text_without_prompts_has_no_rows_near_it() -> None:
    text = [Sample([7, *range(100, 120)], [IGNORED, *range(100, 120)], f"neutral {n}", [0.0] * 21) for n in range(5)]
    assert near_rows(text, 0) == [] == near_rows([], 0)
    alike = [Sample([7, 8, 9, n], [IGNORED] * 3 + [n], f"rows {n}") for n in range(5)]
    assert near_rows(alike, 0) == []  # the prompts hold no words of their own
    assert near_rows([Sample([7, 8], [IGNORED] * 2, "unlearned")], 0) == []
