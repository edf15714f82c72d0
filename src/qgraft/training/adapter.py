"""Which adapter a run trains: one that is on the model, or a new one of the kind and with the options that are asked for."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qgraft.adapter_files.calibration import CALIBRATION, keep_samples, read_rows
from qgraft.adapter_files.folder import read_trained
from qgraft.adapter_files.lora import token_indices
from qgraft.adapter_files.seal import read_seal, remembered_arguments
from qgraft.adapters.adapter import Adapter
from qgraft.adapters.attach import attach_lora, chosen_layers
from qgraft.adapters.attach_prefix import attach_prefix, layout_of
from qgraft.adapters.base import adapter_names, find_adapter, selection_of
from qgraft.adapters.choose import use_adapter
from qgraft.adapters.lora import Lora
from qgraft.adapters.lora_experts import ExpertLora
from qgraft.adapters.peft_names import OF_EXPERTS, TAKEN_FOR_EXPERTS
from qgraft.adapters.prefix import encoder_of
from qgraft.adapters.whole import whole_modules
from qgraft.data.image_samples import ImageSample
from qgraft.data.preference_samples import Preference
from qgraft.data.tokenizing import Sample
from qgraft.errors import CheckpointError, OptionError, option, worded
from qgraft.model_parts import CAUSAL, is_encoder_decoder, task_of
from qgraft.patterns import first_matching
from qgraft.training.arguments import TrainArguments
from qgraft.training.new_tokens import begin_rows, check_rows, indices_of, trains_rows
from qgraft.training.random_state import undisturbed


def prepare_adapter(model: PreTrainedModel, args: TrainArguments) -> None:
    """Make args.adapter_name the one that trains. Seeded, so that a run's first weights depend on its seed alone."""
    if args.adapter_name in adapter_names(model):
        check_adapter(model, args)
        use_adapter(model, args.adapter_name)
        return
    torch.manual_seed(args.seed)
    _attach_new(model, args)


@contextmanager
def adapter_in_training(model: PreTrainedModel, args: TrainArguments) -> Iterator[None]:
    """Within the block args.adapter_name trains, no other thread may call the model, and none trains another."""
    selection_of(model).check_free()
    with undisturbed():
        prepare_adapter(model, args)
        with selection_of(model).taken("trained"):
            yield


def trained_parameters(model: PreTrainedModel, name: str) -> list[nn.Parameter]:
    """The parameters of the adapter `name`, in an order that does not depend on what else is on the model."""
    return [parameter for _, parameter in find_adapter(model, name).named_parameters()]


def decaying_vectors(model: PreTrainedModel, name: str) -> list[nn.Parameter]:
    """The magnitudes of DoRA: weight decay reaches them with transformers' Trainer and PEFT, as no bias or norm."""
    return [each for key, each in find_adapter(model, name).named_parameters() if key.endswith("lora_magnitude_vector")]


def learning_rates(model: PreTrainedModel, args: TrainArguments) -> list[tuple[float, list[nn.Parameter]]] | None:
    """The parameters of args.adapter_name in groups, each with its learning rate, as LoRA+ has them; None without LoRA+.

    Always the A of linear layers, what is on embeddings, the B of linear layers with the magnitudes of DoRA, as PEFT's
    create_loraplus_optimizer has them (Hayou et al. 2024, arXiv:2402.12354).
    """
    if args.loraplus_lr_ratio is None:
        return None
    factors, embedding = dict[str, list[nn.Parameter]](lora_A=[], lora_B=[]), list[nn.Parameter]()
    for part in find_adapter(model, args.adapter_name).parts.values():
        for name, parameter in part.named_parameters():
            # with B what is a vector, as DoRA's magnitudes and biases of heads; rows of tokens with A: as in PEFT
            group = factors["lora_B" if name == "lora_B" or parameter.ndim == 1 else "lora_A"]
            (embedding if isinstance(part, Lora) and part.of_embedding else group).append(parameter)
    return [
        (args.learning_rate, factors["lora_A"]),
        (args.loraplus_lr_embedding, embedding),
        (args.learning_rate * args.loraplus_lr_ratio, factors["lora_B"]),
    ]


def check_adapter(model: PreTrainedModel, args: TrainArguments) -> None:
    """Raise OptionError where the attached adapter args.adapter_name is not what the options speak of."""
    name, wanted = args.adapter_name, args.finetuning_type
    adapter = find_adapter(model, name)
    if not adapter.is_prefix:
        if wanted == "p_tuning":
            raise OptionError(
                f"finetuning_type=p_tuning: the adapter {name!r} is a LoRA",
                hint="leave finetuning_type and pre_seq_len out",
            )
        _check_lora(model, adapter, args)
        return
    length = encoder_of(adapter).config.pre_seq_len
    if wanted == "p_tuning" and args.pre_seq_len != length:
        raise OptionError(f"pre_seq_len={args.pre_seq_len}: the prefix {name!r} has {length} tokens",
                          hint=f"{option('pre_seq_len', length)} goes on training it")  # fmt: skip
    if wanted == "lora" and not args.adapter_name_or_path:
        raise OptionError(
            f"finetuning_type=lora: the model has a prefix of that name, {name!r}",
            hint=f"{option('pre_seq_len', length)} to train it, or {option('adapter_name', 'lora')} for a LoRA without it",
        )


def _check_lora(model: PreTrainedModel, adapter: Adapter, args: TrainArguments) -> None:
    """Raise OptionError for options of a new LoRA that the attached one does not have."""
    said = {
        "r": args.r,
        "lora_alpha": args.lora_alpha,
        "lora_dropout": args.lora_dropout,
        "use_rslora": args.use_rslora,
        "exact": args.exact,
        "use_dora": args.use_dora,
        "init_lora_weights": args.init_lora_weights,
    }
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    loras = {path: part.config for path, part in adapter.parts.items() if isinstance(part, Lora)}
    configs = [vars(config) for config in loras.values()]
    wrong = [
        f"{name}={value}, the adapter has {configs[0][name]}"
        for name, value in said.items()
        if value != defaults[name] and all(config[name] != value for config in configs)
    ]
    for name, field, table in zip(("rank_pattern", "alpha_pattern"), ("r", "lora_alpha"), _patterns(args), strict=True):
        other = {path: getattr(config, field) for path, config in loras.items()
                 if (key := first_matching(table, path)) is not None and getattr(config, field) != table[key]}  # fmt: skip
        wrong += [f"{name}: {path} has {field} {value}" for path, value in list(other.items())[:1]]
    named = (args.layers_to_transform, args.target_parameters)
    if args.target_modules != defaults["target_modules"] or any(each is not None for each in named):
        asked = chosen_layers(model, args.target_modules, args.layers_to_transform, args.target_parameters or ())
        if set(asked) != set(loras):
            wrong.append(f"target_modules and layers_to_transform name {len(asked)} layers, it is on "
                         f"{len(loras)}{'' if len(asked) != len(loras) else ' other ones'}")  # fmt: skip
    wrong += check_rows(model, args)
    if wrong:
        raise OptionError(
            f"the adapter {adapter.name!r} is on the model already: {'; '.join(wrong)}",
            hint="leave them out to go on training it, or "
            + worded(
                flags="leave --adapter_name_or_path out for a new one",
                python=f"take another name for a new one: {option('adapter_name', 'second')}",
            ),
        )


def positions_to_take(model: PreTrainedModel, args: TrainArguments) -> int:
    """How many positions of the context a prefix takes that is attached later."""
    is_new = args.finetuning_type == "p_tuning" and args.adapter_name not in adapter_names(model)
    return (args.pre_seq_len or 0) if is_new and layout_of(model) == "peft" else 0


def take_trained(model: PreTrainedModel, folder: Path, name: str) -> None:
    """Put the weights of the sealed adapter in `folder` into the attached one, `name`. Raises CheckpointError."""
    saved, current = read_trained(folder), find_adapter(model, name).state_dict()
    if {k: v.shape for k, v in saved.items()} != {k: v.shape for k, v in current.items()}:
        raise CheckpointError(
            f"{folder} holds another adapter: {len(saved)} tensors of other names or shapes "
            f"than the {len(current)} of this run",
            hint="resume with the same options of the adapter, or start anew with another output_dir",
        )
    find_adapter(model, name).take(saved)


def take_saved(model: PreTrainedModel, folder: Path, name: str) -> None:
    """The same of a run that ended, with what its seal says and the rows that were kept."""
    take_trained(model, folder, name)
    seal = read_seal(folder)
    selection_of(model).change(name, trained=remembered_arguments(seal), kept=read_rows(folder, seal))


def describe_adapter(model: PreTrainedModel, name: str) -> dict[str, Any]:
    """What kind of adapter was trained, and with which options of its own."""
    adapter = find_adapter(model, name)
    whole = {"modules_to_save": list(found)} if (found := whole_modules(adapter)) else {}
    if adapter.is_prefix:
        return {"kind": adapter.kind, **dataclasses.asdict(encoder_of(adapter).config)}
    loras = {path: part.config for path, part in adapter.parts.items() if isinstance(part, Lora)}
    configs = [dataclasses.asdict(config) for config in loras.values()]
    common = {key: value for key, value in configs[0].items() if all(config[key] == value for config in configs)}
    plain = {"exact": False, "use_dora": False, "init_lora_weights": True, "target_parameters": ()}
    for name, value in plain.items():
        if common.get(name) == value:
            del common[name]  # as the checkpoints of earlier releases have it, which are compared with this
    for name, field in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        if field not in common:
            common[name] = {path: getattr(config, field) for path, config in loras.items()}
    if rows := token_indices(adapter):
        common["trainable_token_indices"] = rows
    return {"kind": adapter.kind, "layers": len(configs), **whole, **common}


def keep_rows(
    model: PreTrainedModel,
    args: TrainArguments,
    tokenizer: PreTrainedTokenizerBase | None,
    learned: Sequence[Sample | Preference],
    held_out: Sequence[Sample | Preference],
) -> list[str]:
    """Let the adapter bring rows of its training, to be merged with, and say so; or none, where none are asked for.

    Of preferences the answers that are chosen or wanted. A prefix changes no weight, so none is merged; layers of
    encoder-decoders, and those of adapters that learned from images, are merged without rows.
    """
    adapter, kept = find_adapter(model, args.adapter_name), None
    solves = not adapter.is_prefix and not is_encoder_decoder(model.config)  # what a merge does with rows
    solves = solves and task_of(model) == CAUSAL and not any(isinstance(sample, ImageSample) for sample in learned)
    if args.save_calibration and tokenizer is not None and solves:
        texts, held = ([e.texts[0] for e in rows if e.desirable is not False] for rows in (learned, held_out))
        kept = keep_samples(tokenizer, texts, held, args.seed)
    selection_of(model).change(adapter.name, kept=kept)
    if kept is None:
        return []
    return [
        f"the adapter keeps {len(kept.rows)} rows of its data to be merged with, which can be read: delete {CALIBRATION}, or "
        f"train with {option('save_calibration', False)}, before you give it away"
    ]


def misread_by_peft(model: Any, name: str) -> list[str]:
    """One sentence where PEFT puts what linear layers of the adapter learned on experts: it reads their names so."""
    parts = find_adapter(model, name).parts.items()
    leaves = {
        path.rpartition(".")[2] for path, part in parts if isinstance(part, Lora) and not isinstance(part, ExpertLora)
    }
    if getattr(model.config, "model_type", None) not in TAKEN_FOR_EXPERTS or not (misread := leaves & OF_EXPERTS):
        return []
    return [
        f"PEFT takes {', '.join(sorted(misread))} of {model.config.model_type} for layers of its experts, and would compute "
        f"something else with this adapter; {option('target_modules', ','.join(sorted(leaves - misread)))} is read as it is"
    ]


def _patterns(args: TrainArguments) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tables of ranks and alphas."""
    return cast(dict[str, Any], args.rank_pattern or {}), cast(dict[str, Any], args.alpha_pattern or {})


def _attach_new(model: PreTrainedModel, arguments: TrainArguments) -> None:
    """An adapter of the kind and with the options of `arguments`."""
    name = arguments.adapter_name
    if arguments.finetuning_type == "p_tuning":
        assert arguments.pre_seq_len is not None
        attach_prefix(model, arguments.pre_seq_len, arguments.prefix_projection, arguments.prefix_dropout, name)
        return
    rows = indices_of(model, arguments) if trains_rows(arguments) else None
    attach_lora(
        model, arguments.r, arguments.lora_alpha, arguments.lora_dropout, arguments.target_modules,
        arguments.use_rslora, name, arguments.layers_to_transform, arguments.exact, *_patterns(arguments),
        arguments.use_dora, arguments.init_lora_weights == "true" or arguments.init_lora_weights, rows,
        arguments.target_parameters or (),
    )  # fmt: skip
    begin_rows(model, arguments)
