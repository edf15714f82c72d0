"""Make golden.json: losses and gradients of TRL's trainers with a PEFT LoRA, on the model and rows of tiny.py.

    python tests/golden/preferences/make.py      needs trl and peft; made with trl 1.16.0, peft 0.21.2, transformers 5.24.0

Each trainer is made as a user makes it, with a tokenizer of single words; what is stored is what its own compute_loss gives
for the batch that its own collator makes of all rows, in evaluation mode, and the gradients of it.
"""

import json
import os
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
warnings.simplefilter("ignore")
sys.path.insert(0, str(Path(__file__).parent))

import trl  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from tiny import ALPHA, NUMBERS, PAIRS, RANK, TARGETS, VOCABULARY, fill_lora, tiny_model  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402
from trl.experimental.cpo import CPOConfig, CPOTrainer  # noqa: E402
from trl.experimental.orpo import ORPOConfig, ORPOTrainer  # noqa: E402

DPO = ("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "sppo_hard", "apo_zero", "apo_down", "sigmoid_norm")


def tokenizer():
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, **{f"t{n}": n for n in range(2, VOCABULARY)}}, "<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def text(ids):
    return " ".join("<eos>" if number == 1 else f"t{number}" for number in ids)


def peft_model():
    model = get_peft_model(tiny_model(), LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS)))
    fill_lora(
        {name.replace(".default.weight", ".weight"): p for name, p in model.named_parameters() if p.requires_grad}
    )
    return model.eval()


def refer_to_base(trainer):
    """Else the reference would be TRL's copy of the adapter that it is given."""
    trainer.model.delete_adapter("ref")


def measured(trainer, inputs):
    trainer.model.eval()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    gradients = {name.replace(".default.weight", ".weight"): p.grad for name, p in trainer.model.named_parameters()
                 if p.requires_grad}  # fmt: skip
    kept = (
        getattr(trainer, "_stored_metrics", None) or trainer._metrics
    )  # those of trl.experimental are called otherwise
    metrics = {key: values[-1] for mode in kept.values() for key, values in mode.items() if values}
    return {
        "loss": float(loss),
        "gradients": {
            name.removeprefix("base_model.model."): [float(f"{x:.7g}") for x in (g.norm(), *g.flatten()[:4].tolist())]
            for name, g in sorted(gradients.items())
        },
        "metrics": {
            key.removeprefix("eval_"): float(value) for key, value in metrics.items() if "/" in key or key == "kl"
        },
    }


def common(folder):
    return {
        "output_dir": folder, "use_cpu": True, "report_to": "none", "max_length": 64, "remove_unused_columns": False,
        "per_device_train_batch_size": len(PAIRS), "beta": NUMBERS["beta"], "bf16": False,
    }  # fmt: skip


def batch(trainer):
    rows = [trainer.train_dataset[number] for number in range(len(trainer.train_dataset))]
    return trainer._prepare_inputs(trainer.data_collator(rows))


def made():
    pairs = Dataset.from_list(
        [{"prompt": text(p) + " ", "chosen": text(c[:-1]), "rejected": text(r[:-1])} for p, c, r in PAIRS]
    )
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for loss in DPO:
            smoothing = {"label_smoothing": NUMBERS["label_smoothing"]} if loss in ("robust", "exo_pair") else {}
            args = trl.DPOConfig(**common(folder), loss_type=loss, **smoothing)
            trainer = trl.DPOTrainer(peft_model(), None, args, train_dataset=pairs, processing_class=tokenizer())
            refer_to_base(trainer)
            found[loss] = measured(trainer, batch(trainer))
        args = CPOConfig(**common(folder), loss_type="simpo", cpo_alpha=0.0, simpo_gamma=NUMBERS["simpo_gamma"],
                         label_smoothing=NUMBERS["label_smoothing"])  # fmt: skip
        found["simpo"] = measured(
            t := CPOTrainer(peft_model(), args, train_dataset=pairs, processing_class=tokenizer()), batch(t)
        )
        args = ORPOConfig(**common(folder))
        found["orpo"] = measured(
            t := ORPOTrainer(peft_model(), args, train_dataset=pairs, processing_class=tokenizer()), batch(t)
        )
        rows = [{"prompt": text(p) + " ", "completion": text(each[:-1]), "label": label}
                for p, c, r in PAIRS for each, label in ((c, True), (r, False))]  # fmt: skip
        for loss in ("kto", "apo_zero_unpaired"):
            weights = {name: NUMBERS[name] for name in ("desirable_weight", "undesirable_weight")}
            args = trl.KTOConfig(**common(folder) | {"per_device_train_batch_size": len(rows)}, loss_type=loss, **weights,
                                 train_sampling_strategy="sequential")  # fmt: skip
            trainer = trl.KTOTrainer(
                peft_model(), None, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer()
            )
            refer_to_base(trainer)
            found[loss] = measured(trainer, batch(trainer))
    return found


if __name__ == "__main__":
    libraries = {name: version(name) for name in ("trl", "peft", "transformers", "torch")}
    path = Path(__file__).parent / "golden.json"
    losses = ",\n".join(f"  {json.dumps(name)}: {json.dumps(found)}" for name, found in made().items())
    head = json.dumps({"made_with": libraries, "numbers": NUMBERS}, indent=1)[:-2]
    path.write_text(f'{head},\n "losses": {{\n{losses}\n }}\n}}\n')
