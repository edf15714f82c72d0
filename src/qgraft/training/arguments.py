"""Every option of a training run, in one place: TrainArguments, parsed from flags, YAML, JSON or built in Python.

`TrainArguments` is transformers' TrainingArguments plus what qgraft adds; the command line, the YAML keys, `--help` and
the saved run all come from its fields. Names that other tools use for the same thing are translated, options of theirs
that change nothing here are accepted and named in a note (option_names.py; for those that we inherit
trainer_options.py). Anything else that is unknown, or that cannot be obeyed, is an error.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

from transformers import HfArgumentParser, TrainingArguments

from qgraft.adapters.attach import check_name
from qgraft.adapters.layer_choice import parse_layers
from qgraft.adapters.layer_ranks import check_layer_ranks
from qgraft.data.templates import SYSTEM_TEXTS
from qgraft.errors import OptionError, UnsupportedError, option
from qgraft.sizes import parse_size
from qgraft.training.classification_options import ClassificationOptions, settle_classification
from qgraft.training.combinations import impossible
from qgraft.training.config_files import CONFIG_SUFFIXES, Named, overrides, read_config, stray_word, unknown_option
from qgraft.training.optimization import check_optimization
from qgraft.training.option_names import ALIASES, WITHOUT_EFFECT
from qgraft.training.option_types import option_kinds, settle_types
from qgraft.training.precision import settle_precision
from qgraft.training.ranges import check_intervals, out_of_range
from qgraft.training.stages import settle_stage
from qgraft.training.trainer_options import (
    REFUSED,
    rename_checkpointing,
    settle_best,
    settle_options,
    settle_strategies,
    tracking_callbacks,
)
from qgraft.training.unread import unasked, unread


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class TrainArguments(ClassificationOptions, TrainingArguments, metaclass=Named):
    """Options of a training run; those not listed here are transformers' TrainingArguments."""

    command, public_name = "train", "qgraft.TrainArguments"

    model_name_or_path: str | None = _option(None, "GGUF file, Hugging Face folder, hub id, or a known model's name.")
    quantize: str | None = _option(None, "Format to pack a float checkpoint in while loading, e.g. q4_1.")
    quantization_bit: int | None = _option(None, "ChatGLM: 4 or 8, what its weights are packed in while loading.")
    adapter_name_or_path: str | None = _option(None, "Folder of an adapter to go on training instead of a new one.")
    stage: str = _option("sft", "sft (fine-tuning); of preferences dpo, ipo, orpo, simpo, kto; distill (of a teacher).")
    loss_type: str | None = _option(
        None, "dpo: sigmoid, hinge, ipo, robust, exo_pair, ...; kto: kto, apo_zero_unpaired."
    )
    beta: float | None = _option(None, "How much the reference holds back, 0.1; distill: 0 forward to 1 reverse KL.")
    label_smoothing: float | None = _option(None, "Preferences: share of rows that may be the wrong way round.")
    desirable_weight: float | None = _option(None, "kto: what the loss of wanted answers is multiplied by; 1.")
    undesirable_weight: float | None = _option(None, "kto: the same of those that are not wanted; 1.")
    simpo_gamma: float | None = _option(None, "simpo: margin by which the chosen answer is to be ahead; 0.5.")
    rpo_alpha: float | None = _option(None, "Pairs: add so much of the mean loss of the chosen answers' tokens.")
    teacher_model_name_or_path: str | None = _option(None, "distill: the teacher, named like the model.")
    teacher_adapter_name_or_path: str | None = _option(None, "distill: an adapter of the teacher's.")
    teacher_cache: str | None = _option(None, "distill: folder of what the teacher says; default: in output_dir.")
    loss_top_k: int | None = _option(None, "distill: tokens that the teacher names at each place; 64.")
    kd_ratio: float | None = _option(None, "distill: share of the divergence beside the labels' own loss; 1.")
    kd_temperature: float | None = _option(None, "distill: divides the logits of both; 1.")
    lmbda: float | None = _option(None, "distill: share of batches whose answers the student draws itself; 0.")
    seq_kd: bool = _option(False, "distill: the teacher draws the answers of the other batches.")
    finetuning_type: str | None = _option(None, "What is trained: lora, or p_tuning, the default with pre_seq_len.")
    r: int = _option(8, "Rank of the LoRA.")
    lora_alpha: float = _option(16.0, "The delta is scaled by lora_alpha / r.")
    lora_dropout: float = _option(0.0, "Share of the LoRA's inputs that is zeroed in training.")
    rank_pattern: dict[str, Any] | str | None = _option(None, "Ranks of single layers, {layers: r}.")  # noqa: RUF009
    alpha_pattern: dict[str, Any] | str | None = _option(None, "Their lora_alpha likewise.")  # noqa: RUF009
    target_modules: str = _option("all-linear", "all-linear, a comma list of layer names, or a regular expression.")
    target_parameters: str | None = _option(None, "Experts: mlp.experts.gate_up_proj,mlp.experts.down_proj, or one.")
    layers_to_transform: str | None = _option(None, "Only targets in these layers, counted from 0: 15-29 or 15,16,17.")
    use_rslora: bool = _option(False, "Scale by lora_alpha / sqrt(r) instead.")
    exact: bool = _option(False, "LoRA that changes the base's minimums only: a merge keeps all of it.")
    use_dora: bool = _option(False, "DoRA: the length of each row of the weights is trained apart from its direction.")
    init_lora_weights: str = _option("true", "pissa, or pissa_niter_16: begin with the base's principal components.")
    loraplus_lr_ratio: float | None = _option(None, "LoRA+: B learns at this many times learning_rate; 16.")
    loraplus_lr_embedding: float = _option(1e-6, "LoRA+: learning rate of adapters on embeddings.")
    add_tokens: list[str] | None = _option(None, "New tokens, with trained rows: texts, a .txt or .json file.")  # noqa: RUF009
    add_special_tokens: list[str] | None = _option(None, "The same, left out where answers are shown.")  # noqa: RUF009
    trainable_token_indices: dict[str, Any] | str | None = _option(None, "Tokens to train rows of.")  # noqa: RUF009
    pre_seq_len: int | None = _option(None, "p_tuning: trained keys and values in front of every layer's; 128.")
    prefix_projection: bool = _option(False, "p_tuning: make them by a small network; take smaller learning rates.")
    prefix_dropout: float = _option(0.1, "p_tuning: share of them that is zeroed in training.")
    adapter_name: str = _option("default", "How the adapter is called in this process.")
    force: bool = _option(False, "Load an adapter that does not fit, as far as it does; go on with other rows or seed.")

    dataset: str | None = _option(None, "Comma list of files, dataset_info.json entries, hub names, built-in sets.")
    dataset_dir: str | None = _option(None, "Folder of dataset_info.json and of the files it names.")
    allow_outside_files: bool = _option(False, "dataset_info.json may name files outside of its folder.")
    eval_dataset: str | None = _option(None, "Held-out rows, named like dataset; measured every epoch by default.")
    test_dataset: str | None = _option(None, "Rows that do_predict answers, named like dataset; default: eval_dataset.")
    val_size: float = _option(0.0, "Hold out this share (below 1) or number of rows of the dataset for evaluation.")
    max_samples: int | None = _option(None, "Read at most so many rows of each dataset.")
    max_train_samples: int | None = _option(None, "The same of dataset alone.")
    max_eval_samples: int | None = _option(None, "The same of eval_dataset alone.")
    max_predict_samples: int | None = _option(None, "The same of the rows that do_predict answers.")
    max_length: int = _option(2048, "Longer samples are cut at the right, if an answer token remains.")
    max_source_length: int | None = _option(None, "ChatGLM: longest prompt, cut at the right.")
    max_target_length: int | None = _option(None, "ChatGLM: longest answer, cut at the right, then ended.")
    val_max_target_length: int | None = _option(None, "The same of held-out and test rows alone.")
    ignore_pad_token_for_loss: bool = _option(True, "ChatGLM, false: learn padding up to both lengths, as its scripts.")
    template: str | None = _option(
        None, "Chat template: auto (the model's own), plain, a training variant, or a .jinja file."
    )
    system: str | None = _option(None, "System prompt for rows that have none.")
    source_prefix: str = _option("", "Text in front of every prompt.")
    train_on_prompt: bool = _option(False, "Learn the prompts too, not the answers only.")
    mask_history: bool = _option(False, "Learn only the last answer of a conversation.")
    mask_reasoning: bool = _option(False, "Do not learn what answers think before they answer.")
    enable_thinking: bool | None = _option(None, "What the chat template of a reasoning model is told under this name.")
    system_text: str = _option("question", "Under a template without system role: in front of the question, or drop.")
    language: str | None = _option(None, "Whisper: what texts are written in, as a code or a name: en, chinese.")
    task: str | None = _option(None, "Whisper: transcribe, or translate (into English).")
    prompt_column: str | None = _option(None, "Column of the question, where the rows' own names are not recognized.")
    response_column: str | None = _option(None, "Column of the answer.")
    history_column: str | None = _option(None, "Column of earlier rounds, [[question, answer], ...].")
    name: str | None = _option(None, "What {{name}} in the dataset becomes.")
    author: str | None = _option(None, "What {{author}} in the dataset becomes.")

    predict_with_generate: bool = _option(False, "do_eval also scores generated answers; do_predict always does.")
    max_new_tokens: int | None = _option(None, "Longest answer; 128, with ChatGLM as its script has it.")
    num_beams: int | None = _option(None, "Beams of the search for an answer; 1.")
    do_sample: bool | None = _option(None, "Draw an answer's tokens; true with ChatGLM, else the likeliest.")
    temperature: float | None = _option(None, "Of drawn tokens; 0.95 with ChatGLM, else 1; 0: the likeliest.")
    top_p: float | None = _option(None, "Draw from this share of the probability; 0.7 with ChatGLM, else 1.")

    compute: str = _option(
        "auto", "CPU: products with packed weights in float32, bf16 or int8; auto: bf16 where there is hardware."
    )
    max_tokens_per_pass: int = _option(0, "Larger batches pass in parts, same gradients. 0: 384, on a GPU what fits.")
    cache_frozen_layers: bool = _option(False, "Keep on disk what enters the lowest adapter: faster later epochs.")
    keep_unpacked: str = _option("auto", "GPU: keep half-precision copies of weights where memory is left; or no.")
    cuda_graphs: str = _option("auto", "GPU: replay passes as CUDA graphs; auto: where starting kernels is slower.")
    memory_limit: str | None = _option(None, "6GB: the fastest setting that stays below it; auto: what is free.")
    overwrite_output_dir: bool = _option(False, "Replace an earlier run in output_dir, or what one predicted there.")
    find_lr: bool = _option(
        False, "Train nothing; find a learning rate to try, in 40 steps: find_lr.png, find_lr.json."
    )
    plot_loss: bool = _option(True, "Draw loss.png.")
    save_calibration: bool = _option(True, "Leave some rows, readable, beside a LoRA: it merges without the dataset.")

    # transformers' options with another default
    learning_rate: float = _option(2e-4, "Peak learning rate of AdamW.")
    logging_steps: float = _option(5, "Log every so many steps (a share of all steps when below 1).")
    save_total_limit: int | None = _option(2, "Keep so many checkpoints, the best and the last among them.")
    eval_strategy: str | None = _option(  # type: ignore[assignment]  # what is said, until it is settled
        None, "no, steps or epoch; epoch where there are held-out rows."
    )
    load_best_model_at_end: bool | None = _option(  # type: ignore[assignment]
        None, "Keep the adapter with the lowest held-out loss; true where there are held-out rows."
    )
    early_stopping_patience: int | None = _option(
        None, "Stop after so many measurements without a lower held-out loss."
    )
    early_stopping_threshold: float = _option(0.0, "How much lower it has to be to count.")
    remove_unused_columns: bool = _option(False, "Samples are tokenized already.")

    def __post_init__(self) -> None:
        settle_types(self, REFUSED)
        self.notes: list[str] = settle_options(self)  # what was replaced or ignored; the command line prints it
        self._settle_work()
        self._check()
        self.notes += unread(self)
        self._compute_dtype = settle_precision(self)
        rename_checkpointing(self)
        self.eval_unsaid: bool = self.eval_strategy is None
        settle_strategies(self, held_out=bool(self.do_train and (self.eval_dataset or self.val_size)))
        asked, best = self.do_eval, self.load_best_model_at_end
        self.load_best_model_at_end = False  # transformers' Trainer keeps the best only where it saves as it measures
        try:
            super().__post_init__()
        except ValueError as error:
            raise OptionError(str(error)) from error
        self.do_eval = asked  # transformers sets it for any eval_strategy
        self.load_best_model_at_end = best
        self.notes += settle_best(self)
        check_intervals(self)
        if self.do_train:
            check_optimization(self)
        tracking_callbacks(self)  # those of a package that is missing say so now

    @property
    def compute_dtype(self) -> str:
        """The dtype that activations are computed in, for load()."""
        return self._compute_dtype

    @property
    def n_gpu(self) -> int:
        """At most one, whatever is there: with more, the Trainer splits batches among copies of the model."""
        return min(super().n_gpu, 1)

    def _settle_work(self) -> None:
        """What is done and what is trained, where it is not said."""
        if not (self.do_train or self.do_eval or self.do_predict):
            self.do_train = True
        if self.finetuning_type is None:
            self.finetuning_type = "lora" if self.pre_seq_len is None else "p_tuning"
        prefix = self.finetuning_type == "p_tuning"
        if prefix:
            self.pre_seq_len = 128 if self.pre_seq_len is None else self.pre_seq_len
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        said = [name for name in (_OF_LORAS if prefix else _OF_PREFIXES) if getattr(self, name) != defaults[name]]
        without = option("finetuning_type", "lora" if prefix else "p_tuning")
        on, trained = ("prefix", "LoRA") if prefix else ("LoRA", "prefix")
        self.notes += [f"{name} has no effect on a {on}; {without} trains a {trained}" for name in said]
        if self.predict_with_generate and not (self.do_eval or self.do_predict):
            self.notes.append("predict_with_generate has no effect: neither do_eval nor do_predict is asked for")

    def _check(self) -> None:
        if self.finetuning_type not in ("lora", "p_tuning"):
            raise UnsupportedError(f"finetuning_type={self.finetuning_type!r}: only lora and p_tuning are there")
        if self.layers_to_transform is not None:
            parse_layers(self.layers_to_transform)
        check_layer_ranks(self.rank_pattern, self.alpha_pattern)  # type: ignore[arg-type]  # no text any more
        check_name(self.adapter_name)
        if not self.target_modules.strip(", ") and not self.target_parameters:
            raise OptionError("target_modules names no layer", hint=option("target_modules", "all-linear"))
        self._check_numbers()
        settle_stage(self)
        settle_classification(self)
        if not self.ignore_pad_token_for_loss and None in (self.max_source_length, self.max_target_length):
            raise OptionError("ignore_pad_token_for_loss=false needs max_source_length and max_target_length, the length "
                              "that is padded to", hint="batches hold no padding otherwise")  # fmt: skip
        if self.memory_limit not in (None, "auto"):
            parse_size(self.memory_limit)
        if self.cuda_graphs not in ("auto", "yes", "no"):
            raise OptionError(f"cuda_graphs={self.cuda_graphs!r}: expected auto, yes or no")
        if self.keep_unpacked not in ("auto", "no"):
            raise OptionError(f"keep_unpacked={self.keep_unpacked!r}: expected auto or no")
        if self.system_text not in SYSTEM_TEXTS:
            raise OptionError(f"system_text={self.system_text!r}: expected {' or '.join(SYSTEM_TEXTS)}")

    def _check_numbers(self) -> None:
        """Raise OptionError for all numbers that are out of their ranges, at once, and what does not go together."""
        problems = out_of_range(self)
        if self.quantization_bit not in (None, 4, 8):
            problems.append(f"quantization_bit={self.quantization_bit}: expected 4 or 8")
        if problems := problems + impossible(self):
            raise OptionError("; ".join(problems))


_OF_PREFIXES = ("pre_seq_len", "prefix_projection", "prefix_dropout")
_OF_LORAS = (
    "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "target_parameters", "layers_to_transform",
)  # fmt: skip
Arguments = TypeVar("Arguments", bound=TrainArguments)


def parse_arguments(argv: Sequence[str]) -> TrainArguments:
    """TrainArguments from command line words; see parse_options."""
    return parse_options(argv, TrainArguments)


def parse_options(argv: Sequence[str], kind: type[Arguments]) -> Arguments:
    """The options `kind` from command line words: flags, or a YAML/JSON file followed by option=value words.

    Raises OptionError for an unknown option (with the closest names) or an impossible value.
    """
    if argv and Path(argv[0]).suffix in CONFIG_SUFFIXES:
        given = overrides(argv[1:], option_kinds(kind))
        return _from_dict(_own_names(read_config(Path(argv[0]))) | _own_names(given), kind)
    words, notes = _translate_flags(argv)
    parsed, rest = option_parser(kind).parse_known_args(words)
    if rest:
        stray_word(kind, rest)
    return _build(kind, vars(parsed), notes)


def parse_jobs(argv: Sequence[str]) -> list[TrainArguments]:
    """TrainArguments of each job: several configuration files, each followed by all of the option=value words.

    Anything else is one job; see parse_arguments. Raises OptionError for all that is wrong in any of the files.
    """
    files = list(takewhile(lambda word: Path(word).suffix in CONFIG_SUFFIXES and "=" not in word, argv))
    if len(files) < 2:
        return [parse_arguments(argv)]
    jobs, problems = [], []
    for file in files:
        try:
            jobs.append(parse_arguments([file, *argv[len(files) :]]))
        except OptionError as error:
            problems.append(f"{file}: {error}")
    if problems:
        raise OptionError("\n".join(problems))
    return jobs


def arguments_from_dict(options: Mapping[str, Any]) -> TrainArguments:
    """TrainArguments from {option: value}, aliases of other tools included; raises OptionError."""
    return _from_dict(options, TrainArguments)


def _from_dict(options: Mapping[str, Any], kind: type[Arguments]) -> Arguments:
    known = {f.name for f in dataclasses.fields(kind) if f.init}
    values: dict[str, Any] = {}
    notes = []
    for name, value in _own_names(options).items():
        if name in WITHOUT_EFFECT:
            notes.append(f"{name} has no effect: {WITHOUT_EFFECT[name]}")
        elif name not in known:
            unknown_option(kind, name)
        else:
            values[name] = value
    return _build(kind, values, notes)


def changed_arguments(args: TrainArguments) -> dict[str, Any]:
    """The options that differ from their defaults, as JSON values."""
    defaults = type(args)(output_dir=args.output_dir, use_cpu=args.use_cpu)
    options = [option.name for option in dataclasses.fields(args) if option.init]
    changed = {name: getattr(args, name) for name in options if getattr(args, name) != getattr(defaults, name)}
    return {name: getattr(value, "value", value) for name, value in changed.items()}


class _Parser(HfArgumentParser):
    """HfArgumentParser whose complaints are ours: no usage of 150 options, no exit."""

    def error(self, message: str) -> NoReturn:
        raise OptionError(message, hint=f"`{self.prog} --help` lists the options")


def option_parser(kind: type[TrainArguments] = TrainArguments) -> HfArgumentParser:
    """The parser of all options, as flags."""
    return _Parser(cast(Any, kind), prog=f"qgraft {kind.command}", allow_abbrev=False, add_help=False)


def _build(kind: type[Arguments], values: Mapping[str, Any], notes: list[str]) -> Arguments:
    init = {f.name for f in dataclasses.fields(kind) if f.init}
    try:
        arguments = kind(**{name: value for name, value in values.items() if name in init})
    except _OF_TRANSFORMERS as error:  # its checks, and what it runs into where it has none
        raise OptionError(str(error) or type(error).__name__) from error
    arguments.notes[:0] = [*notes, *unasked(arguments)]
    return arguments


_OF_TRANSFORMERS = (
    ArithmeticError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError,
)  # fmt: skip


def _translate_flags(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words with other tools' names replaced by ours, and notes on those that have no effect."""
    words: list[str] = []
    notes: list[str] = []
    called: dict[str, str] = {}
    skipping = False
    for word in argv:
        if not word.startswith("--"):
            if not skipping:
                words.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        skipping = name in WITHOUT_EFFECT
        if skipping:
            notes.append(f"{name} has no effect: {WITHOUT_EFFECT[name]}")
        else:
            words.append(f"--{_own_name(name, called)}{equals}{value}")
    return words, notes


def _own_names(options: Mapping[str, Any]) -> dict[str, Any]:
    called: dict[str, str] = {}
    return {_own_name(name, called): value for name, value in options.items()}


def _own_name(name: str, called: dict[str, str]) -> str:
    """Our name of an option; `called` is what each was called so far: two names for one would hide a value."""
    own = ALIASES.get(name, name)
    if called.setdefault(own, name) != name:
        raise OptionError(f"{called[own]} and {name} are the same option ({own}); give one of them")
    return own
