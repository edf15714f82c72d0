"""Writes docs/architectures.md: what became of a tiny model of every causal architecture of the installed transformers.

python docs/make_architectures.py          an hour at most; tests/zoo has the trial itself
python docs/make_architectures.py --gguf   only the section on GGUF files, at once, from the tables in checkpoints/
"""

import os
import sys
import tempfile
import warnings
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests" / "zoo"))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
warnings.filterwarnings("ignore")

HEAD = """# Architectures

What qgraft makes of every causal architecture that transformers {version} lists, found out with a tiny model of each
(`python docs/make_architectures.py`; `tests/zoo` tries the usual ones in every run and all of them in `make test-slow`).

**exact** means, measured by transformers' own model with the same weights: equal logits, from floats and packed in q8_0;
the same 24 greedy tokens from a prompt longer than its window, with fast decoding on; the same loss and gradients of LoRAs
on three samples of 7 to 40 tokens, packed in one row where the architecture keeps them apart, else one by one; equal
logits after saving and loading again; nothing that is said of a token hangs on those behind it. Layers that are known to
compute x W^T + b hold packed weights; experts, routers,
convolutions and layers whose weights an architecture reads itself stay floats, and take no LoRA.
**refused** means that loading or training ends in that error. **not tried** means that no tiny model of the kind could be
made, or that transformers' own fails, so nothing is claimed.

{exact} exact, {refused} refused, {others} not tried.

| model_type | outcome |
|---|---|
"""


GGUF = """
## From GGUF files

Of these, the ones whose GGUF files are read, trained on, merged into and written from folders. All are held to
transformers' own float model of the weights that the bytes of a tiny file mean
(`tests/checkpoints/test_gguf_architectures.py`): logits to 1e-5 of the largest, loss and gradients of A and B on
samples of 7 to 40 tokens, 32 greedy tokens with fast decoding on; what an adapter learned is in a merged file that is
read again; a tensor too many and keys that would change the computation are refused. llama.cpp runs the same files,
and those written from folders, with and without a GGUF-LoRA (`tests/oracle`): log-probabilities to 3e-5, with GELU,
which it takes from a table, to 5e-3.

**samples**: whether several share a row in training, or each has a pass of its own. **in C**: whether a step of decoding is
one call of C; all others decode by transformers' pass with the packed layers in it.

| general.architecture | model_type | read | trained, samples | merged, written | decoded | stored otherwise |
|---|---|---|---|---|---|---|
{rows}

Experts stay packed, as they lie in the file; those that no token of a pass was routed to are not read. LoRAs are put on
them by `--target_parameters`, with PEFT's names, layout and values: `tests/checkpoints/test_gguf_experts.py` has PEFT's
own layers on transformers' model as the judge. The router takes none. A merge solves for each expert with the tokens
that come to it, and names those that it only rounds, because too few came. Experts of a folder are packed by
`--quantize` in formats of GGUF files (`f16` and `bf16` among them), whichever way the folder keeps them, and then
trained, merged and written as a file; without it they stay floats, which take no LoRA. Back into the folder, whatever
tensors it has of them, experts are written as floats (`--to f16`, `--to bf16`). The released gpt-oss, whose folder has
its experts in MXFP4, is read, trained, merged and written in these blocks, bit for bit as
`transformers.integrations.mxfp4` reads them. Gate and up of experts may lie in one tensor (`ffn_gate_up_exps`,
[experts, gate rows and then up rows, in]): it stays one, also in a GGUF-LoRA. Of ours llama.cpp reads `deepseek2` and
`qwen35moe` so. Files of 2023 with a tensor for each expert are refused.

`granitemoe` with `expert_shared_feed_forward_length` has gate and up of the shared expert in two tensors, which are one
layer in transformers: it is held as floats and takes no LoRA, and a saved file has both as they were. Such models are
not written from folders. The routers of Hunyuan's mixtures are linear layers in transformers; they stay floats as all
routers, and take no LoRA.

Not served from GGUF, and refused by name: all other architectures. Layers
that only draft tokens (`nextn_predict_layers`) are left out, and copied when the file is saved.

`deepseek2` is DeepSeek 2, and with `expert_gating_func` 2 DeepSeek 3. Where a file has `attn_k_b` and `attn_v_b` in
place of `attn_kv_b` (those since 2025), that layer is held as floats and takes no LoRA: the keys are stored transposed.
llama.cpp adds no LoRA to its queries, keys and values: an adapter with one there is refused as a GGUF-LoRA, and can be
merged. The groups of experts of DeepSeek 2 (not Lite) are chosen by their best expert, as its authors do; llama.cpp
takes the best two. PEFT takes `gate_proj` and `up_proj` in `target_modules` for those of the experts, as transformers 4
had them: an adapter on dense or shared layers of a mixture that shall be opened by PEFT is put on attention alone, and
on experts by `target_parameters`.

Where a `deepseek2` has yarn and no `yarn_log_multiplier`, cos and sin are scaled and scores are not, as by its authors' code;
llama.cpp scales both.

The ramp of yarn begins and ends in gpt-oss where the model was trained with it (`truncate` of transformers is false);
llama.cpp rounds both to whole elements of a head. Queries and keys of Qwen 3.5's delta nets are normed with an epsilon of
1e-6, as by its authors; llama.cpp takes that of the file, which in released ones is the same.

`chatglm` is ChatGLM3-6B and GLM-4-9B in the layout of their own code, which is ours here (`models/chatglm2.py`); it is
held to transformers' GLM with the same weights too. In Gemma 3n and 4 the table of embeddings for each layer stays packed
and mapped, and the rows of the tokens are gathered. Keys and values of layers that take those of others are left as they
are. llama.cpp adds no LoRA to `per_layer_model_proj`, and in Gemma 3n to altup's projections and router: an adapter with
one there is refused as a GGUF-LoRA, and can be merged. Gemma 3n is not written from folders, which have no keys and values
for those layers, and llama.cpp wants them; it takes the deviation of n activations over n - 1, the authors' model over n.

`t5` is T5, FLAN-T5, mT5 and umT5: an encoder and a decoder. What is said above holds of source and target: logits of
transformers' model with the same weights to 1e-5, losses of 20 steps those of PEFT, merged files read again
(`tests/checkpoints/test_gguf_t5.py`); llama.cpp's logits, which it gives through its C interface, to 0.002 where they
deviate by 1, with a GGUF-LoRA, merged and written from folders (`tests/oracle/test_llamacpp_pairs.py`). Feed-forward
layers are gated, with GELU, where the file has `ffn_gate` (llama.cpp's rule); ReLU else. A file without
`output.weight` has a tied output layer, and what goes into it is divided by the root of d_model, as by T5's authors
and transformers; llama.cpp does not divide, so its likeliest tokens are the same and its probabilities sharper.
Dropout is 0.1 while training, as in T5's configuration, because no key states it. A decoder deeper than the encoder
is refused: neither transformers' generate() nor llama.cpp runs it. Files of an encoder alone (`t5encoder`) are
refused.

A Qwen 3.5 with more value heads than key heads (4B and larger) has the columns of `ssm_out` in another order of heads than
transformers, and in a K-quant several heads share a block. So these bytes stay as they are, in any format, and the layer
puts its inputs in their order (`QuantizedLinear.input_order`); it is trained, merged into and saved as any other. Adapters
have transformers' order in the model and in PEFT's files, the file's in a GGUF-LoRA. An exact LoRA is refused there. A file
written from a folder of floats has that order in any format, too; from weights that are K-quants already it is refused.
"""
PAIRS = {"t5": ["t5", "umt5"]}  # encoder-decoders: tests/checkpoints/test_gguf_t5.py
PACKED_APART = {"gpt-oss", "lfm2", "lfm2moe", "qwen35", "qwen35moe"}  # by tests/checkpoints/test_gguf_architectures.py


def gguf_section() -> str:
    """What is said of GGUF files, from the tables of the architectures."""
    from qgraft.checkpoints.gguf_keys import TABLE
    from qgraft.checkpoints.gguf_rules import ARCHITECTURES
    from qgraft.checkpoints.gguf_write_keys import UNWRITTEN
    from qgraft.passes.decoding_families import FAMILIES

    lines = []
    for name, keys in TABLE.items():
        kinds = PAIRS.get(name, [keys.model_type, *([keys.other[1]] if keys.other else [])])
        rules = ARCHITECTURES[name]
        stored = [
            *(["rows"] if rules.rows else []),
            *(["norms + 1"] if rules.norm_offset else []),
            *(["kernels"] if rules.kernels != "\0" else []),
            *(["gate and up of experts alternate"] if rules.alternates else []),
        ]
        fast = [kind for kind in kinds if kind in FAMILIES]
        decoded = "packed layers" if not fast else "in C" if fast == kinds else f"{', '.join(fast)} in C"
        apart = "one in each pass" if name in PACKED_APART else "several in a row"
        apart = "pairs, padded" if name in PAIRS else apart
        models = ", ".join(f"`{kind}`" for kind in kinds)
        written = "merged only" if name in UNWRITTEN else "yes"
        written = "yes, merged without rows" if name in PAIRS else written
        lines.append(f"| `{name}` | {models} | yes | {apart} | {written} | {decoded} | {', '.join(stored)} |")
    return GGUF.format(rows="\n".join(lines))


def main() -> None:
    """Write the table, or the section on GGUF files alone."""
    if sys.argv[1:] == ["--gguf"]:
        page = (HERE / "architectures.md").read_text(encoding="utf-8").partition("\n## From GGUF files")[0]
        (HERE / "architectures.md").write_text(page + gguf_section(), encoding="utf-8")
        return
    import torch
    import transformers
    from judge import outcome
    from kinds import KINDS

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    rows = {}
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            rows[kind] = outcome(kind, Path(folder))
        print(f"{kind}: {rows[kind]}", flush=True)
    write(rows, transformers.__version__)


def write(rows: dict[str, str], version: str) -> None:
    """The page; exits with an error where an outcome is that something is wrong."""
    counts = [
        sum(text.startswith(word) for text in rows.values()) for word in ("exact", "refused", "not tried", "wrong")
    ]
    if counts.pop():
        sys.exit("something is wrong: the table is left as it is")
    head = HEAD.format(version=version, **dict(zip(("exact", "refused", "others"), counts, strict=True)))
    lines = [f"| `{kind}` | {text} |" for kind, text in rows.items()]
    (HERE / "architectures.md").write_text(head + "\n".join(lines) + "\n" + gguf_section(), encoding="utf-8")


if __name__ == "__main__":
    main()
