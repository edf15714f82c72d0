"""Regular expressions: those that people use match as Python's do, those without end are refused or ended."""

import re

import pytest

from qgraft.errors import UnsupportedError
from qgraft.patterns import first_group, is_pattern, matches

PATHS = [
    f"model.{tower}layers.{number}.{layer}"
    for tower in ("", "vision.")
    for number in (0, 1, 12)
    for layer in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj", "mlp.gate_up_proj")
]
USED = [  # in adapters on the hub
    r"^(?!.*vision).*(?:q_proj|v_proj)$",
    r"model\.layers\.(0|1|2)\.self_attn\.q_proj",
    r".*\.(q|v)_proj",
    r"[\w.]+_proj",
    r"(.*\.)?(q_proj)",
    r"model\.layers\.\d+\.(mlp|self_attn)\.[a-z_]+",
    r".*language_model.*\.(up_proj|down_proj).*$",
    r".*layers\.1[0-9]\.(a{2,3}(b{1,2})*|mlp\.\w*)",
    r"[^(*]+\.(?P<which>q|down)_proj",
]


@pytest.mark.parametrize("pattern", USED)
def test_as_python_matches(pattern: str) -> None:
    assert [matches(pattern, path) for path in PATHS] == [re.fullmatch(pattern, path) is not None for path in PATHS]


@pytest.mark.parametrize(
    "pattern",
    ["(([a-z_.0-9]+)+)+!", "(a+)*", "(a*)*b", "((a+))+", "(?:a{2,})+", "(x+x+)+y", "(a|b+)*", "([)]+)+", "(\\)+)+",
     "(" * 5000 + ")" * 5000, "(", "[", 5, None, ["a"], "a" * (1 << 21)],
)  # fmt: skip
def test_refused(pattern: object) -> None:
    assert not is_pattern(pattern)


def test_what_takes_too_long_is_ended() -> None:
    with pytest.raises(UnsupportedError, match=r"(?s)was not through with 'aaa.*hint: write it without"):
        matches("(a|aa)+$x", "a" * 200)


def test_first_group() -> None:
    assert first_group(r"(?:^|.*?\.)layers\.(\d+)\.", "model.layers.12.mlp") == "12"
    assert first_group(r"(?:^|.*?\.)h\.(\d+)\.", "model.layers.12.mlp") is None
    assert first_group("(x)?y", "y") is None
