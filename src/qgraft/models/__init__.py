"""Architectures that transformers does not have, with their tokenizers.

chatglm.py    ChatGLM-6B: prefix-LM attention, two positions a token, scaled residuals
chatglm2.py   ChatGLM2-6B and what shares its layout (ChatGLM3-6B): causal, grouped queries
find.py       which of them a config.json describes
"""
