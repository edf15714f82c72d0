"""Learning from sequence to sequence: T5, BART and their kind, on the loop that all runs have.

    sample   a pair of source and target (data/pairs.py)
    label    a token of the target; its weight is its pair's
    pass     pairs of similar lengths, padded (passes/pairs.py, padded.py)

Which kind of model it is decides, not an option: `stage: sft` on an encoder-decoder learns so. What has no meaning there is
refused by `check_pair_run`, all at once, and on the command line before the weights are read.
"""

from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from qgraft.data.pairs import PairOptions, PairSample, build_pairs, check_pair_options
from qgraft.data.reading import Accounting, Dataset, named_columns, read_dataset
from qgraft.passes.pairs import padded_together, pair_losses, split_pairs
from qgraft.training.option_names import PACKED
from qgraft.training.padded import Kind

if TYPE_CHECKING:
    from qgraft.training.arguments import TrainArguments


PAIRS = Kind[PairSample](
    split=split_pairs,
    losses=pair_losses,
    together=padded_together,
    labels=lambda sample: len(sample.labels),
    weight=lambda sample: len(sample.labels) * sample.weight,
)


def read_pairs(
    tokenizer: PreTrainedTokenizerBase, dataset: Dataset, args: "TrainArguments", limit: int, *, held_out: bool
) -> tuple[list[PairSample], Accounting]:
    """The pairs of one dataset, with sources and targets of at most `limit` tokens, as the options of a run ask for them."""
    most = args.max_eval_samples if held_out else args.max_train_samples
    longest = args.val_max_target_length if held_out else None
    conversations, accounting = read_dataset(
        dataset, args.dataset_dir, name=args.name, author=args.author, columns=named_columns(vars(args)),
        max_samples=most or args.max_samples, allow_outside_files=args.allow_outside_files,
    )  # fmt: skip
    return build_pairs(tokenizer, conversations, accounting, pair_options(args, limit, longest)), accounting


def pair_options(args: "TrainArguments", limit: int, longest: int | None = None) -> PairOptions:
    """How a run writes pairs, both sides of at most `limit` tokens; `longest` goes before args.max_target_length."""
    source, target = args.max_source_length or limit, longest or args.max_target_length or limit
    return PairOptions(args.source_prefix, min(source, limit), min(target, limit))


def check_pair_run(args: "TrainArguments") -> None:
    """Raise OptionError for options of a run that have no meaning for an encoder-decoder, at once."""
    packed = any(PACKED in note for note in args.notes)
    check_pair_options(vars(args), *(["packing: samples pass padded, side by side"] if packed else []))
