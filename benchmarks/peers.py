"""The contestants of train_cpu.py and profile_step.py: each trains the same adapter on the same rows in the same order.

    qgraft             qgraft.train() with default settings on the packed Q4_1 file
    qgraft-float32     the same with compute=float32; likewise qgraft-bf16, qgraft-int8
    peft               transformers' Trainer and PEFT on the float32 model that the file stands for, batches padded to the
                       longest row: what everybody runs
    peft-packed        with transformers' padding-free collator, as TRL's packing uses it: shows the gain of kernels and
                       memory without that of padding
    nf4, nf4-packed    PEFT on bitsandbytes NF4, products in float32; padded and packed
    nf4-bf16           the recipe that is copied from GPUs: NF4 with double quantization, products in bfloat16, autocast,
                       prepare_model_for_kbit_training, gradient checkpointing
    hqq                PEFT on HQQ, 4 bits in groups of 64
    quanto             PEFT on optimum-quanto, 4 bits
    torchao            PEFT on torchao, 8 bits (PEFT takes no 4-bit weights of torchao)
    unsloth            unsloth's backend for CPUs as it comes, with load_in_4bit=False: its loader and its loss in TRL's
                       trainer, gradient checkpointing; on a CPU without bfloat16 the base and the products are float32
    unsloth-nf4        the same with load_in_4bit=True, its default: NF4 with double quantization

The peers load the float32 checkpoint that prepare() writes: the values of the packed file, so `peft` has the same base as
qgraft and ends with the same loss. The other formats round these values again: their base, and so their loss, is another.
"""

import importlib.util
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REFERENCE = "peft"  # the float32 loss that all on the same base must reach
SAME_BASE = ("qgraft", "qgraft-float32", "qgraft-bf16", "qgraft-int8", "peft", "peft-packed")
UNSLOTH = ("unsloth", "unsloth-nf4")
NF4 = ("nf4", "nf4-packed")  # the same base too, theirs
NEEDS = {"nf4": "bitsandbytes", "nf4-packed": "bitsandbytes", "nf4-bf16": "bitsandbytes", "hqq": "hqq",
         "quanto": "optimum.quanto", "torchao": "torchao", "unsloth": "unsloth", "unsloth-nf4": "unsloth"}  # fmt: skip
CONTESTANTS = (*SAME_BASE, *NF4, "nf4-bf16", "hqq", "quanto", "torchao", *UNSLOTH)
MODEL, RANK = "smollm2-135m", 8


def missing_package(name: str) -> str | None:
    """What a contestant needs and is not installed."""
    needed = NEEDS.get(name)
    if needed is None:
        return None
    parent = needed.partition(".")[0]
    return needed if importlib.util.find_spec(parent) is None or importlib.util.find_spec(needed) is None else None


def prepare(folder: Path, datasets: list[str]) -> None:
    """Write what all contestants share: rows, float checkpoint, first adapter weights, and the sizes of the model."""
    import torch
    from peft_nf4 import float_model

    import qgraft
    from qgraft.adapter_files.gguf_lora import export_gguf_lora

    model, tokenizer = qgraft.load(MODEL)
    float_model(model).save_pretrained(folder / "float")
    tokenizer.save_pretrained(folder / "float")
    torch.manual_seed(0)
    qgraft.attach_lora(model, r=RANK, lora_alpha=2 * RANK)
    qgraft.save_adapter(model, folder / "adapter")
    export_gguf_lora(model, folder / "adapter.gguf", dtype="float32")
    for dataset in datasets:
        (folder / f"{dataset}.json").write_text(json.dumps(shared_rows(dataset, tokenizer)))
    (folder / "sizes.json").write_text(json.dumps(sizes(model)))


def shared_rows(dataset: str, tokenizer: Any) -> dict[str, Any]:
    """The rows of a data set as messages and as tokens, shuffled once.

    identity    the package's own examples; mixed    docstrings, 38 to 400 tokens; dense    512 tokens each, all learned
    """
    import tasks
    import torch

    from qgraft.training.evaluate import build_samples, read_dataset

    parts = tasks.identity() if dataset == "identity" else tasks.docstrings()
    options: dict[str, Any] = {"identity": {}, "mixed": {"max_length": 400},
                               "dense": {"max_length": 512, "train_on_prompt": True}}[dataset]  # fmt: skip
    shared: dict[str, Any] = {"options": options}
    for part, rows in zip(("train", "held_out"), parts, strict=True):
        if dataset == "dense":
            rows = joined(rows, 2600 if part == "train" else 5200)[: 64 if part == "train" else 4]
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1)).tolist()
        messages = [rows[i] for i in order]
        samples = build_samples(tokenizer, *read_dataset(messages), **options)
        assert len(samples) == len(messages)
        tokens = [{"input_ids": sample.input_ids, "labels": sample.labels} for sample in samples]
        shared[part] = {"messages": messages, "tokens": tokens}
    return shared


def joined(rows: list[Any], characters: int) -> list[Any]:
    """Rows whose answers are several answers of `rows`, of at least so many characters."""
    joint, text = [], ""
    for row in rows:
        question, answer = (message["content"] for message in row["messages"])
        text += f"{question}\n{answer}\n\n"
        if len(text) >= characters:
            joint.append({"messages": [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": text}]})
            text = ""
    return joint


def sizes(model: Any) -> dict[str, Any]:
    """The shapes (out, in, count) of the linear layers and of the head, and the operations of the adapter per token."""
    from qgraft.adapters.base import find_adapter

    shapes: dict[tuple[int, int], int] = {}
    lora = 0
    for each in find_adapter(model, "default").parts.values():
        shape = each.lora_B.shape[0], each.lora_A.shape[1]
        shapes[shape] = shapes.get(shape, 0) + 1
        lora += 6 * RANK * sum(shape)  # x A, h B; g B, gh A and the gradients of A and B
    head = tuple(model.get_output_embeddings().packed_weight.shape)
    return {
        "layers": [[*shape, count] for shape, count in shapes.items()],
        "head": head,
        "lora_flops": lora,
        "body_weights": sum(rows * columns * count for (rows, columns), count in shapes.items()),
        "head_weights": head[0] * head[1],
    }


def train(name: str, shared: dict[str, Any], folder: Path, steps: int, batch: int) -> tuple[float, Callable[[], float]]:
    """Load the contestant's model and train. Returns the seconds of loading, and a function for the held-out loss."""
    options = {
        "output_dir": str(folder / "out" / name), "max_steps": steps, "per_device_train_batch_size": batch,
        "learning_rate": 1e-3, "lr_scheduler_type": "constant", "save_strategy": "no", "logging_steps": 1000,
        "use_cpu": True, "dataloader_pin_memory": False, "remove_unused_columns": False, "report_to": "none",
    }  # fmt: skip
    if name.startswith("qgraft"):
        return train_qgraft(name, shared, folder, options)
    if name in UNSLOTH:
        return train_unsloth(name, shared, folder, options)
    return train_peft(name, shared, folder, options)


def train_qgraft(
    name: str, shared: dict[str, Any], folder: Path, options: dict[str, Any]
) -> tuple[float, Callable[[], float]]:
    """Ours: what `qgraft train` runs. Only the order of the rows is fixed."""
    import qgraft
    from qgraft.data.tokenizing import Sample, samples_sha256
    from qgraft.training.objective import evaluate_samples

    load = qgraft.load  # what it imports is imported here
    began = time.perf_counter()
    model, tokenizer = load(MODEL)
    load_seconds = time.perf_counter() - began
    qgraft.load_adapter(model, folder / "adapter")
    compute = name.partition("-")[2]
    args = qgraft.TrainArguments(
        **options, **shared["options"], **({"compute": compute} if compute else {}), plot_loss=False,
        overwrite_output_dir=True, train_sampling_strategy="sequential",
    )  # fmt: skip
    qgraft.train(model, tokenizer, shared["train"]["messages"], args)
    saved = json.loads((Path(args.output_dir) / "run.json").read_text())
    tokens = [Sample(row["input_ids"], row["labels"], "") for row in shared["train"]["tokens"]]
    assert saved["dataset"]["sha256"] == samples_sha256(tokens), "the peers learn other tokens"
    held_out = [Sample(row["input_ids"], row["labels"], "") for row in shared["held_out"]["tokens"]]
    return load_seconds, lambda: evaluate_samples(model, held_out).loss


def train_peft(
    name: str, shared: dict[str, Any], folder: Path, options: dict[str, Any]
) -> tuple[float, Callable[[], float]]:
    """The peers."""
    from peft import PeftModel, prepare_model_for_kbit_training
    from torch.utils.data import SequentialSampler
    from transformers import AutoTokenizer, DataCollatorWithFlattening, Trainer, TrainingArguments

    class InOrder(Trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return SequentialSampler(self.train_dataset)

    began = time.perf_counter()
    base = load_peer(name, folder / "float")
    AutoTokenizer.from_pretrained(folder / "float")
    load_seconds = time.perf_counter() - began
    if name == "nf4-bf16":
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=True)
        options = options | {"bf16": True, "gradient_checkpointing": True}
    model = PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)
    args = TrainingArguments(**options, disable_tqdm=True)
    collate = DataCollatorWithFlattening() if name.endswith("-packed") else pad
    rows = shared["train"]["tokens"]
    InOrder(model, args, data_collator=collate, train_dataset=rows).train()
    return load_seconds, lambda: held_out_loss(model, shared["held_out"]["tokens"])


def train_unsloth(
    name: str, shared: dict[str, Any], folder: Path, options: dict[str, Any]
) -> tuple[float, Callable[[], float]]:
    """unsloth, with what it does by default on a CPU; only adapter, rows and their order are ours."""
    import torch

    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        os.environ["UNSLOTH_CPU_BF16"] = "0"  # it asks the CPU, which may have more than this run may use
    import unsloth  # before trl, which it changes
    from datasets import Dataset
    from peft import load_peft_weights, set_peft_model_state_dict
    from torch.utils.data import SequentialSampler
    from trl import SFTConfig, SFTTrainer

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return SequentialSampler(self.train_dataset)

    began = time.perf_counter()
    base, tokenizer = unsloth.FastLanguageModel.from_pretrained(
        str(folder / "float"), max_seq_length=512, load_in_4bit=name == "unsloth-nf4"
    )
    load_seconds = time.perf_counter() - began
    model = unsloth.FastLanguageModel.get_peft_model(base, r=RANK, lora_alpha=2 * RANK)
    set_peft_model_state_dict(model, load_peft_weights(str(folder / "adapter"), device="cpu"))
    args = SFTConfig(**options, disable_tqdm=True, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
    rows = Dataset.from_list(shared["train"]["tokens"])
    InOrder(model, args, data_collator=pad, train_dataset=rows, processing_class=tokenizer).train()
    return load_seconds, lambda: held_out_loss(model, shared["held_out"]["tokens"])


def load_peer(name: str, checkpoint: Path) -> Any:
    """The base model of a peer, from the float32 checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig, TorchAoConfig

    dtype, config = torch.float32, None
    if name == "nf4-bf16":
        dtype = torch.bfloat16
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype,
                                    bnb_4bit_use_double_quant=True)  # fmt: skip
    elif name in NF4:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    elif name == "quanto":
        config = QuantoConfig(weights="int4")
    elif name == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        config = TorchAoConfig(Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, quantization_config=config)
    return pack_with_hqq(model) if name == "hqq" else model


def pack_with_hqq(model: Any) -> Any:
    """HQQ's own layers in place of the model's; transformers 5 cannot load into them."""
    import torch
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=64)
    for path, module in list(model.model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            packed = HQQLinear(module, config, compute_dtype=torch.float32, device="cpu")
            model.model.set_submodule(path, packed)
    return model


def pad(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The usual collator: rows padded to the longest one, an attention mask, labels -100 on padding."""
    import torch

    longest = max(len(row["input_ids"]) for row in rows)
    batch: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in rows:
        missing = longest - len(row["input_ids"])
        batch["input_ids"].append(row["input_ids"] + [0] * missing)
        batch["attention_mask"].append([1] * len(row["input_ids"]) + [0] * missing)
        batch["labels"].append(row["labels"] + [-100] * missing)
    return {key: torch.tensor(value) for key, value in batch.items()}


def held_out_loss(model: Any, rows: list[dict[str, Any]]) -> float:
    """Mean over all label tokens, each row alone, by transformers' own loss."""
    import torch

    total, count = 0.0, 0
    model.eval()
    for module in model.modules():  # bitsandbytes would go over to bfloat16 in evaluation
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    for row in rows:
        labels = torch.tensor([row["labels"]])
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([row["input_ids"]]), labels=labels).loss
        learned = int((labels[:, 1:] != -100).sum())
        total, count = total + float(loss) * learned, count + learned
    return total / count
