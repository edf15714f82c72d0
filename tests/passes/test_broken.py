"""NaN in a file's weights: whoever uses the model is told, and of which weight."""

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from tests.tiny_pairs import write_pairs_model, write_t5_gguf
from tests.tiny_speech import audio, write_speech_model

import qgraft
from qgraft.errors import TrainingError
from qgraft.passes.broken import LANES, BrokenLogitsError
from qgraft.serving.answering import answer
from qgraft.training.predict import predict

ROWS = [{"instruction": "the service was good", "output": "positive"}, {"instruction": "bad", "output": "negative"}]
PLACES = {
    "t5": ("enc.blk.0.attn_q.weight", (32, 32), "encoder.block.0.layer.0.SelfAttention.q"),
    "llama": ("blk.1.ffn_down.weight", (64, 256), "model.layers.1.mlp.down_proj"),
}


SHORT = {  # behind fewer tokens than vectors have lanes PyTorch's attention says 0 where all scores are NaN
    "blk.0.attn_q.weight": "model.layers.0.self_attn.q_proj",
    "blk.1.attn_k.weight": "model.layers.1.self_attn.k_proj",
}


@pytest.fixture(scope="module", params=PLACES)
def broken(request, tmp_path_factory, make_gguf):
    """(a file in which one number is none, where the model has it)"""
    name, shape, where = PLACES[request.param]
    weight = np.full(shape, 0.1, np.float32)
    weight[3, 3] = np.nan
    path, write = (
        tmp_path_factory.mktemp("broken") / "tiny.gguf",
        make_gguf if request.param == "llama" else write_t5_gguf,
    )
    write(path, request.param, extra={name: weight})
    return path, where


@pytest.mark.parametrize("use", ["evaluate", "one step", "predict", "answer"])
def test_nan_in_a_weight_is_said(tmp_path, broken, use):
    path, where = broken
    model, tokenizer = qgraft.load(path)
    args = qgraft.TrainArguments(
        output_dir=str(tmp_path / "out"), max_steps=1, use_cpu=True, plot_loss=False, max_new_tokens=2
    )
    uses = {
        "evaluate": lambda: qgraft.evaluate(model, tokenizer, ROWS),
        "one step": lambda: qgraft.train(model, tokenizer, ROWS, args),
        "predict": lambda: predict(model, tokenizer, ROWS, args),
        "answer": lambda: answer(model, tokenizer, [("user", "good")], max_new_tokens=2),
    }
    with pytest.raises((TrainingError, BrokenLogitsError)) as raised:
        uses[use]()
    assert where in str(raised.value.hint) and str(path) in str(raised.value.hint)
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("name", [*SHORT][:1] + [pytest.param(each, marks=pytest.mark.slow) for each in [*SHORT][1:]])
def test_nan_that_attention_keeps_back_is_said_behind_short_prompts(tmp_path, make_gguf, tiny_gguf, name):
    weight = tiny_gguf("llama").model.get_submodule(SHORT[name]).weight.detach().numpy().copy()
    weight[3, 3] = np.nan
    make_gguf(tmp_path / "tiny.gguf", extra={name: weight})
    model, tokenizer = qgraft.load(tmp_path / "tiny.gguf")
    assert len(tokenizer("good")["input_ids"]) < LANES
    args = qgraft.TrainArguments(output_dir=str(tmp_path / "out"), use_cpu=True, max_new_tokens=2, plot_loss=False)
    for use in (
        lambda: answer(model, tokenizer, [("user", "good")], max_new_tokens=2),
        lambda: predict(model, tokenizer, [{"instruction": "good", "output": "bad"}], args),
    ):
        with pytest.raises(BrokenLogitsError) as raised:
            use()
        assert SHORT[name] in str(raised.value.hint)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bart", "whisper"])
def test_nan_that_a_decoder_of_pairs_keeps_back_is_said(tmp_path, kind):
    """Its first tokens have fewer keys than a vector has lanes, whatever the encoder reads."""
    if kind == "whisper":
        write_speech_model(tmp_path)
        path, asked = "model.decoder.layers.1.self_attn.q_proj", {"messages": [], "audio": audio(200), "language": "en"}
    else:
        write_pairs_model("bart", tmp_path)
        path, asked = "model.decoder.layers.1.self_attn.k_proj", {"messages": [("user", "good")]}
    model, tokenizer = qgraft.load(tmp_path)
    answer(model, tokenizer, **asked, max_new_tokens=2)
    weights = load_file(tmp_path / "model.safetensors")
    weights[f"{path}.weight"][3, 3] = np.nan
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, tokenizer = qgraft.load(tmp_path)
    with pytest.raises(BrokenLogitsError) as raised:
        answer(model, tokenizer, **asked, max_new_tokens=2)
    assert path in str(raised.value.hint)
