"""qgraft eval: the loss of a model, with or without an adapter, on held-out rows; or which answers it prefers."""

from collections.abc import Sequence

from qgraft.cli.options import Parser, comma_lines, load_with_adapters, number_in, print_json, print_note, true_or_false
from qgraft.errors import AdapterError
from qgraft.ranges import LENGTH
from qgraft.training.ranges import RANGES

NUMBERS = ("beta", "label_smoothing", "desirable_weight", "undesirable_weight", "simpo_gamma", "rpo_alpha")


def run(words: Sequence[str]) -> int:
    """Parse, load, measure, print."""
    parser = Parser("eval", "Measure the loss on the answers of held-out rows, for the base and for each adapter.")
    parser.add_model()
    parser.add_argument(
        "--dataset", required=True, help="comma list of files, dataset_info.json entries, built-in sets"
    )
    parser.add_argument("--dataset_dir", help="folder of dataset_info.json and of the files it names")
    parser.add_argument(
        "--allow_outside_files", action="store_true", help="dataset_info.json may name files outside of its folder"
    )
    parser.add_argument("--template", help="chat template: auto, plain, chatml, a training variant, or a .jinja file")
    parser.add_argument("--source_prefix", help="text in front of every question (default: as in training)")
    parser.add_argument("--enable_thinking", type=true_or_false, help="what a reasoning model's template is told")
    parser.add_speech()
    parser.add_argument("--system", help="system prompt for rows that have none")
    parser.add_argument("--name", help="what {{name}} in the dataset becomes")
    parser.add_argument("--author", help="what {{author}} in the dataset becomes")
    parser.add_argument("--prompt_column", help="column of the question, where the rows' own names are not recognized")
    parser.add_argument("--response_column", help="column of the answer")
    parser.add_argument("--label_column", help="of a classifier: column of the label, or of a label for each word")
    parser.add_argument("--history_column", help="column of earlier rounds, [[question, answer], ...]")
    parser.add_argument(
        "--max_length", type=number_in(LENGTH), default=2048, help="longer samples are cut (default 2048)"
    )
    for side, what in (("source", "question"), ("target", "answer")):
        parser.add_argument(
            f"--max_{side}_length", type=number_in(RANGES[f"max_{side}_length"]),
            help=f"of an encoder-decoder, and ChatGLM: longest {what} (default: as in training)",
        )  # fmt: skip
    parser.add_argument("--stage", default="sft", help="rows of preferences: dpo, ipo, orpo, simpo or kto")
    parser.add_argument("--loss_type", help="which loss of preferences, as in training")
    for number in NUMBERS:
        parser.add_argument(
            f"--{number}", type=number_in(RANGES[number]), help="of the loss of preferences, as in training"
        )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(words)

    from qgraft.adapters.base import adapter_names, find_adapter
    from qgraft.adapters.choose import use_adapter
    from qgraft.adapters.token_rows import token_rows_of
    from qgraft.data.reading import named_columns
    from qgraft.training.evaluate import evaluate

    model, tokenizer, _ = load_with_adapters(options)
    results, names = {}, adapter_names(model)
    with_tokens = [name for name in names if token_rows_of(find_adapter(model, name))]
    for name in [None, *names]:
        use_adapter(model, name)
        try:
            results[name or "base"] = evaluate(
                model, tokenizer, options.dataset, dataset_dir=options.dataset_dir, template=options.template,
                system=options.system, source_prefix=options.source_prefix or "", name=options.name,
                author=options.author, max_length=options.max_length, max_source_length=options.max_source_length,
                max_target_length=options.max_target_length, columns=named_columns(vars(options)),
                enable_thinking=options.enable_thinking, allow_outside_files=options.allow_outside_files,
                stage=options.stage, loss_type=options.loss_type, language=options.language, task=options.task,
                progress=True, **{name: getattr(options, name) for name in NUMBERS},
            ).as_dict()  # fmt: skip
        except AdapterError as error:  # rows that hold new tokens of another adapter
            if not with_tokens or name in with_tokens:
                raise
            print_note(f"{name or 'base'} cannot read these rows: {error.message}")
    if options.json:
        print_json({"model": options.model, "dataset": options.dataset, "results": results})
        return 0
    width = max(map(len, results))
    for key, result in results.items():
        print(f"{key:<{width}}  loss {result['loss']:.4f}  {_beside(result)}")
    rows = next(iter(results.values()))  # the same for all
    labels = f"{rows['labels']} {'answer tokens' if 'perplexity' in rows else 'labels'} of " if "labels" in rows else ""
    counts = [f"{labels}{rows['samples']} samples", f"{rows['dropped']} rows dropped"]
    if rows["truncated"]:
        sides = {name: getattr(options, name) for name in ("max_source_length", "max_target_length")}
        given = [f"{name} {value}" for name, value in sides.items() if value] or [f"max_length {options.max_length}"]
        counts += [f"{rows['truncated']} cut at {given[0]}", *given[1:]]
        counts[-1] += ": their ends are not measured"
    print(comma_lines(counts))
    return 0


def _beside(result: dict[str, float]) -> str:
    """What is said beside the loss: the perplexity, or of preferences how often the model is right, and how clearly."""
    if "perplexity" in result:
        return f"perplexity {result['perplexity']:.2f}"
    if "accuracy" in result:
        return f"accuracy {100 * result['accuracy']:.1f} %  macro-F1 {result['macro_f1']:.3f}"
    if "mae" in result:
        return f"mean error {result['mae']:.4f}"
    names = {"logps/accuracies": "likelier", "rewards/accuracies": "rewarded more", "rewards/margins": "margin"}
    shown = {names[key]: result[key] for key in names if key in result}
    return "  ".join(f"{name} {value:.3f}" if name == "margin" else f"{name} {100 * value:.1f} %"
                     for name, value in shown.items())  # fmt: skip
