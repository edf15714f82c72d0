"""The samples of a run: its rows read and tokenized as its options say, and some of them held out."""

from functools import partial
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qgraft.data.held_out import hold_out
from qgraft.data.preference_samples import build_preferences, mismatched
from qgraft.data.reading import Accounting, Dataset, named_columns, read_dataset, read_preferences
from qgraft.data.templates import ChatTemplate
from qgraft.data.tokenizing import ChatGlmOptions, WritesPrompts, build_samples
from qgraft.errors import DataError, worded
from qgraft.model_parts import CAUSAL, hears, is_encoder_decoder, marker_ids, task_of, vision_of
from qgraft.passes.limits import stated_ends
from qgraft.training.arguments import TrainArguments
from qgraft.training.evaluate import template_of
from qgraft.training.images import check_image_run, image_rows, learning_of, samples_of, texts_alone
from qgraft.training.label_rows import read_label_samples
from qgraft.training.seq2seq import read_pairs
from qgraft.training.speech import read_speech
from qgraft.training.stages import preference_options


def prepare_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset | None,
    eval_dataset: Dataset | None,
    args: TrainArguments,
    limit: int,
    notes: list[str],
) -> tuple[list[Any], list[Any], Accounting, Accounting | None]:
    """(samples or preferences, held-out ones, where the rows of both went); `notes` gets what a reader should know."""
    chosen = dataset if dataset is not None else args.dataset
    if chosen is None or chosen == "":
        raise DataError(
            "no dataset is given",
            hint=worded(
                flags="--dataset my.jsonl", python="rows as the third argument of train(), or dataset='my.jsonl'"
            ),
        )
    if task_of(model) != CAUSAL:
        return _prepare_labelled(model, tokenizer, chosen, eval_dataset, args, limit, notes)
    template = None if is_encoder_decoder(model.config) else template_of(tokenizer, args)
    if template is not None and template.note:
        notes.append(template.note)
    if args.history_column and getattr(tokenizer, "bare_single", False) and isinstance(tokenizer, WritesPrompts):
        notes.append("history_column: rows without history begin with [Round 0] too, as in ChatGLM's script; chat sends "
                     "a first question bare")  # fmt: skip
    if template is not None and (found := _prepare_seen(model, chosen, eval_dataset, args, limit, template, notes)):
        return found
    samples, accounting = read_samples(model, tokenizer, chosen, args, limit, template, held_out=False)
    notes += accounting.said()
    options = preference_options(args)
    pairing = options is not None and options.loss_type == "kto"
    held_out = eval_dataset if eval_dataset is not None else args.eval_dataset
    if held_out is not None and held_out != "":
        eval_samples, held_out_accounting = read_samples(
            model, tokenizer, held_out, args, limit, template, held_out=True
        )
        notes += [f"held-out rows: {sentence}" for sentence in held_out_accounting.said()]
    else:
        eval_samples, held_out_accounting = [], None
    if args.val_size and not held_out:
        samples, eval_samples = hold_out(samples, args.val_size, args.seed)
        notes.append(f"held out {len(eval_samples)} of {len(samples) + len(eval_samples)} samples for evaluation")
    if pairing:
        samples, eval_samples = (mismatched(rows, limit) for rows in (samples, eval_samples))
    return samples, eval_samples, accounting, held_out_accounting


def _prepare_seen(
    model: PreTrainedModel,
    dataset: Dataset,
    eval_dataset: Dataset | None,
    args: TrainArguments,
    limit: int,
    template: ChatTemplate,
    notes: list[str],
) -> tuple[list[Any], list[Any], Accounting, Accounting | None] | None:
    """The same of rows with images, for a model that sees them; None where no row holds one."""
    held_out = eval_dataset if eval_dataset is not None else args.eval_dataset
    rows = image_rows(model, args, (dataset, args.max_train_samples), (held_out, args.max_eval_samples))
    if rows is None:
        return None
    check_image_run(vars(args), args.notes)
    (samples, accounting), *others = [
        samples_of(model, each, template, limit, learning_of(model, args)) for each in rows if each is not None
    ]
    notes += accounting.said()
    for eval_samples, where in others:
        notes += [f"held-out rows: {sentence}" for sentence in where.said()]
        return samples, eval_samples, accounting, where
    kept_back: list[Any] = []
    if args.val_size:
        samples, kept_back = hold_out(samples, args.val_size, args.seed)
        notes.append(f"held out {len(kept_back)} of {len(samples) + len(kept_back)} samples for evaluation")
    return samples, kept_back, accounting, None


def _prepare_labelled(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    eval_dataset: Dataset | None,
    args: TrainArguments,
    limit: int,
    notes: list[str],
) -> tuple[list[Any], list[Any], Accounting, Accounting | None]:
    """The same of labelled rows, for a classifier."""
    reads = partial(read_label_samples, model, tokenizer, args=args, limit=limit)
    samples, accounting = reads(dataset, notes=notes, most=args.max_train_samples)
    notes += accounting.said()
    held_out = eval_dataset if eval_dataset is not None else args.eval_dataset
    if held_out is not None and held_out != "":
        said = list[str]()
        eval_samples, held_out_accounting = reads(held_out, notes=said, most=args.max_eval_samples)
        notes += [f"held-out rows: {sentence}" for sentence in (*said, *held_out_accounting.said())]
        return samples, eval_samples, accounting, held_out_accounting
    eval_samples = []
    if args.val_size:
        samples, eval_samples = hold_out(samples, args.val_size, args.seed)
        notes.append(f"held out {len(eval_samples)} of {len(samples) + len(eval_samples)} samples for evaluation")
    return samples, eval_samples, accounting, None


def read_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    args: TrainArguments,
    limit: int,
    template: ChatTemplate | None,
    *,
    held_out: bool,
) -> tuple[list[Any], Accounting]:
    """The samples or preferences of one dataset, of at most `limit` tokens, as the options of a run ask for them.

    Args:
        template: None for an encoder-decoder, whose pairs have none.
    """
    if hears(model.config):
        return read_speech(model, dataset, args, held_out=held_out)
    if template is None:
        return read_pairs(tokenizer, dataset, args, limit, held_out=held_out)
    options = preference_options(args)
    most = args.max_eval_samples if held_out else args.max_train_samples
    longest = args.val_max_target_length if held_out else None
    reading: dict[str, Any] = {
        "name": args.name, "author": args.author, "columns": named_columns(vars(args)),
        "max_samples": most or args.max_samples, "allow_outside_files": args.allow_outside_files,
    }  # fmt: skip
    chatglm = ChatGlmOptions(args.max_source_length, longest or args.max_target_length, numbered=bool(args.history_column),
                      learn_padding=not args.ignore_pad_token_for_loss, source_prefix=args.source_prefix)  # fmt: skip
    learning: dict[str, Any] = {
        "template": template, "system": args.system, "max_length": limit, "mask_history": args.mask_history,
        "mask_reasoning": args.mask_reasoning, "eos_ids": stated_ends(model), "chatglm": chatglm,
        "markers": marker_ids(model),
    }  # fmt: skip
    if options is not None:
        rows, accounting = read_preferences(dataset, args.dataset_dir, labelled=options.labelled, **reading)
        return build_preferences(tokenizer, rows, accounting, **learning), accounting
    conversations, accounting = read_dataset(dataset, args.dataset_dir, images=bool(vision_of(model)), **reading)
    conversations = texts_alone(conversations, accounting, args.stage)
    learning["train_on_prompt"] = args.train_on_prompt
    return build_samples(tokenizer, conversations, accounting, **learning), accounting
