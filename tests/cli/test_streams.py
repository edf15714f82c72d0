"""What is printed to nobody, onto a full disk, or in an encoding without the characters."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

QGRAFT = [sys.executable, "-m", "qgraft"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
NAME = "nowhere-\u4f60\udcff"  # bytes of a file's name that are no UTF-8


def sh(words: str, *, limit: int = 60, **environment: str) -> tuple[int, str]:
    """(exit code, stdout and stderr) of `words` in bash, in which $Q is the command."""
    told = {**ENVIRONMENT, "Q": " ".join(QGRAFT), **environment}
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail\n{words}"], env=told, capture_output=True, timeout=limit, check=False
    )
    return done.returncode, (done.stdout + done.stderr).decode()


def test_results_that_cannot_be_written_are_an_error_but_not_those_that_nobody_reads() -> None:
    assert sh("$Q --help | true") == (0, "")
    assert sh("$Q --help >&- 2>&-") == (0, "")
    full = sh("$Q --help > /dev/full")
    assert full == (2, "error: what was printed could not be written: No space left on device\n")
    assert sh("$Q nosuch 2> /dev/full")[0] == 2 and sh("$Q nosuch 2>&1 >&- | true")[0] == 2


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_an_encoding_without_the_characters(encoding: str) -> None:
    code, told = sh('$Q "$NAME"; $Q eval --threads "$NAME"', PYTHONIOENCODING=encoding, NAME=NAME)
    assert code == 2 and "Traceback" not in told and told.count("error: ") == 2
    assert told.count("\u4f60" if encoding == "utf-8" else "\\u4f60") == 2 and told.count("\\udcff") == 2


def test_a_python_without_docstrings_is_refused() -> None:
    assert sh("$Q doctor", PYTHONOPTIMIZE="2")[1].startswith("error: Python runs with -OO")


@pytest.mark.slow
def test_a_run_that_nobody_watches_any_more_goes_on_to_its_end(tiny_gguf, tmp_path: Path) -> None:
    rows = tmp_path / f"rows-{NAME}.jsonl"  # a row with a key that no UTF-8 can hold is told as well
    rows.write_text('{"\\ud83d": 1}\n' + '{"instruction": "q", "output": "a b c d e f g h"}\n' * 30)
    train = (
        f'$Q train --model_name_or_path {tiny_gguf("llama").path} --dataset "$ROWS" --max_steps 2 --use_cpu true --r 2'
    )
    merge = f"$Q merge --model {tiny_gguf('llama').path} --min-retained -1 --adapter"
    for number, ends in enumerate(("2>&1 | true", "2>&- >&-", "2> /dev/full", "")):
        out = tmp_path / f"{number}"
        code, told = sh(f"{train} --output_dir {out} {ends}", limit=300, ROWS=str(rows))
        assert code == 0 and (out / "adapter_model.safetensors").exists(), told
        assert "unknown keys: \\ud83d" in told or ends
        code, told = sh(f"{merge} {out} --output {out}.gguf {ends}", limit=300)
        assert code == 0 and (tmp_path / f"{number}.gguf").exists(), told
