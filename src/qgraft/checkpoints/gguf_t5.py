"""T5 and its kind in a GGUF file: what an encoder and a decoder have each of their own.

    block_count, decoder_block_count    layers of the encoder and of the decoder, enc.blk.* and dec.blk.*
    enc.blk.*.ffn_gate.weight           a gated feed-forward layer (T5 1.1, FLAN-T5, mT5, umT5): GELU; without it ReLU
    enc.blk.1.attn_rel_b.weight         umT5: every layer has a bias of positions of its own, in the others the first has it
    output.weight                       an output layer of its own. Without it, it is the embedding, and what goes into it is
                                        divided by the root of d_model, as in T5's first release

The last line is the authors' computation and transformers'. llama.cpp does not divide: its likeliest token is the same one,
its probabilities are sharper. A converter that was given both of two tied matrices wrote both; so an output layer is tied
where it says what the embedding says, but for the rounding of their formats.

Source: T5Model in llama.cpp's conversion/t5.py, and models/t5.cpp there.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig

from qgraft.checkpoints.gguf_file import GgufFile
from qgraft.checkpoints.gguf_header import Header
from qgraft.errors import UnsupportedError
from qgraft.formats import PackedTensor, dequantize, take_rows

START, DECODER_LAYERS = "decoder_start_token_id", "decoder_block_count"
EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
_COMPARED = 64  # rows
_ALIKE = 0.9  # cosine of a row and the same row in another format; of two matrices apart it is near 0


def t5_type(file: GgufFile) -> str:
    """transformers' name of the configuration; mT5 computes as T5 does."""
    own = any(re.fullmatch(r"(?:enc|dec)\.blk\.[1-9]\d*\.attn_rel_b\.weight", name) for name in file.tensors)
    return "umt5" if own else "t5"


def t5_fields(header: Header, file: GgufFile) -> dict[str, Any]:
    """What the decoder begins with, how many layers it has, the feed-forward layers, whether outputs are scaled.

    Raises CheckpointError for values that cannot be.
    """
    written = {name.split(".")[2] for name in file.tensors if name.startswith("dec.blk.")}
    start, rows = header.get(START), file.tensors[EMBEDDING].shape[0] if EMBEDDING in file.tensors else 0
    if type(start) is not int or not 0 <= start < max(rows, 1):
        raise header.wrong(START, "the id of a token, which every answer begins with")
    most = max(min(len(written), header.layers), 1)  # transformers and llama.cpp answer with no more than the encoder's
    return {
        "num_decoder_layers": header.count(DECODER_LAYERS, header.layers, most),
        "decoder_start_token_id": start,
        "feed_forward_proj": "gated-gelu" if "enc.blk.0.ffn_gate.weight" in file.tensors else "relu",
        "tie_word_embeddings": not has_own_output(file),
    }


def t5_keys(config: PreTrainedConfig) -> dict[str, Any]:
    """The keys that a file states beside those of the table. Raises UnsupportedError for what llama.cpp does not run."""
    start, layers = getattr(config, "decoder_start_token_id", None), (config.num_layers, config.num_decoder_layers)
    if start is None:
        raise UnsupportedError("config.json names no decoder_start_token_id, by which every answer begins")
    if layers[1] > layers[0]:
        raise UnsupportedError(
            f"its decoder has {layers[1]} layers and its encoder {layers[0]}: llama.cpp has no room for more in the decoder"
        )
    return {START: start, DECODER_LAYERS: layers[1], "context_length": getattr(config, "n_positions", 512)}


def t5_notes(draft: GgufFile) -> list[str]:
    """What differs in llama.cpp, which runs the file, each one sentence."""
    if draft.metadata["general.architecture"] != "t5" or has_own_output(draft):
        return []
    return ["llama.cpp leaves out the scale of a tied output layer: its likeliest tokens are the same, its probabilities "
            "sharper"]  # fmt: skip


def scales_outputs(values: Mapping[str, Any]) -> bool:
    """Whether a model of this configuration divides what goes into its output layer, as its class in transformers does."""
    tied = bool(values.get("tie_word_embeddings")) and values["model_type"] == "umt5"
    return bool(values.get("scale_decoder_outputs", tied))


def has_own_output(file: GgufFile) -> bool:
    """Whether the output layer is another matrix than the embedding."""
    if OUTPUT not in file.tensors or EMBEDDING not in file.tensors:
        return False
    infos = [file.tensors[name] for name in (OUTPUT, EMBEDDING)]
    if any(len(info.shape) != 2 for info in infos) or infos[0].shape != infos[1].shape:
        return True  # assemble() says what is wrong
    if not infos[0].nbytes:
        return True  # of a draft (gguf_from_folder.py), which has two where they are two
    output, embedding = (_some_rows(file.packed(info.name)) for info in infos)
    return float(torch.cosine_similarity(output, embedding, dim=-1).median()) < _ALIKE


def _some_rows(packed: PackedTensor) -> torch.Tensor:
    """Rows from all over a matrix, float32."""
    rows = packed.shape[0]
    chosen = torch.linspace(0, rows - 1, min(rows, _COMPARED)).long()
    return dequantize(take_rows(packed, chosen), torch.float32)


def t5_same(file: GgufFile) -> dict[str, str]:
    """{parameter: the one that the file has for both}."""
    tied = ["encoder.embed_tokens", "decoder.embed_tokens", *([] if OUTPUT in file.tensors else ["lm_head"])]
    return {f"{name}.weight": "shared.weight" for name in tied}


def settle_scale(config: PreTrainedConfig, file: GgufFile) -> None:
    """transformers 5.17 goes by this field of umT5, and sets it whatever it is told."""
    if config.model_type == "umt5" and not hasattr(config, "scale_decoder_outputs"):
        config.tie_word_embeddings = not has_own_output(file)
