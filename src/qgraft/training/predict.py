"""predict(): answer the rows of a test set, write the answers down, and score them as ChatGLM's evaluate.sh does.

output_dir/
  generated_predictions.txt   a line for each row: {"labels": "what was expected", "predict": "what the model answers"}
  predict_results.json        scores, number of rows, seconds, how was generated, where every row went

A prompt is what training and chat send: the rows before the last answer. Prompts of similar length are answered at once,
padded at the left: only so do all of them end where their answers begin. A model that takes no attention mask would read
the padding, and one that carries a state from token to token does; these answer one row at a time.

ChatGLM's script draws the answers (top_p 0.7, temperature 0.95), so its scores differ a little from run to run; ours
depend on `seed`. Its labels are the expected answers cut to the target length and decoded from ids again, so that both
texts are normalized alike; with ChatGLM's tokenizers so are ours. Scores are of the texts in the file.
Source: ptuning/main.py and trainer_seq2seq.py of both generations.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qgraft import storage
from qgraft.data.ends import end_token_ids, until_end
from qgraft.data.image_samples import image_prompt, require_processor
from qgraft.data.messages import Conversation
from qgraft.data.pairs import encode_source
from qgraft.data.pictures import Picture
from qgraft.data.reading import Accounting, named_columns, read_dataset
from qgraft.data.templates import ChatTemplate
from qgraft.data.tokenizing import ChatGlmOptions, WritesPrompts, answer_text, check_chatglm_options, encode_prompt
from qgraft.errors import DataError, StorageError, option
from qgraft.model_parts import (
    CAUSAL,
    CLASSIFIERS,
    argument_names,
    hears,
    is_encoder_decoder,
    keeps_state,
    marker_ids,
    task_of,
    vision_of,
)
from qgraft.passes.broken import of_numbers
from qgraft.passes.decoder import evaluating
from qgraft.passes.images import generate_seen
from qgraft.passes.limits import sample_limit, stated_ends
from qgraft.passes.pairs import generate_targets
from qgraft.progress import Display, shown
from qgraft.training.arguments import TrainArguments
from qgraft.training.classification_options import check_task
from qgraft.training.evaluate import template_of
from qgraft.training.images import with_images
from qgraft.training.predict_labels import LINES, LabelPredictions, predict_labels, write_predictions
from qgraft.training.predict_speech import ANSWERED, predict_speech
from qgraft.training.scores import load_libraries, mean_scores
from qgraft.training.seq2seq import check_pair_run, pair_options

Dataset = str | Sequence[Mapping[str, object]]

PREDICTIONS, RESULTS, EVALUATED = "generated_predictions.txt", "predict_results.json", "eval_results.json"
NEW_TOKENS = 128  # of an answer; the default target length of ChatGLM's script
_UNBOUNDED = 1 << 30


@dataclass(frozen=True)
class Predictions:
    """What predict() found.

    Attributes:
        pairs: (expected, answered) texts, in the order of the rows.
        scores: bleu-4, rouge-1, rouge-2, rouge-l: means from 0 to 100; of a model that hears wer and cer, and its loss.
        generation: how the answers were generated.
        accounting: where every row went.
        notes: what a reader should know, each one sentence.
    """

    pairs: list[tuple[str, str]]
    scores: dict[str, float]
    generation: dict[str, Any]
    accounting: Accounting
    seconds: float
    notes: list[str]

    def metrics(self, prefix: str) -> dict[str, Any]:
        """The figures as ChatGLM's script names them ("predict_bleu-4"), with how they came about."""
        return {
            **{f"{prefix}_{name}": value for name, value in self.scores.items()},
            f"{prefix}_samples": len(self.pairs),
            f"{prefix}_runtime": round(self.seconds, 4),
            f"{prefix}_samples_per_second": round(len(self.pairs) / max(self.seconds, 1e-9), 3),
            "generation": self.generation,
            "accounting": self.accounting.as_dict(),
            "notes": self.notes,
        }


@dataclass(frozen=True)
class _Question:
    """The ids of a prompt, and the answer that is expected."""

    ids: list[int]
    expected: str
    text: str = ""  # of a prompt with images, as the processor reads it
    images: tuple[Picture, ...] = ()


def predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset | None,
    args: TrainArguments,
    *,
    progress: bool | Console | None = None,
) -> Predictions | LabelPredictions:
    """Answer a dataset with the active adapters, and write answers and scores into args.output_dir; of a classifier what it
    says of the rows (predict_labels.py).

    Args:
        dataset: what read_dataset takes, or rows; None for args.test_dataset, or else args.eval_dataset.
        progress: whether it is shown; None for in a terminal and a notebook.

    Both files are written when everything is answered. Raises DataError, OptionError, StorageError, UnsupportedError.
    """
    check_task(args, model)
    check_predicting(args, dataset, speech=hears(getattr(model, "config", None)))
    chosen = dataset if dataset is not None else args.test_dataset or args.eval_dataset
    assert chosen is not None  # checked above
    if task_of(model) != CAUSAL:
        labelled = predict_labels(model, tokenizer, chosen, args, most=args.max_predict_samples)
        write_predictions(labelled, Path(str(args.output_dir)), RESULTS)
        return labelled
    found = answer_rows(model, tokenizer, chosen, args, max_samples=args.max_predict_samples, console=shown(progress))
    lines = [json.dumps({"labels": label, "predict": answer}, ensure_ascii=False) for label, answer in found.pairs]
    folder = Path(str(args.output_dir))
    storage.write_file(folder / PREDICTIONS, "".join(f"{line}\n" for line in lines).encode())
    storage.write_json(folder / RESULTS, found.metrics("predict"))
    return found


def check_predicting(args: TrainArguments, dataset: Dataset | None = None, *, speech: bool = False) -> None:
    """Raise what is wrong with predict()'s arguments, before the minutes that loading and answering take.

    Args:
        speech: whether the model hears, whose answers are scored by error rates.
    """
    if dataset is None and not args.test_dataset and not args.eval_dataset:
        raise DataError(
            "do_predict has no rows",
            hint=f"{option('test_dataset', 'test.jsonl')}, or {option('eval_dataset', 'held_out.jsonl')}",
        )
    if args.task_type in CLASSIFIERS:
        check_results(args, LINES, RESULTS)
        return
    if not speech:
        load_libraries()
    check_results(args, PREDICTIONS, RESULTS)


def check_results(args: TrainArguments, *names: str) -> None:
    """Raise StorageError where output_dir cannot be written to, or holds one of these files and may not be overwritten."""
    folder = Path(str(args.output_dir))
    if folder.exists() and not folder.is_dir():
        raise StorageError(f"output_dir {folder} is a file, expected a folder")
    if storage.make_folder(folder):  # it could be made
        storage.remove_if_empty(folder)
    if (there := [name for name in names if (folder / name).exists()]) and not args.overwrite_output_dir:
        raise StorageError(f"output_dir {folder} holds {', '.join(there)} already",
                           hint=f"choose another folder, or {option('overwrite_output_dir')} to replace it")  # fmt: skip


def answer_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    args: TrainArguments,
    *,
    max_samples: int | None = None,
    console: Console | None = None,
) -> Predictions:
    """What predict() does, without writing anything; `max_samples` goes before args.max_samples."""
    pairs, room = is_encoder_decoder(model.config), _room(tokenizer, args)
    if hears(model.config):
        began = time.perf_counter()
        torch.manual_seed(args.seed)
        told = pair_settings(model, args) | {"max_new_tokens": room.new}
        texts, scores, told, where = predict_speech(model, tokenizer, dataset, args, told, max_samples, console)
        return Predictions(texts, scores, told, where, time.perf_counter() - began, where.said())
    load_libraries()
    questions, accounting, notes = _questions(model, tokenizer, dataset, args, max_samples)
    settings = pair_settings(model, args) if pairs else generation_settings(tokenizer, args)
    seen = any(question.images for question in questions)
    at_once = args.per_device_eval_batch_size if takes_padding(model) and not seen else 1
    if at_once < args.per_device_eval_batch_size:
        why = "rows with images pass by themselves" if seen else "this model cannot leave padding out"
        notes.append(f"per_device_eval_batch_size has no effect: {why}, so rows are answered one by one")  # fmt: skip
    began = time.perf_counter()
    torch.manual_seed(args.seed)
    ends = end_token_ids(tokenizer, stated_ends(model), None if pairs else template_of(tokenizer, args))
    answers = _answers(model, tokenizer, questions, settings, at_once, room, ends, console)
    seconds = time.perf_counter() - began
    texts = [(question.expected, answer) for question, answer in zip(questions, answers, strict=True)]
    return Predictions(texts, mean_scores(texts), settings | room.as_dict(), accounting, seconds, notes)


def generation_settings(tokenizer: PreTrainedTokenizerBase, args: TrainArguments) -> dict[str, Any]:
    """What generate() is told about choosing tokens: as ChatGLM's script for its tokenizers, else the likeliest ones."""
    scripted = isinstance(tokenizer, WritesPrompts)
    implied = scripted or args.temperature is not None or args.top_p is not None
    drawn = (implied if args.do_sample is None else args.do_sample) and args.temperature != 0
    settings: dict[str, Any] = {"num_beams": args.num_beams or 1, "do_sample": drawn}
    if drawn:
        settings["temperature"] = args.temperature or (0.95 if scripted else 1.0)
        settings["top_p"] = args.top_p or (0.7 if scripted else 1.0)
    return settings


def pair_settings(model: PreTrainedModel, args: TrainArguments) -> dict[str, Any]:
    """The same of an encoder-decoder: as its generation_config.json has it, but for what is said."""
    own: Any = model.generation_config
    drawn = args.temperature is not None or args.top_p is not None if args.do_sample is None else args.do_sample
    said = {"num_beams": args.num_beams or own.num_beams or 1, "do_sample": bool(drawn) and args.temperature != 0}
    if said["do_sample"]:
        said |= {"temperature": args.temperature or 1.0, "top_p": args.top_p or 1.0}
    return said


def takes_padding(model: PreTrainedModel) -> bool:
    """Whether rows of different lengths can be answered at once: what an attention mask hides must change nothing."""
    return "attention_mask" in argument_names(model) and not keeps_state(model)


@dataclass(frozen=True)
class _Room:
    """How long answers may become: `new` tokens, or until prompt and answer have `whole`, if that is more."""

    new: int
    whole: int = 0

    def as_dict(self) -> dict[str, int]:
        return {"max_new_tokens": self.new, **({"max_length": self.whole} if self.whole else {})}

    def after(self, prompt: int, context: int) -> int:
        return min(max(self.new, self.whole - prompt), context - prompt)


def _room(tokenizer: PreTrainedTokenizerBase, args: TrainArguments) -> _Room:
    if args.max_new_tokens is not None:
        return _Room(args.max_new_tokens)
    target = args.max_target_length or NEW_TOKENS
    if isinstance(tokenizer, WritesPrompts):
        return _Room(target, tokenizer.generated_length(args.max_source_length, args.max_target_length))
    return _Room(target)


def _questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    args: TrainArguments,
    max_samples: int | None,
) -> tuple[list[_Question], Accounting, list[str]]:
    """The prompts that fit into the model's context; those that do not move from kept to dropped."""
    context, pairs = sample_limit(model, _UNBOUNDED), is_encoder_decoder(model.config)
    if pairs:
        check_pair_run(args)
    template = ChatTemplate("", "tokenizer") if pairs else template_of(tokenizer, args)
    longest = args.val_max_target_length or args.max_target_length
    chatglm = ChatGlmOptions(args.max_source_length, longest, source_prefix=args.source_prefix)
    check_chatglm_options(tokenizer, chatglm)
    conversations, accounting = read_dataset(
        dataset, args.dataset_dir, name=args.name, author=args.author, columns=named_columns(vars(args)),
        max_samples=max_samples or args.max_samples, allow_outside_files=args.allow_outside_files,
        images=bool(vision_of(model)),
    )  # fmt: skip
    processor, markers = require_processor(model) if with_images(conversations) else None, marker_ids(model)
    questions = []
    for conversation in conversations:
        try:
            if pairs:
                options = pair_options(args, sample_limit(model, args.max_length))
                source, _ = encode_source(tokenizer, conversation.messages[:-1], options)
                questions.append(_Question(source, conversation.messages[-1].content.strip()))
                continue
            if processor is not None and with_images([conversation]):
                text, images = image_prompt(
                    processor, conversation.messages[:-1], template=template, system=args.system,
                    source_prefix=args.source_prefix, tools=conversation.tools, markers=markers,
                )  # fmt: skip
                expected = _expected_text(tokenizer, conversation, template, longest)
                questions.append(_Question([], expected, text, tuple(images)))
                continue
            ids = encode_prompt(tokenizer, conversation.messages[:-1], template=template, system=args.system, chatglm=chatglm,
                                tools=conversation.tools, markers=markers)  # fmt: skip
            if len(ids) >= context:
                raise DataError(f"a prompt as long as the model's context of {context} tokens")
            expected = _expected_text(tokenizer, conversation, template, longest)
        except DataError as error:  # one row never ends a run
            accounting.kept -= 1
            accounting.drop(error.message, conversation.source)
            continue
        questions.append(_Question(ids, expected))
    accounting.check()
    if not questions:
        raise DataError(f"no row is left to answer: {accounting.summary()}", hint="give shorter questions")
    return questions, accounting, [*([template.note] if template.note else []), *accounting.said()]


def _expected_text(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, template: ChatTemplate, longest: int | None
) -> str:
    """The last answer's text; with calls or reasoning apart as the template writes them."""
    said = conversation.messages[-1]
    if not isinstance(tokenizer, WritesPrompts):
        return (said.content if said.is_plain else answer_text(tokenizer, conversation, template)).strip()
    text = said.content
    ids = tokenizer(text, truncation=longest is not None, max_length=longest, verbose=False)["input_ids"]
    return _text(tokenizer, list(ids))


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of ids as it stands in the file."""
    scripted = {"clean_up_tokenization_spaces": True} if isinstance(tokenizer, WritesPrompts) else {}
    return str(tokenizer.decode(ids, skip_special_tokens=True, **scripted)).strip()


def _answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[_Question],
    settings: Mapping[str, Any],
    at_once: int,
    room: _Room,
    ends: Sequence[int],
    console: Console | None,
) -> list[str]:
    """An answer to each question, in their order."""
    context = sample_limit(model, _UNBOUNDED)
    # Neighbours in length waste least; the longest come first, so that memory that is short runs out at once.
    order = sorted(range(len(questions)), key=lambda index: -len(questions[index].ids))
    answers = [""] * len(questions)
    with evaluating(model), Display(*ANSWERED, console=console) as progress:
        task = progress.add_task("", total=len(questions))
        for start in range(0, len(order), at_once):
            batch = order[start : start + at_once]
            prompts = [questions[index].ids for index in batch]
            if seen := [questions[index] for index in batch if questions[index].images]:
                told = {**settings, "max_new_tokens": room.new, "eos_token_id": list(ends) or None}
                found = [generate_seen(model, each.text, each.images, **told)[1] for each in seen]
            elif is_encoder_decoder(model.config):
                found = generate_targets(model, prompts, **settings, max_new_tokens=min(room.new, context - 1))
            else:
                new = room.after(len(prompts[0]), context)
                told = {**settings, "max_new_tokens": new, "eos_token_id": list(ends) or None}
                found = _generate(model, tokenizer, prompts, told)
            for index, ids in zip(batch, found, strict=True):
                answers[index] = _text(tokenizer, until_end(ids, ends))
            progress.advance(task, len(batch))
    return answers


def _generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]], told: Mapping[str, Any]
) -> list[list[int]]:
    """The new ids of each prompt, those behind the end included."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    longest = max(map(len, prompts))
    ids_BT = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in prompts], device=model.device)
    seen_BT = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
    mask = {"attention_mask": seen_BT} if takes_padding(model) else {}
    generate: Any = model.generate
    with torch.inference_mode():
        output_BT = generate(ids_BT, **mask, pad_token_id=pad, logits_processor=of_numbers(model), **told)
    return [row[longest:] for row in output_BT.tolist()]
