"""A LoRA on an image model, from a folder of images to a picture. / 用一个图片目录给图像模型训练 LoRA，再出图。

    python examples/diffusion.py --images images                         Stable Diffusion 1.5 from the hub; take a GPU
    python examples/diffusion.py --images images --model stabilityai/stable-diffusion-xl-base-1.0 --resolution 1024
    python examples/diffusion.py --tiny                                  no network: a tiny random pipeline, squares as images

`images` holds images and metadata.jsonl, a line {"file_name": "0001.png", "text": "what is on it"} for each.
A random pipeline shows the way and paints noise. / 随机初始化的模型只用来走通流程，画出来的是噪声。
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image

from qgraft import diffusion


def make_tiny_pipeline(folder):
    """A Stable Diffusion of random weights. / 随机权重的小 Stable Diffusion。"""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({piece: number for number, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=32)
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=len(pieces), hidden_size=32, intermediate_size=64, num_attention_heads=4, num_hidden_layers=2,
        max_position_embeddings=32, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(32, 64), cross_attention_dim=32, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(16, 16), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
                        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=8, sample_size=16)  # fmt: skip
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
    StableDiffusionPipeline(
        vae, CLIPTextModel(text), tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    ).save_pretrained(folder)
    return folder


def make_squares(folder):
    """Images of one colour, with captions. / 单色图片和描述。"""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for colour in ("red", "green", "blue", "white"):
        Image.new("RGB", (20, 16), colour).save(folder / f"{colour}.png")
        lines.append(json.dumps({"file_name": f"{colour}.png", "text": f"a {colour} square"}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


def main(words=None):
    """All of it; returns the picture. / 完整流程，返回生成的图片。"""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="stable-diffusion-v1-5/stable-diffusion-v1-5", help="hub id or folder")
    parser.add_argument("--images", type=Path, help="folder with metadata.jsonl")
    parser.add_argument("--tiny", action="store_true", help="make a tiny random pipeline and images instead")
    parser.add_argument("--quantize", default="q8_0", help="format of the linear layers; none: floats")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--prompt", help="of the picture; default: the first caption")
    parser.add_argument("--output", type=Path, default=Path("diffusion-out"))
    options = parser.parse_args(words)
    if options.tiny:
        options.model, options.resolution = str(make_tiny_pipeline(options.output / "tiny")), 16
        options.images = make_squares(options.output / "squares")
    if options.images is None:
        parser.error("--images FOLDER, or --tiny")

    denoiser = diffusion.load(options.model, quantize=None if options.quantize == "none" else options.quantize)
    report = diffusion.train(denoiser, diffusion.DiffusionArguments(
        output_dir=str(options.output / "run"), overwrite_output_dir=True, dataset=str(options.images),
        resolution=options.resolution, max_steps=options.steps, per_device_train_batch_size=2, r=8, save_strategy="no",
        gradient_checkpointing=not options.tiny,
    ), progress=True)  # fmt: skip
    print(f"trained {report.parameters:,} parameters, loss {report.metrics['train_loss']:.4f}")

    # diffusers reads it, on the float model; packed weights differ a little from those. / diffusers 直接读，放在浮点模型上
    dtype = torch.float16 if torch.cuda.is_available() else torch.float32
    pipeline = DiffusionPipeline.from_pretrained(options.model, dtype=dtype)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu").load_lora_weights(options.output / "run")
    first = json.loads((options.images / "metadata.jsonl").read_text(encoding="utf-8").splitlines()[0])
    picture = pipeline(options.prompt or first["text"], num_inference_steps=5 if options.tiny else 30,
                       generator=torch.Generator().manual_seed(0)).images[0]  # fmt: skip
    picture.save(options.output / "picture.png")
    print(f"{options.output / 'picture.png'}: {options.prompt or first['text']}")
    return picture


if __name__ == "__main__":
    main()
