"""Whether a model is the base that an adapter was trained on, as its seal says (seal.py)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from qgraft.adapters.base import base_of
from qgraft.errors import option, worded
from qgraft.formats import FORMATS
from qgraft.formats.blocks import FLOATS


def base_problems(model: nn.Module, seal: Mapping[str, Any] | None) -> list[str]:
    """What tells the base that the seal names from this model, in a line; nothing where one of them is not known."""
    base = base_of(model).info
    trained = (seal or {}).get("base") or {}
    if base is None or not trained or trained.get("fingerprint") == base.fingerprint:
        return []
    packings = [_packing(trained.get("formats")), _packing(base.formats)]
    one, other = (f" in {found}" if None not in packings and len(set(packings)) > 1 else "" for found in packings)
    return [
        f"trained on another base: {trained.get('fingerprint')} ({trained.get('source')}{one}), "
        f"this one is {base.fingerprint} ({base.source}{other})"
    ]


def base_hint(model: nn.Module, seal: Mapping[str, Any] | None) -> str | None:
    """How the same folder is loaded as it was in training, where only the format of its weights tells the two apart.

    Force would be bad advice there: the adapter belongs to the numbers that it was trained on.
    """
    base, trained = base_of(model).info, (seal or {}).get("base") or {}
    if base is None or base.container != "folder" or Path(str(trained.get("source"))).name != Path(base.source).name:
        return None
    wanted, got = _packing(trained.get("formats")), _packing(base.formats)
    if wanted == got or wanted not in FORMATS or got not in FORMATS:
        return None
    if got in FLOATS.values() and FORMATS[wanted].quantize is not None and wanted not in FLOATS.values():
        return f"it was trained on the weights packed in {wanted}: give {option('quantize', wanted)}"
    if wanted in FLOATS.values():
        return f"it was trained on the weights in {wanted}: leave {worded(flags='--quantize', python='quantize')} out"
    return None


def _packing(formats: object) -> str | None:
    """The packed format that most weights are in, or the format of all where none is packed; None where nothing is said."""
    counts = formats if isinstance(formats, dict) else {}
    known = {str(name): count for name, count in counts.items() if isinstance(count, int)}
    packed = {name: count for name, count in known.items() if name not in FLOATS.values()} or known
    return max(packed, key=lambda name: packed[name]) if packed else None
