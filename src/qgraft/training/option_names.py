"""What options of training are called elsewhere: PEFT, LLaMA-Factory, ChatGLM-Efficient-Tuning, ChatGLM's ptuning/main.py.

Their command lines run here with the program's name changed. So each of their options has a field of TrainArguments, is
another name of one, or stands below, with why it changes nothing or is not there; none is dropped without a word. Sources:
the dataclasses of ptuning/arguments.py (both generations have the same) and of glmtuner/hparams, transformers'
Seq2SeqTrainingArguments.
"""

ALIASES = {  # name elsewhere -> ours
    "lora_rank": "r",
    "lora_r": "r",
    "lora_target": "target_modules",
    "lora_target_modules": "target_modules",
    "lora_target_parameters": "target_parameters",
    "cutoff_len": "max_length",
    "max_seq_length": "max_length",
    "model": "model_name_or_path",
    "adapter": "adapter_name_or_path",
    "checkpoint_dir": "adapter_name_or_path",
    "ptuning_checkpoint": "adapter_name_or_path",
    "dev_ratio": "val_size",
    "warmup_ratio": "warmup_steps",
    "evaluation_strategy": "eval_strategy",
    "validation_file": "eval_dataset",
    "train_file": "dataset",
    "dataset_name": "dataset",
    "test_file": "test_dataset",
    "eval_num_beams": "num_beams",
    "generation_num_beams": "num_beams",
    "model_author": "author",
    "model_name": "name",
    "train_on_last_turn_only": "mask_history",
    "train_on_inputs": "train_on_prompt",
    "sequence_len": "max_length",
    "max_seq_len": "max_length",
    "text_column": "prompt_column",
    "audio_column_name": "prompt_column",
    "text_column_name": "prompt_column",
    "text_column_names": "prompt_column",
    "label_column_name": "label_column",
    "pref_beta": "beta",
    "dpo_beta": "beta",
    "kto_beta": "beta",
    "pref_loss": "loss_type",
    "dpo_loss": "loss_type",
    "dpo_label_smoothing": "label_smoothing",
    "kto_chosen_weight": "desirable_weight",
    "kto_rejected_weight": "undesirable_weight",
    **dict.fromkeys(("teacher", "teacher_model"), "teacher_model_name_or_path"),
    "teacher_adapter": "teacher_adapter_name_or_path",
}

NOT_THERE = {  # name elsewhere -> what to do instead
    **dict.fromkeys(
        ("pref_ftx", "dpo_ftx"),
        "it is rpo_alpha here, of pairs: of the mean over all chosen tokens of a step, where theirs is over the mean of each "
        "answer; for 0 leave it out",
    ),
    "pissa_init": "it is init_lora_weights=pissa here, or pissa_niter_16",
    "pissa_iter": "it is the number in init_lora_weights=pissa_niter_16",
    "pissa_convert": "leave it out: the files are those of an ordinary LoRA",
}

_PACKING = (
    "packing", "neat_packing", "sample_packing", "eval_sample_packing", "eval_packing", "padding_free", "packing_strategy",
    "packing_length", "multipack_real_batches",
)  # fmt: skip
PACKED = (
    "samples always pass one after another in one row, without padding, and never see each other; "
    "per_device_train_batch_size counts samples, and max_tokens_per_pass how many tokens go through at a time"
)
UNPADDED = "batches hold no padding"
UNSORTED = "batches hold no padding that sorting by length could save; rows come in random order"

WITHOUT_EFFECT = {  # name elsewhere -> why it changes nothing here
    "overwrite_cache": "datasets are tokenized anew in seconds, nothing is cached",
    "preprocessing_num_workers": "tokenizing runs in one process",
    **dict.fromkeys(_PACKING, PACKED),
    "flash_attn": "attention is PyTorch's own",
    "trust_remote_code": "code from model folders is never run",
    "use_fast_tokenizer": "the fast tokenizer is always used",
    "quantization_method": "the weights stay as the file has them",
    **dict.fromkeys(("pad_to_max_length", "pad_to_sequence_len", "pad_to_multiple_of"), UNPADDED),
    **dict.fromkeys(("sortish_sampler", "group_by_length"), UNSORTED),
    "cache_dir": "datasets are not cached; models of the hub lie where HF_HOME says",
    "config_name": "the configuration is that of the model's folder",
    "tokenizer_name": "the tokenizer is that of the model's folder",
    "model_revision": "the hub's newest revision is taken; for another one give its folder",
    "use_auth_token": "the login of `hf auth login` is used where there is one",
    "dataset_config_name": "ChatGLM's script does not read it either; name the subset in dataset_info.json",
    "resize_position_embeddings": "positions are not embedded, or as many as the model has",
    "forced_bos_token": "ChatGLM's script does not read it either",
    "lang": "ChatGLM's script does not read it either",
    "generation_max_length": "ChatGLM's script sets another length over it; give max_new_tokens",
}
