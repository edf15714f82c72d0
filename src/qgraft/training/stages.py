"""Which kinds of training there are, what each takes of the options, and what does not go together.

`stage` is LLaMA-Factory's word, the options are TRL's, but for kd_ratio (torchtune's) and kd_temperature (axolotl's): alpha
stands for the share of the one loss here and of the other there, and `temperature` is that of drawn answers already.
A stage stands for a loss; `dpo` has several, by `loss_type`, and `distill` by `beta`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qgraft.errors import OptionError, near_match, option
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
    "distill": (),
}
_READ_BY = {  # option -> the losses that read it
    "label_smoothing": {"sigmoid", "robust", "exo_pair", "simpo"},
    "simpo_gamma": {"simpo"},
    "desirable_weight": {*LABELLED},
    "undesirable_weight": {*LABELLED},
    "rpo_alpha": {*PAIRED} - {"orpo"},
}
OPTIONS = ("loss_type", "beta", *_READ_BY)
OF_DISTILLING = (
    "teacher_model_name_or_path", "teacher_adapter_name_or_path", "teacher_cache", "loss_top_k", "kd_ratio", "kd_temperature",
    "lmbda", "seq_kd",
)  # fmt: skip


@dataclass(frozen=True)
class DistillOptions:
    """What a student learns of its teacher, see passes/divergence.py.

    Attributes:
        beta: of the divergence; 0 forward KL, 1 reverse KL.
        share: of the divergence; the rest is that of the labels' own loss.
        top_k: how many tokens the teacher names at a place.
        lmbda: share of the batches whose answers the student draws; of the others the teacher does with `seq_kd`.
        drawn_at: the temperature of these draws.
        max_new_tokens: the longest drawn answer.
    """

    beta: float = 0.0
    temperature: float = 1.0
    share: float = 1.0
    top_k: int = 64
    lmbda: float = 0.0
    seq_kd: bool = False
    drawn_at: float = 1.0
    max_new_tokens: int = 128

    @property
    def draws(self) -> bool:
        """Whether any answers are drawn in training."""
        return self.lmbda > 0 or self.seq_kd

    @property
    def learns_rows(self) -> bool:
        """Whether the rows' own answers are learned."""
        return self.lmbda < 1 and not self.seq_kd


def distill_options(args: "TrainArguments") -> DistillOptions | None:
    """What a run learns of a teacher; None where there is none. Raises OptionError for all that is wrong, at once."""
    given = {name: getattr(args, name) for name in OF_DISTILLING if getattr(args, name) not in (None, False)}
    if args.stage != "distill":
        if given:
            raise OptionError(f"{', '.join(given)}: stage {args.stage} has no teacher", hint=option("stage", "distill"))
        return None
    said = {name: value for name in OPTIONS if (value := getattr(args, name)) is not None and name != "beta"}
    problems = [f"{name}: it is of preferences, and stage distill has none" for name in said]
    if args.beta is not None and args.beta > 1:
        problems.append(f"beta={args.beta}: expected a number from 0, forward KL, to 1, reverse KL")
    if args.teacher_model_name_or_path is None and args.teacher_cache is None:
        problems.append("stage distill needs a teacher: a model in teacher_model_name_or_path")
    if args.teacher_adapter_name_or_path is not None and args.teacher_model_name_or_path is None:
        problems.append("teacher_adapter_name_or_path: of which model? give teacher_model_name_or_path")
    names = {
        "beta": "beta", "kd_temperature": "temperature", "kd_ratio": "share", "loss_top_k": "top_k", "lmbda": "lmbda",
        "seq_kd": "seq_kd", "temperature": "drawn_at", "max_new_tokens": "max_new_tokens",
    }  # fmt: skip
    options = DistillOptions(
        **{own: getattr(args, name) for name, own in names.items() if getattr(args, name) is not None}
    )
    if problems := problems + _wrong_with_draws(args, options):
        raise OptionError("; ".join(problems))
    return options


def _wrong_with_draws(args: "TrainArguments", options: DistillOptions) -> list[str]:
    """A line for each option that does not go with answers that are drawn in training, or with none."""
    answers = args.do_predict or args.predict_with_generate
    if not options.draws:
        alone = args.temperature is not None and not answers
        said = "temperature: it is of drawn answers, and none is asked for; kd_temperature is the loss's"
        return [said] if alone else []
    wrong = {
        "drawn answers are judged by the teacher itself: name it in teacher_model_name_or_path": (
            args.teacher_model_name_or_path is None
        ),
        "seq_kd: with lmbda=1 the student draws every answer": options.seq_kd and options.lmbda == 1,
        "kd_ratio: to learn an answer that the student drew itself by its own loss teaches nothing": (
            options.share < 1 and options.lmbda > 0
        ),
        "train_on_prompt: a teacher says of drawn answers alone": args.train_on_prompt,
        "mask_reasoning: what a drawn answer thinks is a part of it": args.mask_reasoning,
        "cache_frozen_layers: drawn answers are other ones in every step": args.cache_frozen_layers,
        "memory_limit: it is of the student alone, and the teacher stays beside it": args.memory_limit is not None,
        "top_p, num_beams and do_sample: answers are drawn from all of a model's tokens; temperature=0 takes the likeliest": (
            not answers and (args.top_p or args.num_beams or args.do_sample is not None)
        ),
    }
    return [problem for problem, holds in wrong.items() if holds]


def preference_options(args: "TrainArguments") -> PreferenceOptions | None:
    """What a run learns preferences by; None for supervised fine-tuning, and for distillation."""
    if args.stage == "distill":
        return None
    return preferring(args.stage, {name: getattr(args, name) for name in OPTIONS}, train_on_prompt=args.train_on_prompt)


def preferring(
    stage: str, said: "dict[str, float | str | None]", *, train_on_prompt: bool = False
) -> PreferenceOptions | None:
    """The same of a stage and the values of OPTIONS, None for what is not said.

    Raises OptionError for all that has no meaning with the stage, at once.
    """
    if stage not in STAGES:
        raise OptionError(f"stage={stage!r}: expected {', '.join(STAGES)}", hint=near_match(stage, STAGES))
    given = {name: value for name, value in said.items() if value is not None}
    if stage == "distill":
        raise OptionError(
            "stage distill: it is a training, which measures its held-out rows itself",
            hint=f"{option('stage', 'sft')} measures the loss of the answers",
        )
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
    if options.beta <= 0:
        problems.append(f"beta={options.beta}: expected a number above 0")
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
    distilling = distill_options(args) is not None
    if not distilling and preference_options(args) is None:
        return
    graphs, padding = args.cuda_graphs == "yes", not args.ignore_pad_token_for_loss
    wrong = {
        "label_smoothing_factor: the teacher says what else is likely; leave it out": args.label_smoothing_factor,
        "cuda_graphs=yes: passes beside a teacher's are not recorded": graphs,
        "ignore_pad_token_for_loss=false: a teacher says nothing of padding": padding,
        "do_eval without do_train: the teacher is asked in training alone; stage sft measures the loss of answers": (
            args.do_eval and not args.do_train
        ),
    } if distilling else {
        "label_smoothing_factor: it smooths the loss of tokens; take label_smoothing": args.label_smoothing_factor,
        "fp16: the reference is computed without its scaled loss; take bf16": args.fp16,
        "cache_frozen_layers: it keeps what enters the adapter of single texts": args.cache_frozen_layers,
        "cuda_graphs=yes: passes of pairs are not recorded": graphs,
        "predict_with_generate: rows of preferences have no one answer to compare with": args.predict_with_generate,
        "ignore_pad_token_for_loss=false: padding is no answer": padding,
    }  # fmt: skip
    if problems := [problem for problem, holds in wrong.items() if holds]:
        raise OptionError(f"stage {args.stage}: " + "; ".join(problems))
    args.cuda_graphs = "no"
