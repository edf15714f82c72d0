"""Tiny random models that see images, made by transformers' own classes, with tokenizers and processors made here."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 1024, "initializer_range": 0.2}  # fmt: skip
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}IMAGE{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# as SmolVLM's: contents are lists of parts
LISTS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}{% if m['content'][0]['type'] == 'image' %}:{% else %}: {% endif %}"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% elif c['type'] == 'image' %}IMAGE{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)
# as Gemma 3's: parts are trimmed
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] | trim }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}IMAGE{% else %}{{ c['text'] | trim }}{% endif %}{% endfor %}{% endif %}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """Random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def tokenizer(template: str, image: str, special: list[str], **named: str) -> PreTrainedTokenizerFast:
    """One token a byte, blank lines of two and three as one; and special ones."""
    vocabulary = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("Ċ", "Ċ"), ("ĊĊ", "Ċ")]
    for one, other in merges:
        vocabulary[one + other] = len(vocabulary)
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", **{"eos_token": "<|im_end|>", "extra_special_tokens": named}
    )
    made.add_tokens(["<|im_start|>", *special], special_tokens=True)
    made.chat_template = template.replace("IMAGE", image)
    return made


def _llava():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    speaks = tokenizer(CHATML, "<image>", ["<image>"])
    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(images, speaks, patch_size=14, vision_feature_select_strategy="default",
                               num_additional_image_tokens=1, chat_template=speaks.chat_template)  # fmt: skip
    sees = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                            image_size=28, patch_size=14)  # fmt: skip
    config = LlavaConfig(vision_config=sees, text_config=LlamaConfig(vocab_size=len(speaks), **TEXT),
                         image_token_index=speaks.convert_tokens_to_ids("<image>"), vision_feature_layer=-1)  # fmt: skip
    return LlavaForConditionalGeneration, config, processor


def _qwen(kind: str):
    import transformers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    special = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    speaks = tokenizer(CHATML, "<|vision_start|><|image_pad|><|vision_end|>", special)
    ids = dict(zip(("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"),
                   speaks.convert_tokens_to_ids(special), strict=True))  # fmt: skip
    patches = {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": 64, "longest_edge": 1024}}
    images = Qwen2VLImageProcessorPil(**patches)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    text = {**TEXT, "vocab_size": len(speaks), "rope_parameters": rope}
    sees = {"depth": 2, "num_heads": 4, "patch_size": 4, "hidden_size": 32}
    videos = "Qwen2VLVideoProcessor"
    if kind == "Qwen2":
        sees |= {"embed_dim": 32, "mlp_ratio": 2}
    elif kind == "Qwen2_5_":
        sees |= {"intermediate_size": 64, "out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1]}
    else:
        videos = "Qwen3VLVideoProcessor"
        text |= {"head_dim": 8, "rope_parameters": {**rope, "mrope_interleaved": True}}
        sees |= {"intermediate_size": 64, "out_hidden_size": 32, "num_position_embeddings": 64,
                 "deepstack_visual_indexes": [0]}  # fmt: skip
    config = getattr(transformers, f"{kind}VLConfig")(vision_config=sees, text_config=text, **ids)
    processor = getattr(transformers, f"{kind}VLProcessor")(
        images, speaks, getattr(transformers, videos)(patch_size=4, merge_size=2), chat_template=speaks.chat_template
    )
    return getattr(transformers, f"{kind}VLForConditionalGeneration"), config, processor


def _gemma3():
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3Processor
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    special = ["<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>"]
    speaks = tokenizer(GEMMA, "<start_of_image>", ["<bos>", *special], boi_token="<start_of_image>",
                       eoi_token="<end_of_image>", image_token="<image_soft_token>")  # fmt: skip
    speaks.bos_token, speaks.eos_token = "<bos>", "<end_of_turn>"
    images = Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    processor = Gemma3Processor(images, speaks, chat_template=speaks.chat_template, image_seq_length=4)
    boi, eoi, soft = speaks.convert_tokens_to_ids(special[2:])
    sees = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "image_size": 28, "patch_size": 7}  # fmt: skip
    text = {**TEXT, "vocab_size": len(speaks), "head_dim": 8, "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"]}  # fmt: skip
    config = Gemma3Config(vision_config=sees, text_config=text, mm_tokens_per_image=4, boi_token_index=boi,
                          eoi_token_index=eoi, image_token_index=soft)  # fmt: skip
    return Gemma3ForConditionalGeneration, config, processor


def _idefics(kind: str):
    import importlib

    import transformers

    folder = "idefics3" if kind == "Idefics3" else "smolvlm"
    module = importlib.import_module(f"transformers.models.{folder}.image_processing_pil_{folder}")
    special = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    special += [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    speaks = tokenizer(LISTS, "<image>", special, image_token="<image>", fake_image_token="<fake_token_around_image>",
                       global_image_token="<global-img>", image_boundary_token="<fake_token_around_image>",
                       end_of_utterance_token="<end_of_utterance>")  # fmt: skip
    images = getattr(module, f"{kind}ImageProcessorPil")(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    given = {"chat_template": speaks.chat_template, "image_seq_len": 4}
    if kind == "SmolVLM":
        given["video_processor"] = transformers.SmolVLMVideoProcessor()
    processor = getattr(transformers, f"{kind}Processor")(images, speaks, **given)
    sees = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "image_size": 32, "patch_size": 8}  # fmt: skip
    text = transformers.LlamaConfig(vocab_size=len(speaks), **TEXT)
    config = getattr(transformers, f"{kind}Config")(vision_config=sees, text_config=text, scale_factor=2,
        image_token_id=speaks.convert_tokens_to_ids("<image>"), pad_token_id=speaks.pad_token_id)  # fmt: skip
    return getattr(transformers, f"{kind}ForConditionalGeneration"), config, processor


GEMMA4_IDS = ("boi_token_id", "eoi_token_id", "image_token_id", "boa_token_id", "eoa_token_index", "audio_token_id")


def gemma4_config(vocabulary: int, ids: dict[str, int]):
    """Gemma 4's without its audio tower; `ids` by GEMMA4_IDS."""
    from transformers import Gemma4Config

    sees = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 4, "head_dim": 8, "pooling_kernel_size": 2, "patch_size": 4,
            "position_embedding_size": 64}  # fmt: skip
    text = {**TEXT, "vocab_size": vocabulary, "head_dim": 8, "global_head_dim": 8, "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"], "vocab_size_per_layer_input": vocabulary,
            "hidden_size_per_layer_input": 32}  # fmt: skip
    return Gemma4Config(vision_config=sees, text_config=text, audio_config=None, video_token_id=None, **ids)


def _gemma4():
    from transformers import Gemma4ForConditionalGeneration, Gemma4Processor, Gemma4VideoProcessor
    from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    names = ("boi_token", "eoi_token", "image_token", "boa_token", "eoa_token", "audio_token")
    special = ["<|image>", "<image|>", "<|image|>", "<|audio>", "<audio|>", "<|audio|>"]
    speaks = tokenizer(GEMMA, "<|image|>", ["<bos>", "<start_of_turn>", "<end_of_turn>", *special],
                       **dict(zip(names, special, strict=True)))  # fmt: skip
    speaks.bos_token, speaks.eos_token = "<bos>", "<end_of_turn>"
    images = Gemma4ImageProcessorPil(patch_size=4, max_soft_tokens=70, pooling_kernel_size=2)
    processor = Gemma4Processor(Gemma4AudioFeatureExtractor(), images, speaks, Gemma4VideoProcessor(),
                                chat_template=speaks.chat_template)  # fmt: skip
    config = gemma4_config(len(speaks), dict(zip(GEMMA4_IDS, speaks.convert_tokens_to_ids(special), strict=True)))
    return Gemma4ForConditionalGeneration, config, processor


KINDS = {
    "llava": _llava,
    "gemma3": _gemma3,
    "gemma4": _gemma4,
    "idefics3": lambda: _idefics("Idefics3"),
    "smolvlm": lambda: _idefics("SmolVLM"),
    "qwen2_vl": lambda: _qwen("Qwen2"),
    "qwen2_5_vl": lambda: _qwen("Qwen2_5_"),
    "qwen3_vl": lambda: _qwen("Qwen3"),
}
WITH_TORCHVISION = {"gemma4", "smolvlm", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"}  # their processors hold one of videos


def write_image_model(kind: str, folder: Path):
    """The model, saved in the folder with its processor."""
    torch.manual_seed(0)
    cls, config, processor = KINDS[kind]()
    model = cls(config).eval()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model
