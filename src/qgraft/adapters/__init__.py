"""WHAT is trained: small modules on a frozen base.

lora.py     one LoRA in one layer, and the layer that carries several
attach.py   put them on a model, choose the active ones, take them off
"""
