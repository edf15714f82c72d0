"""Which tokens of a conversation are learned, under templates as published: compared with transformers' rendering."""

import json

import pytest

from qgraft.data.masks import CUT_SHORT, EMPTY_BLOCK, NO_END, OWN_WORDS, RETOKENIZED, SEVERAL, THINKS_ANYWAY
from qgraft.data.messages import Call, Conversation, ConversationError, Message
from qgraft.data.reading import Accounting, read_dataset
from qgraft.data.rendering import MOVED_SYSTEM, REWRITTEN
from qgraft.data.templates import ChatTemplate, variant
from qgraft.data.tokenizing import IGNORED, build_samples, encode_conversation, encode_prompt, resolve_template
from qgraft.data.turn_tokens import READ_AS_TEXT
from qgraft.errors import DataError

MARKS_A_NEWLINE = ("lfm2_2_5", "qwen3_marked")  # behind the end, as something that the model writes
END = {  # original -> the token that ends an answer there
    "hermes": "<|im_end|>", "qwen2_5": "<|im_end|>", "qwen3": "<|im_end|>", "qwen3_5_think": "<|im_end|>",
    "lfm2_2_5": "<|im_end|>", "llama3": "<|eot_id|>", "llama3_1": "<|eot_id|>", "gemma": "<end_of_turn>", "phi3": "<|end|>",
    "mistral_7b_v0_2": "</s>", "deepseekv3": "<｜end▁of▁sentence｜>", "r1_distill": "<｜end▁of▁sentence｜>",
    "qwen3_marked": "<|im_end|>",
}  # fmt: skip
ROUNDS = Conversation.of(
    "a:1",
    ("user", "Hi"),
    ("assistant", "Hello"),
    ("user", "Who?"),
    ("assistant", "Me"),
    ("user", "So?"),
    ("assistant", "Yes"),
)
PARAMETERS = {"type": "object", "properties": {}}
TOOLS = ({"type": "function", "function": {"name": "look", "description": "d", "parameters": PARAMETERS}},)
CALLED = Conversation(
    (Message("user", "Weather?"), Message("assistant", calls=(Call("look", '{"at": "Paris"}'),)),
     Message("tool", "12 C"), Message("assistant", "It is 12 C")), "a:1", TOOLS,
)  # fmt: skip


def thinking(*reasonings: str, apart: bool = True) -> Conversation:
    """Questions with answers, each of which thought something first."""
    messages = []
    for number, reasoning in enumerate(reasonings):
        answer = Message("assistant", f"A{number}", reasoning=reasoning)
        if not apart:
            answer = Message("assistant", f"<think>\n{reasoning}\n</think>\n\nA{number}")
        messages += [Message("user", f"Q{number}"), answer]
    return Conversation(tuple(messages), "a:1")


def learned(tokenizer, samples) -> list[str]:
    for sample in samples:
        assert all(label in (IGNORED, token) for token, label in zip(sample.input_ids, sample.labels, strict=True))
    return [tokenizer.decode([label for label in sample.labels if label != IGNORED]) for sample in samples]


def runs(sample) -> list[tuple[int, int]]:
    """(start, stop) of each stretch of labels."""
    flags = [False, *(label != IGNORED for label in sample.labels), False]
    starts = [n for n in range(len(flags) - 1) if flags[n + 1] and not flags[n]]
    return [(start, next(n for n in range(start, len(flags)) if not flags[n + 1])) for start in starts]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("name", END)
def test_every_answer_is_learned_once_behind_its_prompt(chat_tokenizer, original, name, bos):
    """In front of each learned stretch stand exactly the ids that a server sends, but for a closed block of no thoughts."""
    tokenizer = chat_tokenizer(END[name], original(name))
    tokenizer._add_bos_token = bos
    samples = encode_conversation(tokenizer, ROUNDS)
    stretches = [(sample, *run) for sample in samples for run in runs(sample)]
    assert len(stretches) == 3
    for count, (sample, start, stop) in zip((1, 3, 5), stretches, strict=True):
        prompt = encode_prompt(tokenizer, ROUNDS.messages[:count])
        assert sample.input_ids[: len(prompt)] == prompt
        between = tokenizer.decode(sample.input_ids[len(prompt) : start]).replace("<think>", "").replace("</think>", "")
        assert between.strip() == ""
        answer = tokenizer.decode(sample.input_ids[start:stop])
        assert answer == ROUNDS.messages[count].content + END[name] + ("\n" if name in MARKS_A_NEWLINE else "")


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "deepseekv3", "r1_distill", "glm4moe", "qwen3_marked"])
def test_an_empty_thinking_block_is_never_learned(chat_tokenizer, original, name):
    tokenizer = chat_tokenizer(END.get(name, "</s>"), original(name))
    accounting = Accounting(read=1, kept=1)
    samples = build_samples(tokenizer, [ROUNDS], accounting)
    assert "think" not in "".join(learned(tokenizer, samples))
    assert any(EMPTY_BLOCK in note for note in accounting.notes)


def test_a_block_that_the_row_itself_has_is_learned_as_it_is(chat_tokenizer, original):
    tokenizer = chat_tokenizer(template=original("qwen3"))
    row = Conversation.of("a:1", ("user", "Hi /no_think"), ("assistant", "<think>\n\n</think>\n\nHello"))
    assert learned(tokenizer, encode_conversation(tokenizer, row)) == ["<think>\n\n</think>\n\nHello<|im_end|>"]


def test_enable_thinking_false_has_the_block_in_the_prompt(chat_tokenizer, original):
    tokenizer = chat_tokenizer(template=original("qwen3"))
    template = resolve_template(tokenizer, enable_thinking=False)
    (sample,) = encode_conversation(tokenizer, ROUNDS, template=template, mask_history=True)
    prompt = encode_prompt(tokenizer, ROUNDS.messages[:5], template=template)
    assert tokenizer.decode(prompt).endswith("<think>\n\n</think>\n\n")
    assert sample.input_ids[: len(prompt)] == prompt and sample.labels[len(prompt)] != IGNORED


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "deepseekv3", "r1_distill"])
def test_what_answers_think_is_learned_each_in_its_own_rendering(chat_tokenizer, original, name, apart):
    tokenizer = chat_tokenizer(END[name], original(name))
    conversation = thinking("HMM", "OK", apart=apart)
    samples = encode_conversation(tokenizer, conversation)
    opened = "" if name == "qwen3" else "<think>\n"
    block = "<think>\n{}\n</think>\n\n".removeprefix(opened)
    assert learned(tokenizer, samples) == [
        block.format(f"{t}") + f"A{n}{END[name]}" for n, t in enumerate(("HMM", "OK"))
    ]
    for sample, count in zip(samples, (1, 3), strict=True):
        prompt = encode_prompt(tokenizer, conversation.messages[:count])
        assert sample.input_ids[: len(prompt)] == prompt and sample.labels[len(prompt)] != IGNORED
    assert "HMM" not in tokenizer.decode(samples[1].input_ids)  # as the template has it once others follow
    masked = encode_conversation(tokenizer, conversation, mask_reasoning=True)
    assert [sample.input_ids for sample in masked] == [sample.input_ids for sample in samples]
    assert learned(tokenizer, masked) == [f"A{n}{END[name]}" for n in range(2)]


@pytest.mark.parametrize("name", ["hermes", "llama3", "gemma", "phi3"])
def test_reasoning_that_a_template_cannot_write_is_a_counted_drop(chat_tokenizer, original, name):
    tokenizer = chat_tokenizer(END[name], original(name))
    accounting = Accounting(read=2, kept=2)
    assert len(build_samples(tokenizer, [thinking("HMM"), ROUNDS], accounting)) == 1
    assert (accounting.kept, accounting.dropped) == (1, {"the chat template writes no reasoning": 1})


def test_an_answer_is_as_transformers_writes_it(chat_tokenizer, original):
    """The whole sample of a template that rewrites nothing is apply_chat_template's text."""
    for name in ("hermes", "llama3", "gemma", "phi3", "qwen2_5"):
        tokenizer = chat_tokenizer(END[name], original(name))
        (sample,) = encode_conversation(tokenizer, ROUNDS)
        chat = [{"role": m.role, "content": m.content} for m in ROUNDS.messages]
        assert tokenizer.decode(sample.input_ids) == tokenizer.apply_chat_template(chat, tokenize=False)


@pytest.mark.parametrize("conversation", [ROUNDS, thinking("HMM", "OK"), CALLED], ids=["rounds", "thinking", "calls"])
def test_generation_marks_are_what_transformers_masks(chat_tokenizer, original, conversation):
    """Of the last answer in each sample, the text that return_assistant_tokens_mask tells; blocks of no thoughts aside."""
    template = original("qwen3_marked")
    tokenizer = chat_tokenizer(template=template)
    samples = encode_conversation(tokenizer, conversation)
    answers = [n for n, message in enumerate(conversation.messages) if message.role == "assistant"]
    ours = [tokenizer.decode(sample.input_ids[start:stop]) for sample in samples for start, stop in runs(sample)]
    for index, text in zip(answers, ours, strict=True):
        chat = []
        for message in conversation.messages[: index + 1]:
            calls = {"tool_calls": [call.as_dict() for call in message.calls]} if message.calls else {}
            apart = {"reasoning_content": message.reasoning} if message.reasoning else {}
            chat.append({"role": message.role, "content": message.content, **calls, **apart})
        coded = tokenizer.apply_chat_template(chat, tools=list(conversation.tools) or None, return_dict=True,
                                              return_assistant_tokens_mask=True)  # fmt: skip
        masked = tokenizer.decode([t for t, m in zip(coded["input_ids"], coded["assistant_masks"], strict=True) if m])
        assert masked.endswith(text)
        assert masked.removesuffix(text).rpartition("<|im_end|>\n")[2] in ("", "<think>\n\n</think>\n\n")


def test_marks_without_the_end_are_kept_and_said(chat_tokenizer):
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer, accounting = chat_tokenizer(template=template), Accounting(read=1, kept=1)
    assert learned(tokenizer, build_samples(tokenizer, [ROUNDS], accounting)) == ["HelloMeYes"]
    assert [note.removesuffix(" (rows: 1)") for note in accounting.notes] == [NO_END]


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3_1", "lfm2_2_5", "deepseekv3", "qwen3_5_think"])
def test_calls_are_learned_as_the_template_writes_them(chat_tokenizer, original, name):
    tokenizer = chat_tokenizer(END[name], original(name))
    conversation = CALLED if name != "deepseekv3" else Conversation(CALLED.messages, "a:1")
    samples = encode_conversation(tokenizer, conversation)
    texts = [tokenizer.decode(sample.input_ids[start:stop]) for sample in samples for start, stop in runs(sample)]
    assert len(texts) == 2
    assert (
        "look" in texts[0] and "Paris" in texts[0] and texts[0].rstrip().endswith(END[name]) and '\\"' not in texts[0]
    )
    assert texts[1].rstrip() == "It is 12 C" + END[name]
    assert "12 C" in tokenizer.decode(samples[-1].input_ids).split("look")[-1]
    chat = [{"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": "",
             "tool_calls": [CALLED.messages[1].calls[0].as_dict(as_text=name == "deepseekv3")]}]  # fmt: skip
    whole = tokenizer.apply_chat_template(chat, tools=list(conversation.tools) or None, tokenize=False)
    assert texts[0] in whole


@pytest.mark.parametrize(
    ("name", "why"),
    [("hermes", "the chat template writes no tools"), ("gemma", "must alternate"), ("deepseekv3", "writes no tools"),
     ("llama3", "writes no tools")],
)  # fmt: skip
def test_tools_and_calls_that_a_template_cannot_write_are_refused(chat_tokenizer, original, name, why):
    with pytest.raises(ConversationError, match=why):
        encode_conversation(chat_tokenizer(END[name], original(name)), CALLED)
    beside = Conversation((Message("user", "q"), Message("assistant", "words", calls=CALLED.messages[1].calls)), "a:1")
    with pytest.raises(ConversationError, match="beside tool_calls"):
        encode_conversation(chat_tokenizer(END["llama3_1"], original("llama3_1")), beside)


def test_a_turn_that_a_template_leaves_out_is_refused(chat_tokenizer):
    deaf = (
        "{% for m in messages %}{% if m.role != 'tool' %}{{ m.role + ':' + m.content + '</s>' }}{% endif %}{% endfor %}"
    )
    tokenizer = chat_tokenizer("</s>", deaf + "{% if add_generation_prompt %}assistant:{% endif %}")
    rows = Conversation.of("a:1", ("user", "q"), ("assistant", "a"), ("tool", "RESULT"), ("assistant", "b"))
    with pytest.raises(ConversationError, match="leaves out turns of role tool"):
        encode_conversation(tokenizer, rows)


@pytest.mark.parametrize(
    ("name", "written"),
    [("glm4", "<|observation|>\n12 C"), ("qwen3", "<tool_response>\n12 C\n</tool_response>"),
     ("llama3_1", '<|start_header_id|>ipython<|end_header_id|>\n\n"12 C"<|eot_id|>'),
     ("hermes", "<|im_start|>tool\n12 C<|im_end|>")],
)  # fmt: skip
def test_a_tools_turn_has_the_role_that_the_template_knows(chat_tokenizer, original, name, written):
    tokenizer = chat_tokenizer(END.get(name, "</s>"), original(name))
    for role in ("tool", "observation", "ipython", "function"):
        turns = [("user", "q"), ("assistant", "call"), (role, "12 C"), ("assistant", "b")]
        (conversation,), _ = read_dataset([{"messages": [{"role": said, "content": text} for said, text in turns]}])
        assert written in tokenizer.decode(encode_conversation(tokenizer, conversation)[-1].input_ids)


def test_a_system_text_without_a_role_stands_in_the_first_question_or_is_refused(chat_tokenizer, original):
    tokenizer = chat_tokenizer("<end_of_turn>", original("gemma"))
    row = Conversation.of("a:1", ("system", "Be brief."), ("user", "q"), ("assistant", "a"))
    plain, accounting = Conversation.of("a:2", ("user", "q"), ("assistant", "a")), Accounting(read=2, kept=2)
    samples = build_samples(tokenizer, [row, plain], accounting)
    assert "user\nBe brief.\n\nq<end_of_turn>" in tokenizer.decode(samples[0].input_ids)
    assert accounting.notes == [f"{MOVED_SYSTEM} (rows: 1)"]
    prompt = encode_prompt(tokenizer, row.messages[:2])
    assert (
        samples[0].input_ids[: len(prompt)] == prompt == encode_prompt(tokenizer, [("user", "q")], system="Be brief.")
    )
    accounting = Accounting(read=2, kept=2)
    dropping = resolve_template(tokenizer, system_text="drop")
    assert len(build_samples(tokenizer, [row, plain], accounting, template=dropping)) == 1
    assert accounting.dropped == {"a system text, and the chat template has no system role": 1}
    silent = "{% for m in messages if m.role != 'system' %}{{ m.role + ':' + m.content + '</s>' }}{% endfor %}"
    tokenizer = chat_tokenizer("</s>", silent + "{% if add_generation_prompt %}assistant:{% endif %}")
    assert "Be brief." in tokenizer.decode(encode_conversation(tokenizer, row)[0].input_ids)


def test_rows_that_no_template_takes_are_counted_and_all_of_them_are_an_error(chat_tokenizer):
    """Whatever a template raises for one row, the others are trained on."""
    fussy = (
        "{% for m in messages %}{% if m.content == 'bad' %}{{ 1 / 0 }}{% elif m.content == 'worse' %}{{ 'a' * 10**9 }}"
        "{% elif m.content == 'index' %}{{ [][3].x }}{% endif %}{{ m.role + ':' + m.content + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer = chat_tokenizer("</s>", fussy)
    rows = [
        Conversation.of(f"a:{n}", ("user", q), ("assistant", "a"))
        for n, q in enumerate(("bad", "worse", "index", "good"))
    ]
    accounting = Accounting(read=4, kept=4)
    assert [sample.source for sample in build_samples(tokenizer, rows, accounting)] == ["a:3"]
    assert accounting.kept + sum(accounting.dropped.values()) == 4 and len(accounting.dropped) == 3
    with pytest.raises(DataError, match="no sample is left: read 3 rows, kept 0, dropped 3") as error:
        build_samples(tokenizer, rows[:3], Accounting(read=3, kept=3))
    assert "built-in training variants chatml, llama-3, gemma, qwen3" in (error.value.hint or "")


def test_what_was_done_is_said_once_with_the_number_of_rows(chat_tokenizer, original):
    tokenizer = chat_tokenizer(END["r1_distill"], original("r1_distill"))
    accounting = Accounting(read=3, kept=3)
    build_samples(tokenizer, [thinking("a", "b"), thinking("c"), ROUNDS], accounting)
    assert sorted(accounting.notes) == sorted(
        [f"{OWN_WORDS} (rows: 2)", f"{SEVERAL} (rows: 2)", f"{EMPTY_BLOCK} (rows: 1)"]
    )
    assert RETOKENIZED not in "".join(accounting.notes)


def test_a_variant_learns_what_the_original_cannot(chat_tokenizer):
    """R1's distillations with reasoning apart and calls: refused under the original, learned under the variant."""
    tokenizer = chat_tokenizer(END["r1_distill"])
    messages = (Message("user", "q"), Message("assistant", "", reasoning="HMM", calls=CALLED.messages[1].calls))
    template = ChatTemplate(variant("r1-distill"), "r1-distill")
    (text,) = learned(tokenizer, encode_conversation(tokenizer, Conversation(messages, "a:1"), template=template))
    assert text.startswith("HMM\n</think>\n\n<｜tool▁calls▁begin｜>") and text.endswith("<｜end▁of▁sentence｜>")


# Weights, and one row of each kind


def test_weights_mask_and_scale(chat_tokenizer, original):
    tokenizer = chat_tokenizer(template=original("hermes"))
    answers = [
        Message("assistant", "Hello", weight=0),
        Message("assistant", "Me", weight=0.5),
        Message("assistant", "Yes"),
    ]
    messages = [message for n in range(3) for message in (ROUNDS.messages[2 * n], answers[n])]
    (sample,) = encode_conversation(tokenizer, Conversation(tuple(messages), "a:1"))
    (plain,) = encode_conversation(tokenizer, ROUNDS)
    assert sample.input_ids == plain.input_ids and plain.weights is None
    assert learned(tokenizer, [sample]) == ["Me<|im_end|>Yes<|im_end|>"]
    assert [weight for weight in sample.weights if weight] == [0.5] * len("Me.") + [1.0] * len(
        "Yes."
    )  # and an end each
    assert [bool(weight) for weight in sample.weights] == [label != IGNORED for label in sample.labels]
    with pytest.raises(ConversationError, match="its weight is 0"):
        encode_conversation(tokenizer, Conversation((messages[0], answers[0]), "a:1"))
    with pytest.raises(ConversationError, match="train_on_prompt learns every token"):
        encode_conversation(tokenizer, Conversation(tuple(messages), "a:1"), train_on_prompt=True)


ONE_OF_EACH = {
    "alpaca": {"instruction": "q", "output": "a"},
    "weight": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 2}]},
    "masked": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "train": False}]},
    "reasoning": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "thinking": "t"}]},
    "calls": {"messages": [{"role": "user", "content": "q"},
                           {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
                           {"role": "ipython", "content": "1"}, {"role": "assistant", "content": "b"}]},
    "sharegpt call": {"tools": '[{"name": "f", "parameters": {}}]', "conversations": [
        {"from": "human", "value": "q"}, {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "1"}, {"from": "gpt", "value": "b"}]},
    "system": {"instruction": "q", "output": "a", "system": "s"},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]},
                           {"role": "assistant", "content": "a"}]},
    "image": {"messages": [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "a"}]},
    "bad weight": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": -1}]},
    "unknown": {"instruction": "q", "output": "a", "id": 7},
    "empty": {"instruction": "q", "output": ""},
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "lost"),
    [("qwen3", {"masked", "image", "bad weight", "empty"}),
     ("hermes", {"masked", "image", "bad weight", "empty", "reasoning", "calls", "sharegpt call"}),
     ("gemma", {"masked", "image", "bad weight", "empty", "reasoning", "calls", "sharegpt call"})],
)  # fmt: skip
def test_a_file_with_a_row_of_each_kind_is_accounted_for(chat_tokenizer, original, tmp_path, name, lost):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ONE_OF_EACH.values()))
    tokenizer = chat_tokenizer(END[name], original(name))
    conversations, accounting = read_dataset(str(file))
    samples = build_samples(tokenizer, conversations, accounting)
    kinds = dict(enumerate(ONE_OF_EACH, 1))
    kept = {kinds[int(sample.source.rpartition(":")[2])] for sample in samples}
    assert kept == ONE_OF_EACH.keys() - lost
    assert accounting.read == len(ONE_OF_EACH) == accounting.kept + sum(accounting.dropped.values())
    assert accounting.kept == len(kept)
    assert accounting.said()[-1] == "keys of rows that have no effect: id (1)"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("<think>T</think>A", "A<|im_end|>"),
        ("\n<think>\nT\n</think>\n\nA", "A<|im_end|>"),
        ("A", "A<|im_end|>"),
        ("Well <think>T</think> A", None),
        ("T</think>A", None),
        ("<think>T</think>A<think>Y</think>B", None),
        ("Use `<think>` here, then `</think>`.", None),
        ("<think>T no end", None),
    ],
)
def test_reasoning_is_masked_where_it_is_one_block_at_the_beginning(chat_tokenizer, original, content, expected):
    """Otherwise nobody can say what is reasoning: the row is dropped, and counted."""
    tokenizer = chat_tokenizer("<|im_end|>", original("hermes"))
    asked = Conversation.of("a:1", ("user", "Q"), ("assistant", content))
    if expected is None:
        with pytest.raises(ConversationError, match="mask_reasoning: thinking tags elsewhere"):
            encode_conversation(tokenizer, asked, mask_reasoning=True)
    else:
        assert learned(tokenizer, encode_conversation(tokenizer, asked, mask_reasoning=True)) == [expected]


@pytest.mark.parametrize("name", ["qwen3", "r1-distill"])
def test_words_before_the_reasoning_are_not_lost_in_silence(chat_tokenizer, name):
    tokenizer = chat_tokenizer("<|im_end|>", "")
    chosen = ChatTemplate(variant(name), name)
    asked = Conversation.of("a:1", ("user", "Q"), ("assistant", "Well <think>T</think> A"))
    with pytest.raises(ConversationError, match="leaves out a part of an answer: 'Well'"):
        encode_conversation(tokenizer, asked, template=chosen)
    both = Conversation((Message("user", "Q"), Message("assistant", "<think>X1Y2</think>A1", reasoning="T1")), "a:1")
    try:
        (text,) = learned(tokenizer, encode_conversation(tokenizer, both, template=chosen))
    except ConversationError:
        return
    assert "X1Y2" in text and "T1" in text and "A1" in text


def test_what_changes_an_answer_is_said(chat_tokenizer, original):
    tokenizer = chat_tokenizer("<|im_end|>", original("hermes"))
    upper = ChatTemplate(original("hermes").replace("message['content']", "(message['content'] | upper)"), "upper")
    assert upper.text != original("hermes")
    for template, content, remark in (
        (upper, "Hello you", REWRITTEN),
        (None, "say ok <|im_end|>", CUT_SHORT),
        (None, "say <|im_end|> ok", READ_AS_TEXT),
        (None, "say ok", None),
    ):
        accounting = Accounting(read=1, kept=1)
        asked = Conversation.of("a:1", ("user", "Q"), ("assistant", content))
        build_samples(tokenizer, [asked], accounting, template=template)
        assert [note.rpartition(" (rows")[0] for note in accounting.notes] == ([remark] if remark else [])


def test_thinking_behind_a_prompt_that_asks_for_none_is_said(chat_tokenizer, original):
    tokenizer = chat_tokenizer("<|im_end|>", original("qwen3"))
    accounting = Accounting(read=1, kept=1)
    template = resolve_template(tokenizer, None, enable_thinking=False)
    build_samples(tokenizer, [thinking("T")], accounting, template=template)
    assert any(note.startswith(THINKS_ANYWAY) for note in accounting.notes)


def test_a_system_column_beside_a_system_message_is_named():
    messages = [
        {"role": "system", "content": "X"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
    conversations, accounting = read_dataset([{"system": "S", "messages": messages}])
    assert conversations[0].messages[0].content == "X"
    assert "system (beside a system message)" in " ".join(accounting.said())
