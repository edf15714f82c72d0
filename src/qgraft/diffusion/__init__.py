"""LoRAs on diffusion models: the U-Nets and transformers of diffusers, packed or floats.

    from qgraft import diffusion

    unet = diffusion.load("stable-diffusion-v1-5", quantize="q8_0")
    diffusion.train(unet, diffusion.DiffusionArguments(dataset="images", output_dir="out"))
    diffusion.merge(unet)
    diffusion.save(unet, "merged/unet")

qgraft.attach_lora, save_adapter, load_adapter, use_adapter and the like work on them as on language models.
"""

from qgraft.adapter_files.diffusers_lora import save_lora_weights
from qgraft.diffusion.arguments import ATTENTION, DiffusionArguments
from qgraft.diffusion.denoisers import load
from qgraft.diffusion.merged import merge, save
from qgraft.diffusion.run import train

__all__ = ["ATTENTION", "DiffusionArguments", "load", "merge", "save", "save_lora_weights", "train"]
