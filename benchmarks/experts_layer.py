"""The experts of one layer of Qwen3-30B-A3B, with random weights: CPU time of a pass, forward and backward.

    python benchmarks/experts_layer.py            # 128 tokens, 8 of 128 experts each; Q4_K and Q6_K; one thread
    python benchmarks/experts_layer.py --tokens 1 --experts 32

`loras`: with LoRAs of rank 4 on all experts. The times are CPU time of the process, the fastest of some passes.
"""

import argparse
import sys
import time
from collections.abc import Sequence

import torch

from qgraft.experts import QuantizedExperts, Segment, Stack, route
from qgraft.formats import quantize


def main() -> None:
    """Print the milliseconds of each kind of pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=768)
    parser.add_argument("--passes", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    count, hidden, inner = options.experts, options.hidden, options.inner
    gate_up = QuantizedExperts({name: stack(count, inner, hidden, "q4_k") for name in ("gate", "up")})
    down = QuantizedExperts({"down": stack(count, hidden, inner, "q6_k")})
    x = torch.randn(options.tokens, hidden)
    weights = [factors(layer) for layer in (gate_up, down)]
    chosen = torch.stack([torch.randperm(count)[:8] for _ in range(options.tokens)])
    for name, backward, loras in (
        ("forward", False, False), ("both", True, False), ("forward, loras", False, True), ("both, loras", True, True),
    ):  # fmt: skip
        seconds = []
        for _ in range(options.passes):
            began = time.process_time()
            run((gate_up, down), weights if loras else ([], []), x, chosen, backward)
            seconds.append(time.process_time() - began)
        print(f"{name}: {min(seconds) * 1000:.1f} ms")


def stack(experts: int, out: int, width: int, format: str) -> Stack:
    """Random weights; the same for each expert, which takes no longer to make and as long to multiply."""
    one = quantize(torch.randn(out, width) * 0.02, format)
    return Stack(
        experts, type(one)(format, (experts * out, width), tuple(part.repeat(experts, 1) for part in one.parts))
    )


def factors(layer: QuantizedExperts) -> list[torch.Tensor]:
    """A and B of rank 4 of all experts."""
    shapes = ((4, layer.in_features), (layer.out_features, 4))
    return [torch.randn(layer.num_experts, *shape) for shape in shapes]


def run(
    layers: Sequence[QuantizedExperts],
    weights: Sequence[Sequence[torch.Tensor]],
    x: torch.Tensor,
    chosen: torch.Tensor,
    backward: bool,
) -> None:
    """One pass."""
    x = x.clone().requires_grad_(backward)
    leaves = [[each.detach().requires_grad_(backward) for each in some] for some in weights]
    routed, _ = route(x, chosen, layers[0].num_experts)
    segments = [[Segment(0, len(x), 1.0)] if some else [] for some in weights]
    with torch.set_grad_enabled(backward):
        gate, up = layers[0].with_loras(routed, segments[0], leaves[0]).chunk(2, -1)
        inner = routed._replace(x=torch.nn.functional.silu(gate) * up)
        out = layers[1].with_loras(inner, segments[1], leaves[1])
    if backward:
        out.sum().backward()


if __name__ == "__main__":
    sys.exit(main())
