"""HOW tokens go through a model.

decoder.py           how transformers' models are put together: base model, output layer, several samples in a pass
sample_attention.py  attention over a padding-free batch
loss.py              cross-entropy at the labels, in chunks of logits
fused.py             norms, gated products and rotations without intermediate copies, while training
frozen_cache.py      what the layers below the lowest adapter compute, kept on disk
decoding.py          one token of one sequence in one C call, within transformers' generate()
decoding_network.py  what that call needs of a model
limits.py            how long a text may be
"""
