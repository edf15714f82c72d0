"""A model that sees learns to answer about images. / 让看得见图片的模型学会回答有关图片的问题。

    python examples/images.py                                  SmolVLM-256M from the hub, on a GPU or a CPU
    python examples/images.py --model Qwen/Qwen2.5-VL-3B-Instruct --quantize q8_0
    python examples/images.py --tiny                           no network: a tiny random LLaVA
    python examples/images.py --dataset rows.jsonl             your own rows, their images beside the file

The rows made here are squares of one colour with a question about it. The language side's linear layers are packed by
--quantize and carry the LoRA; the vision side stays as it is. A random model shows the way and learns only these colours.
这里的数据是单色方块和有关颜色的提问。--quantize 只量化语言部分的线性层，LoRA 也在这些层上；视觉部分不动。
随机初始化的模型只用来走通流程。
"""

import argparse
import json
from pathlib import Path

import torch
from PIL import Image

import qgraft
from qgraft.serving.answering import answer

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 70, 220), "yellow": (230, 210, 50)}
SHADES = 8


def write_rows(folder):
    """Images and rows that name them, as LLaMA-Factory has them. / 写出图片和数据，格式同 LLaMA-Factory。"""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for shade in range(SHADES):
        for colour, numbers in COLOURS.items():
            name = f"images/{colour}-{shade}.png"
            Image.new("RGB", (64, 64), tuple(max(0, number - 8 * shade) for number in numbers)).save(folder / name)
            question = {"role": "user", "content": "<image>Which colour is this?"}
            rows.append({"messages": [question, {"role": "assistant", "content": colour}], "images": [name]})
    for name, part in (("train.jsonl", rows[len(COLOURS) :]), ("test.jsonl", rows[: len(COLOURS)])):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    return folder / "train.jsonl", folder / "test.jsonl"


def make_tiny_llava(folder):
    """A LLaVA of random weights, one token a byte. / 随机权重的小 LLaVA，一个字节一个 token。"""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, pad_token="<pad>", eos_token="</s>")
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    template = (
        "{% for m in messages %}{{ m['role'] }}: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
        "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
        "{% endif %}{% if m['role'] == 'assistant' %}</s>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(images, tokenizer, patch_size=14, vision_feature_select_strategy="default",
                               num_additional_image_tokens=1, chat_template=template)  # fmt: skip
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=28, patch_size=14, **shape),
        text_config=LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.1, **shape),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), vision_feature_layer=-1,
    )  # fmt: skip
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def main():
    """Load, train, measure, save, read again, ask. / 加载、训练、评估、保存、重新读入、提问。"""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolVLM-256M-Instruct")
    parser.add_argument("--tiny", action="store_true", help="a tiny random LLaVA instead / 换成随机的小模型")
    parser.add_argument("--quantize", help="packs the language side: q8_0, q4_1, ... / 量化语言部分")
    parser.add_argument("--dataset", help="your own rows; a tenth is held out / 自己的数据，十分之一留作评估")
    parser.add_argument("--output_dir", type=Path, default=Path("colours"))
    parser.add_argument("--max_steps", type=int, default=60)
    options = parser.parse_args()

    train_rows, test_rows = write_rows(options.output_dir / "rows")
    source = make_tiny_llava(options.output_dir / "tiny-llava") if options.tiny else options.model
    model, tokenizer = qgraft.load(source, quantize=options.quantize)
    for note in model.qgraft.info.notes:
        print(f"note: {note}")
    args = qgraft.TrainArguments(
        output_dir=str(options.output_dir / "adapter"), r=8, lora_alpha=16, learning_rate=1e-3, max_steps=options.max_steps,
        per_device_train_batch_size=4, logging_steps=10, overwrite_output_dir=True,
        val_size=0.1 if options.dataset else 0.0,
    )  # fmt: skip
    held_out = None if options.dataset else str(test_rows)
    report = qgraft.train(model, tokenizer, options.dataset or str(train_rows), args, eval_dataset=held_out)
    print(f"held-out loss {report.metrics['eval_loss_before']:.3f} -> {report.metrics['eval_loss']:.3f}")

    model, tokenizer = qgraft.load(source, quantize=options.quantize)
    qgraft.load_adapter(model, options.output_dir / "adapter")
    for colour in COLOURS:
        image = options.output_dir / "rows" / "images" / f"{colour}-0.png"
        said = answer(
            model, tokenizer, [("user", "Which colour is this?")], images=[image], max_new_tokens=12, do_sample=False
        )
        print(f"{image.name}: {said.text}")


if __name__ == "__main__":
    main()
