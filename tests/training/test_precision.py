"""Which arithmetic a run computes in."""

import pytest

from qgraft.errors import OptionError, UnsupportedError
from qgraft.training import precision
from qgraft.training.arguments import TrainArguments


@pytest.fixture(params=[True, False], ids=["fast", "slow"])
def fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(precision, "has_fast_bf16", lambda: request.param)
    return request.param


def arguments(**options: object) -> TrainArguments:
    return TrainArguments(output_dir="out", use_cpu=True, **options)


def test_auto_takes_what_the_cpu_multiplies_in_hardware(fast: bool) -> None:
    args = arguments()
    assert args.compute == ("bf16" if fast else "float32")
    assert args.compute_dtype == "auto" and not args.notes
    assert arguments(compute="float32").compute == "float32"


def test_bf16_of_a_configuration_for_gpus_is_taken_or_noted(fast: bool) -> None:
    args = arguments(bf16=True)
    assert args.compute == ("bf16" if fast else "float32") and not args.bf16
    assert [note.partition(":")[0] for note in args.notes] == ([] if fast else ["bf16"])


@pytest.mark.parametrize("compute", ["float32", "int8"])
def test_bf16_beside_another_arithmetic_is_noted(fast: bool, compute: str) -> None:
    args = arguments(bf16=True, compute=compute)
    assert args.compute == compute and args.notes == [
        f"bf16 has no effect: compute={compute} says what a CPU computes in"
    ]


def test_bf16_asked_for_by_name_needs_the_hardware(fast: bool) -> None:
    if fast:
        assert arguments(compute="bf16").compute == "bf16"
    else:
        with pytest.raises(UnsupportedError, match="no bfloat16 arithmetic"):
            arguments(compute="bf16")


def test_an_unknown_compute_names_the_nearest() -> None:
    with pytest.raises(OptionError, match="expected one of auto, float32, bf16, int8") as caught:
        arguments(compute="bfloat16")
    assert "bf16" in str(caught.value)
