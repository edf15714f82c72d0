"""Training rows of ChatGLM: what the official scripts make of them, and how our options reach that."""

import json
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import qgraft
from qgraft.data.messages import Conversation, as_pairs
from qgraft.data.reading import Accounting, read_dataset
from qgraft.data.tokenizing import (
    IGNORED,
    ChatGlmOptions,
    build_samples,
    decode_answer,
    encode_conversation,
    encode_prompt,
    resolve_template,
)
from qgraft.errors import DataError, OptionError
from qgraft.models.chatglm2_tokenizer import ChatGLM2Tokenizer
from qgraft.models.chatglm_tokenizer import ChatGLMTokenizer
from qgraft.training.arguments import arguments_from_dict
from qgraft.training.run import train

ROOT = Path(__file__).parents[2]
CLASSES = {"ice_text.model": ChatGLMTokenizer, "tokenizer.model": ChatGLM2Tokenizer}
FOLDERS = {"ice_text.model": "tokenizer_chatglm", "tokenizer.model": "tokenizer_chatglm2"}
SETTINGS = ("max_source_length", "max_target_length", "ignore_pad_token_for_loss", "use_history")
TWO = Conversation.of("a:1", ("user", "你好"), ("assistant", "Hello!"), ("user", "1+1?"), ("assistant", "2"))


@pytest.fixture(scope="module", params=CLASSES)
def real(request):
    """(tokenizer of the released vocabulary, golden training examples, golden evaluation examples)"""
    folder = FOLDERS[request.param]
    path = ROOT.parent / "shared" / "golden" / folder / request.param
    if not path.is_file():
        pytest.skip(f"the released vocabulary is not in {path.parent}")
    golden = [json.loads((ROOT / "tests/golden" / folder / f"{name}_examples.json").read_text())
              for name in ("train", "eval")]  # fmt: skip
    return CLASSES[request.param](vocab_file=path), *golden


@pytest.fixture(scope="module", params=CLASSES)
def tiny(request, tiny_vocabulary):
    return CLASSES[request.param](vocab_file=tiny_vocabulary(request.param))


@pytest.fixture(scope="module")
def model(tiny):
    config = LlamaConfig(vocab_size=len(tiny), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256)  # fmt: skip
    return LlamaForCausalLM(config).requires_grad_(False)


def read(rows, history):
    columns = {"prompt": "content", "response": "summary"} | ({"history": "history"} if history else {})
    return read_dataset(rows, columns=columns)


def test_golden_training_examples(real):
    tokenizer, examples, _ = real
    for values, group in groupby(examples, key=lambda case: [case[name] for name in SETTINGS]):
        source, target, ignore, history = values
        cases = list(group)
        chatglm = ChatGlmOptions(source, target, numbered=history, learn_padding=not ignore)
        samples = build_samples(tokenizer, *read(cases, history), chatglm=chatglm)
        length = source + target + tokenizer.spare_length
        for sample, case in zip(samples, cases, strict=True):
            room = length - len(sample.input_ids)
            assert ignore or room == 0
            assert sample.input_ids + [tokenizer.pad_token_id] * room == case["input_ids"]
            assert sample.labels + [IGNORED] * room == case["labels"]


def test_golden_evaluation_examples(real):
    tokenizer, examples, evaluations = real
    for case in evaluations:
        conversations, _ = read(examples[:5], case["use_history"])
        prompts = [tokenizer.prompt_text(as_pairs(conversation.messages[:-1])) for conversation in conversations]
        batch = tokenizer(prompts, max_length=case["max_source_length"], truncation=True, padding=True)
        answers = [conversation.messages[-1].content for conversation in conversations]
        labels = tokenizer(answers, max_length=case["max_target_length"], truncation=True)
        assert batch["input_ids"] == case["input_ids"] and labels["input_ids"] == case["labels"]
        assert batch["position_ids"] == case["position_ids"]
        if case["attention_mask"] is not None:
            assert batch["attention_mask"] == case["attention_mask"]


def test_only_the_last_answer_is_learned(tiny):
    (sample,) = encode_conversation(tiny, TWO, template=resolve_template(tiny))
    assert (sample.input_ids, sample.labels) == tiny.sample_ids(as_pairs(TWO.messages))
    assert tiny.decode([label for label in sample.labels if label != IGNORED]) == "2"
    assert encode_conversation(tiny, TWO, mask_history=True) == [sample]


def test_a_sample_begins_with_the_prompt_that_serving_sends(tiny):
    prompt = encode_prompt(tiny, TWO.messages[:3], system="Be brief.")
    (sample,) = encode_conversation(tiny, TWO, system="Be brief.")
    assert sample.input_ids[: len(prompt)] == prompt
    assert encode_prompt(tiny, [("system", "Be brief."), *as_pairs(TWO.messages[:3])]) == prompt


def test_answers_are_decoded_as_the_released_chat_does(tiny):
    ids = tiny(" [[训练时间]] 你好,", add_special_tokens=False)["input_ids"]
    assert decode_answer(tiny, [*ids, tiny.eos_token_id]) == tiny.clean_answer("2023年 你好,")


@pytest.mark.parametrize("name", [None, "auto", "chatglm", "chatglm2", "ChatGLM2-6B"])
def test_the_own_prompt_by_its_names(tiny, name):
    assert resolve_template(tiny, name) == resolve_template(tiny)


@pytest.mark.parametrize("name", ["plain", "chatml", "mine.jinja", "chatglm3", "llama3"])
def test_templates_are_refused(tiny, name):
    with pytest.raises(OptionError, match="special ids between"):
        resolve_template(tiny, name)


def test_what_these_samples_cannot_be_is_refused(tiny):
    with pytest.raises(OptionError, match="train_on_prompt"):
        encode_conversation(tiny, TWO, train_on_prompt=True)
    with pytest.raises(DataError, match=r"a:1: .*tool"):
        encode_conversation(tiny, Conversation.of("a:1", ("user", "q"), ("tool", "t"), ("assistant", "a")))


@pytest.mark.parametrize("chatglm", [ChatGlmOptions(max_source_length=9), ChatGlmOptions(9, 9, learn_padding=True)])
def test_lengths_of_the_official_scripts_are_refused_for_other_tokenizers(chatglm):
    core = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, "a"))
    other = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    with pytest.raises(OptionError, match="max_source_length"):
        build_samples(other, [TWO], Accounting(read=1, kept=1), chatglm=chatglm)
    assert build_samples(other, [TWO], Accounting(read=1, kept=1), chatglm=ChatGlmOptions(numbered=True))


def test_rows_without_question_or_answer_are_dropped_and_counted(tiny):
    rows = [
        {"content": "你好", "summary": "Hello!", "history": [["a", "b"]]},
        {"content": "", "summary": "Hello!", "history": []},
        {"content": "你好", "summary": None, "history": []},
        {"content": "你好", "summary": "Hello!", "history": None},
        {"content": "你好", "summary": "Hello!", "history": [["a"]]},
    ]
    conversations, accounting = read(rows, history=True)
    samples = build_samples(tiny, conversations, accounting)
    assert (accounting.read, accounting.kept, len(samples)) == (5, 2, 2)
    assert set(accounting.dropped) == {"empty question", "no answer", "history is not a list of [question, answer]"}
    assert [len(conversation.messages) for conversation in conversations] == [4, 2]


def test_samples_longer_than_max_length_are_cut_or_dropped(tiny):
    (whole,) = encode_conversation(tiny, TWO)
    prompt = whole.labels.count(IGNORED)
    accounting = Accounting(read=1, kept=1)
    (cut,) = build_samples(tiny, [TWO], accounting, max_length=prompt + 1)
    assert cut.input_ids == whole.input_ids[: prompt + 1] and accounting.truncated == 1
    with pytest.raises(DataError, match="no sample is left"):
        build_samples(tiny, [TWO], Accounting(read=1, kept=1), max_length=prompt)


def run(model, tokenizer, folder, rows, **options):
    told = {"output_dir": str(folder), "max_steps": 1, "use_cpu": True, "plot_loss": False, "save_strategy": "no"}
    report = train(model, tokenizer, rows, arguments_from_dict({**told, **options}))
    saved = json.loads((folder / "run.json").read_text())
    qgraft.detach_lora(model)
    return report, saved


def test_a_run_takes_the_official_options(tiny, model, tmp_path):
    rows = [
        {"ask": "你好" * 9, "reply": "Hello! " * 9, "past": [["a", "b"]]},
        {"ask": "1+1?", "reply": "2", "past": []},
    ]
    told = {"prompt_column": "ask", "response_column": "reply", "history_column": "past", "max_source_length": 12,
            "max_target_length": 8, "per_device_train_batch_size": 2}  # fmt: skip
    report, saved = run(model, tiny, tmp_path / "a", rows, **told)
    conversations, _ = read_dataset(rows, columns={"prompt": "ask", "response": "reply", "history": "past"})
    made = [tiny.sample_ids(as_pairs(each.messages), 12, 8, numbered=True) for each in conversations]
    assert report.metrics["tokens"] == sum(len(ids) for ids, _ in made)
    assert saved["arguments"]["max_source_length"] == 12
    assert any("last answer" in note for note in report.notes)
    assert any("[Round 0]" in note for note in report.notes) == isinstance(tiny, ChatGLMTokenizer)
    report, saved = run(model, tiny, tmp_path / "b", rows, ignore_pad_token_for_loss=False, **told)
    assert report.metrics["tokens"] == 2 * (12 + 8 + tiny.spare_length)
    assert saved["arguments"]["ignore_pad_token_for_loss"] is False


@pytest.mark.parametrize(
    "options",
    [{"max_source_length": 2}, {"max_target_length": 0}, {"ignore_pad_token_for_loss": False, "max_source_length": 9}],
)
def test_impossible_lengths_are_refused(tmp_path, options):
    with pytest.raises(OptionError, match=r"max_(source|target)_length"):
        arguments_from_dict({"output_dir": str(tmp_path), "use_cpu": True, **options})


def test_ignoring_padding_is_the_default_and_changes_nothing(tiny, tmp_path):
    given = arguments_from_dict({"output_dir": str(tmp_path), "use_cpu": True, "ignore_pad_token_for_loss": True})
    assert given.notes == []
    labels = np.array(encode_conversation(tiny, TWO, chatglm=ChatGlmOptions(40, 40))[0].labels)
    assert tiny.pad_token_id not in labels
