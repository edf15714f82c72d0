"""do_eval without training: the held-out rows of a run's options, measured as a run measures them."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qgraft.data.preference_samples import mismatched
from qgraft.data.reading import Accounting
from qgraft.errors import DataError, option
from qgraft.model_parts import is_encoder_decoder
from qgraft.passes.labels import classifier_of, settled
from qgraft.passes.limits import sample_limit
from qgraft.training.arguments import TrainArguments
from qgraft.training.classification import evaluate_labelled
from qgraft.training.classification_options import check_task
from qgraft.training.evaluate import evaluate_preferences, template_of
from qgraft.training.images import IMAGES, check_image_run, image_rows, learning_of, samples_of
from qgraft.training.label_rows import read_label_samples
from qgraft.training.objective import Measured, evaluate_samples
from qgraft.training.padded import evaluate_padded
from qgraft.training.samples import read_samples
from qgraft.training.speech import check_run, check_speech_options, kind_of
from qgraft.training.stages import preference_options


def evaluate_held_out(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: TrainArguments
) -> tuple[Measured, Accounting]:
    """What the model, with its active adapters, says of args.eval_dataset; the same samples as train() would take."""
    if not args.eval_dataset:
        raise DataError("do_eval has no rows", hint=option("eval_dataset", "held_out.jsonl"))
    if is_encoder_decoder(model.config):
        check_run(model.config, args)
        most = sample_limit(model, args.max_length)
        pairs, accounting = read_samples(model, tokenizer, args.eval_dataset, args, most, None, held_out=True)
        return evaluate_padded(model, kind_of(model), pairs, compute=args.compute), accounting
    check_speech_options(model.config, vars(args))
    check_task(args, model)
    if (classifier := classifier_of(model)) is not None:
        limit = sample_limit(model, args.max_length)
        rows, accounting = read_label_samples(
            model, tokenizer, args.eval_dataset, args, limit, [], most=args.max_eval_samples
        )
        classifier = settled(model, classifier, rows)[0]
        return evaluate_labelled(model, rows, classifier, compute=args.compute), accounting
    limit, template, options = (
        sample_limit(model, args.max_length),
        template_of(tokenizer, args),
        preference_options(args),
    )
    if (seeing := image_rows(model, args, (args.eval_dataset, args.max_eval_samples))) is not None and seeing[0]:
        check_image_run(vars(args), args.notes)
        seen, accounting = samples_of(model, seeing[0], template, limit, learning_of(model, args))
        return evaluate_padded(model, IMAGES, seen, compute=args.compute), accounting
    samples, accounting = read_samples(model, tokenizer, args.eval_dataset, args, limit, template, held_out=True)
    if options is None:
        return evaluate_samples(model, samples, compute=args.compute), accounting
    judged = mismatched(samples, limit) if options.loss_type == "kto" else samples
    return evaluate_preferences(model, judged, options, args.compute), accounting
