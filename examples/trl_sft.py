"""Train a packed model by TRL's SFTTrainer, with PEFT's LoRA; then go on in qgraft with what it learned.

python examples/trl_sft.py model.gguf      needs peft and trl
"""

import sys

from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

import qgraft


def main() -> None:
    model, tokenizer = qgraft.load(sys.argv[1])
    rows = Dataset.from_list([{"text": f"The secret number of room {n} is {n * 7}."} for n in range(40)])
    config = qgraft.peft_config(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    options = SFTConfig("trl-out", max_steps=20, learning_rate=1e-3, bf16=False, report_to="none")
    trainer = SFTTrainer(model, options, train_dataset=rows, processing_class=tokenizer, peft_config=config)
    trainer.train()
    trainer.model.save_pretrained("trl-adapter")

    model = trainer.model.unload()  # the packed model again
    qgraft.load_adapter(model, "trl-adapter")
    print(qgraft.adapter_names(model))


if __name__ == "__main__":
    main()
