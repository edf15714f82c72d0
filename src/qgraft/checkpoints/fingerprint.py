"""The fingerprint of a base model: which tensors it has, how they are stored, and a sample of their bytes.

An adapter is sealed with the fingerprint of the base it was trained on, so that another base is noticed when the
adapter is loaded. Hashing every byte would take seconds at each start of a large model; sampling reads 7 KiB of each
tensor, about 2000 places in a 4 GB file: hundredths of a second from the page cache; from a disk, the time to read
2000 times its readahead (usually 128 KiB), bytes that loading the model needs next anyway.

    fingerprint = "qg1:" + first 32 hex digits of sha256( digests of all tensors, sorted by name )
    digest      = sha256( JSON [name, shape, format, nbytes], newline, sampled bytes )
    sample      = all bytes up to 4 KiB; else the first, middle and last 1 KiB and 4 windows of 1 KiB between

It notices: another architecture, size or format, renamed or missing tensors, another training stage of the same model
(fine-tuning moves nearly all weights), an adapter merged into the base (every block gets a new scale), a change of any
byte in a tensor of up to 4 KiB. It does not notice: single changed bytes outside the samples, other metadata, another
tokenizer, and it is no defence against somebody who wants two bases to look alike: SHA-256 of the whole file is.

Not chosen: the file's name, path, date or metadata (copies are the same base). Tensors go by the names that their
container gives them. "qg1" names this recipe; another recipe gets another prefix, never the same one.
"""

import hashlib
import json
from collections.abc import Iterable

import torch
from torch import Tensor

PREFIX = "qg1:"
HEX_DIGITS = 32  # 128 bits: among 2^32 bases two agree by chance with probability 2^-65, and it fits on a line
WHOLE_BYTES = 4096
EDGE_BYTES = 1024
WINDOWS = 4  # few and long: from a cold disk each place costs a read, however short
WINDOW_BYTES = 1024


def fingerprint(entries: Iterable[tuple[str, tuple[int, ...], str, Tensor]]) -> str:
    """The fingerprint of the tensors `entries`, in whatever order they come, each read once and then let go.

    Args:
        entries: (name, shape of the weight, format, stored tensor of any dtype, shape and device). Tensors that are
            contiguous are not copied, so mapped files are read at the sampled places only.

    Returns:
        "qg1:" and 32 hex digits.
    """
    digests = sorted((name, _digest(name, shape, fmt, tensor)) for name, shape, fmt, tensor in entries)
    total = hashlib.sha256(b"".join(digest for _, digest in digests))
    return PREFIX + total.hexdigest()[:HEX_DIGITS]


def _digest(name: str, shape: tuple[int, ...], fmt: str, tensor: Tensor) -> bytes:
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)  # [nbytes] uint8
    about = json.dumps([name, list(shape), fmt, raw.numel()])  # JSON: no two entries spell alike
    digest = hashlib.sha256(about.encode() + b"\n")
    for start, stop in sampled_ranges(raw.numel()):
        digest.update(raw[start:stop].cpu().numpy().tobytes())
    return digest.digest()


def sampled_ranges(nbytes: int) -> list[tuple[int, int]]:
    """The (start, stop) byte ranges that the fingerprint reads of a tensor of `nbytes`; they may overlap."""
    if nbytes <= WHOLE_BYTES:
        return [(0, nbytes)]
    middle, last = (nbytes - EDGE_BYTES) // 2, nbytes - EDGE_BYTES
    windows = [(nbytes - WINDOW_BYTES) * step // (WINDOWS + 1) for step in range(1, WINDOWS + 1)]
    edges = [(start, start + EDGE_BYTES) for start in (0, middle, last)]
    return edges + [(start, start + WINDOW_BYTES) for start in windows]
