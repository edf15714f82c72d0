"""Which kernel serves which op: QGRAFT_KERNELS, devices, formats, a library that is not there."""

from collections.abc import Callable

import pytest
import torch

from qgraft.errors import OptionError, UnsupportedError
from qgraft.formats import FORMATS, quantize
from qgraft.kernels import (
    Choice,
    choose,
    linear,
    linear_grad_input,
    linear_grad_input_int8,
    linear_int8,
    native_status,
    reference,
    triton_ops,
)
from qgraft.kernels.cpu import library
from qgraft.kernels.cpu import packed as native
from qgraft.kernels.cpu.abi import FORMAT_IDS, INT8_FORMATS
from qgraft.kernels.table import ROWS

UseKernels = Callable[[str | None], None]

needs_native = pytest.mark.skipif(not native_status()[0], reason=f"native kernels are {native_status()[1]}")


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no C compiler had been there when qgraft was installed."""
    monkeypatch.setattr(library, "load", lambda: None)


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("op", ROWS)
def test_every_op_format_and_device_has_a_kernel_and_a_reason(op: str, device: str, use_kernels: UseKernels) -> None:
    use_kernels(None)
    for format in FORMATS if ROWS[op].by_format else [None]:
        choice = choose(op, format, device)
        assert (choice.op, choice.format, choice.device) == (op, format, device)
        assert choice.kernel in ("native", "triton", "torch", "reference")
        assert choice.why.strip()


@needs_native
@pytest.mark.parametrize("value", [None, "auto", "native"])
def test_native_serves_its_formats_on_the_cpu(value: str | None, use_kernels: UseKernels) -> None:
    use_kernels(value)
    for format in FORMAT_IDS:
        choice = choose("linear", format, "cpu")
        assert choice.kernel == "native"
        assert choice.why.startswith("built, runs as ")


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_formats_without_8_bit_products_are_computed_in_float32_and_say_so(
    kernels: str, use_kernels: UseKernels
) -> None:
    use_kernels(kernels)
    for format, layout in FORMATS.items():
        if layout.quantize is None:
            continue
        packed, x, g = quantize(torch.randn(5, 256), format), torch.randn(20, 256), torch.randn(20, 5)
        for op, rounded, exact, given in (
            ("linear_int8", linear_int8, linear, x),
            ("linear_grad_input_int8", linear_grad_input_int8, linear_grad_input, g),
        ):
            choice = choose(op, format, "cpu")
            assert choice.compute in ("int8", "float32")
            assert (choice.compute == "int8") == (format in INT8_FORMATS) or "grad" in op
            assert choice.kernel == choose("linear", format, "cpu").kernel
            assert torch.equal(rounded(given, packed), exact(given, packed)) == (choice.compute == "float32"), (
                op,
                format,
            )


def test_native_knows_only_formats_that_exist() -> None:
    assert set(FORMAT_IDS) <= set(FORMATS)
    assert sorted(FORMAT_IDS.values()) == list(range(len(FORMAT_IDS)))


def test_reference_can_be_forced(use_kernels: UseKernels) -> None:
    use_kernels("reference")
    expected = Choice("linear", "q4_1", "cpu", "reference", "QGRAFT_KERNELS=reference")
    assert choose("linear", "q4_1", "cpu") == expected


def test_forced_reference_is_what_runs(use_kernels: UseKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice is not only shown: the other kernel is never called."""
    ran: list[str] = []
    for module, name in ((native, "native"), (reference, "reference")):
        real = module.linear
        monkeypatch.setattr(module, "linear", lambda x, p, name=name, real=real: ran.append(name) or real(x, p))
    packed = quantize(torch.randn(3, 32), "q4_1")
    use_kernels("reference")
    linear(torch.randn(2, 32), packed)
    assert ran == ["reference"]
    use_kernels("auto")
    linear(torch.randn(2, 32), packed)
    assert ran == ["reference", choose("linear", "q4_1", "cpu").kernel]


def test_typo_in_the_variable_is_an_error_with_a_hint(use_kernels: UseKernels) -> None:
    use_kernels("nativ")
    with pytest.raises(OptionError) as caught:
        choose("linear", "q4_1", "cpu")
    assert caught.value.message == "QGRAFT_KERNELS='nativ': expected auto, native, triton or reference"
    assert caught.value.hint == "did you mean native?"


def test_typo_in_the_variable_stops_the_op_itself(use_kernels: UseKernels) -> None:
    packed = quantize(torch.randn(3, 32), "q4_1")
    use_kernels("fast")
    with pytest.raises(OptionError, match="QGRAFT_KERNELS='fast'"):
        linear(torch.randn(2, 32), packed)


@pytest.fixture
def gpu_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """As if there were a GPU, for which triton compiles or does not."""

    def make(available: bool) -> None:
        monkeypatch.setattr(triton_ops, "triton_status", lambda: (available, "said so"))

    return make


def test_cuda_is_served_by_triton_where_it_is_there_and_by_plain_torch_elsewhere(
    use_kernels: UseKernels, gpu_with: Callable[[bool], None]
) -> None:
    for available, kernel in ((True, "triton"), (False, "reference")):
        gpu_with(available)
        use_kernels(None)
        for format in triton_ops.FORMATS:
            choice = choose("linear", format, "cuda")
            assert (choice.kernel, choice.why) == (kernel, "said so")
        for format in FORMATS.keys() - triton_ops.FORMATS:
            choice = choose("linear", format, "cuda")
            assert (choice.kernel, choice.why) == ("reference", "plain torch; no triton kernel for this format yet")


def test_native_leaves_a_gpu_to_plain_torch(use_kernels: UseKernels, gpu_with: Callable[[bool], None]) -> None:
    gpu_with(True)
    use_kernels("native")
    choice = choose("linear", "q4_1", "cuda")
    assert choice.kernel == "reference"
    assert "device" in choice.why


def test_triton_that_is_asked_for_and_missing_is_an_error(
    use_kernels: UseKernels, gpu_with: Callable[[bool], None]
) -> None:
    gpu_with(False)
    use_kernels("triton")
    with pytest.raises(UnsupportedError) as caught:
        choose("linear", "q4_1", "cuda")
    expected = "QGRAFT_KERNELS=triton, but there is no triton kernel for linear of q4_1 weights: said so"
    assert caught.value.message == expected
    assert caught.value.hint is not None and "compiler" in caught.value.hint
    assert choose("linear", "q4_1", "cpu").kernel in ("native", "reference"), "the CPU has nothing to do with it"


@pytest.mark.parametrize("missing", ["gcc", "Python.h"])
def test_triton_without_what_its_launchers_are_built_with_is_not_chosen(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would fail at the first launch, hours into nothing."""
    monkeypatch.setattr(triton_ops, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    if missing == "gcc":
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setattr(triton_ops.shutil, "which", lambda name: None)
    else:
        monkeypatch.setenv("CC", "gcc")
        monkeypatch.setattr(triton_ops.sysconfig, "get_paths", lambda: {"include": "/nowhere"})
    available, why = triton_ops.triton_status.__wrapped__()
    assert not available and ("C compiler" if missing == "gcc" else "Python's headers") in why


@pytest.mark.parametrize("format", sorted(set(FORMATS) - set(FORMAT_IDS)))
def test_format_without_a_native_loop_is_served_by_plain_torch(format: str, use_kernels: UseKernels) -> None:
    use_kernels("auto")
    choice = choose("dequantize", format, "cpu")
    assert choice.kernel == "reference"
    assert "format" in choice.why


@pytest.mark.usefixtures("no_library")
def test_missing_library_falls_back_under_auto_and_says_so(use_kernels: UseKernels) -> None:
    use_kernels("auto")
    choice = choose("linear", "q4_1", "cpu")
    assert choice.kernel == "reference"
    assert "not built" in choice.why
    packed = quantize(torch.randn(3, 32), "q4_1")
    assert linear(torch.randn(2, 32), packed).shape == (2, 3)


@pytest.mark.usefixtures("no_library")
def test_missing_library_is_an_error_when_native_is_asked_for(use_kernels: UseKernels) -> None:
    use_kernels("native")
    with pytest.raises(UnsupportedError) as caught:
        choose("linear", "q4_1", "cpu")
    assert "native kernel for linear of q4_1 weights: not built" in caught.value.message
    assert caught.value.hint is not None
    assert "gcc" in caught.value.hint


@needs_native
def test_choice_is_made_once(use_kernels: UseKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that changes while the process runs does not switch kernels half way."""
    use_kernels("auto")
    before = choose("linear", "q4_1", "cpu")
    monkeypatch.setenv("QGRAFT_KERNELS", "reference")
    assert choose("linear", "q4_1", "cpu") is before
