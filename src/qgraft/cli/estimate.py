"""qgraft estimate: what training a model will hold in memory with each setting, and which one a limit leads to."""

import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from qgraft.cli.options import Parser, number_in, print_json, print_note
from qgraft.ranges import COUNT

DESCRIPTION = """Show how much memory training will hold, by its parts, with and without gradient checkpointing.
Every option of `qgraft train` is understood: --r 16, --target_modules q_proj, --optim sgd, --pre_seq_len 128, ...
With --memory_limit 6GB the setting that `qgraft train` would choose comes last."""


def run(words: Sequence[str]) -> int:
    """Parse, load, count, print."""
    parser = Parser("estimate", DESCRIPTION)
    parser.add_argument(
        "--model", required=True, help="GGUF file, Hugging Face folder, hub id, or a known model's name"
    )
    parser.add_argument("--tokens", type=number_in(COUNT), help="most tokens in a pass (default: max_tokens_per_pass)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options, rest = parser.parse_known_args(words)

    from qgraft.checkpoints.load import load, refuse_encoder_decoder
    from qgraft.memory.settings import estimate
    from qgraft.model_parts import require_writer, vision_of
    from qgraft.training.adapter import prepare_adapter
    from qgraft.training.arguments import parse_arguments
    from qgraft.training.new_tokens import take_tokens

    tokens = [] if options.tokens is None else [f"--max_tokens_per_pass={options.tokens}"]
    arguments = parse_arguments([*rest, *tokens])
    refuse_encoder_decoder(options.model, "estimate")
    dtype, device = arguments.compute_dtype, arguments.device
    model, tokenizer = load(options.model, quantize=arguments.quantize, dtype=dtype, device=device)
    require_writer(model, "qgraft estimate")
    if vision_of(model):
        print_note("note: this is of rows of text; what images take on the vision side is not counted")
    if tokenizer is not None:
        take_tokens(model, tokenizer, arguments)
    prepare_adapter(model, arguments)
    found = estimate(model, arguments)
    if options.json:
        print_json([{**asdict(each), "activations": each.activations, "total": each.total} for each in found])
    else:
        _print(found, bool(arguments.memory_limit))
    return 0


def _print(found: Sequence[Any], limited: bool) -> None:
    """One column for each setting; the activations of a layer, and of all."""
    from qgraft.sizes import format_size

    print(f"{'setting':<22}" + "".join(f"{number:>12}" for number in range(1, len(found) + 1)))
    rows: dict[str, list[str]] = {}
    for each in found:
        low, high = min(each.layers), max(each.layers)
        rows.setdefault("tokens in a pass", []).append(str(each.setting.tokens_per_pass))
        rows.setdefault("checkpointing", []).append("yes" if each.setting.checkpointing else "no")
        rows.setdefault("time of a token", []).append(f"x {each.setting.cost:.2f}")
        for name, size in each.parts().items():
            rows.setdefault(name, []).append(format_size(size))
            if name == "activations":
                one = f"{high / 1e6:.1f} MB" if high - low < 1e5 else f"{low / 1e6:.0f}-{high / 1e6:.0f} MB"
                rows.setdefault(f"  each of {len(each.layers)} layers", []).append(one)
        parts = each.parts()
        kept = parts["activations"] + parts["working"]  # freed in pieces, which the C library may keep
        if not limited:
            rows.setdefault("peak memory, at most", []).append(format_size(each.total + kept))
        rows.setdefault("peak memory" if limited else "  with a memory_limit", []).append(format_size(each.total))
    for name, cells in rows.items():
        print(f"{name:<22}" + "".join(f"{cell:>12}" for cell in cells))
    if limited:
        print(textwrap.fill(f"below the limit: {found[-1]}", 80, initial_indent="\n"))
    else:
        print("\nWithout --memory_limit freed memory is kept for speed, with one it goes back.")
