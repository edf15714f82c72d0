"""WHAT is trained: small modules on a frozen base.

adapter.py         an attached adapter: one value, and what its parts are asked
lora.py            one LoRA in one layer, and the layer that carries several
lora_embedding.py  the same for an embedding
prefix.py          P-Tuning v2: the network that makes one prefix
holder.py          the modules of a model that carry parts of adapters
selection.py       a model's adapters, and what is active in a call
base.py            model.qgraft, which has the selection; questions about a model's adapters
attach.py          put LoRAs on a model, take adapters off
attach_prefix.py   put prefixes on a model
choose.py          choose the active adapters
states.py          a LoRA's weights as a dict of tensors
batch_rows.py      another adapter for each row of a batch
targets.py, layer_choice.py  which layers
combine.py         one LoRA out of several
fit_prefix.py      whether a stored prefix fits a model
recompute.py       inputs of layers that need not be saved
peft_names.py      what PEFT calls a LoRA's tensors
for_peft.py        let PEFT put its own LoRAs on packed layers
peft_layers.py     PEFT's layers around ours
"""
