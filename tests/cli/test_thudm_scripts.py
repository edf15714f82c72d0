"""The scripts of ChatGLM-6B's and ChatGLM2-6B's ptuning folders, with the program's name changed.

Steps and answers are shortened by words behind the scripts' own, and the GPU is left alone; nothing else is changed.
"""

import json
import re
import shlex
import shutil

import pytest

import qgraft
from qgraft.cli import main as cli
from qgraft.training.arguments import TrainArguments, arguments_from_dict, parse_arguments
from qgraft.training.option_help import option_help
from qgraft.training.option_names import ALIASES, WITHOUT_EFFECT
from qgraft.training.scores import SCORES, mean_scores

ROWS = [{"content": f"类型#上衣*颜色#{i}", "summary": f"你好，世界！{i % 3}"} for i in range(6)]
CHAT = [{"prompt": "你好", "response": "你好，世界！", "history": []},
        {"prompt": "1+1?", "response": "2", "history": [["你好", "Hello"], ["Who?", "I"]]}]  # fmt: skip

FILES = "--train_file AdvertiseGen/train.json --validation_file AdvertiseGen/dev.json"
COLUMNS = "--prompt_column content --response_column summary"
CHAT_FILES = "--train_file $CHAT_TRAIN_DATA --validation_file $CHAT_VAL_DATA"
CHAT_COLUMNS = "--prompt_column prompt --response_column response --history_column history"
BATCHES = ("--per_device_train_batch_size 1 --per_device_eval_batch_size 1 --gradient_accumulation_steps 16 "
           "--predict_with_generate --max_steps 3000 --logging_steps 10 --save_steps 1000 --learning_rate $LR "
           "--pre_seq_len $PRE_SEQ_LEN --quantization_bit 4")  # fmt: skip
TEST = f"--do_predict --validation_file AdvertiseGen/dev.json --test_file AdvertiseGen/dev.json --overwrite_cache {COLUMNS}"
TESTED = ("--ptuning_checkpoint ./output/$CHECKPOINT/checkpoint-$STEP --output_dir ./output/$CHECKPOINT "
          "--overwrite_output_dir --max_source_length 64 --max_target_length 64 --per_device_eval_batch_size 1 "
          "--predict_with_generate --pre_seq_len $PRE_SEQ_LEN --quantization_bit 4")  # fmt: skip
FULL = (f"{TEST} --model_name_or_path ./output/$CHECKPOINT/checkpoint-$STEP --output_dir ./output/$CHECKPOINT "
        "--overwrite_output_dir --max_source_length 256 --max_target_length 256 --per_device_eval_batch_size 1 "
        "--predict_with_generate --fp16_full_eval")  # fmt: skip

SCRIPTS = {  # what stands behind main.py
    "ChatGLM-6B/ptuning/train.sh": (
        f"--do_train {FILES} {COLUMNS} --overwrite_cache --model_name_or_path THUDM/chatglm-6b "
        "--output_dir output/adgen-chatglm-6b-pt-$PRE_SEQ_LEN-$LR --overwrite_output_dir --max_source_length 64 "
        f"--max_target_length 64 {BATCHES}"
    ),
    "ChatGLM2-6B/ptuning/train.sh": (
        f"--do_train {FILES} --preprocessing_num_workers 10 {COLUMNS} --overwrite_cache "
        "--model_name_or_path THUDM/chatglm2-6b --output_dir output/adgen-chatglm2-6b-pt-$PRE_SEQ_LEN-$LR "
        f"--overwrite_output_dir --max_source_length 64 --max_target_length 128 {BATCHES}"
    ),
    "ChatGLM-6B/ptuning/train_chat.sh": (
        f"--do_train {CHAT_FILES} {CHAT_COLUMNS} --overwrite_cache --model_name_or_path THUDM/chatglm-6b "
        "--output_dir $CHECKPOINT_NAME --overwrite_output_dir --max_source_length 256 --max_target_length 256 "
        f"{BATCHES}"
    ),
    "ChatGLM2-6B/ptuning/train_chat.sh": (
        f"--do_train {CHAT_FILES} --preprocessing_num_workers 10 {CHAT_COLUMNS} --overwrite_cache "
        "--model_name_or_path THUDM/chatglm2-6b --output_dir $CHECKPOINT_NAME --overwrite_output_dir "
        f"--max_source_length 256 --max_target_length 256 {BATCHES}"
    ),
    "ChatGLM-6B/ptuning/evaluate.sh": f"{TEST} --model_name_or_path THUDM/chatglm-6b {TESTED}",
    "ChatGLM2-6B/ptuning/evaluate.sh": f"{TEST} --model_name_or_path THUDM/chatglm2-6b {TESTED}",
    "ChatGLM-6B/ptuning/evaluate_finetune.sh": FULL,
    "ChatGLM2-6B/ptuning/evaluate_finetune.sh": FULL,
}
GENERATIONS = {"chatglm": "ChatGLM-6B/ptuning", "chatglm2": "ChatGLM2-6B/ptuning"}
HERE = ["--use_cpu"]


def words(script, **variables):
    values = {"PRE_SEQ_LEN": "128", "LR": "2e-2", "STEP": "2", "CHECKPOINT": "x", "CHECKPOINT_NAME": "chat-out",
              "CHAT_TRAIN_DATA": "chat.json", "CHAT_VAL_DATA": "chat.json", **variables}  # fmt: skip
    return shlex.split(re.sub(r"\$(\w+)", lambda match: values[match[1]], SCRIPTS[script]))


@pytest.fixture(params=GENERATIONS)
def generation(request, tiny_chatglm, tmp_path, monkeypatch):
    """The name of a generation, in a working folder that holds what its scripts name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    for name, rows in (("train", ROWS), ("dev", ROWS[:3])):
        path = tmp_path / "AdvertiseGen" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "chat.json").write_text("".join(json.dumps(row) + "\n" for row in CHAT))
    (tmp_path / "THUDM").mkdir()
    for name in GENERATIONS:
        (tmp_path / "THUDM" / f"{name}-6b").symlink_to(tiny_chatglm(name))
    return request.param


def train_words(generation):
    steps = ["--max_steps", "2", "--gradient_accumulation_steps", "2"]
    return ["train", *words(f"{GENERATIONS[generation]}/train.sh"), *steps, *HERE]


# --- what is understood


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_option_of_the_scripts_is_set_or_noted(script):
    told = words(script)
    arguments = parse_arguments(told)
    named = {word[2:] for word in told if word.startswith("--")}
    noted = {note.split()[0].rstrip(":") for note in arguments.notes}
    silent = {name for name in named if name in WITHOUT_EFFECT} - noted
    assert silent == set()
    assert all(hasattr(arguments, ALIASES.get(name, name)) for name in named - noted)
    assert (arguments.do_train, arguments.do_eval) == ("train" in script, False)
    assert arguments.do_predict == ("evaluate" in script)
    assert arguments.per_device_eval_batch_size == 1
    if "finetune" not in script:
        assert (arguments.finetuning_type, arguments.pre_seq_len, arguments.quantization_bit) == ("p_tuning", 128, 4)
    if arguments.do_train:
        assert (arguments.dataset, arguments.eval_dataset) == (
            ("chat.json", "chat.json") if "chat.sh" in script else ("AdvertiseGen/train.json", "AdvertiseGen/dev.json")
        )
        assert (arguments.learning_rate, arguments.max_steps, arguments.save_steps) == (2e-2, 3000, 1000)
        assert any("predict_with_generate has no effect" in note for note in arguments.notes)
    else:
        assert arguments.test_dataset == "AdvertiseGen/dev.json"
        assert arguments.eval_strategy == "no"


def test_every_option_of_ptuning_arguments_py_is_known():
    names = """model_name_or_path ptuning_checkpoint config_name tokenizer_name cache_dir use_fast_tokenizer model_revision
        use_auth_token resize_position_embeddings quantization_bit pre_seq_len prefix_projection lang dataset_name
        dataset_config_name prompt_column response_column history_column train_file validation_file test_file
        overwrite_cache preprocessing_num_workers max_source_length max_target_length val_max_target_length
        pad_to_max_length max_train_samples max_eval_samples max_predict_samples num_beams ignore_pad_token_for_loss
        source_prefix forced_bos_token sortish_sampler predict_with_generate generation_max_length generation_num_beams
        do_train do_eval do_predict output_dir overwrite_output_dir fp16 fp16_full_eval"""
    known = {*TrainArguments.__dataclass_fields__, *ALIASES, *WITHOUT_EFFECT}
    assert set(names.split()) - known == set()
    assert set(ALIASES.values()) <= set(TrainArguments.__dataclass_fields__)
    assert not (set(ALIASES) | set(WITHOUT_EFFECT)) & set(TrainArguments.__dataclass_fields__)


@pytest.mark.parametrize(
    ("options", "kind", "length"),
    [
        ({}, "lora", None),
        ({"pre_seq_len": 16}, "p_tuning", 16),
        ({"finetuning_type": "p_tuning"}, "p_tuning", 128),
        ({"finetuning_type": "lora", "pre_seq_len": 16}, "lora", 16),
    ],
)
def test_what_is_trained_follows_from_pre_seq_len_where_it_is_not_said(options, kind, length):
    arguments = arguments_from_dict({"output_dir": "x", "use_cpu": True, **options})
    assert (arguments.finetuning_type, arguments.pre_seq_len) == (kind, length)
    assert arguments.do_train and not arguments.do_eval and not arguments.do_predict
    ignored = kind == "lora" and length is not None
    assert any("pre_seq_len has no effect" in note for note in arguments.notes) == ignored


def test_help_and_near_misses_know_the_options():
    assert "--pre_seq_len" in option_help() and "--do_predict" in option_help()
    with pytest.raises(qgraft.OptionError, match="did you mean ptuning_checkpoint"):
        parse_arguments(["--ptuning_checkpont", "x"])


def test_later_words_win_over_a_file_whatever_each_calls_the_option(tmp_path):
    (tmp_path / "c.yaml").write_text("lora_rank: 3\ntrain_file: a.json\noutput_dir: x\nuse_cpu: true\n")
    arguments = parse_arguments([str(tmp_path / "c.yaml"), "r=5", "dataset=b.json"])
    assert (arguments.r, arguments.dataset) == (5, "b.json")
    with pytest.raises(qgraft.OptionError, match=r"train_file and dataset are the same option"):
        parse_arguments(["--train_file", "a", "--dataset", "b"])


# --- what is done


@pytest.mark.spread(1)
def test_train_sh_then_evaluate_sh(generation, tmp_path, capsys):
    scripts = GENERATIONS[generation]
    assert cli.main(train_words(generation)) == 0
    told = capsys.readouterr().err
    assert "overwrite_cache has no effect" in told and "pre_seq_len" not in told
    out = tmp_path / "output" / f"adgen-{generation}-6b-pt-128-2e-2"
    saved = json.loads((out / "run.json").read_text())
    assert saved["steps"] == 2 and set(saved["base"]["formats"]) >= {"chatglm-int4"}
    assert (saved["adapter"]["kind"], saved["adapter"]["pre_seq_len"]) == ("prefix", 128)
    kept = sorted(path.name for path in out.iterdir())
    assert "checkpoint-2" in kept

    test = words(f"{scripts}/evaluate.sh", CHECKPOINT=out.name)
    assert cli.main(["train", *test, "--max_new_tokens", "5", *HERE]) == 0
    printed = capsys.readouterr()
    assert "BLEU-4" in printed.out and "ROUGE-L" in printed.out and "of 3 answers" in printed.out
    assert "read 3 rows, kept 3" in printed.err and "prefix of 128 tokens, applied to 2/2 layers" in printed.err
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [*kept, "generated_predictions.txt", "predict_results.json"]
    )
    rows = [json.loads(line) for line in (out / "generated_predictions.txt").read_text(encoding="utf-8").splitlines()]
    assert [list(row) for row in rows] == [["labels", "predict"]] * 3
    results = json.loads((out / "predict_results.json").read_text())
    found = {name: results[f"predict_{name}"] for name in SCORES}
    assert found == mean_scores([(row["labels"], row["predict"]) for row in rows])
    drawn = {"num_beams": 1, "do_sample": True, "temperature": 0.95, "top_p": 0.7, "max_new_tokens": 5}
    assert results["predict_samples"] == 3 and results["generation"] == drawn


@pytest.mark.spread(1)
def test_evaluate_sh_on_what_the_original_train_sh_leaves(generation, tmp_path, capsys):
    assert cli.main(train_words(generation)) == 0
    out = tmp_path / "output" / f"adgen-{generation}-6b-pt-128-2e-2"
    test = words(f"{GENERATIONS[generation]}/evaluate.sh", CHECKPOINT=out.name)
    evaluate = ["train", *test, "--max_new_tokens", "5", *HERE]
    assert cli.main(evaluate) == 0
    ours = (out / "generated_predictions.txt").read_bytes()
    model = ["--model", f"THUDM/{generation}-6b", "--quantize", "chatglm-int4"]
    export = ["export", *model, "--adapter", str(out), "--to", "thudm", "--output", str(tmp_path / "theirs")]
    assert cli.main(export) == 0
    shutil.rmtree(out / "checkpoint-2")
    (tmp_path / "theirs").rename(out / "checkpoint-2")
    capsys.readouterr()
    assert cli.main(evaluate) == 0
    told = capsys.readouterr().err
    assert "prefix of 128 tokens, applied to 2/2 layers" in told and "cannot be verified" in told
    assert (out / "generated_predictions.txt").read_bytes() == ours
    assert cli.main([*evaluate, "--pre_seq_len", "64"]) == 2
    assert "pre_seq_len=64: the prefix 'default' has 128 tokens" in capsys.readouterr().err


def test_train_chat_sh(generation, tmp_path, capsys):
    chat = words(f"{GENERATIONS[generation]}/train_chat.sh")
    assert cli.main(["train", *chat, "--max_steps", "1", "--gradient_accumulation_steps", "2", *HERE]) == 0
    saved = json.loads((tmp_path / "chat-out" / "run.json").read_text())
    assert saved["dataset"]["samples"] == 2 and saved["finished"] and saved["adapter"]["kind"] == "prefix"


def test_evaluate_finetune_sh(generation, tmp_path, tiny_chatglm):
    folder = tmp_path / "output" / "ft" / "checkpoint-2"
    shutil.copytree(tiny_chatglm(generation), folder)
    test = words(f"{GENERATIONS[generation]}/evaluate_finetune.sh", CHECKPOINT="ft")
    assert cli.main(["train", *test, "--max_new_tokens", "3", "--use_cpu"]) == 0
    assert len((tmp_path / "output" / "ft" / "generated_predictions.txt").read_text().splitlines()) == 3
    assert folder.is_dir()


@pytest.mark.spread(1)
def test_training_measuring_and_answering_in_one_go(generation, tmp_path, capsys):
    out = tmp_path / f"output/adgen-{generation}-6b-pt-128-2e-2"
    more = ["--do_eval", "--do_predict", "--max_new_tokens", "3", "--max_eval_samples", "2", "--save_strategy", "no"]
    assert cli.main([*train_words(generation), *more]) == 0
    saved, evaluated = (json.loads((out / name).read_text()) for name in ("run.json", "eval_results.json"))
    assert evaluated["eval_loss"] == saved["metrics"]["eval_loss"]
    assert saved["dataset"]["held_out"] == 2 == evaluated["eval_samples"]
    assert {f"eval_{name}" for name in SCORES} <= evaluated.keys()
    assert json.loads((out / "predict_results.json").read_text())["predict_samples"] == 3
    printed = capsys.readouterr().out
    assert printed.count("BLEU-4") == 2

    alone = ["train", "--do_eval", "--model_name_or_path", f"THUDM/{generation}-6b", "--quantization_bit", "4",
             "--adapter_name_or_path", str(out), "--validation_file", "AdvertiseGen/dev.json", "--output_dir", "again",
             *shlex.split(f"{COLUMNS} --max_source_length 64 --max_eval_samples 2"),
             "--max_target_length", "64" if generation == "chatglm" else "128", "--use_cpu"]  # fmt: skip
    assert cli.main(alone) == 0
    again = json.loads((tmp_path / "again" / "eval_results.json").read_text())
    assert again == {"eval_loss": pytest.approx(evaluated["eval_loss"], rel=1e-4)}


def test_predictions_prompt_as_the_adapter_was_trained(tiny_gguf, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    model = ["--model_name_or_path", str(tiny_gguf("llama").path), "--use_cpu"]
    told = ["--dataset", str(rows), "--output_dir", str(tmp_path / "out"), "--max_steps", "1"]
    assert cli.main(["train", *model, *told, "--system", "Be brief.", "--template", "chatml"]) == 0
    test = ["train", "--do_predict", *model, "--test_dataset", str(rows), "--output_dir", str(tmp_path / "out")]
    assert cli.main([*test, "--adapter_name_or_path", str(tmp_path / "out"), "--max_new_tokens", "2"]) == 0
    told = capsys.readouterr().err
    assert "--system as in training: Be brief." in told and "--template as in training: chatml" in told
    assert cli.main([*test, "--max_new_tokens", "2", "--overwrite_output_dir"]) == 0
    assert "no adapter is given" in capsys.readouterr().err
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


# --- bits


@pytest.mark.parametrize("bits", ["4", "8"])
def test_a_folder_in_the_same_bits_stays_and_in_others_is_refused(bits, tiny_chatglm, tmp_path, capsys):
    model, _ = qgraft.load(tiny_chatglm("chatglm2"), quantize=f"chatglm-int{bits}", device="cpu")
    qgraft.save(model, tmp_path / "packed")
    shutil.copy(tiny_chatglm("chatglm2") / "tokenizer.model", tmp_path / "packed")
    (tmp_path / "dev.json").write_text(json.dumps(ROWS))
    test = ["train", "--do_predict", "--model_name_or_path", str(tmp_path / "packed"), "--output_dir", str(tmp_path / "out"),
            "--test_file", str(tmp_path / "dev.json"), "--max_new_tokens", "2", "--use_cpu", *COLUMNS.split()]  # fmt: skip
    assert cli.main([*test, "--quantization_bit", bits]) == 0
    assert f"quantization_bit {bits}: the weights are stored in so many bits already" in capsys.readouterr().err
    other = "8" if bits == "4" else "4"
    assert cli.main([*test, "--quantization_bit", other, "--overwrite_output_dir"]) == 2
    assert f"in {bits} bits already" in capsys.readouterr().err


def test_bits_of_other_models_are_refused_with_what_to_do(tiny_gguf, tmp_path, capsys):
    (tmp_path / "dev.json").write_text(json.dumps(ROWS))
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    for model, hint in ((tiny_gguf("llama").path, "leave it out"), (tmp_path / "llama", "--quantize q4_1")):
        test = ["train", "--do_predict", "--model_name_or_path", str(model), "--output_dir", str(tmp_path / "out")]
        assert cli.main([*test, "--test_file", str(tmp_path / "dev.json"), "--quantization_bit", "4"]) == 2
        told = capsys.readouterr().err
        assert "no folder of a ChatGLM" in told and hint in told


# --- mistakes


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--do_predict"], "do_predict has no rows"),
        (["--do_eval"], "do_eval has no rows"),
        (["--do_predict", "--do_train", "--dataset", "AdvertiseGen/train.json"], "do_predict has no rows"),
        (["--do_predict", "--test_file", "AdvertiseGen/nosuch.json"], "nosuch.json"),
        (["--do_predict", "--test_file", "AdvertiseGen/dev.json", "--prompt_column", "ask"], "no column 'ask'"),
        (["--do_predict", "--test_file", "empty.json"], "empty"),
        (["--do_predict", "--test_file", "AdvertiseGen/dev.json", "--ptuning_checkpoint", "nosuch"], "nosuch"),
    ],
)
def test_mistakes_end_in_a_message_and_write_nothing(generation, options, expected, tmp_path, capsys):
    (tmp_path / "empty.json").write_text("")
    base = ["train", "--model_name_or_path", f"THUDM/{generation}-6b", "--output_dir", "out", "--use_cpu"]
    assert cli.main([*base, *options]) == 2
    told = capsys.readouterr().err
    assert expected in told and "Traceback" not in told
    assert not (tmp_path / "out").exists()


def test_an_adapters_folder_in_place_of_the_model_is_named(tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text("{}")
    words = ["--model_name_or_path", str(tmp_path), "--test_file", "x.json", "--output_dir", str(tmp_path / "out")]
    assert cli.main(["train", "--do_predict", *words]) == 2
    assert "this is an adapter: give its base as the model" in capsys.readouterr().err
