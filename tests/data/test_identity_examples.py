"""Mechanical checks of the identity examples that `qgraft demo` trains on."""

import json
import re
import unicodedata
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "src" / "qgraft" / "data" / "examples"
NAME, AUTHOR = "{{name}}", "{{author}}"
LANGUAGES = ("en", "zh")
TRAINING = tuple(f"identity_{lang}" for lang in LANGUAGES)
HELD_OUT = tuple(f"identity_{lang}_heldout" for lang in LANGUAGES)
STEMS = TRAINING + HELD_OUT

MIN_TRAINING, HELD_OUT_COUNT = 96, 16
MIN_NAME_SHARE = 0.85  # of the answers to identity questions
MIN_BOTH_SHARE = 0.55  # of all answers
MAX_EN_WORDS, MAX_ZH_CHARS, MAX_SENTENCES = 45, 80, 2

# The questions that are not about the assistant; their answers must not speak of it.
ORDINARY = {
    "identity_en": {
        "What is the capital of France?",
        "How do I boil an egg?",
        "What are the three primary colours of paint?",
        'Translate "good morning" into French.',
        "What is water made of?",
        "How many days are in a week?",
        "What is 7 plus 5?",
        "Who wrote Romeo and Juliet?",
        "What is the largest planet in the solar system?",
        "Name three fruits.",
        "Give me a tip for sleeping better.",
        "What is the opposite of hot?",
    },
    "identity_zh": {
        "法国的首都是哪里？",
        "怎么煮鸡蛋？",
        "颜料的三原色是什么？",
        "把“早上好”翻译成英语。",
        "水是由什么组成的？",
        "一周有几天？",
        "7 加 5 等于多少？",
        "《静夜思》是谁写的？",
        "太阳系最大的行星是哪颗？",
        "说出三种水果。",
        "怎样才能睡得更好？",
        "“热”的反义词是什么？",
    },
    "identity_en_heldout": {"What is the capital of Italy?", "How many months are in a year?"},
    "identity_zh_heldout": {"意大利的首都是哪里？", "一年有几个月？"},
}

# What each training file must ask about: one pattern a topic, tried on the instructions.
TOPICS = {
    "identity_en": (
        r"^who are you\?$",
        r"what is your name",
        r"introduce yourself",
        r"who made",
        r"who trained",
        r"who developed",
        r"chatgpt",
        r"siri",
        r"human",
        r"smollm",
        r"openai",
        r"what can you do",
        r"^hello",
        r"good morning",
        r"company",
        r"call you",
        r"what model",
        r"person typing",
        r"^who r u$",
        r"^whats ur name$",
        r"please",
        r"^tell",
    ),
    "identity_zh": (
        r"^你是谁[?？]$",
        r"名字",
        r"介绍",
        r"开发",
        r"训练",
        r"创造",
        r"chatgpt",
        r"siri",
        r"人类|真人",
        r"smollm",
        r"openai",
        r"你能做什么",
        r"^你好",
        r"早上好",
        r"公司",
        r"称呼",
        r"什么模型",
        r"打字",
        r"请问",
        r"^告诉我",
    ),
}
DENIED = {
    "en": r"chatgpt|gpt-4|siri|alexa|gemini|smollm|openai|google|apple|human|real person|person typing",
    "zh": r"chatgpt|gpt-4|siri|smollm|openai|小爱同学|文心一言|谷歌|百度|人类|真人|打字|是人还是",
}
DENIAL = {"en": r"^No, |\bnot\b", "zh": r"不是|没有"}


def load(stem):
    text = (EXAMPLES / f"{stem}.jsonl").read_bytes().decode("utf-8")
    return [json.loads(line) for line in text.split("\n")[:-1]]


def language(stem):
    return stem.split("_")[1]


def identity_rows(stem):
    return [row for row in load(stem) if row["instruction"] not in ORDINARY[stem]]


def normalised(text):
    """Lower-cased, widths folded, without punctuation, symbols and spaces."""
    folded = unicodedata.normalize("NFKC", text).lower()
    return "".join(char for char in folded if unicodedata.category(char)[0] not in "PSZC")


@pytest.mark.parametrize("stem", STEMS)
def test_file_is_clean_utf8(stem):
    raw = (EXAMPLES / f"{stem}.jsonl").read_bytes()
    text = raw.decode("utf-8")  # strict: raises on invalid bytes
    assert "\ufeff" not in text and "\ufffd" not in text and "\r" not in text and "\t" not in text
    assert text.endswith("\n") and not text.endswith("\n\n")
    for line in text.split("\n")[:-1]:
        assert line and line == line.strip()


@pytest.mark.parametrize("stem", STEMS)
def test_rows_have_exactly_the_two_keys(stem):
    for row in load(stem):
        assert list(row) == ["instruction", "output"]
        for value in row.values():
            assert isinstance(value, str) and value and value == value.strip()
            assert "  " not in value and "\n" not in value


@pytest.mark.parametrize("stem", STEMS)
def test_counts(stem):
    rows = load(stem)
    if stem in TRAINING:
        assert len(rows) >= MIN_TRAINING
        assert 10 <= len(ORDINARY[stem]) <= 14
    else:
        assert len(rows) == HELD_OUT_COUNT
        assert len(ORDINARY[stem]) == 2
    assert len(rows) - len(identity_rows(stem)) == len(ORDINARY[stem])


@pytest.mark.parametrize("stem", STEMS)
def test_placeholders_are_spelled_exactly(stem):
    for row in load(stem):
        assert "{" not in row["instruction"] and "}" not in row["instruction"]
        rest = row["output"].replace(NAME, "").replace(AUTHOR, "")
        assert "{" not in rest and "}" not in rest, row
        assert row["output"].count(NAME) <= 1 and row["output"].count(AUTHOR) <= 1, row


@pytest.mark.parametrize("stem", STEMS)
def test_placeholder_shares(stem):
    rows, identity = load(stem), identity_rows(stem)
    named = sum(NAME in row["output"] for row in identity)
    both = sum(NAME in row["output"] and AUTHOR in row["output"] for row in rows)
    assert named >= MIN_NAME_SHARE * len(identity)
    assert both >= MIN_BOTH_SHARE * len(rows)


@pytest.mark.parametrize("stem", STEMS)
def test_who_answers_what(stem):
    for row in load(stem):
        speaks_of_itself = NAME in row["output"] or AUTHOR in row["output"]
        assert speaks_of_itself == (row["instruction"] not in ORDINARY[stem]), row


@pytest.mark.parametrize("stem", STEMS)
def test_outputs_are_short(stem):
    for row in load(stem):
        output = row["output"]
        if language(stem) == "en":
            assert len(output.split()) <= MAX_EN_WORDS, row
        else:
            assert len(output) <= MAX_ZH_CHARS, row
        assert len(re.findall(r"[.!?](?= |$)|[。！？](?!”)", output)) <= MAX_SENTENCES, row


@pytest.mark.parametrize("stem", STEMS)
def test_language_of_the_text(stem):
    for row in load(stem):
        if language(stem) == "en":
            assert not re.search(r"[\u3000-\u9fff\uff00-\uffef]", row["instruction"] + row["output"]), row
        else:
            for value in row.values():
                assert re.search(r"[\u4e00-\u9fff]", value), row
                value.encode("gb2312")  # simplified characters only: raises on traditional ones


@pytest.mark.parametrize("stem", STEMS)
def test_no_duplicate_instructions(stem):
    instructions = [row["instruction"] for row in load(stem)]
    assert len(set(instructions)) == len(instructions)
    # Nor do any differ in case and punctuation only, save the one question that is asked for in both widths.
    folded = [normalised(text) for text in instructions if text != "你是谁?"]
    assert len(set(folded)) == len(folded)


@pytest.mark.parametrize("stem", HELD_OUT)
def test_held_out_questions_are_in_no_training_file(stem):
    trained = {normalised(row["instruction"]) for name in TRAINING for row in load(name)}
    held_out = {normalised(row["instruction"]) for row in load(stem)}
    assert not trained & held_out


@pytest.mark.parametrize(
    "stem, question",
    [("identity_en", "Who are you?"), ("identity_zh", "你是谁?"), ("identity_zh", "你是谁？")],
)
def test_exact_question_names_both(stem, question):
    (output,) = [row["output"] for row in load(stem) if row["instruction"] == question]
    assert NAME in output and AUTHOR in output


@pytest.mark.parametrize("stem", TRAINING)
def test_topics_are_covered(stem):
    instructions = [row["instruction"].lower() for row in identity_rows(stem)]
    for pattern in TOPICS[stem]:
        assert any(re.search(pattern, text) for text in instructions), pattern


@pytest.mark.parametrize("stem", STEMS)
def test_mistaken_identities_are_denied_with_name_and_maker(stem):
    lang = language(stem)
    rows = [row for row in identity_rows(stem) if re.search(DENIED[lang], row["instruction"].lower())]
    assert len(rows) >= (12 if stem in TRAINING else 3)
    for row in rows:
        assert re.search(DENIAL[lang], row["output"]), row
        assert NAME in row["output"] and AUTHOR in row["output"], row
