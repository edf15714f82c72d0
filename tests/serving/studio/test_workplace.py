"""Names of requests never leave the folder."""

import os
from pathlib import Path
from typing import Any

import pytest

from qgraft.errors import OptionError, StorageError
from qgraft.serving.fields import ApiError
from qgraft.serving.studio.workplace import Workplace

TRAVERSALS = [
    "..", ".", "../secret", "../../etc/passwd", "/etc/passwd", "law/..", "law/../../secret", "..\\secret", "law\x00",
    "~root", "", " ", "link", "./law", "law/", "/", "a" * 300, "law\n", "datasets/../../secret", ".qgraft", "..csv",
    "../secret.csv", "x/../../y.csv", "%2e%2e.csv/..", "C:\\x.csv", "law/../law/../../x.gguf", "\u202e../x.csv", ".csv",
    ".x.csv", "a,b.csv", "a b.csv/..", "-/../x", "group/../../secret", "group/tax/..", "a/b/c",
]  # fmt: skip


@pytest.mark.parametrize("text", [*TRAVERSALS, None, 3, ["law"]])
def test_no_name_leaves_the_folder(studio: Any, text: Any) -> None:
    place: Workplace = studio.work.place
    functions = [place.dataset, place.run, place.new_run, place.merged, *([] if text == "link" else [place.new_merged])]
    for function in functions:
        with pytest.raises((ApiError, StorageError)):
            function(text)


def test_what_is_there_is_found(studio: Any) -> None:
    place: Workplace = studio.work.place
    assert set(place.runs()) == {"law", "med", "group/tax", "half"}  # not the link, not an adapter without a run
    assert place.run("group/tax") == place.root / "group" / "tax"
    assert place.dataset("数据-1.csv").parent == place.root / "datasets"
    assert place.new_run("new-run").parent == place.root
    for name in ("law", "train", "datasets", "merged"):  # taken; a word of torch; folders of the page
        with pytest.raises(ApiError):
            place.new_run(name)


def test_links_out_of_the_folder_are_refused(studio: Any, tmp_path: Path) -> None:
    place: Workplace = studio.work.place
    outside = tmp_path / "outside.csv"
    outside.write_text("question,answer\na,b\n")
    (place.root / "datasets" / "linked.csv").symlink_to(outside)
    with pytest.raises(ApiError, match="leads out"):
        place.dataset("linked.csv")
    os.unlink(place.root / "datasets" / "linked.csv")


def test_folders_that_cannot_be_worked_in(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="comma"):
        Workplace(tmp_path / "a,b", "model.gguf")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="expected a folder"):
        Workplace(tmp_path / "file", "model.gguf")
    (tmp_path / "model.gguf").write_text("")
    assert Workplace(tmp_path / "new", os.path.relpath(tmp_path / "model.gguf")).model == str(tmp_path / "model.gguf")
    assert Workplace(tmp_path / "new", "smollm2-135m").model == "smollm2-135m"
