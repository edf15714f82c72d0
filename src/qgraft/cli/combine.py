"""qgraft combine: make one adapter out of several, from their folders alone."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from qgraft.cli.options import Parser, number_in, print_json, print_note
from qgraft.errors import OptionError
from qgraft.ranges import FINITE, RANK, SEED, SHARE_ABOVE_0


def run(words: Sequence[str]) -> int:
    """Parse, combine, print the report."""
    parser = Parser("combine", "Make one adapter out of several, each with a weight. The base is not needed.")
    parser.add_argument(
        "--adapter",
        action="append",
        required=True,
        metavar="FOLDER=WEIGHT",
        help="adapter folder and its weight, 1 where none is given; once for each adapter",
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where to write the new adapter")
    parser.add_argument(
        "--method",
        default="linear",
        help="linear (default): the exact sum, ranks add up; svd: the sum cut to --rank; ties, dare, magnitude_prune: "
        "pruned before the sum (these need PEFT)",
    )
    largest = "rank of the result, not for linear (default: the inputs' largest)"
    parser.add_argument("--rank", type=number_in(RANK), help=largest)
    kept = "what ties, dare, magnitude_prune keep of each adapter (default 0.5)"
    parser.add_argument("--density", type=number_in(SHARE_ABOVE_0), help=kept)
    parser.add_argument("--seed", type=number_in(SEED), default=0, help="of dare's random choice (default 0)")
    parser.add_argument("--dtype", default="float32", help="of the file: float32 (default), float16, bfloat16")
    parser.add_argument("--force", action="store_true", help="combine although the base differs or is not known")
    parser.add_argument("--overwrite", action="store_true", help="replace the adapter that --output holds")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(words)

    from qgraft.adapter_files.calibration import CALIBRATION
    from qgraft.adapter_files.combine import combine_files
    from qgraft.adapters.combine import METHODS, PRUNING

    if options.density is not None and options.method in METHODS and options.method not in PRUNING:
        raise OptionError(f"--density {options.density:g}: {options.method} prunes nothing",
                          hint=f"leave it out, or take {', '.join(PRUNING)}")  # fmt: skip

    weights = parse_weights(options.adapter)
    report = combine_files(
        weights, options.output, options.method, options.rank, options.density, options.seed,
        options.dtype, options.force, options.overwrite,
    )  # fmt: skip
    without = [str(folder) for folder in weights if not (Path(folder) / CALIBRATION).is_file()]
    if (Path(options.output) / CALIBRATION).is_file():
        print_note(f"note: {CALIBRATION} holds rows of all of their data to be merged with, which can be read: delete it "
                   "before you give the adapter away")  # fmt: skip
    elif len(without) < len(weights):
        print_note(f"note: no {CALIBRATION} is written, since there is none in {', '.join(without)}: to merge what was "
                   "combined, give rows of all tasks (qgraft merge --dataset)")  # fmt: skip
    if options.json:
        print_json(report.as_dict())
        return 0
    print(report)
    print(f"written to {options.output}; try it with: qgraft chat --model BASE --adapter {options.output}")
    return 0


def parse_weights(words: Sequence[str]) -> dict[str | Path, float]:
    """{"law": 0.7, "med": 1.0} from ["law=0.7", "med"]; a path may hold "=" itself, the last one counts."""
    weights: dict[str | Path, float] = {}
    for word in words:
        folder, equals, weight = word.rpartition("=")
        try:
            number = number_in(FINITE)(weight) if equals else 1.0
        except argparse.ArgumentTypeError as error:
            raise OptionError(f"--adapter {word}: expected FOLDER or FOLDER=NUMBER; {error}") from None
        name = folder if equals else word
        if name in weights:
            raise OptionError(f"--adapter {name} is given twice", hint="give it once, with the sum of the weights")
        weights[name] = number
    return weights
