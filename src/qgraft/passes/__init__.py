"""HOW tokens go through a model.

decoder.py           the states and logits of a padding-free batch, in the fastest way that the model keeps to
loss.py              cross-entropy at the labels, in chunks of logits
known_layers.py      which layers of transformers compute which formula
fused.py             norms, gated products and rotations without intermediate copies, while training
frozen_cache.py      what the layers below the lowest adapter compute, kept on disk
graphed.py           passes of training that are replayed as CUDA graphs;  static_pass.py: one on tables of a fixed size
decoding.py          one token of one sequence in one call of kernels, within transformers' generate()
decoding_families.py  which models it computes;  decoding_network.py: what it needs of one
limits.py            how long a text may be
"""
