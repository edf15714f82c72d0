"""T5's files in llama.cpp, which shares no code with qgraft: as they are, merged, written from folders, with a GGUF-LoRA.

llama.cpp keeps keys and values in float16 and takes GELU from a table: measured, logits of a
deviation of 6.2 are 0.009 apart, of 0.85 0.0014.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_pairs import KINDS, write_t5_gguf

import qgraft
from qgraft.adapter_files.gguf_lora import export_gguf_lora
from qgraft.adapters.targets import lora_layers

RUNNER = Path(__file__).with_name("run_llamacpp_pairs.py")
SOURCE, TARGET = [5, 9, 12, 7, 20, 33, 41, 1], [0, 6, 9, 30, 11]
APART = 2e-2


def llamacpp(path: Path, loras: tuple[Path, ...] = ()) -> torch.Tensor:
    """llama.cpp's logits [target, 160]."""
    pytest.importorskip("xllamacpp")
    job = {
        "model": str(path),
        "loras": [str(each) for each in loras],
        "source": SOURCE,
        "target": TARGET,
        "tokens": 160,
    }
    done = subprocess.run(
        [sys.executable, str(RUNNER)], input=json.dumps(job), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"llama.cpp failed:\n{done.stdout[-500:]}\n{done.stderr[-2000:]}"
    return torch.tensor(json.loads(done.stdout.splitlines()[-1]))


@torch.no_grad()
def ours(model: Any) -> torch.Tensor:
    """The same of a model here, without the scale of a tied output layer, which llama.cpp leaves out."""
    logits = model(input_ids=torch.tensor([SOURCE]), decoder_input_ids=torch.tensor([TARGET])).logits[0]
    scaled = getattr(model.config, "scale_decoder_outputs", False)
    return logits * model.config.d_model**0.5 if scaled else logits


def train_a_little(model: Any) -> None:
    qgraft.attach_lora(model, 4, 8)
    torch.manual_seed(1)
    for _, layer in lora_layers(model):
        for each in layer.loras["default"].parameters():
            torch.nn.init.normal_(each, std=0.1)


@pytest.mark.parametrize(
    "kind", ["t5", *(pytest.param(name, marks=pytest.mark.slow) for name in ("t5-untied", "umt5-untied"))]
)
def test_the_logits_are_llamacpps(tmp_path: Path, kind: str) -> None:
    """With an adapter too: beside the file as a GGUF-LoRA, and merged into it."""
    path = tmp_path / "tiny.gguf"
    write_t5_gguf(path, kind)
    model, _ = qgraft.load(path)
    base = ours(model)
    assert float((llamacpp(path) - base).abs().max()) < APART and base.std() > 0.5
    train_a_little(model)
    adapted = ours(model)
    assert float((adapted - base).abs().max()) > 0.5
    export_gguf_lora(model, tmp_path / "lora.gguf", dtype="float32")
    assert float((llamacpp(path, (tmp_path / "lora.gguf",)) - adapted).abs().max()) < APART
    qgraft.merge(model, method="nearest")
    qgraft.save(model, tmp_path / "merged.gguf")
    assert float((llamacpp(tmp_path / "merged.gguf") - adapted).abs().max()) < APART


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["t5", "t5-untied", "mt5", "umt5-untied"])
def test_files_written_from_folders(tmp_path: Path, kind: str) -> None:
    """As they are, and with linear layers in q8_0."""
    name = KINDS[kind][0]
    model = write_t5_gguf(tmp_path / "made.gguf", kind)
    if kind == "umt5-untied" and not hasattr(model.config, "scale_decoder_outputs"):
        pytest.skip(
            "this release of transformers scales it whatever config.json says, so no file says what it computes"
        )
    _, tokenizer = qgraft.load(tmp_path / "made.gguf")
    model.save_pretrained(tmp_path / "folder")
    tokenizer.save_pretrained(tmp_path / "folder")
    expected = ours(getattr(transformers, name).from_pretrained(tmp_path / "folder").eval())
    loaded, _ = qgraft.load(tmp_path / "folder")
    qgraft.save(loaded, tmp_path / "written.gguf")
    assert float((llamacpp(tmp_path / "written.gguf") - expected).abs().max()) < APART
    qgraft.save(loaded, tmp_path / "packed.gguf", to="q8_0")
    packed, _ = qgraft.load(tmp_path / "packed.gguf")
    assert set(packed.qgraft.info.formats) == {"f32", "q8_0"}
    assert float((llamacpp(tmp_path / "packed.gguf") - ours(packed)).abs().mean()) < 0.2  # inputs in 8 bits there


KEYS = {  # what a file states -> options of the model that it means
    "attention.relative_buckets_count": {"relative_attention_num_buckets": 16},
    "attention.layer_norm_rms_epsilon": {"layer_norm_epsilon": 0.3},
    "attention.key_length": {"d_kv": 16},
    "decoder_block_count": {"num_decoder_layers": 1},
    "attention.layer_norm_epsilon, without effect": {},
    "context_length, without effect": {},
}


@pytest.mark.spread(1)
@pytest.mark.parametrize("key", KEYS)
def test_what_keys_mean(tmp_path: Path, key: str) -> None:
    """Each with a value that is not the usual one; the judge of tests/oracle/test_gguf_keys.py takes decoders."""
    name, comma, _ = key.partition(",")
    more = {f"t5.{name}": 0.7 if "epsilon" in name else 4} if comma else {}
    write_t5_gguf(tmp_path / "usual.gguf", "t5")
    write_t5_gguf(tmp_path / "tiny.gguf", "t5", keys=more, **KEYS[key])
    model, usual = (qgraft.load(tmp_path / f"{each}.gguf")[0] for each in ("tiny", "usual"))
    assert float((llamacpp(tmp_path / "tiny.gguf") - ours(model)).abs().max()) < APART
    assert comma or float((ours(model) - ours(usual)).abs().max()) > 3 * APART
