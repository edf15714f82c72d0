import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qgraft.data.messages import Conversation, Message, as_pairs
from qgraft.data.reading import Accounting
from qgraft.data.templates import CHATML_TEMPLATE, PLAIN_TEMPLATE, ChatTemplate
from qgraft.data.tokenizing import (
    IGNORED,
    Sample,
    build_samples,
    encode_conversation,
    encode_prompt,
    resolve_template,
)
from qgraft.errors import DataError, OptionError, UnsupportedError

SPECIAL = ["<s>", "<|im_start|>", "<|im_end|>", "</s>"]
TWO_TURNS = Conversation.of("a.jsonl:1", ("user", "Hi"), ("assistant", "Hello"), ("user", "Who?"), ("assistant", "Me"))
STRIPPING = CHATML_TEMPLATE.replace("message['content']", "message['content'] | trim")
# Like Qwen3: the last answer gets an empty reasoning block, earlier ones lose it.
REASONING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
NO_END = (  # like ChatGLM2
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'Q: ' + m['content'] + '\\nA: ' }}"
    "{% else %}{{ m['content'] + '\\n\\n' }}{% endif %}{% endfor %}"
)


def make_tokenizer(
    template: str | None = CHATML_TEMPLATE, eos: str | None = "<|im_end|>", special: list[str] = SPECIAL
) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a handful of merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("H", "i"), ("l", "l"), ("Ġ", "H"), ("ĠH", "i"), ("Ċ", "Ċ")]
    pieces = [*special, *alphabet, *("".join(pair) for pair in merges)]
    core = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(piece, special=True) for piece in special])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def encoded(tokenizer: PreTrainedTokenizerFast, conversation: Conversation, **options) -> Sample:
    """The one sample of a conversation."""
    (sample,) = encode_conversation(tokenizer, conversation, **options)
    return sample


def learned(tokenizer: PreTrainedTokenizerFast, sample: Sample) -> str:
    assert len(sample.input_ids) == len(sample.labels)
    assert all(label in (IGNORED, token) for token, label in zip(sample.input_ids, sample.labels, strict=True))
    return tokenizer.decode([label for label in sample.labels if label != IGNORED])


def test_answers_are_learned_with_their_end_token_and_nothing_else(tokenizer):
    sample = encoded(tokenizer, TWO_TURNS)
    assert learned(tokenizer, sample) == "Hello<|im_end|>Me<|im_end|>"
    assert tokenizer.decode(sample.input_ids) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nMe<|im_end|>\n"
    )
    assert sample.source == "a.jsonl:1"


def test_newline_after_the_end_token_is_input_only(tokenizer):
    sample = encoded(tokenizer, TWO_TURNS)
    assert tokenizer.decode(sample.input_ids[-1:]) == "\n"
    assert sample.labels[-2:] == [tokenizer.eos_token_id, IGNORED]


def test_mask_history_learns_the_last_answer(tokenizer):
    sample = encoded(tokenizer, TWO_TURNS, mask_history=True)
    assert learned(tokenizer, sample) == "Me<|im_end|>"
    assert sample.input_ids == encoded(tokenizer, TWO_TURNS).input_ids


def test_train_on_prompt_learns_everything(tokenizer):
    sample = encoded(tokenizer, TWO_TURNS, train_on_prompt=True)
    assert sample.labels == sample.input_ids


def test_train_on_prompt_and_mask_history_exclude_each_other(tokenizer):
    with pytest.raises(OptionError, match="exclude each other"):
        encoded(tokenizer, TWO_TURNS, train_on_prompt=True, mask_history=True)


def test_system_is_put_in_front_only_where_there_is_none(tokenizer):
    with_system = Conversation((Message("system", "Own."), *TWO_TURNS.messages), "a.jsonl:2")
    given = tokenizer.decode(encoded(tokenizer, TWO_TURNS, system="Be kind.").input_ids)
    own = tokenizer.decode(encoded(tokenizer, with_system, system="Be kind.").input_ids)
    assert given.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user")
    assert own.startswith("<|im_start|>system\nOwn.<|im_end|>\n")
    assert "kind" not in own


@pytest.mark.parametrize("template", [CHATML_TEMPLATE, PLAIN_TEMPLATE, NO_END, STRIPPING, REASONING])
@pytest.mark.parametrize("bos", [False, True])
def test_each_answer_is_learned_behind_the_ids_of_its_prompt_at_serving(template, bos):
    tokenizer = make_tokenizer(template)
    tokenizer._add_bos_token = bos
    samples = encode_conversation(tokenizer, TWO_TURNS)
    for count in (1, 3):
        prompt = encode_prompt(tokenizer, TWO_TURNS.messages[:count])
        assert (prompt[0] == tokenizer.bos_token_id) == bos
        (sample,) = (
            each for each in samples if each.input_ids[: len(prompt)] == prompt and _learns_at(each, len(prompt))
        )
        assert sample.labels[len(prompt) - 1] == IGNORED
    assert learned_in_all(tokenizer, samples).count("Hello") == 1


def _learns_at(sample: Sample, place: int) -> bool:
    return any(label != IGNORED for label in sample.labels[place : place + 20])


def learned_in_all(tokenizer: PreTrainedTokenizerFast, samples: list[Sample]) -> str:
    return "".join(learned(tokenizer, sample) for sample in samples)


def test_bos_is_not_added_twice():
    tokenizer = make_tokenizer("{{ bos_token }}" + CHATML_TEMPLATE)
    tokenizer._add_bos_token = True
    sample = encoded(tokenizer, TWO_TURNS)
    assert sample.input_ids.count(tokenizer.bos_token_id) == 1
    assert sample.input_ids[0] == tokenizer.bos_token_id


def test_plain_template_for_tokenizers_without_one():
    tokenizer = make_tokenizer(None, "</s>")
    first, second = encode_conversation(tokenizer, TWO_TURNS, system="S")
    assert tokenizer.decode(first.input_ids) == "S\n\nUser: Hi\nAssistant: Hello</s>\n"
    assert tokenizer.decode(second.input_ids) == (
        "S\n\nUser: Hi\nAssistant: Hello</s>\nUser: Who?\nAssistant: Me</s>\n"
    )
    assert [learned(tokenizer, sample) for sample in (first, second)] == ["Hello</s>", "Me</s>"]


def test_a_prompt_that_ends_in_a_blank_has_earlier_answers_in_other_tokens():
    """ "A: " + "Hello" is learned; a server that sends the answer back has " H" in one token. Both are kept exactly."""
    tokenizer = make_tokenizer(None, "</s>")
    first, second = encode_conversation(tokenizer, TWO_TURNS)
    prompt = encode_prompt(tokenizer, TWO_TURNS.messages[:3])
    assert second.input_ids[: len(prompt)] == prompt != first.input_ids[: len(prompt)]
    (joined,) = encode_conversation(tokenizer, TWO_TURNS, train_on_prompt=True)
    assert joined.input_ids == joined.labels == second.input_ids


def test_missing_end_token_is_appended_to_each_answer_and_learned():
    """Each in a sample of its own: behind an earlier answer the template goes on without one."""
    tokenizer = make_tokenizer(NO_END.replace("A: ", "A:"), "</s>")
    first, second = encode_conversation(tokenizer, TWO_TURNS)
    assert tokenizer.decode(first.input_ids) == "Q: Hi\nA:Hello</s>"
    assert tokenizer.decode(second.input_ids) == "Q: Hi\nA:Hello\n\nQ: Who?\nA:Me</s>"
    assert (learned(tokenizer, first), learned(tokenizer, second)) == ("Hello</s>", "Me</s>")


def test_the_end_of_a_turn_is_known_where_the_tokenizer_names_another_end():
    tokenizer = make_tokenizer(CHATML_TEMPLATE, "</s>")
    assert learned(tokenizer, encoded(tokenizer, TWO_TURNS)) == "Hello<|im_end|>Me<|im_end|>"


def test_other_end_tokens_count_when_named():
    tokenizer = make_tokenizer(CHATML_TEMPLATE.replace("<|im_end|>", " over"), "</s>")
    samples = encode_conversation(tokenizer, TWO_TURNS)
    assert [learned(tokenizer, each) for each in samples] == ["Hello over</s>", "Me over</s>"]
    over = tokenizer(" over", add_special_tokens=False)["input_ids"][-1]
    assert learned(tokenizer, encoded(tokenizer, TWO_TURNS, eos_ids=[over])) == "Hello overMe over"


def test_tokenizer_without_end_token_is_refused():
    with pytest.raises(UnsupportedError, match="no end token"):
        encoded(make_tokenizer(eos=None, special=["<s>"]), TWO_TURNS)


def test_end_token_at_the_end_of_an_answer_ends_what_is_learned(tokenizer):
    tricky = Conversation.of("x:1", ("user", "Hi"), ("assistant", "A<|im_end|>\n"))
    assert learned(tokenizer, encoded(tokenizer, tricky)) == "A<|im_end|>"
    inside = Conversation.of("x:1", ("user", "Hi"), ("assistant", "A<|im_end|>B"))
    assert learned(tokenizer, encoded(tokenizer, inside)) == "A<|im_end|>B<|im_end|>"


def test_template_that_strips_content():
    tokenizer = make_tokenizer(STRIPPING)
    padded = Conversation.of("x:1", ("user", " Hi \n"), ("assistant", "\nHello "))
    assert learned(tokenizer, encoded(tokenizer, padded)) == "Hello<|im_end|>"


def test_template_that_rewrites_history():
    """Each answer as it is last; the empty block that the template puts there is input."""
    tokenizer = make_tokenizer(REASONING)
    samples = encode_conversation(tokenizer, TWO_TURNS)
    assert [learned(tokenizer, sample) for sample in samples] == ["Hello<|im_end|>", "Me<|im_end|>"]
    for count, sample in zip((2, 4), samples, strict=True):
        chat = [{"role": role, "content": content} for role, content in as_pairs(TWO_TURNS.messages[:count])]
        assert tokenizer.decode(sample.input_ids) == tokenizer.apply_chat_template(chat, tokenize=False)
    (last,) = encode_conversation(tokenizer, TWO_TURNS, mask_history=True)
    assert (last.input_ids, last.labels) == (samples[1].input_ids, samples[1].labels)
    assert [sample.part for sample in samples] == [0, 1]


def test_template_whose_prompt_does_not_begin_the_answer_is_an_error():
    tokenizer = make_tokenizer(CHATML_TEMPLATE.replace("assistant\\n' }}", "assistant\\n<think>' }}"))
    with pytest.raises(
        DataError, match=r"a\.jsonl:1: the chat template \(tokenizer\) writes the prompt of answer 1"
    ) as e:
        encoded(tokenizer, TWO_TURNS)
    assert "another template" in (e.value.hint or "")


def test_template_that_refuses_a_conversation_names_it():
    tokenizer = make_tokenizer("{{ raise_exception('no system role') }}")
    with pytest.raises(DataError, match=r"a\.jsonl:1: chat template \(tokenizer\) fails: no system role"):
        encoded(tokenizer, TWO_TURNS)


def test_sentencepiece_answers_get_no_second_blank():
    """A tokenizer that puts a blank before whatever comes first must not do so before each segment."""
    core = Tokenizer(
        models.BPE({piece: n for n, piece in enumerate(["</s>", "▁", *"HieloMW?QA:hoyu[]/NST", "<unk>"])}, [])
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.add_special_tokens([AddedToken("</s>", special=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST]' + m['content'] + '[/INST]' }}"
        "{% else %}{{ m['content'] + '</s>' }}{% endif %}{% endfor %}"
    )
    sample = encoded(tokenizer, Conversation(TWO_TURNS.messages[:2], "x:1"))
    assert tokenizer.convert_ids_to_tokens([t for t in sample.labels if t != IGNORED]) == [*"Hello", "</s>"]


def test_resolve_template(tmp_path, tokenizer):
    bare = make_tokenizer(None)
    for auto in (None, "auto"):
        assert resolve_template(tokenizer, auto) == ChatTemplate(CHATML_TEMPLATE, "tokenizer")
        assert resolve_template(bare, auto).text == PLAIN_TEMPLATE
    assert "no chat template" in resolve_template(bare, None).note
    assert resolve_template(tokenizer, "default") == resolve_template(tokenizer, "plain")
    assert resolve_template(bare, "chatml") == ChatTemplate(CHATML_TEMPLATE, "chatml")
    file = tmp_path / "mine.jinja"
    file.write_text("{{ 'ü' }}", encoding="utf-8")
    assert resolve_template(tokenizer, str(file)) == ChatTemplate("{{ 'ü' }}", str(file))


@pytest.mark.parametrize("name", ["llama3", "qwen", "gemma", "phi", "mistral", "chatglm2", "deepseek3"])
def test_family_names_are_the_tokenizers_own_template_and_say_so(tokenizer, name):
    chosen = resolve_template(tokenizer, name)
    assert (chosen.text, chosen.origin) == (CHATML_TEMPLATE, "tokenizer")
    assert name in chosen.note
    with pytest.raises(OptionError, match="has none"):
        resolve_template(make_tokenizer(None), name)


def test_unknown_templates_are_errors(tmp_path, tokenizer):
    with pytest.raises(OptionError, match="did you mean chatml"):
        resolve_template(tokenizer, "chatmll")
    with pytest.raises(OptionError, match="cannot be read"):
        resolve_template(tokenizer, str(tmp_path / "none.jinja"))
    with pytest.raises(DataError, match="fails"):
        encoded(tokenizer, TWO_TURNS, template=ChatTemplate("{% if %}", "bad.jinja"))


def conversation(answer: str, number: int) -> Conversation:
    return Conversation.of(f"a.jsonl:{number}", ("user", "Hi"), ("assistant", answer))


def test_build_samples_counts_what_it_cuts_and_drops(tokenizer):
    short, long = conversation("Me", 1), conversation("e" * 50, 2)
    hopeless = Conversation.of("a.jsonl:3", ("user", "q" * 60), ("assistant", "Me"))
    whole = encoded(tokenizer, long)
    limit = len(whole.input_ids) - 10
    accounting = Accounting(read=4, kept=3, dropped={"no answer": 1}, examples={"no answer": ["a.jsonl:4"]})
    samples = build_samples(tokenizer, [short, long, hopeless], accounting, template="auto", max_length=limit)
    assert samples == [
        encoded(tokenizer, short),
        Sample(whole.input_ids[:limit], whole.labels[:limit], long.source),
    ]
    assert (accounting.kept, accounting.truncated, accounting.truncated_tokens) == (2, 1, 10)
    assert accounting.dropped == {"no answer": 1, f"no answer token within max_length {limit}": 1}
    assert accounting.examples[f"no answer token within max_length {limit}"] == ["a.jsonl:3"]


def test_build_samples_without_truncation_drops_long_ones(tokenizer):
    accounting = Accounting(read=2, kept=2)
    samples = build_samples(
        tokenizer, [conversation("Me", 1), conversation("e" * 50, 2)], accounting, max_length=60, truncate=False
    )
    assert [sample.source for sample in samples] == ["a.jsonl:1"]
    assert accounting.dropped == {"longer than max_length 60": 1}
    assert accounting.truncated == 0


@pytest.mark.parametrize("room", [0, 1])
def test_the_first_answer_token_decides(tokenizer, room):
    prompt = encode_prompt(tokenizer, [("user", "Hi")])
    accounting = Accounting(read=1, kept=1)
    if room:
        (sample,) = build_samples(tokenizer, [conversation("Hello", 1)], accounting, max_length=len(prompt) + room)
        assert [label for label in sample.labels if label != IGNORED] == sample.input_ids[-1:]
    else:
        with pytest.raises(DataError, match="no sample is left"):
            build_samples(tokenizer, [conversation("Hello", 1)], accounting, max_length=len(prompt))


def test_duplicates_are_kept_and_no_limit_is_no_limit(tokenizer):
    accounting = Accounting(read=2, kept=2)
    assert len(build_samples(tokenizer, [conversation("e" * 500, 1)] * 2, accounting)) == 2
    assert (accounting.read, accounting.kept, accounting.dropped) == (2, 2, {})
