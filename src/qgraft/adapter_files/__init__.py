"""Adapters in and out of files: ours and PEFT's (one folder), THUDM's prefixes, GGUF-LoRA, several combined.

folder.py       save_adapter, load_adapter: what a path holds, and the seal that says what it was trained on
lora.py         a LoRA between a model and PEFT's options and tensors
peft_config.py  PEFT's options of a LoRA, checked
prefix.py       a prefix between a model and its folder
thudm.py        a prefix as THUDM's scripts write it
gguf_lora.py    a LoRA as llama.cpp takes it
combine.py      one adapter folder out of several
"""
