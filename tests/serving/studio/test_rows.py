"""What the page shows of rows is what training does with them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import qgraft
from qgraft.data.tokenizing import IGNORED, Sample, resolve_template
from qgraft.serving.studio.rows import SHOWN, pieces, questions, read_rows
from qgraft.training.arguments import TrainArguments
from qgraft.training.samples import read_samples

ODD = (
    "question,answer\nhello 你好 🙂 world,the cat 猫 sat\n,empty\nhello,\nuser mat,and the mat mat\n"
    + "hello,the cat\n" * 30
)


def test_rows_are_shown_as_training_reads_them(studio: Any, tmp_path: Path) -> None:
    path = tmp_path / "odd.csv"
    path.write_text(ODD)
    options = {"system": "the world", "max_length": 100}
    shown = read_rows(studio.service, path, options)
    arguments = TrainArguments(output_dir=str(tmp_path / "out"), use_cpu=True, **options)
    model, tokenizer = studio.service.engine.model, studio.service.tokenizer
    template = resolve_template(tokenizer)
    samples, accounting = read_samples(model, tokenizer, str(path), arguments, 100, template, held_out=False)
    assert (shown["read"], shown["kept"], shown["dropped"]) == (accounting.read, accounting.kept, accounting.dropped)
    assert shown["tokens"] == sum(len(sample.input_ids) for sample in samples)
    assert shown["learned"] == sum(label != IGNORED for sample in samples for label in sample.labels)
    assert len(shown["rows"]) == SHOWN
    for row, sample in zip(shown["rows"], samples, strict=False):
        assert "".join(text for text, _ in row["pieces"]) == tokenizer.decode(sample.input_ids)
        learned = "".join(text for text, on in row["pieces"] if on)
        assert learned == tokenizer.decode([token for token in sample.labels if token != IGNORED])
    assert "🙂" in [text.strip() for text, _ in shown["rows"][0]["pieces"]]


def test_pieces_end_where_characters_do(tiny_gguf: Callable[..., Any]) -> None:
    _, tokenizer = qgraft.load(str(tiny_gguf("gemma2").path), device="cpu")  # sentencepiece, bytes for what it lacks
    ids = tokenizer("the cat 🙂", add_special_tokens=False)["input_ids"]
    found = pieces(Sample(ids, [*[IGNORED] * 2, *ids[2:]], "x"), lambda some: str(tokenizer.decode(some)))
    assert "".join(text for text, _ in found) == tokenizer.decode(ids) and "\ufffd" not in "".join(t for t, _ in found)
    torn = pieces(Sample(ids[:-1], ids[:-1], "x"), lambda some: str(tokenizer.decode(some)))
    assert torn[-1][0].endswith("\ufffd") and len(torn) >= 3


def test_a_file_of_nothing_says_why(studio: Any, tmp_path: Path) -> None:
    path = tmp_path / "long.csv"
    path.write_text("question,answer\n" + "hello " * 90 + ",the cat\n")
    shown = read_rows(studio.service, path, {"max_length": 20})
    assert shown["rows"] == [] and shown["kept"] == 0 and "no answer token within max_length 20" in shown["problem"]
    assert questions(path) == ["hello " * 90] and questions(tmp_path / "none.csv") == []
