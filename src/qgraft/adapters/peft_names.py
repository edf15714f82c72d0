"""PEFT's names of the tensors of a LoRA: the only place that knows how they are made up.

base_model.model.<module path>.lora_A.weight      [r, in]
base_model.model.<module path>.lora_B.weight      [out, r]
base_model.model.<module path>.lora_embedding_A   [r, vocabulary]     of an embedding
base_model.model.<module path>.lora_embedding_B   [width, r]
"""

STEM = "base_model.model."


def tensor_name(path: str, part: str, of_embedding: bool = False) -> str:
    """PEFT's name of the A or B of a LoRA on the layer at this module path."""
    return f"{STEM}{path}." + (f"lora_embedding_{part}" if of_embedding else f"lora_{part}.weight")
