"""NaN in a file's weights: whoever uses the model is told, and of which weight."""

import numpy as np
import pytest
from tests.tiny_pairs import write_t5_gguf

import qgraft
from qgraft.errors import TrainingError
from qgraft.passes.broken import BrokenLogitsError
from qgraft.serving.answering import answer
from qgraft.training.predict import predict

ROWS = [{"instruction": "the service was good", "output": "positive"}, {"instruction": "bad", "output": "negative"}]
PLACES = {
    "t5": ("enc.blk.0.attn_q.weight", (32, 32), "encoder.block.0.layer.0.SelfAttention.q"),
    "llama": ("blk.1.ffn_down.weight", (64, 256), "model.layers.1.mlp.down_proj"),
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
