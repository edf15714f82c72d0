"""The layouts of folders: one file each, and one line in this table.

A folder may hold several of them: the embedding and the output layer of a quantized checkpoint are plain numbers. For each
matrix the first layout of the table that holds it counts. To add one:

    1. Give its matrices a format (formats/), if they have none yet.
    2. Write its file: which tensors make up `X.weight`, and the functions that `Layout` names (layout.py).
    3. Add it to `LAYOUTS`, before those that would hold its matrices, too.

GGUF is no layout but a container of its own: one file whose header names formats, which `gguf_file.py` reads and
`gguf_write.py` writes.
"""

from collections.abc import Collection, Mapping
from functools import reduce
from typing import Any, Final

from qgraft.checkpoints.layouts import chatglm, floats, mxfp4
from qgraft.checkpoints.layouts.layout import WEIGHT, Layout, StoredMatrix, tensor_name

__all__ = [
    "LAYOUTS",
    "Layout",
    "StoredMatrix",
    "configured",
    "find_layout",
    "is_claimed",
    "layout_for",
    "owners",
    "tensor_name",
    "tensor_names",
]

LAYOUTS: Final[list[Layout]] = [chatglm.LAYOUT, mxfp4.LAYOUT, floats.LAYOUT]


def is_claimed(config: Mapping[str, Any]) -> bool:
    """Whether a layout reads the folder that this config.json is of."""
    return any(layout.claims(config) for layout in LAYOUTS)


def find_layout(matrix: StoredMatrix) -> Layout:
    """The layout that this matrix is kept in."""
    return next(layout for layout in LAYOUTS if layout.holds(matrix))


def layout_for(format: str) -> Layout:
    """The layout that a matrix of this format is written in; ValueError where folders have no place for it."""
    for layout in LAYOUTS:
        if format in layout.formats:
            return layout
    raise ValueError(f"{format}: no layout of folders stores it")


def tensor_names(layout: Layout, weight: str) -> tuple[str, ...]:
    """What the tensors of the matrix `X.weight` are called in this layout, the one that is always there first."""
    return tuple(tensor_name(weight, suffix) for suffix in layout.suffixes)


def owners(names: Collection[str]) -> dict[str, str]:
    """{tensor: the matrix `X.weight`, or X of all experts, that it is part of in one of the layouts}, for those of `names`
    that are."""
    found: dict[str, str] = {}
    known = set(names)
    for layout in LAYOUTS:
        for suffix in layout.suffixes:
            for name in names:
                stem = name.removesuffix(suffix)
                if stem != name and stem + layout.suffixes[0] in known:
                    found.setdefault(name, stem if layout.experts else stem + WEIGHT)
    return found


def configured(config: Mapping[str, Any], formats: Collection[str]) -> Mapping[str, Any]:
    """config.json for a folder whose matrices have these formats, by every layout; the same where nothing changes."""
    return reduce(lambda changed, layout: layout.configure(changed, tuple(formats)), LAYOUTS, config)
