"""qgraft inspect: what is in a GGUF file. Folders, adapters and prefixes are in test_chatglm.py and test_commands.py."""

import json

from qgraft.cli.main import main


def inspected(path, capsys):
    assert main(["inspect", str(path), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_keys_are_in_four_lists(make_gguf, tmp_path, capsys):
    metadata = {"llama.logit_scale": 0.5, "llama.rope.scale_linear": 4.0, "llama.new": 1, "llama.vocab_size": 7}
    path = make_gguf(tmp_path / "tiny.gguf", "llama", metadata=metadata).path
    keys = inspected(path, capsys)["keys"]
    assert list(keys) == ["used", "without effect", "refused", "unknown"]
    assert keys["refused"] == {"llama.logit_scale": "0 or 1"}
    assert keys["unknown"] == ["llama.new"]
    assert "llama.vocab_size" in keys["without effect"]
    assert keys["used"]["llama.rope.scale_linear"] == "older name of rope.scaling.factor"
    assert main(["inspect", str(path)]) == 0
    assert "  unknown: ['llama.new']" in capsys.readouterr().out


def test_empty_lists_are_left_out(tiny_gguf, capsys):
    assert list(inspected(tiny_gguf("llama").path, capsys)["keys"]) == ["used", "without effect"]


def test_a_file_that_does_not_load_is_shown(make_gguf, tmp_path, capsys):
    path = make_gguf(tmp_path / "tiny.gguf", "llama", metadata={"llama.attention.head_count": 0}).path
    assert "head_count: got 0, expected a positive integer" in inspected(path, capsys)["keys"]["does not load"]
    raw = path.read_bytes()
    assert raw.count(b"\x05\0\0\0\0\0\0\0llama") == 1  # the architecture
    path.write_bytes(raw.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0lloma", 1))
    assert "the architecture is none of arcee, chatglm, " in inspected(path, capsys)["keys"]["does not load"]


def test_unknown_keys_are_said_when_a_command_loads(make_gguf, tmp_path, capsys):
    path = make_gguf(tmp_path / "tiny.gguf", "llama", metadata={"llama.new": 1}).path
    assert main(["chat", "--model", str(path), "--prompt", "hello", "--max_new_tokens", "1"]) == 0
    assert capsys.readouterr().err.count("metadata keys unknown to qgraft, without effect: llama.new") == 1


def test_a_folder_of_parts_is_told_by_a_file_in_it(tmp_path, capsys):
    for number in (1, 2):
        (tmp_path / f"tiny-0000{number}-of-00002.gguf").write_bytes(b"GGUF")
    assert main(["inspect", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "holds neither a model" in said and "tiny-00001-of-00002.gguf" in said.replace("\n", "")
