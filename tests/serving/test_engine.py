"""An answer in a batch is the answer alone, whoever comes and goes beside it; and one that fails fails alone."""

import random
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from talkers import MIXES, generated, with_adapters

import qgraft
from qgraft.adapters.attach import attach_lora, detach_adapter
from qgraft.adapters.base import find_adapter
from qgraft.attention import attention_of
from qgraft.errors import AdapterError, DataError, OptionError, UnsupportedError
from qgraft.model_parts import decoder_of
from qgraft.models.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration
from qgraft.models.chatglm2 import ChatGLM2Config, ChatGLM2ForConditionalGeneration
from qgraft.passes.decoding import why_not
from qgraft.serving.engine import Engine, answer_all
from qgraft.serving.passes_of import SharedPasses, SinglePasses
from qgraft.serving.requests import BusyError, Delta, Finish, Request
from qgraft.serving.sampling import Sampling

Maker = Callable[..., Any]
GREEDY = Sampling(temperature=0)


class NoWords:
    """A tokenizer for models without one: every id is a word."""

    eos_token_id, unk_token_id, clean_up_tokenization_spaces = 2, None, False

    def convert_tokens_to_ids(self, tokens: list[str]) -> list[None]:
        return [None] * len(tokens)

    def get_added_vocab(self) -> dict[str, int]:
        return {}

    def decode(self, ids: list[int], **options: Any) -> str:
        return "".join(f"{token} " for token in ids)


def answered(model: Any, tokenizer: Any, requests: list[Request], **options: Any) -> list[Any]:
    """The answers of an engine of its own."""
    engine = Engine(model, tokenizer, **options)
    answers = answer_all(engine, requests)
    engine.stop()
    return answers


def random_requests(model: Any, count: int, seed: int, mixes: Any = MIXES, most: int = 40) -> list[Request]:
    draw = random.Random(seed)
    size = model.get_input_embeddings().weight.shape[0]
    beginnings = [[draw.randrange(4, size) for _ in range(most)] for _ in range(3)]  # some prompts begin alike
    requests = []
    for _ in range(count):
        prompt = draw.choice(beginnings)[: draw.randint(1, most)] + [
            draw.randrange(4, size) for _ in range(draw.randint(1, 5))
        ]
        requests.append(Request(tuple(prompt), draw.choice(mixes), GREEDY, max_tokens=draw.randint(1, 12)))
    return requests


def check_greedy(model: Any, tokenizer: Any, requests: list[Request], **options: Any) -> Engine:
    """Every request's ids are those of generate() for it alone. Returns the engine, closed."""
    engine = Engine(model, tokenizer, **options)
    ends = sorted(engine.ends)
    answers = answer_all(engine, requests)
    engine.stop()
    for request, answer in zip(requests, answers, strict=True):
        expected = generated(model, list(request.prompt), request.adapters, request.max_tokens or 0, ends)
        assert [token.id for token in answer["tokens"]] == expected, (request.adapters, len(request.prompt))
        finish = answer["finish"]
        assert finish.reason == ("length" if len(expected) == request.max_tokens else "stop") and finish.error is None
        text = tokenizer.decode(expected, skip_special_tokens=True)
        assert answer["text"] == text or "\ufffd" in text  # bytes that are no text may come out as text at first
    assert attention_of(model) != "qgraft_cached"
    return engine


@pytest.mark.parametrize(
    "architecture",
    ["llama", "gemma2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "gemma3", "stablelm"))],
)
def test_answers_in_a_batch_are_those_alone(tiny_gguf: Maker, architecture: str) -> None:
    model, tokenizer = qgraft.load(str(tiny_gguf(architecture).path), device="cpu")
    prefix = architecture != "stablelm"  # which takes none
    with_adapters(model, prefix)
    requests = random_requests(model, 8, seed=1, mixes=MIXES if prefix else MIXES[:5])
    engine = check_greedy(model, tokenizer, requests, max_batch=5, pass_tokens=24, max_queue=99)
    assert isinstance(engine.passes, SharedPasses) and engine.counts["passes"] < 60


@pytest.mark.slow
def test_a_dora_answers_among_others_as_it_does_alone(tiny_gguf: Maker) -> None:
    model, tokenizer = qgraft.load(str(tiny_gguf("qwen2").path), device="cpu")
    with_adapters(model, prefix=False)
    attach_lora(model, r=4, lora_alpha=8, use_dora=True, name="dora")
    draw = torch.Generator().manual_seed(4)
    for lora in find_adapter(model, "dora").parts.values():
        lora.lora_B.data.normal_(0, 0.2, generator=draw)
        lora.lora_magnitude_vector.data.mul_(1 + 0.3 * torch.rand(lora.lora_B.shape[0], generator=draw))
    mixes = ({}, {"law": 1.0}, {"dora": 1.0}, {"dora": 0.6, "law": 0.4})
    check_greedy(
        model, tokenizer, random_requests(model, 16, seed=1, mixes=mixes), max_batch=5, pass_tokens=24, max_queue=99
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture",
    ["llama", "gpt2", "gemma2", "gemma3", "qwen2", "qwen3", "phi3", "starcoder2", "nemotron", "stablelm"],
)
def test_two_hundred_random_mixes(tiny_gguf: Maker, architecture: str) -> None:
    """Greedy as generate() alone; drawn as this engine alone, which no library can be asked."""
    model, tokenizer = qgraft.load(str(tiny_gguf(architecture).path), device="cpu")
    prefix = architecture not in ("nemotron", "stablelm")  # which take none
    with_adapters(model, prefix)
    requests = random_requests(model, 200, seed=2, mixes=MIXES if prefix else MIXES[:5])
    check_greedy(model, tokenizer, requests, max_batch=16, pass_tokens=64, max_queue=999)
    drawn = [
        replace(request, sampling=Sampling(seed=seed, temperature=1.2, top_p=0.95, repetition_penalty=1.1))
        for seed, request in enumerate(requests[:40])
    ]
    together = answered(model, tokenizer, drawn, max_batch=16, pass_tokens=64, max_queue=999)
    for request, answer in zip(drawn, together, strict=True):
        (alone,) = answered(model, tokenizer, [request])
        assert answer["tokens"] == alone["tokens"], request.adapters


def chatglm() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 4}
    config = ChatGLMConfig(
        **sizes, vocab_size=60, inner_hidden_size=64, max_sequence_length=64, bos_token_id=50, eos_token_id=51
    )
    return ChatGLMForConditionalGeneration(config).eval()


def test_chatglm_reads_its_context_in_both_directions() -> None:
    model = with_adapters(chatglm())
    marks = model.transformer.marks
    requests = [
        Request((*prompt.prompt[:15], marks.gmask, marks.sop), prompt.adapters, GREEDY, max_tokens=6)
        for prompt in random_requests(model, 6, seed=4)
    ]
    clean = [
        Request(tuple(5 if token >= 46 and at < len(r.prompt) - 2 else token for at, token in enumerate(r.prompt)),
                r.adapters, GREEDY, max_tokens=6)
        for r in requests
    ]  # fmt: skip
    check_greedy(model, NoWords(), clean, max_batch=4, pass_tokens=16)


def test_chatglm2() -> None:
    torch.manual_seed(0)
    config = ChatGLM2Config(
        padded_vocab_size=60, hidden_size=32, num_layers=2, num_attention_heads=4, ffn_hidden_size=64, kv_channels=8,
        seq_length=64,
    )  # fmt: skip
    model = with_adapters(ChatGLM2ForConditionalGeneration(config).eval())
    check_greedy(model, NoWords(), random_requests(model, 6, seed=5), max_batch=4, pass_tokens=16)


def test_a_model_that_cannot_share_passes_answers_one_by_one() -> None:
    torch.manual_seed(0)
    model = transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=40, hidden_size=32, n_layer=2, n_head=4)
    ).eval()
    attach_lora(model, r=4, name="law")
    for lora in find_adapter(model, "law").parts.values():
        torch.nn.init.normal_(lora.lora_B, 0, 0.2)
    requests = random_requests(model, 5, seed=6, mixes=({}, {"law": 1.0}, {"law": 0.5}), most=10)
    engine = check_greedy(model, NoWords(), requests, max_batch=3)
    assert isinstance(engine.passes, SinglePasses) and "no decoder that is told positions" in str(engine.why_not_shared)


# -- who comes and goes --


def sampled(prompt: list[int], seed: int, **options: Any) -> Request:
    return Request(tuple(prompt), options.pop("adapters", {}), Sampling(seed=seed, top_p=0.9, **options), max_tokens=8)


def test_draws_depend_on_the_seed_alone(talker: Any) -> None:
    model, tokenizer = talker
    asked = [sampled([10, 11, 12 + n], seed=n, adapters=MIXES[n]) for n in range(5)]
    together = answered(model, tokenizer, asked)
    engine = Engine(model, tokenizer, max_batch=1)
    for request, answer in zip(asked, together, strict=True):
        assert answer_all(engine, [request])[0]["tokens"] == answer["tokens"]
    other = answer_all(engine, [sampled([10, 11, 12], seed=77)])[0]
    assert other["tokens"] != together[0]["tokens"]
    engine.stop()


def test_an_adapter_of_nans_fails_alone(talker: Any) -> None:
    model, tokenizer = talker
    attach_lora(model, r=2, name="broken")
    for lora in find_adapter(model, "broken").parts.values():
        lora.lora_B.data.fill_(float("nan"))
    engine = Engine(model, tokenizer)
    prompt = list(range(20, 40))
    requests = [Request(tuple(prompt[: 18 + n]), mix, GREEDY, max_tokens=6) for n, mix in enumerate(({}, {"law": 1.0}))]
    expected = answer_all(engine, requests)
    bad = Request(tuple(prompt), {"broken": 1.0}, GREEDY, max_tokens=6)
    again = answer_all(engine, [bad, requests[0], bad, requests[1], bad])
    assert [again[1]["tokens"], again[3]["tokens"]] == [each["tokens"] for each in expected]
    for answer in again[::2]:
        assert (
            answer["finish"].reason == "error" and "not finite" in str(answer["finish"].error) and not answer["tokens"]
        )
    assert answer_all(engine, requests)[1]["tokens"] == expected[1]["tokens"]  # in the slots that the broken ones had
    engine.stop()
    detach_adapter(model, "broken")


def test_a_text_that_cannot_be_decoded_fails_alone(talker: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = talker
    engine = Engine(model, tokenizer)
    request = Request((5, 6, 7), {"law": 1.0}, GREEDY, max_tokens=6)
    (expected,) = answer_all(engine, [request])
    told: list[list[Any]] = [[], [], []]
    asked = [engine.submit(request, events.append) for events in told]

    def broken(*args: Any) -> str:
        raise IndexError("piece id is out of range")

    asked[0].text.push = broken  # type: ignore[method-assign]
    asked[1].text.end = broken  # type: ignore[method-assign]
    while engine.step():
        pass
    for events in told[:2]:
        assert "piece id is out of range" in str(events[-1].error) and events[-1].reason == "error"
    assert "".join(event.text for event in told[2][:-1]) == expected["text"] and not engine.running
    assert "an answer has failed" in caplog.text
    engine.stop()


def test_who_is_cancelled_leaves_a_place(talker: Any) -> None:
    model, tokenizer = talker
    engine = Engine(model, tokenizer, max_batch=2)
    told: list[list[Any]] = [[], [], []]
    asked = [
        engine.submit(Request((5, 6, 7, 8 + n), {}, GREEDY, max_tokens=50, ignore_ends=True), told[n].append)
        for n in range(3)
    ]
    engine.step()
    engine.step()
    assert len(engine.running) == 2 and len(engine.waiting) == 1
    engine.cancel(asked[0])
    engine.step()
    assert told[0][-1].reason == "cancelled" and [len(engine.running), len(engine.waiting)] == [2, 0]
    engine.cancel(asked[1])
    engine.cancel(asked[2])
    assert not engine.step() and engine.passes.used < 0.1
    engine.stop()


def test_memory_that_runs_out_sends_the_latest_back(talker: Any) -> None:
    model, tokenizer = talker
    requests = [
        Request(tuple(range(10 + n, 40 + n)), MIXES[n % 4], GREEDY, max_tokens=30, ignore_ends=True) for n in range(4)
    ]
    plenty = answered(model, tokenizer, requests)
    scarce = Engine(model, tokenizer, cache_tokens=144)
    answers = answer_all(scarce, requests)
    assert [each["tokens"] for each in answers] == [each["tokens"] for each in plenty]
    assert scarce.counts["passes"] > 40 and not scarce.running and not scarce.waiting
    scarce.stop()


def test_equal_beginnings_are_passed_once_under_the_same_adapters(talker: Any) -> None:
    model, tokenizer = talker
    engine = Engine(model, tokenizer)
    prompt = tuple(range(10, 60))

    def cached(adapters: dict[str, float], ids: tuple[int, ...] = prompt) -> int:
        return answer_all(engine, [Request(ids, adapters, GREEDY, max_tokens=3)])[0]["finish"].cached

    assert [cached({}), cached({}), cached({}, prompt[:32]), cached({}, prompt[:33])] == [0, 48, 16, 32]
    assert [cached({"law": 1.0}), cached({"law": 0.5}), cached({"law": 1.0}), cached({"style": 1.0})] == [0, 0, 48, 0]
    detach_adapter(model, "law")
    attach_lora(model, r=4, name="law")
    assert cached({"law": 1.0}) == 0  # another adapter under that name
    engine.stop()


def test_what_cannot_be_answered_is_refused(talker: Any) -> None:
    model, tokenizer = talker
    engine = Engine(model, tokenizer, max_batch=1, max_queue=1)
    with pytest.raises(UnsupportedError, match="by another engine"):
        Engine(model, tokenizer)
    for request, error, said in (
        (Request(()), DataError, "the prompt is empty"),
        (Request((5, 99999)), DataError, "expected ids below"),
        (Request((5,) * 128), DataError, "the prompt is 128 tokens, and the model's context is 128"),
        (Request((5,) * 124, {"style": 1.0}), DataError, "context is 123"),
        (Request((5,), {"tax": 1.0}), AdapterError, "no adapter named 'tax'"),
        (Request((5,), {"law": float("nan")}), OptionError, "finite"),
        (Request((5,), {"style": 0.5}), OptionError, "weights of prefixes"),
        (Request((5,), stop=("",)), OptionError, "stop"),
        (Request((5,), max_tokens=-1), OptionError, "max_tokens"),
        (Request((5,), sampling=Sampling(logit_bias={99999: 1.0})), OptionError, "no token 99999"),
    ):
        with pytest.raises(error, match=said):
            engine.submit(request, print)
    for _ in range(2):
        engine.submit(Request((5,), {}, GREEDY, max_tokens=2), lambda event: None)
    with pytest.raises(BusyError, match="2 requests are waiting"):
        engine.submit(Request((5,), {}, GREEDY), print)
    engine.stop()


def test_the_context_ends_an_answer(talker: Any) -> None:
    model, tokenizer = talker
    engine = Engine(model, tokenizer)
    answers = answer_all(engine, [Request((5,) * 120, mix, GREEDY, ignore_ends=True) for mix in ({}, {"style": 1.0})])
    assert [len(each["tokens"]) for each in answers] == [8, 3]
    assert {each["finish"].reason for each in answers} == {"length"}
    engine.stop()


def test_a_thread_answers_while_adapters_come_and_go(talker: Any) -> None:
    model, tokenizer = talker
    engine = Engine(model, tokenizer)
    request = Request((5, 6, 7), {"law": 1.0}, GREEDY, max_tokens=40, ignore_ends=True)
    (alone,) = answer_all(engine, [request])
    engine.start()
    done, told = threading.Event(), []

    def listen(event: Delta | Finish) -> None:
        told.append(event)
        if isinstance(event, Finish):
            done.set()

    engine.submit(request, listen)
    for name in ("tax", "tax2"):
        with engine.paused():
            attach_lora(model, r=2, name=name)
            assert attention_of(model) != "qgraft_cached"
    with engine.paused():
        detach_adapter(model, "tax")
    assert engine.uses("law") or done.is_set()
    assert done.wait(120)
    assert "".join(event.text for event in told[:-1]) == alone["text"]
    with pytest.raises(ZeroDivisionError), engine.paused():
        raise ZeroDivisionError
    engine.stop(5)
    with pytest.raises(BusyError, match="being stopped"):
        engine.submit(request, listen)


def test_who_is_alone_is_decoded_in_c_over_the_same_memory(talker: Any) -> None:
    model, tokenizer = talker
    if why_not(decoder_of(model)) is not None:
        pytest.skip("no native kernels here")
    prompt = tuple(range(10, 40))
    requests = [
        Request(prompt[: 20 + n], mix, GREEDY, max_tokens=20, ignore_ends=True) for n, mix in enumerate(MIXES[:5])
    ]
    engine = Engine(model, tokenizer)
    together = answer_all(engine, requests)
    assert isinstance(engine.passes, SharedPasses)
    before = engine.passes.native.steps
    alone = [answer_all(engine, [request])[0] for request in requests]
    assert engine.passes.native.steps - before > 50
    assert [each["tokens"] for each in alone] == [each["tokens"] for each in together]
    mixed = answer_all(engine, [replace(requests[1], max_tokens=3), requests[2]])[1]  # by the one, then by the other
    assert mixed["tokens"] == alone[2]["tokens"]
    engine.stop()
