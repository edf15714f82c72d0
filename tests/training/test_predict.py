"""Answers to test rows: prompts, batches, lengths, the files, and scores against the libraries called by hand."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import jieba
import pytest
import torch
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge_chinese import Rouge

import qgraft
from qgraft.data.messages import as_messages, as_pairs
from qgraft.data.reading import read_dataset
from qgraft.data.tokenizing import ChatGlmOptions, encode_conversation, encode_prompt, resolve_template
from qgraft.errors import DataError, OptionError, StorageError, UnsupportedError
from qgraft.training import predict as predict_module
from qgraft.training import scores as scores_module
from qgraft.training.arguments import TrainArguments, arguments_from_dict
from qgraft.training.held_out import evaluate_held_out
from qgraft.training.predict import answer_rows, check_results, generation_settings, predict, takes_padding
from qgraft.training.scores import SCORES, mean_scores, score

ROOT = Path(__file__).parents[2]
ROWS = [
    {"content": "你好", "summary": "你好，世界！"},
    {"content": "晚上睡不着应该怎么办？多运动", "summary": "多运动，少喝咖啡。"},
    {"content": "1+1?", "summary": "It is 2."},
    {"content": "介绍一下清华大学的历史和现状，介绍一下清华大学", "summary": "清华大学"},
    {"content": "Hello", "summary": "Hello, world!"},
]
NAMED = {"prompt_column": "content", "response_column": "summary"}
GREEDY = {"do_sample": False, "max_new_tokens": 6}
TEXTS = [
    ("宽松的阔腿裤这两年真的吸粉不少。", "这条阔腿裤很宽松，穿起来舒服。明星时尚达人的心头爱。"),
    ("The cat sat on the mat.", "A cat sat on a mat today."),
    ("一", "一"),
    ("你好，世界！你好吗？我很好。", "你好，世界！你好吗？我很好。"),
    ("完全不同", "xyz"),
]


def arguments(folder, **options):
    return arguments_from_dict({"output_dir": str(folder), "use_cpu": True, "do_predict": True, **NAMED, **options})


@pytest.fixture(scope="module", params=["chatglm", "chatglm2"])
def chatglm(request, tiny_chatglm):
    return qgraft.load(tiny_chatglm(request.param), device="cpu")


@pytest.fixture(params=["llama", "gpt2", "qwen3", "chatglm", "chatglm2"])
def loaded(request, tiny_gguf, tiny_chatglm):
    name = request.param
    return qgraft.load(tiny_chatglm(name) if "chatglm" in name else tiny_gguf(name).path, device="cpu")


# --- scores


@pytest.mark.parametrize(("reference", "answer"), TEXTS)
def test_scores_are_those_of_the_original_formula(reference, answer):
    rouge = Rouge().get_scores(" ".join(jieba.cut(answer)), " ".join(jieba.cut(reference)))[0]
    bleu = sentence_bleu([list(reference)], list(answer), smoothing_function=SmoothingFunction().method3)
    expected = {"bleu-4": round(bleu * 100, 4), **{name: round(rouge[name]["f"] * 100, 4) for name in rouge}}
    assert score(reference, answer) == expected


def test_the_mean_is_over_answers_and_an_empty_one_counts_nothing():
    with pytest.raises(ValueError):
        Rouge().get_scores("", "你好")  # what the original would end in
    pairs = [*TEXTS, ("你好", ""), ("你好", " \n"), ("", "你好")]
    whole, found = mean_scores(TEXTS), mean_scores(pairs)
    assert set(found) == set(SCORES)
    assert found == {name: pytest.approx(whole[name] * len(TEXTS) / len(pairs)) for name in SCORES}
    assert score("你好", "") == dict.fromkeys(SCORES, 0.0)


def test_without_the_libraries_it_says_what_to_install(monkeypatch, tmp_path):
    scores_module.load_libraries.cache_clear()
    monkeypatch.setitem(sys.modules, "rouge_chinese", None)
    with pytest.raises(UnsupportedError, match=r"rouge_chinese is not installed") as caught:
        predict(None, None, ROWS, arguments(tmp_path))
    assert "qgraft[predict]" in str(caught.value)


# --- answers


def test_answers_are_those_that_generate_gives_to_each_prompt_alone(loaded, tmp_path):
    model, tokenizer = loaded
    found = answer_rows(model, tokenizer, ROWS, arguments(tmp_path, per_device_eval_batch_size=3, **GREEDY))
    conversations, _ = read_dataset(ROWS, columns={"prompt": "content", "response": "summary"})
    assert len(found.pairs) == len(ROWS)
    for (_, answer), conversation in zip(found.pairs, conversations, strict=True):
        ids = torch.tensor([encode_prompt(tokenizer, conversation.messages[:-1])])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False,
                                eos_token_id=tokenizer.eos_token_id)  # fmt: skip
        expected = tokenizer.decode(output[0, ids.shape[1] :].tolist(), skip_special_tokens=True)
        assert answer == expected.strip()
    assert found.scores == mean_scores(found.pairs)
    assert len({answer for _, answer in found.pairs}) > 1


def test_a_model_that_takes_no_mask_answers_one_by_one(tiny_gguf, tmp_path, monkeypatch):
    model, tokenizer = qgraft.load(tiny_gguf("llama").path, device="cpu")
    expected = answer_rows(model, tokenizer, ROWS, arguments(tmp_path, **GREEDY)).pairs
    assert takes_padding(model)
    monkeypatch.setattr(type(model), "_is_stateful", True)
    sizes = []
    model.register_forward_pre_hook(lambda *_: sizes.append(1))
    generate = predict_module._generate
    monkeypatch.setattr(
        predict_module, "_generate", lambda m, t, p, told: sizes.append(len(p)) or generate(m, t, p, told)
    )
    found = answer_rows(model, tokenizer, ROWS, arguments(tmp_path, **GREEDY))
    assert set(sizes) == {1} and found.pairs == expected
    assert any("one by one" in note for note in found.notes)


def test_prompts_are_cut_and_labels_normalized_as_the_scripts_do(tmp_path):
    """Against the evaluation inputs and labels that the original code computed."""
    for folder, file, name in (("tokenizer_chatglm", "ice_text.model", "ChatGLMTokenizer"),
                               ("tokenizer_chatglm2", "tokenizer.model", "ChatGLM2Tokenizer")):  # fmt: skip
        path = ROOT.parent / "shared" / "golden" / folder / file
        if not path.is_file():
            pytest.skip(f"the released vocabulary is not in {path.parent}")
        module = sys.modules["qgraft.models." + ("chatglm2_tokenizer" if "2" in name else "chatglm_tokenizer")]
        tokenizer = getattr(module, name)(vocab_file=path)
        rows, cases = (json.loads((ROOT / "tests/golden" / folder / f"{part}_examples.json").read_text())
                       for part in ("train", "eval"))  # fmt: skip
        for case in cases:
            columns = {"prompt": "content", "response": "summary"} | (
                {"history": "history"} if case["use_history"] else {}
            )
            conversations, _ = read_dataset(rows[:5], columns=columns)
            pad = tokenizer.pad_token_id
            for conversation, padded, labels in zip(conversations, case["input_ids"], case["labels"], strict=True):
                ids = encode_prompt(
                    tokenizer, conversation.messages[:-1], chatglm=ChatGlmOptions(case["max_source_length"])
                )
                assert [pad] * (len(padded) - len(ids)) + ids == padded
                expected = tokenizer.decode(labels, skip_special_tokens=True, clean_up_tokenization_spaces=True).strip()
                template, longest = resolve_template(tokenizer), case["max_target_length"]
                assert predict_module._expected_text(tokenizer, conversation, template, longest) == expected


def test_the_official_settings_are_chatglms_defaults_and_flags_win(chatglm, tiny_gguf, tmp_path):
    _, tokenizer = chatglm
    official = {"num_beams": 1, "do_sample": True, "temperature": 0.95, "top_p": 0.7}
    assert generation_settings(tokenizer, arguments(tmp_path)) == official
    told = arguments(tmp_path, num_beams=3, temperature=0.5, top_p=0.9)
    assert generation_settings(tokenizer, told) == {"num_beams": 3, "do_sample": True, "temperature": 0.5, "top_p": 0.9}
    for greedy in ({"do_sample": False}, {"temperature": 0}):
        assert generation_settings(tokenizer, arguments(tmp_path, **greedy)) == {"num_beams": 1, "do_sample": False}
    _, other = qgraft.load(tiny_gguf("llama").path, device="cpu")
    assert generation_settings(other, arguments(tmp_path)) == {"num_beams": 1, "do_sample": False}
    drawn = {"num_beams": 1, "do_sample": True, "temperature": 1.0, "top_p": 0.5}
    assert generation_settings(other, arguments(tmp_path, top_p=0.5)) == drawn


def test_answers_end_where_the_scripts_end_them(chatglm, tmp_path, monkeypatch):
    """At 512 tokens in the first generation, at both lengths and one more in the second; or after max_new_tokens."""
    model, tokenizer = chatglm
    seen = []
    monkeypatch.setattr(predict_module, "_generate", lambda m, t, prompts, told: seen.append(
        (len(prompts[0]), told["max_new_tokens"])) or [[] for _ in prompts])  # fmt: skip
    lengths = {"max_source_length": 16, "max_target_length": 40}
    answer_rows(model, tokenizer, ROWS, arguments(tmp_path, per_device_eval_batch_size=1, **lengths))
    whole = 512 if tokenizer.bare_single else 16 + 40 + 1
    assert len(seen) == len(ROWS) and {prompt + new for prompt, new in seen} == {whole}
    assert max(prompt for prompt, _ in seen) == 16
    seen.clear()
    answer_rows(model, tokenizer, ROWS, arguments(tmp_path, max_new_tokens=7, **lengths))
    assert {new for _, new in seen} == {7}


def test_drawing_depends_on_the_seed_alone(chatglm, tmp_path):
    model, tokenizer = chatglm
    options = {"max_new_tokens": 8}
    runs = [answer_rows(model, tokenizer, ROWS, arguments(tmp_path, seed=seed, **options)).pairs for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_beams_find_an_answer_that_is_at_least_as_likely(chatglm, tmp_path):
    model, tokenizer = chatglm
    ids = encode_prompt(tokenizer, [("user", "你好")])

    def likelihood(beams):
        told = {"max_new_tokens": 5, "num_beams": beams, "do_sample": False, "eos_token_id": None}
        (new,) = predict_module._generate(model, tokenizer, [ids], told)
        with torch.no_grad():
            logits = model(torch.tensor([ids + new])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        return float(logits.gather(1, torch.tensor(new)[:, None]).sum())

    assert likelihood(8) >= likelihood(1) - 1e-4


def test_active_adapters_answer(chatglm, tmp_path):
    model, tokenizer = chatglm
    args = arguments(tmp_path, **GREEDY)
    base = answer_rows(model, tokenizer, ROWS, args).pairs
    qgraft.attach_lora(model, r=4)
    try:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.5)
        assert answer_rows(model, tokenizer, ROWS, args).pairs != base
        with qgraft.adapters_off(model):
            assert answer_rows(model, tokenizer, ROWS, args).pairs == base
    finally:
        qgraft.detach_lora(model)


def test_rows_that_cannot_be_asked_are_counted_and_calls_are_expected_as_the_template_writes_them(tiny_gguf, tmp_path):
    model, tokenizer = qgraft.load(tiny_gguf("llama").path, device="cpu")
    template = tmp_path / "calls.jinja"
    template.write_text(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name + c.function.arguments | tojson }}{% endfor %}"
        "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    asked = {"role": "user", "content": "q"}
    call = {"name": "f", "arguments": '{"x": 1}'}
    answers = [{"content": "a"}, {"content": "a", "thinking": "t"}, {"tool_calls": [call]}]
    rows = [{"messages": [asked, {"role": "assistant", **answer}]} for answer in answers]
    args = arguments(tmp_path, template=str(template))
    questions, accounting, notes = predict_module._questions(model, tokenizer, rows, args, None)
    assert [question.expected for question in questions] == ["a", 'f{"x": 1}']
    assert accounting.dropped == {"the chat template writes no reasoning": 1} and accounting.kept == 2 and notes == []


def test_a_text_in_front_of_every_prompt(chatglm, tiny_gguf, tmp_path):
    _, tokenizer = chatglm
    (conversation,), _ = read_dataset(ROWS[:1], columns={"prompt": "content", "response": "summary"})
    chatglm = ChatGlmOptions(source_prefix="介绍: ")
    prompt = encode_prompt(tokenizer, conversation.messages[:-1], chatglm=chatglm)
    text = "介绍: " + tokenizer.prompt_text(as_pairs(conversation.messages[:-1]))
    assert prompt == tokenizer(text)["input_ids"]
    assert encode_conversation(tokenizer, conversation, chatglm=chatglm)[0].input_ids[: len(prompt)] == prompt
    _, other = qgraft.load(tiny_gguf("llama").path, device="cpu")
    joined = [("user", "介绍: 你好"), ("assistant", "你好，世界！")]
    assert encode_prompt(other, conversation.messages[:-1], chatglm=chatglm) == encode_prompt(other, joined[:1])
    sample = encode_conversation(other, conversation, chatglm=chatglm)
    assert sample == encode_conversation(other, replace(conversation, messages=as_messages(joined)))


# --- files


def test_the_files_are_those_of_the_original(chatglm, tmp_path):
    model, tokenizer = chatglm
    rows = [*ROWS, {"content": "", "summary": "x"}, {"content": "a", "summary": None}]
    found = predict(model, tokenizer, rows, arguments(tmp_path / "out", **GREEDY))
    lines = (tmp_path / "out" / "generated_predictions.txt").read_text(encoding="utf-8").splitlines()
    assert lines == [
        json.dumps({"labels": label, "predict": answer}, ensure_ascii=False) for label, answer in found.pairs
    ]
    assert len(lines) == len(ROWS) and "你好" in lines[0]
    results = json.loads((tmp_path / "out" / "predict_results.json").read_text())
    again = mean_scores([(row["labels"], row["predict"]) for row in map(json.loads, lines)])
    assert {name: results[f"predict_{name}"] for name in SCORES} == again
    assert results["predict_samples"] == len(ROWS)
    assert results["generation"] == {"num_beams": 1, "do_sample": False, "max_new_tokens": 6}
    assert results["accounting"]["dropped"] == {"empty question": 1, "no answer": 1}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"generated_predictions.txt", "predict_results.json"}


def test_earlier_predictions_are_replaced_only_if_told_and_nothing_else_is_touched(chatglm, tmp_path):
    model, tokenizer = chatglm
    (tmp_path / "checkpoint-1").mkdir()
    predict(model, tokenizer, ROWS[:1], arguments(tmp_path, **GREEDY))
    with pytest.raises(StorageError, match=r"generated_predictions\.txt, predict_results\.json already"):
        predict(model, tokenizer, ROWS, arguments(tmp_path, **GREEDY))
    predict(model, tokenizer, ROWS, arguments(tmp_path, overwrite_output_dir=True, **GREEDY))
    assert len((tmp_path / "generated_predictions.txt").read_text().splitlines()) == len(ROWS)
    assert (tmp_path / "checkpoint-1").is_dir()


def test_nothing_is_written_when_answering_fails(chatglm, tmp_path, monkeypatch):
    model, tokenizer = chatglm

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(KeyboardInterrupt):
        predict(model, tokenizer, ROWS, arguments(tmp_path / "out", **GREEDY))
    assert not (tmp_path / "out").exists()


# --- rows


def test_rows_come_from_the_test_set_or_else_the_held_out_one_and_may_be_fewer(chatglm, tmp_path):
    model, tokenizer = chatglm
    for name, count in (("test", 4), ("held", 3)):
        lines = [json.dumps(row, ensure_ascii=False) for row in ROWS[:count]]
        (tmp_path / f"{name}.json").write_text("\n".join(lines), encoding="utf-8")
    files = {"test_file": str(tmp_path / "test.json"), "validation_file": str(tmp_path / "held.json")}

    def count(**options):
        args = arguments(tmp_path / "out", overwrite_output_dir=True, **GREEDY, **options)
        return len(predict(model, tokenizer, None, args).pairs)

    assert count(**files) == 4
    assert count(validation_file=files["validation_file"]) == 3
    assert count(**files, max_predict_samples=2, max_eval_samples=1) == 2
    assert count(**files, max_samples=1) == 1
    args = arguments(tmp_path, do_eval=True, max_eval_samples=1, **files)
    assert evaluate_held_out(model, tokenizer, args)[1].kept == 1


def test_a_prompt_that_fills_the_context_is_dropped_and_counted(chatglm, tmp_path):
    model, tokenizer = chatglm
    rows = [*ROWS, {"content": "你好" * 600, "summary": "x"}]
    found = answer_rows(model, tokenizer, rows, arguments(tmp_path, **GREEDY))
    assert len(found.pairs) == len(ROWS)
    assert found.accounting.dropped == {"a prompt as long as the model's context of 512 tokens": 1}
    with pytest.raises(DataError, match="no row is left to answer"):
        answer_rows(model, tokenizer, rows[-1:], arguments(tmp_path, **GREEDY))


@pytest.mark.parametrize(
    ("rows", "options", "expected"),
    [
        (None, {}, "do_predict has no rows"),
        ([], {}, "holds no rows"),
        (ROWS, {"prompt_column": "ask"}, "no column 'ask'"),
        (ROWS, {"response_column": "reply"}, "no column 'reply'"),
        ([{"content": "你好", "summary": ""}], {}, "no answer: 1"),
    ],
)
def test_rows_that_cannot_be_answered_are_refused(chatglm, tmp_path, rows, options, expected):
    with pytest.raises(DataError, match=expected):
        predict(*chatglm, rows, arguments(tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


def test_lengths_of_chatglms_scripts_are_refused_for_other_tokenizers(tiny_gguf, tmp_path):
    model, tokenizer = qgraft.load(tiny_gguf("llama").path, device="cpu")
    with pytest.raises(OptionError, match="max_source_length"):
        answer_rows(model, tokenizer, ROWS, arguments(tmp_path, max_source_length=20))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"num_beams": 0, "max_new_tokens": 0},
            "max_new_tokens=0: .*; num_beams=0",
        ),
        ({"temperature": -1.0}, "temperature=-1.0: expected 0, or a number from 1e-05"),
        ({"temperature": float("nan")}, "temperature=nan: expected 0, or a number"),
        ({"top_p": 0.0}, "top_p=0.0: expected a number above 0, at most 1"),
        ({"max_predict_samples": 0}, "max_predict_samples=0"),
        ({"pre_seq_len": 0}, "pre_seq_len=0: expected a whole number from 1 to"),
        ({"prefix_dropout": 1.0}, "prefix_dropout=1.0"),
        ({"quantization_bit": 5}, "quantization_bit=5: expected 4 or 8"),
        ({"quantization_bit": 4, "quantize": "q4_1"}, "give one of them"),
        ({"val_max_target_length": 2}, "a whole number from 3 to"),
        ({"test_file": "a", "test_dataset": "b"}, "are the same option"),
    ],
)
def test_impossible_numbers_are_refused(tmp_path, options, expected):
    with pytest.raises(OptionError, match=expected):
        arguments(tmp_path, **options)


def test_an_output_dir_that_cannot_be_made_is_found_out_before_anything_is_answered(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write .*file/out: Not a directory"):
        check_results(TrainArguments(output_dir=str(tmp_path / "file" / "out"), do_train=False, do_eval=True), "x")
    check_results(TrainArguments(output_dir=str(tmp_path / "out"), do_train=False, do_eval=True), "x")
    assert not (tmp_path / "out").exists()
