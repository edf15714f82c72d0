"""Which kinds of training there are, what each takes of the options, and what does not go together.

`stage` is LLaMA-Factory's word, the options are TRL's. A stage stands for a loss; `dpo` has several, by `loss_type`.
"""

from typing import TYPE_CHECKING

from qgraft.errors import OptionError, option
from qgraft.training.preference_losses import LABELLED, PAIRED, PreferenceOptions

if TYPE_CHECKING:
    from qgraft.training.arguments import TrainArguments

STAGES = {  # stage -> its losses, the first of which is taken where nothing is said
    "sft": (),
    "dpo": ("sigmoid", *(name for name in PAIRED if name != "sigmoid")),
    "ipo": ("ipo",),
    "orpo": ("orpo",),
    "simpo": ("simpo",),
    "kto": LABELLED,
}
_READ_BY = {  # option -> the losses that read it
    "label_smoothing": {"sigmoid", "robust", "exo_pair", "simpo"},
    "simpo_gamma": {"simpo"},
    "desirable_weight": {*LABELLED},
    "undesirable_weight": {*LABELLED},
    "rpo_alpha": {*PAIRED} - {"orpo"},
}
OPTIONS = ("loss_type", "beta", *_READ_BY)


def preference_options(args: "TrainArguments") -> PreferenceOptions | None:
    """What a run learns preferences by; None for supervised fine-tuning."""
    return preferring(args.stage, {name: getattr(args, name) for name in OPTIONS}, train_on_prompt=args.train_on_prompt)


def preferring(
    stage: str, said: "dict[str, float | str | None]", *, train_on_prompt: bool = False
) -> PreferenceOptions | None:
    """The same of a stage and the values of OPTIONS, None for what is not said.

    Raises OptionError for all that has no meaning with the stage, at once.
    """
    if stage not in STAGES:
        raise OptionError(f"stage={stage!r}: expected {', '.join(STAGES)}")
    given = {name: value for name, value in said.items() if value is not None}
    if stage == "sft":
        if given:
            raise OptionError(f"{', '.join(given)}: stage sft learns no preferences", hint=option("stage", "dpo"))
        return None
    loss = str(given.pop("loss_type", STAGES[stage][0]))
    if loss not in STAGES[stage]:
        raise OptionError(f"loss_type={loss!r}: stage {stage} has {', '.join(STAGES[stage])}")
    problems = [f"{name}: loss_type {loss} does not read it, {', '.join(sorted(_READ_BY[name]))} do"
                for name in given if loss not in _READ_BY.get(name, {loss})]  # fmt: skip
    options = PreferenceOptions(loss, **{name: float(value) for name, value in given.items()},
                                train_on_prompt=train_on_prompt)  # fmt: skip
    smoothing = options.label_smoothing
    if smoothing >= 0.5:
        problems.append(
            f"label_smoothing={smoothing}: expected the share of rows that are the wrong way round, below 0.5; from there on "
            "nothing is preferred, or the rejected answers are"
        )
    if loss == "exo_pair" and not smoothing:
        problems.append(
            "loss_type exo_pair needs label_smoothing above 0, such as 0.001: it is the logarithm of it that counts"
        )
    if train_on_prompt and loss != "orpo":
        problems.append(
            f"train_on_prompt: loss_type {loss} compares answers; orpo learns the prompt with the chosen one"
        )
    if problems:
        raise OptionError("; ".join(problems))
    return options


def settle_stage(args: "TrainArguments") -> None:
    """Raise OptionError for options that do not go with the stage, at once. CUDA graphs are for supervised fine-tuning."""
    if preference_options(args) is None:
        return
    wrong = {
        "label_smoothing_factor: it smooths the loss of tokens; take label_smoothing": args.label_smoothing_factor,
        "fp16: the reference is computed without its scaled loss; take bf16": args.fp16,
        "cache_frozen_layers: it keeps what enters the adapter of single texts": args.cache_frozen_layers,
        "cuda_graphs=yes: passes of pairs are not recorded": args.cuda_graphs == "yes",
        "predict_with_generate: rows of preferences have no one answer to compare with": args.predict_with_generate,
        "ignore_pad_token_for_loss=false: padding is no answer": not args.ignore_pad_token_for_loss,
    }
    if problems := [problem for problem, holds in wrong.items() if holds]:
        raise OptionError(f"stage {args.stage}: " + "; ".join(problems))
    args.cuda_graphs = "no"
