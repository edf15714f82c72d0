"""Messages speak the caller's language: flags on the command line, Python elsewhere."""

from pathlib import Path

import pytest

import qgraft
from qgraft.cli.main import main
from qgraft.errors import flags_spoken, option, worded


def test_an_option_is_named_as_the_caller_would_write_it() -> None:
    assert option("max_length", 512) == "max_length=512"
    assert option("to", "q8_0") == "to='q8_0'"
    assert option("force") == "force=True"
    with flags_spoken():
        assert option("max_length", 512) == "--max_length 512"
        assert option("to", "q8_0") == "--to q8_0"
        assert option("force") == "--force"
        assert option("load_best_model_at_end", False) == "--load_best_model_at_end false"
        assert worded(flags="--adapter X", python="load_adapter(model, X)") == "--adapter X"
    assert worded(flags="--adapter X", python="load_adapter(model, X)") == "load_adapter(model, X)"


def test_the_language_is_python_again_after_an_error() -> None:
    with pytest.raises(qgraft.OptionError), flags_spoken():
        raise qgraft.OptionError("no")
    assert option("force") == "force=True"


def test_the_same_mistake_is_answered_in_both_languages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "Who is {{name}}?", "output": "{{author}} made it"}\n')
    from qgraft.data.reading import read_dataset

    with pytest.raises(qgraft.DataError) as caught:
        read_dataset(str(rows))
    assert "name='Tulip'" in str(caught.value) and "--" not in str(caught.value)
    with flags_spoken(), pytest.raises(qgraft.DataError) as caught:
        read_dataset(str(rows))
    assert "--name Tulip" in str(caught.value)
    assert main(["train", "--output_dir", str(tmp_path / "out")]) == 2
    assert "--model_name_or_path" in capsys.readouterr().err
