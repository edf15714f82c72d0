"""Formats that are read by a table, on a GPU that is pretended: the table is put there once."""

import pytest
import torch
from pretended_gpu import OnGpu, pretended_gpu
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from qgraft.formats import FORMATS, PackedTensor, dequantize
from qgraft.formats.device_tables import on_device

BY_TABLE = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_nl", "iq4_xs", "mxfp4", "nvfp4")


def any_bytes(format: str) -> PackedTensor:
    data = torch.randint(0, 120, FORMATS[format].parts[0].shape(3, 256), dtype=torch.uint8)  # no NaN
    return PackedTensor(format, (3, 256), (data,))


def on_gpu(packed: PackedTensor) -> PackedTensor:
    return PackedTensor(packed.format, packed.shape, tuple(part.to("cuda") for part in packed.parts))


@pytest.mark.parametrize("format", BY_TABLE)
def test_a_second_call_uploads_nothing_and_can_be_recorded(format: str) -> None:
    packed, other = any_bytes(format), any_bytes(format)
    expected, then = dequantize(packed, torch.float32), dequantize(other, torch.float32)
    with pretended_gpu() as gpu:
        there = on_gpu(packed)
        gpu.waits.clear()
        assert torch.equal(dequantize(there, torch.float32).cpu(), expected)
        first, _ = gpu.waits
        assert first[0] == "copy from the CPU" and "device_tables.py" in first[1]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # a wait in it raises RuntimeError
            out = dequantize(there, torch.float32)
        there.parts[0].copy_(other.parts[0])
        graph.replay()
        assert torch.equal(out.cpu(), then)
    with pretended_gpu() as gpu:  # another GPU, to which nothing of the first is known
        there = on_gpu(packed)
        gpu.waits.clear()
        dequantize(there, torch.float32)
        assert len(gpu.waits) == 1


def test_a_graph_that_would_have_to_upload_a_table_is_refused() -> None:
    with pretended_gpu():
        there, graph = on_gpu(any_bytes("iq3_s")), torch.cuda.CUDAGraph()
        with (
            pytest.raises(RuntimeError, match="table iq3_s is not on cuda:0 yet"),
            torch.cuda.graph(graph, capture_error_mode="thread_local"),
        ):
            dequantize(there, torch.float32)
        assert dequantize(there, torch.float32).isfinite().all()


def test_fake_tables_are_not_kept_and_kept_ones_are_ordinary_tensors() -> None:
    def table() -> torch.Tensor:
        return torch.tensor((1.0, 2.0))

    with pretended_gpu():
        gpu = torch.device("cuda", 0)
        with torch.inference_mode():
            assert not on_device("t", table, gpu).is_inference()
    for _ in range(2):
        with FakeTensorMode():
            fake = on_device("t", table, torch.device("meta"))
            assert isinstance(fake, FakeTensor)
            assert fake + torch.ones(2, device="meta") is not None  # one of this mode
    with pretended_gpu():
        assert isinstance(on_device("t", table, gpu), OnGpu)
