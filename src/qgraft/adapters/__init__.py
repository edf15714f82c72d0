"""WHAT is trained: small modules on a frozen base.

lora.py            one LoRA in one layer, and the layer that carries several
prefix.py          P-Tuning v2: the network that makes one prefix
attach.py          put LoRAs on a model; choose the active adapters of either kind, take them off
attach_prefix.py   put prefixes on a model
selection.py       what is active, shared by all of a model's adapters
rows.py            another adapter for each row of a batch
combine.py         one LoRA out of several
"""
