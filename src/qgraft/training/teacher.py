"""The teacher of stage distill: loaded, asked once about every label of the rows, let go; the student trains after that.

It must read the student's token ids as the student does: the same vocabulary, and the same ids for each row of the run, by
its own tokenizer and template (data/same_ids.py). How many rows an embedding has beyond the tokenizer may differ; the two
are compared over the ids that both have.
"""

import gc
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qgraft.adapter_files.folder import load_adapter
from qgraft.adapters.base import base_of, find_adapter
from qgraft.adapters.choose import active_adapters
from qgraft.checkpoints.load import load
from qgraft.data.batches import collate, neighbours, split_batch
from qgraft.data.reading import Dataset
from qgraft.data.same_ids import are_one, sample_problem, vocabulary_problem
from qgraft.data.tokenizing import Sample, samples_sha256
from qgraft.errors import OptionError, QgraftError, TrainingError, option
from qgraft.linear import computing
from qgraft.locks import folder_locked
from qgraft.mapped import release
from qgraft.memory.budget import CPU_EVAL_TOKENS, GPU_EVAL_TOKENS
from qgraft.passes.decoder import label_states, output_head, padding_free
from qgraft.passes.divergence import Said, likeliest
from qgraft.passes.fused import fused_modules
from qgraft.passes.limits import context_length
from qgraft.progress import Display
from qgraft.training.adapter import describe_adapter
from qgraft.training.arguments import TrainArguments
from qgraft.training.distillation import Taught
from qgraft.training.drawn import longest_samples
from qgraft.training.evaluate import template_of
from qgraft.training.preferences import labels_of
from qgraft.training.processes import Processes
from qgraft.training.samples import read_samples
from qgraft.training.stages import DistillOptions, distill_options
from qgraft.training.teacher_cache import OF_TEACHER, TEACHER, WIDTH, TeacherCache, read_about

BLOCK_LABELS = 4096  # of a file of the cache, which is what a kill costs at most


@dataclass(frozen=True)
class Lesson:
    """What came of asking: both sides of the rows with it, how many ids it is about, and its hash.

    Attributes:
        teacher: where answers are drawn in training, which it is asked about then.
    """

    learned: Sequence[Sample]
    held_out: Sequence[Sample]
    width: int
    sha256: str
    teacher: "LiveTeacher | None" = None


@dataclass(eq=False)
class LiveTeacher:
    """A teacher that stays loaded, and is asked about texts that were not there before.

    Attributes:
        k: tokens that it names at each label.
        tokens: of a pass; within `ready` only.
    """

    model: PreTrainedModel
    args: TrainArguments
    options: DistillOptions
    width: int
    k: int
    tokens: int = 0

    @contextmanager
    def ready(self, samples: Sequence[Sample]) -> Iterator[None]:
        """Within the block texts like these, and no longer ones, take the fastest way through it."""
        with _fastest(self.model, self.args, samples) as self.tokens:
            yield

    @torch.no_grad()
    def taught(self, samples: Sequence[Sample]) -> list[Taught]:
        """The samples with what it says of them."""
        return list(_shared_out(samples, self._said(samples))) if samples else []

    def _said(self, samples: Sequence[Sample]) -> Said:
        said = [_said(self.model, batch, self.options, self.k, self.width)
                for batch in split_batch(collate(samples), self.tokens)]  # fmt: skip
        _check_finite(joined := Said.joined(said), samples)
        return joined


def ask_teacher(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: TrainArguments,
    datasets: Sequence[Dataset | None],
    sides: tuple[list[Sample], list[Sample]],
    limit: int,
    processes: Processes,
    notes: list[str],
    console: Console | None = None,
) -> Lesson:
    """What the teacher of a run says of its samples, from the cache as far as it is there; `notes` gets what to say of it.

    Args:
        datasets: the rows to learn and those held out, which the samples were made of.
        limit: the longest sample.

    Raises OptionError for a teacher that reads other ids or too little, StorageError for a cache of something else.
    """
    with torch.no_grad():
        lesson = _asked(model, tokenizer, args, datasets, sides, limit, processes, notes, console)
    gc.collect()  # a teacher that is asked no more is gone before the student's memory is measured
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return lesson


def _asked(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: TrainArguments, datasets: Sequence[Dataset | None],
    sides: tuple[list[Sample], list[Sample]], limit: int, processes: Processes, notes: list[str], console: Console | None,
) -> Lesson:  # fmt: skip
    options, folder = distill_options(args), _folder(args)
    assert options is not None
    asked = [*(sides[0] if options.learns_rows else []), *sides[1]]  # of these the answers are known before
    teacher = _load_teacher(args, notes)
    if teacher is None:
        width = min(_rows_of(model), read_about(folder)[WIDTH])
    else:
        longest = [*(longest_samples(sides[0], limit, options) if options.draws else sides[0]), *sides[1]]
        check_teacher(model, tokenizer, teacher, args, datasets, longest, limit)
        width = min(_rows_of(model), _rows_of(teacher[0]))
    about = _about(teacher, args, options, asked, width, folder)
    taught, sha256 = (
        _known_before(teacher, args, options, asked, about, processes, notes, console) if asked else ([], "")
    )
    learned = taught[: len(taught) - len(sides[1])] if options.learns_rows else sides[0]
    held_out = taught[len(taught) - len(sides[1]) :]
    if teacher is None or not options.draws:
        return Lesson(learned, held_out, width, sha256)
    notes.append(f"the teacher stays beside the student, and names {about['loss_top_k']} tokens at each that is drawn")
    said = hashlib.sha256(json.dumps([about, sha256], sort_keys=True).encode()).hexdigest()
    return Lesson(learned, held_out, width, said, LiveTeacher(teacher[0], args, options, width, about["loss_top_k"]))


def _known_before(
    teacher: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None, args: TrainArguments, options: DistillOptions,
    samples: Sequence[Sample], about: dict[str, Any], processes: Processes, notes: list[str], console: Console | None,
) -> tuple[list[Taught], str]:  # fmt: skip
    """The samples with what the teacher says of them, by the cache, and a hash of that."""
    folder = _folder(args)
    blocks = list(neighbours([labels_of(sample) for sample in samples], BLOCK_LABELS))
    counts = [sum(map(labels_of, samples[block])) for block in blocks]
    cache = TeacherCache(folder, about, counts, about["loss_top_k"])
    with folder_locked(folder) if processes.first else nullcontext():
        if processes.first:
            cache.begin(_made_with(teacher, args), overwrite=_may_overwrite(args))
        processes.gather(None)
        _ask_about(teacher, cache, [samples[block] for block in blocks], options, args, processes, console)
        processes.gather(None)
        found = [cache.read(number) for number in range(len(blocks))]
    said = [each for each in found if each is not None]
    assert len(said) == len(blocks)
    named = sum(float((1 - each.rest.double().exp()).sum()) for each in said) / sum(counts)
    notes.append(
        f"the teacher names {cache.k} of {about[WIDTH]} tokens at each of {sum(counts)} labels, {100 * named:.2f} % of its "
        "probability; the others count as one"
    )
    taught = [each for block, of_it in zip(blocks, said, strict=True) for each in _shared_out(samples[block], of_it)]
    return taught, cache.sha256


def _folder(args: TrainArguments) -> Path:
    """Where the cache is."""
    return Path(args.teacher_cache or Path(str(args.output_dir)) / TEACHER)


def check_teacher(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    teacher: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    args: TrainArguments,
    datasets: Sequence[Dataset | None],
    samples: Sequence[Sample],
    limit: int,
) -> None:
    """Raise OptionError where the teacher does not read the samples as the student does. Arguments as of ask_teacher."""
    name, (other, its_own) = args.teacher_model_name_or_path, teacher
    family = "a teacher has to read the same token ids: take another model of the same family and release"
    if problem := vocabulary_problem(tokenizer, its_own):
        raise OptionError(f"teacher {name}: {problem}, for the student and for it", hint=family)
    context, longest = context_length(other), max(len(sample.input_ids) for sample in samples)
    if context is not None and context < longest:
        raise OptionError(
            f"teacher {name}: its context is {context} tokens, and the longest sample has {longest}",
            hint=option("max_length", context),
        )
    if are_one(tokenizer, its_own):
        return
    for held_out, dataset in enumerate(datasets):
        if dataset is None:
            continue
        own, others = (_read_by(each, model, dataset, args, limit, bool(held_out)) for each in (tokenizer, its_own))
        if problem := sample_problem(own, others, tokenizer):
            raise OptionError(
                f"teacher {name}: it reads other ids than the student: {problem}",
                hint=f"{option('template', 'chatml')}, or whichever the teacher knows, gives both the same; else {family}",
            )


def _read_by(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, dataset: Dataset, args: TrainArguments, limit: int,
    held_out: bool,
) -> list[Sample]:  # fmt: skip
    """The samples of a dataset by this tokenizer and its template. Raises OptionError where the teacher's makes none."""
    try:
        template = template_of(tokenizer, args)
        return read_samples(model, tokenizer, dataset, args, limit, template, held_out=held_out)[0]
    except QgraftError as error:  # the student's have been made before
        raise OptionError(f"teacher {args.teacher_model_name_or_path}: {error.message}", hint=error.hint) from error


def _load_teacher(args: TrainArguments, notes: list[str]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase] | None:
    """The teacher with its adapter active, and its tokenizer; None where the cache alone is given."""
    name = args.teacher_model_name_or_path
    if name is None:
        return None
    teacher, tokenizer = load(name, dtype=args.compute_dtype, device=args.device)
    if tokenizer is None:
        raise OptionError(f"teacher {name}: it has no tokenizer, so what its ids mean is not known")
    if args.teacher_adapter_name_or_path is not None:
        notes += str(load_adapter(teacher, args.teacher_adapter_name_or_path, "teacher")).splitlines()
    return teacher, tokenizer


def _about(
    teacher: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None, args: TrainArguments, options: DistillOptions,
    samples: Sequence[Sample], width: int, folder: Path,
) -> dict[str, Any]:  # fmt: skip
    """All that decides what is in the cache; of a teacher that is not given, what the cache says."""
    if teacher is None:
        of_teacher = {key: read_about(folder).get(key) for key in OF_TEACHER}
    else:
        info = base_of(teacher[0]).info
        of_teacher = {
            "teacher": None if info is None else info.fingerprint,
            "teacher_adapter": {name: _adapter_sha256(teacher[0], name) for name in active_adapters(teacher[0])},
            "compute": f"{args.compute}, {args.compute_dtype}",
        }
    return {
        **of_teacher, "rows (SHA-256 of the samples)": samples_sha256(samples), WIDTH: width,
        "loss_top_k": min(options.top_k, width), "kd_temperature": options.temperature,
    }  # fmt: skip


def _made_with(teacher: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None, args: TrainArguments) -> dict[str, Any]:
    """What a reader of the cache may want to know; the ids of the rows say all that matters of it."""
    if teacher is None:
        return {}
    template = template_of(teacher[1], args)
    return {
        "teacher": args.teacher_model_name_or_path, "teacher_adapter": args.teacher_adapter_name_or_path,
        "tokenizer": hashlib.sha256(json.dumps(sorted(teacher[1].get_vocab().items())).encode()).hexdigest(),
        "template": hashlib.sha256(template.text.encode()).hexdigest(), "max_length": args.max_length,
    }  # fmt: skip


def _may_overwrite(args: TrainArguments) -> bool:
    """A cache that somebody named is theirs; looking for a rate replaces nothing."""
    return args.overwrite_output_dir and args.teacher_cache is None and not args.find_lr


def _adapter_sha256(model: PreTrainedModel, name: str) -> str:
    about = json.dumps(describe_adapter(model, name), sort_keys=True, default=str)
    digest = hashlib.sha256(about.encode())
    for key, tensor in sorted(find_adapter(model, name).state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _ask_about(
    teacher: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None, cache: TeacherCache,
    blocks: Sequence[Sequence[Sample]], options: DistillOptions, args: TrainArguments, processes: Processes,
    console: Console | None,
) -> None:  # fmt: skip
    """Let the teacher pass the blocks that are not there, those that fall to this process."""
    missing = processes.gather([number for number in range(len(blocks)) if cache.read(number) is None])[0]
    if not missing:
        return
    if teacher is None:
        raise OptionError(
            f"teacher_cache {cache.folder}: {len(missing)} of {len(blocks)} blocks are missing or damaged",
            hint=f"{option('teacher_model_name_or_path', 'teacher.gguf')} asks for them",
        )
    if args.memory_limit:
        raise OptionError(
            f"memory_limit {args.memory_limit}: it is of the student alone, and the teacher is to be asked before it",
            hint="ask it by `qgraft distill` first, then train with the limit",
        )
    shows = (TextColumn("asked the teacher about {task.completed:.0f}/{task.total:.0f} samples"), BarColumn(bar_width=8),
             TimeRemainingColumn(compact=True))  # fmt: skip
    every = [sample for block in blocks for sample in block]
    with Display(*shows, console=console) as display, _fastest(teacher[0], args, every) as tokens:
        task = display.add_task("", total=sum(map(len, blocks)))
        display.advance(task, sum(len(block) for number, block in enumerate(blocks) if number not in missing))
        for number in missing[processes.rank :: processes.count]:
            batches = split_batch(collate(blocks[number]), tokens)
            said = Said.joined([_said(teacher[0], batch, options, cache.k, cache.about[WIDTH]) for batch in batches])
            _check_finite(said, blocks[number])
            cache.keep(number, said)
            display.advance(task, len(blocks[number]))
    release(*teacher[0].buffers())


@contextmanager
def _fastest(teacher: PreTrainedModel, args: TrainArguments, samples: Sequence[Sample]) -> Iterator[int]:
    """Within the block samples take the fastest way through the teacher; yields the tokens of a pass."""
    with ExitStack() as stack:
        stack.enter_context(computing(teacher, args.compute))
        problem = stack.enter_context(padding_free(teacher, samples))
        stack.enter_context(fused_modules(teacher))
        yield 0 if problem else GPU_EVAL_TOKENS if teacher.device.type == "cuda" else CPU_EVAL_TOKENS


def _said(teacher: PreTrainedModel, batch: Any, options: DistillOptions, k: int, width: int) -> Said:
    states_NH, _ = label_states(teacher, batch)
    return likeliest(states_NH, output_head(teacher), k=k, width=width, temperature=options.temperature)


def _check_finite(said: Said, samples: Sequence[Sample]) -> None:
    """Raise TrainingError where the teacher says no numbers; nothing would be learned from them but NaN."""
    known_N = said.log_probs.isfinite().all(-1) & (said.rest < torch.inf)  # false of NaN too
    for sample, known in zip(samples, known_N.split([labels_of(sample) for sample in samples]), strict=True):
        if not bool(known.all()):
            raise TrainingError(f"{sample.source}: what the teacher says is NaN or infinite")


def _shared_out(samples: Sequence[Sample], said: Said) -> Iterator[Taught]:
    """The samples of a block, each with its part."""
    start = 0
    for sample in samples:
        end = start + labels_of(sample)
        yield Taught.of(sample, said[start:end])
        start = end


def _rows_of(model: PreTrainedModel) -> int:
    """How many ids the model says something of, with the new tokens that an adapter will have rows of."""
    rows = getattr(model.get_output_embeddings(), "out_features", None)
    new = (token.id + 1 for token in base_of(model).tokens.values())
    return max([int(rows or model.config.get_text_config().vocab_size), *new])
