"""Options of a run that have no meaning together."""

from typing import TYPE_CHECKING

from qgraft.adapters.lora import impossible_methods

if TYPE_CHECKING:
    from qgraft.training.arguments import TrainArguments


def impossible(args: "TrainArguments") -> list[str]:
    """A line for each combination of `args` that cannot be obeyed."""
    prefix, cached = args.finetuning_type == "p_tuning", args.cache_frozen_layers
    both = args.quantization_bit is not None and args.quantize is not None
    wrong = {
        "quantize and quantization_bit both say what the weights are packed in; give one of them": both,
        "find_lr: it trains nothing that do_eval or do_predict could ask": (
            args.find_lr and (args.do_eval or args.do_predict)
        ),
        "find_lr: it goes on from no checkpoint; leave resume_from_checkpoint out": (
            args.find_lr and args.resume_from_checkpoint
        ),
        "exact: a prefix changes no weight; it is an option of a LoRA": prefix and args.exact,
        "use_dora: a prefix has no rows of a length; it is an option of a LoRA": prefix and args.use_dora,
        "init_lora_weights: a prefix has no A and B; it is an option of a LoRA": (
            prefix and args.init_lora_weights != "true"
        ),
        "loraplus_lr_ratio: a prefix has no A and B; it is an option of a LoRA": prefix and args.loraplus_lr_ratio,
        "rank_pattern and alpha_pattern: a prefix has no layers of a rank": (
            prefix and (args.rank_pattern or args.alpha_pattern)
        ),
        "add_tokens, add_special_tokens and trainable_token_indices: a prefix has no rows of tokens": (
            prefix and (args.add_tokens or args.add_special_tokens or args.trainable_token_indices)
        ),
        "cache_frozen_layers: rows of tokens are below every layer": (
            cached and (args.add_tokens or args.add_special_tokens or args.trainable_token_indices)
        ),
        "neftune_noise_alpha: stage sft alone learns with noise": args.stage != "sft" and args.neftune_noise_alpha,
        "cache_frozen_layers: with neftune_noise_alpha other states enter the layers in every epoch": (
            cached and args.neftune_noise_alpha
        ),
        "cache_frozen_layers: a prefix is in every layer, so none is frozen": prefix and cached,
        "cache_frozen_layers: training in fp16 and evaluation compute otherwise; take bf16": cached and args.fp16,
    }
    return [*impossible_methods(args), *(line for line, holds in wrong.items() if holds)]
