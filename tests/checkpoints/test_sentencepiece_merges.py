"""Merges out of scores, against llama.cpp and against the sentencepiece package: the ids of texts, on vocabularies that
training makes and on ones that nobody would train."""

import random
from pathlib import Path

import pytest
import sentencepiece as sp
from vocabularies import TEXTS, llamacpp, made_texts, ours, sentencepiece, write

from qgraft.checkpoints.gguf_file import read_gguf
from qgraft.checkpoints.gguf_vocabulary import read_vocabulary
from qgraft.checkpoints.sentencepiece_merges import merges_by_score
from qgraft.errors import UnsupportedError

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"
LINE = "\u2581"
RUNS = [
    *("a" * n for n in range(1, 24)),
    *(" " * n for n in range(1, 12)),
    " a b ab  ba   aab",
    "\na\n\nb",
    "漢字 é",
    "<0x41>",
]


def grown(chance: random.Random, letters: str, count: int) -> list[str]:
    """Pieces that are each made of two before it, as training makes them."""
    pieces = list(letters)
    for _ in range(count):
        piece = chance.choice(pieces) + chance.choice(pieces)
        if len(piece) < 9 and piece not in pieces:
            pieces.append(piece)
    return pieces[len(letters) :]


def compared(tmp_path: Path, seeds: range) -> tuple[int, int]:
    """How many vocabularies had llama.cpp's ids, and how many were refused; AssertionError where ids differ."""
    asked: list[tuple[Path, list[str]]] = []
    refused = 0
    for number in seeds:
        chance = random.Random(number)
        letters = LINE + chance.choice(["a", "ab", "abc", "abé漢"])
        pieces = grown(chance, letters, chance.choice([5, 20, 60]))
        if number % 3 == 0:  # pieces that no others make
            pieces = list(dict.fromkeys("".join(chance.choices(letters, k=chance.randint(2, 6))) for _ in range(20)))
        scores = [-float(n) for n in range(len(pieces))]
        if number % 2:
            chance.shuffle(scores)
        if number % 5 == 0:
            scores = [score // 2 for score in scores]
        all_scores = [*(-1000.0 - n for n in range(len(letters))), *scores]
        prefix = {"add_space_prefix": bool(number % 4)} if number % 7 else {}
        path = write(tmp_path / f"{number}.gguf", sentencepiece([*letters, *pieces], all_scores, **prefix))
        texts = ["".join(chance.choices(letters.replace(LINE, " ") + " ", k=chance.randint(0, 30))) for _ in range(40)]
        try:
            merges_by_score(read_vocabulary(read_gguf(path)), read_gguf(path).metadata["tokenizer.ggml.scores"])
        except UnsupportedError:
            refused += 1
        else:
            asked.append((path, [*texts, *RUNS, "<s>ab</s>a <extra> b", "a<extra>", "<extra> "]))
    for (path, texts), answer in zip(asked, llamacpp(asked, special=True), strict=True):
        for text, got, expected in zip(texts, ours(path, texts, special=True), answer["ids"], strict=True):
            assert got == expected, (path.name, text)
    return len(asked), refused


def test_ids_are_llamacpps(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    same, refused = compared(tmp_path, range(40))
    assert same > 25 and refused > 0


@pytest.mark.slow
def test_ids_are_llamacpps_on_many_vocabularies(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    same, refused = compared(tmp_path, range(1000, 2000))
    assert same > 600 and refused > 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that the sentencepiece package trained as Llama's are: BPE with bytes for what it does not know."""
    folder = tmp_path_factory.mktemp("trained")
    texts = [*TEXTS, *made_texts(100)]
    (folder / "text").write_text("\n".join(line for text in texts for line in text.replace("\0", "").splitlines()))
    sp.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "m"), vocab_size=1000, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2,
        character_coverage=0.98, user_defined_symbols=["<extra>"], split_by_whitespace=False,
    )  # fmt: skip
    return folder / "m.model"


def as_gguf(model: sp.SentencePieceProcessor, path: Path) -> Path:
    """As llama.cpp's converter writes it; the kinds of pieces are those of the file."""
    size = range(model.get_piece_size())
    kinds = [
        2
        if model.is_unknown(n)
        else 3
        if model.is_control(n)
        else 6
        if model.is_byte(n)
        else 5
        if model.is_unused(n)
        else 1
        for n in size
    ]
    pieces = [model.id_to_piece(n) for n in size]
    kinds = [4 if piece == "<extra>" else kind for piece, kind in zip(pieces, kinds, strict=True)]
    keys = {"tokens": pieces, "scores": [model.get_score(n) for n in size], "token_type": kinds}
    roles = {"bos_token_id": model.bos_id(), "eos_token_id": model.eos_id(), "unknown_token_id": model.unk_id()}
    return write(path, {"model": "llama", **keys, **{key: number for key, number in roles.items() if number >= 0}})


def test_ids_are_those_of_the_sentencepiece_package(trained: Path, tmp_path: Path) -> None:
    model = sp.SentencePieceProcessor(str(trained))
    texts = [text for text in [*TEXTS, *made_texts(100, number=5)] if text and "\0" not in text and LINE not in text]
    got = ours(as_gguf(model, tmp_path / "m.gguf"), texts)
    assert got == [model.encode(text) for text in texts]
    assert sum(len(ids) for ids in got) < 0.8 * sum(len(text.encode()) for text in texts), "little was merged"


def real(name: str, path: Path) -> Path:
    if not (GOLDEN / name).is_file():
        pytest.skip("the vocabulary files of ChatGLM are not here")
    return as_gguf(sp.SentencePieceProcessor(str(GOLDEN / name)), path)


def test_a_real_vocabulary(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    path = real("tokenizer_chatglm2/tokenizer.model", tmp_path / "real.gguf")
    texts = [*TEXTS, *made_texts(100, number=6)]
    assert ours(path, texts) == llamacpp([(path, texts)])[0]["ids"]


@pytest.mark.slow
def test_a_real_vocabulary_of_the_unigram_kind_is_refused(tmp_path: Path) -> None:
    """Its scores are probabilities, in no order of joining, and some are equal."""
    path = real("tokenizer_chatglm/ice_text.model", tmp_path / "real.gguf")
    with pytest.raises(UnsupportedError, match=r"'▁d', '▁times', .*(?s:.*)a unigram model's scores"):
        ours(path, [""])


@pytest.mark.parametrize(
    ("pieces", "scores", "message"),
    [
        (["a", "b", "ab", "ba"], [-9, -9, -1, -1], r"2 tokens have the score -1 \('ab', 'ba', \.\.\.\)"),
        (["a", "b", "c", "ab", "bc", "abc"], [-9, -9, -9, -2, -2, -1], "2 tokens have the score -2"),
        (["a", "xa"], [-1, -2], "token 'xa' is joined of 'x' and 'a', expected tokens"),
    ],
)
def test_refused(tmp_path: Path, pieces: list[str], scores: list[float], message: str) -> None:
    path = write(tmp_path / "tiny.gguf", sentencepiece(pieces, [float(score) for score in scores]))
    with pytest.raises(UnsupportedError, match=message):
        ours(path, ["a"])


def test_of_two_equal_neighbours_the_left_is_there_first(tmp_path: Path) -> None:
    """In baba the second ba is made when the first is complete: a + ba is no pair there, however good its score."""
    pytest.importorskip("xllamacpp")
    pieces = ["ba", "baa", "bbaa", "aba", "bbaab", "ababa", "ababaa", "bab", "baab", "baba", "a", "b"]
    scores = [-2.0, -3.0, -5.0, -4.0, -8.0, -7.0, -6.0, 0.0, -1.0, -7.5, -9.0, -9.0]
    path = write(tmp_path / "tiny.gguf", sentencepiece(pieces, scores, add_space_prefix=False))
    texts = [*pieces, "bababa", "abababa", "babaaba", "bbabab", *("ba" * n for n in range(5, 9))]
    assert ours(path, texts) == llamacpp([(path, texts)])[0]["ids"]


def test_without_scores_all_are_equal(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    apart = write(
        tmp_path / "apart.gguf",
        sentencepiece([LINE, *"abcd", "ab", "cd"], scores=None, add_space_prefix=False) | {"scores": None},
    )
    texts = ["abcd", "a b", "aab"]
    assert ours(apart, texts) == llamacpp([(apart, texts)])[0]["ids"]
    over = write(tmp_path / "over.gguf", sentencepiece([LINE, *"ab", "ab", "ba"]) | {"scores": None})
    with pytest.raises(UnsupportedError, match="2 tokens have the score 0"):
        ours(over, texts)


def test_pairs_with_one_score_are_joined_from_the_left(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    scores = [-9.0, -9.0, -9.0, -9.0, -1.0, -1.0, -1.0]
    path = write(
        tmp_path / "tiny.gguf", sentencepiece(["a", "b", "c", "d", "cd", "bc", "ab"], scores, add_space_prefix=False)
    )
    texts = ["abcd", "bcd", "abc", "abcdabcd", "bcdabcab"]
    assert ours(path, texts) == llamacpp([(path, texts)])[0]["ids"]


def test_work_on_hostile_vocabularies_is_bounded(tmp_path: Path) -> None:
    """Tokens whose parts have worse scores are joined letter by letter, which takes the square of their length."""
    runs = ["a" * length for length in range(2, 600)]
    path = write(tmp_path / "runs.gguf", sentencepiece(["a", *runs], [0.0, *map(float, range(len(runs)))]))
    with pytest.raises(UnsupportedError, match="too many tokens have parts of worse scores"):
        ours(path, [""])
    long = write(tmp_path / "long.gguf", sentencepiece(["a", *("b" * 900_000 + str(number) for number in range(20))]))
    with pytest.raises(UnsupportedError, match=r"got 180000\d\d characters, expected at most 16777216"):
        ours(long, [""])
    tied = [f"{a}{b}" for a in map(chr, range(0x4E00, 0x4E40)) for b in map(chr, range(0x5000, 0x5040))]
    letters = sorted(set("".join(tied)))
    flat = write(tmp_path / "flat.gguf", sentencepiece([*letters, *tied], [-1.0] * len(letters) + [0.0] * len(tied)))
    with pytest.raises(UnsupportedError, match="4096 tokens have the score 0"):
        ours(flat, [""])
