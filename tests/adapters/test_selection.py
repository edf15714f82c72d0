"""What is active is a matter of each call: every answer is the one that it is alone, whatever other threads do."""

import asyncio
import copy
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import qgraft
from qgraft.adapters.attach import detach_adapter
from qgraft.adapters.base import adapter_names, find_adapter, selection_of
from qgraft.adapters.choose import active_adapters, adapters_off, use_adapter
from qgraft.adapters.targets import lora_layers
from qgraft.errors import AdapterError, UnsupportedError
from qgraft.jobs.segments import Segment, serving_segments

SHAPE = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": None,
}  # fmt: skip
NAMES = ("law", "med", "tax", "prefix")


def fill(model: Any, name: str, seed: int, scale: float = 0.5) -> None:
    generator = torch.Generator().manual_seed(seed)
    for key, tensor in qgraft.lora_state_dict(model, name).items():
        if "lora_B" in key:
            tensor.normal_(0, scale, generator=generator)


@pytest.fixture
def model() -> Any:
    """A tiny Llama with three LoRAs of different layers and a prefix; "law" is active."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.15)
    targets = {"law": "all-linear", "med": "q_proj,down_proj,lm_head", "tax": "v_proj"}
    for seed, (name, layers) in enumerate(targets.items()):
        qgraft.attach_lora(model, r=3, target_modules=layers, name=name)
        fill(model, name, seed)
    qgraft.attach_prefix(model, pre_seq_len=3, name="prefix")
    find_adapter(model, "prefix").state_dict()["embedding.weight"].normal_(0, 2)
    use_adapter(model, "law")
    return model


@pytest.fixture(autouse=True)
def quick_switches() -> Iterator[None]:
    """Threads take turns every tenth of a millisecond, in the middle of a layer; each computes on one core."""
    interval, threads = sys.getswitchinterval(), torch.get_num_threads()
    sys.setswitchinterval(1e-4)
    torch.set_num_threads(1)
    yield
    sys.setswitchinterval(interval)
    torch.set_num_threads(threads)


def ids_of(rows: int, tokens: int, seed: int = 1) -> Tensor:
    return torch.randint(3, 97, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def logits(model: Any, ids: Tensor, **options: Any) -> Tensor:
    return model(ids, **options).logits


def generate(model: Any, ids: Tensor, **options: Any) -> Tensor:
    """The logits of each new token of a greedy answer."""
    told = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True, **options}
    return torch.stack(model.generate(ids, attention_mask=torch.ones_like(ids), **told).logits)


def in_thread(work: Callable[[], Any]) -> Any:
    """What `work` returns or raises in a thread of its own, which knows nothing of this one."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def all_at_once(works: list[Callable[[], None]]) -> None:
    """Run these in a thread each, begun together; raises what one of them raises."""
    gate = threading.Barrier(len(works))
    with ThreadPoolExecutor(len(works)) as pool:
        waiting = [pool.submit(lambda work=work: (gate.wait(), work())) for work in works]
        for each in waiting:
            each.result()


# ---------------------------------------------------------------- every answer is the one alone


def calls_of(model: Any, thread: int) -> list[Callable[[], Tensor]]:
    """The four calls that a thread makes again and again, with other adapters in each thread."""
    ids = ids_of(2, 9, seed=thread)
    own, other = NAMES[thread % 4], NAMES[(thread + 1) % 4]

    def base() -> Tensor:
        with adapters_off(model):
            return logits(model, ids)

    return [
        lambda: logits(model, ids, adapter_names=[own, None]),
        lambda: logits(model, ids, adapter_names=[own, other]),
        lambda: logits(model, ids),
        base,
        lambda: generate(model, ids[:, : 4 + thread % 3], adapter_names=[own, own]),
        lambda: generate(model, ids[:, : 4 + thread % 3], adapter_names=[other, None]),
    ]


@pytest.mark.parametrize("turns", [40, pytest.param(100, marks=pytest.mark.slow)])
def test_eight_threads_with_four_adapters(model: Any, turns: int) -> None:
    """So many calls each: seven forward passes to one answer."""
    wrong: list[str] = []
    works, expected = [], []
    for thread in range(8):
        calls = calls_of(model, thread)
        want = [call() for call in calls]
        expected += want
        order = [index % 4 for index in range(7)]

        def work(thread: int = thread, calls: Any = calls, want: Any = want, order: Any = order) -> None:
            for turn in range(turns):
                index = 4 + turn % 2 if turn % 8 == 7 else order[turn % 7]
                if not torch.equal(calls[index](), want[index]):
                    wrong.append(f"thread {thread}, call {turn}: {index}")

        works.append(work)
    all_at_once(works)
    assert wrong == []
    forwards = [each for each in expected if each.dim() == 3 and each.shape[0] == 2]
    assert not any(torch.equal(a, b) for i, a in enumerate(forwards) for b in forwards[:i])  # they do differ
    assert selection_of(model).running == set()


def test_adapter_names_beside_a_default_that_changes(model: Any) -> None:
    """One thread names its adapters, one goes by the default, one changes it: no answer is a mixture."""
    ids = ids_of(2, 9)
    named = logits(model, ids, adapter_names=["med", "prefix"])
    defaults = []
    for name in ("law", "tax", "prefix", None):
        use_adapter(model, name)
        defaults.append((logits(model, ids), generate(model, ids)))
    wrong: list[str] = []
    done = threading.Event()

    def by_name() -> None:
        for _ in range(60):
            if not torch.equal(logits(model, ids, adapter_names=["med", "prefix"]), named):
                wrong.append("named")

    def by_default() -> None:
        for turn in range(60):
            got = generate(model, ids) if turn % 4 == 3 else logits(model, ids)
            if not any(torch.equal(got, want[turn % 4 == 3]) for want in defaults):
                wrong.append("default")
        done.set()

    def change() -> None:
        while not done.is_set():
            for name in ("law", "tax", "prefix", None):
                use_adapter(model, name)

    all_at_once([by_name, by_default, change])
    assert wrong == []


# ---------------------------------------------------------------- when what counts


def test_a_call_goes_by_what_was_active_when_it_began(model: Any) -> None:
    ids = ids_of(1, 6)
    law, answer = logits(model, ids), generate(model, ids)
    use_adapter(model, "tax")
    tax = logits(model, ids)
    use_adapter(model, "law")
    switch = model.model.layers[0].mlp.register_forward_hook(lambda *_: in_thread(lambda: use_adapter(model, "tax")))
    assert torch.equal(logits(model, ids), law)
    use_adapter(model, "law")
    assert torch.equal(generate(model, ids), answer)
    switch.remove()
    assert active_adapters(model) == {"tax": 1.0}
    assert torch.equal(logits(model, ids), tax)


def test_the_decoder_alone_takes_calls_as_well(model: Any) -> None:
    ids = ids_of(2, 6)
    with torch.inference_mode():
        want = model.model(ids, adapter_names=["tax", None]).last_hidden_state
        use_adapter(model, "tax")
        tax = model.model(ids).last_hidden_state
        torch.testing.assert_close(tax[0], want[0])
        switch = model.model.layers[0].mlp.register_forward_hook(
            lambda *_: in_thread(lambda: use_adapter(model, "law"))
        )
        assert torch.equal(model.model(ids).last_hidden_state, tax)
        switch.remove()


def test_adapters_off_is_of_one_thread(model: Any) -> None:
    ids = ids_of(1, 6)
    law = logits(model, ids)
    with adapters_off(model):
        base = logits(model, ids)
        assert active_adapters(model) == {}
        assert torch.equal(in_thread(lambda: logits(model, ids)), law)
        use_adapter(model, "tax")  # for others, and for later
        assert torch.equal(logits(model, ids), base)
    assert active_adapters(model) == {"tax": 1.0}


def test_adapters_off_is_of_one_task(model: Any) -> None:
    ids = ids_of(1, 6)
    law = logits(model, ids)
    with adapters_off(model):
        base = logits(model, ids)

    async def switched_off() -> None:
        with adapters_off(model):
            await asyncio.sleep(0)
            assert torch.equal(logits(model, ids), base)
            assert torch.equal(await asyncio.to_thread(logits, model, ids), base)
            await asyncio.sleep(0)

    async def switched_on() -> None:
        for _ in range(3):
            await asyncio.sleep(0)
            assert torch.equal(logits(model, ids), law)

    async def both() -> None:
        await asyncio.gather(switched_off(), switched_on())

    asyncio.run(both())


class Collected:
    """A streamer that starts a call in a thread of its own for the first tokens it is given."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call, self.got = call, None

    def put(self, ids: Tensor) -> None:
        self.got = in_thread(self.call) if self.got is None else self.got

    def end(self) -> None:
        pass


def test_a_thread_that_an_answer_starts_begins_with_the_default(model: Any) -> None:
    ids = ids_of(1, 6)
    law, med = logits(model, ids), generate(model, ids, adapter_names=["med"])
    streamer = Collected(lambda: logits(model, ids))
    assert torch.equal(generate(model, ids, adapter_names=["med"], streamer=streamer), med)
    assert torch.equal(streamer.got, law)


def test_a_text_streamer_gets_the_answer_of_its_call(model: Any) -> None:
    """As servers do it: generate() in a thread, and the tokens from a queue."""
    ids = ids_of(1, 6)
    streamers = {}
    for name in ("law", "med"):
        streamer = streamers[name] = transformers.TextIteratorStreamer(Spelled())
        options = {"adapter_names": [name], "streamer": streamer, "max_new_tokens": 12, "do_sample": False}
        threading.Thread(
            target=model.generate, args=(ids,), kwargs={**options, "attention_mask": torch.ones_like(ids)}
        ).start()
    got = {name: "".join(streamer) for name, streamer in streamers.items()}
    for name, text in got.items():
        told = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        answer = model.generate(ids, adapter_names=[name], **told)[0].tolist()
        assert text.split() == [str(token) for token in answer]
    assert got["law"] != got["med"]


class Spelled:
    """A tokenizer whose words are numbers."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(f"{int(token)} " for token in ids)


# ---------------------------------------------------------------- calls within calls, and their end


def test_a_call_within_a_call_is_one_of_its_own(model: Any) -> None:
    ids, inner = ids_of(2, 6), []
    want, other = logits(model, ids, adapter_names=["tax", None]), logits(model, ids[:1], adapter_names=["med"])
    plain = logits(model, ids)

    def hook(*_: Any) -> None:
        if not inner:
            inner.append(None)
            inner[:] = [logits(model, ids[:1], adapter_names=["med"]), logits(model, ids)]

    handle = model.model.layers[0].mlp.register_forward_hook(hook)
    assert torch.equal(logits(model, ids, adapter_names=["tax", None]), want)
    handle.remove()
    assert torch.equal(inner[0], other) and torch.equal(inner[1], plain)


def test_a_model_that_helps_another_goes_by_its_own_adapters(model: Any) -> None:
    helper, seen = copy.deepcopy(model), []
    use_adapter(helper, "med")
    ids = ids_of(1, 6)
    answer = model.generate(ids, adapter_names=["tax"], max_new_tokens=6, do_sample=False)

    def note(*_: Any) -> None:
        seen.append((active_adapters(helper), selection_of(model).now().row_names))

    helper.model.layers[0].mlp.register_forward_hook(note)
    told = {"max_new_tokens": 6, "do_sample": False, "assistant_model": helper}
    assert torch.equal(model.generate(ids, adapter_names=["tax"], **told), answer)
    assert seen and all(each == ({"med": 1.0}, ("tax",)) for each in seen)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["forward", "generate"])
def test_nothing_is_left_of_a_call_that_was_broken_off(model: Any, error: type[BaseException], where: str) -> None:
    """torch runs its hooks after an Exception only; Ctrl-C in the middle of a layer must not bind the next call."""
    ids = ids_of(2, 6)
    layer, x = dict(lora_layers(model))["model.layers.1.mlp.down_proj"], torch.randn(2, 6, 48)
    with torch.inference_mode():
        states, product = model.model(ids).last_hidden_state, layer(x)

    def fail(*_: Any) -> None:
        raise error

    handle = model.model.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(error):
        {"forward": logits, "generate": generate}[where](model, ids, adapter_names=["tax", None])
    handle.remove()
    with torch.inference_mode():
        assert torch.equal(layer(x), product)
        assert torch.equal(model.model(ids).last_hidden_state, states)
    in_thread(lambda: detach_adapter(model, "tax"))  # nobody uses it any more
    assert selection_of(model).running == set()


def test_a_default_that_was_chosen_after_ctrl_c_counts(model: Any) -> None:
    ids = ids_of(1, 6)
    use_adapter(model, "tax")
    with torch.inference_mode():
        want = model.model(ids).last_hidden_state
    use_adapter(model, "law")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.model.layers[1].mlp.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        logits(model, ids)
    handle.remove()
    use_adapter(model, "tax")
    with torch.inference_mode():
        assert torch.equal(model.model(ids).last_hidden_state, want)
    assert active_adapters(model) == {"tax": 1.0}


@pytest.mark.slow
def test_compiled_models_know_their_rows(model: Any) -> None:
    """torch.compile runs hooks from functions of its own."""
    ids = ids_of(2, 6)
    want = logits(model, ids, adapter_names=["tax", None])
    compiled = torch.compile(model, backend="eager")
    with torch.inference_mode():
        assert torch.equal(compiled(ids, adapter_names=["tax", None]).logits, want)


# ---------------------------------------------------------------- what needs the model for itself


def within_a_layer(model: Any, work: Callable[[], Any]) -> Any:
    """What `work` raises, or returns, in another thread while this one is in the middle of a call with "tax"."""
    results: list[Any] = []

    def hook(*_: Any) -> None:
        try:
            results.append(in_thread(work))
        except (AdapterError, UnsupportedError) as error:
            results.append(error)

    handle = model.model.layers[0].mlp.register_forward_hook(hook)
    logits(model, ids_of(2, 6), adapter_names=["tax", None])
    handle.remove()
    return results[0]


def test_an_adapter_that_is_in_use_stays(model: Any) -> None:
    want = logits(model, ids_of(2, 6), adapter_names=["tax", None])
    error = within_a_layer(model, lambda: detach_adapter(model, "tax"))
    assert isinstance(error, AdapterError) and "'tax'" in str(error) and "using" in str(error)
    assert torch.equal(logits(model, ids_of(2, 6), adapter_names=["tax", None]), want)
    detach_adapter(model, "tax")
    assert adapter_names(model) == ["law", "med", "prefix"]


def test_adapters_that_are_not_in_use_come_and_go(model: Any) -> None:
    ids, want = ids_of(2, 6), logits(model, ids_of(2, 6), adapter_names=["tax", None])

    def exchange() -> None:
        detach_adapter(model, "med")
        qgraft.attach_lora(model, r=2, name="new")
        fill(model, "new", 9)

    hook = model.model.layers[0].mlp.register_forward_hook(lambda *_: in_thread(exchange))
    got = logits(model, ids, adapter_names=["tax", None])
    hook.remove()
    assert torch.equal(got, want)
    assert adapter_names(model) == ["law", "tax", "prefix", "new"]


def test_threads_that_attach_at_once_all_do(model: Any) -> None:
    """Two that wrapped the same layer would lose one of the wrappers, and the adapter on it."""
    detach_adapter(model)
    all_at_once([lambda name=name: qgraft.attach_lora(model, r=2, name=name) for name in "abcdefgh"])  # type: ignore[misc]
    assert sorted(adapter_names(model)) == list("abcdefgh")
    assert all(list(layer.loras) == adapter_names(model) for _, layer in lora_layers(model))
    all_at_once([lambda name=name: detach_adapter(model, name) for name in "abcdefgh"])  # type: ignore[misc]
    assert not list(lora_layers(model)) and "generate" not in vars(model)


def test_the_last_prefix_stays_while_there_are_calls(model: Any) -> None:
    before = logits(model, ids_of(1, 6), adapter_names=["prefix"])
    error = within_a_layer(model, lambda: detach_adapter(model, "prefix"))
    assert isinstance(error, UnsupportedError) and "last prefix" in str(error)
    assert torch.equal(logits(model, ids_of(1, 6), adapter_names=["prefix"]), before)
    detach_adapter(model, "prefix")
    error = within_a_layer(model, lambda: qgraft.attach_prefix(model, pre_seq_len=2, name="first"))
    assert isinstance(error, UnsupportedError) and "first prefix" in str(error)
    assert adapter_names(model) == ["law", "med", "tax"]


def test_a_model_that_is_taken_is_called_by_its_thread_alone(model: Any) -> None:
    ids, selection = ids_of(1, 6), selection_of(model)
    want = logits(model, ids)
    refused = [
        lambda: logits(model, ids),
        lambda: model.model(ids),
        lambda: generate(model, ids),
        lambda: use_adapter(model, "tax"),
        lambda: detach_adapter(model, "tax"),
        lambda: qgraft.attach_lora(model, name="new"),
        lambda: qgraft.attach_prefix(model, name="new"),
    ]
    with selection.taken("trained"):
        for work in refused:
            with pytest.raises(UnsupportedError, match="being trained in another thread"):
                in_thread(work)
        with selection.taken("evaluated"):  # a part of the training
            assert torch.equal(logits(model, ids), want)
        assert torch.equal(in_thread(lambda: logits(copy.deepcopy(model), ids)), want)
    assert torch.equal(in_thread(lambda: logits(model, ids)), want)
    error = within_a_layer(model, lambda: selection.taken("trained").__enter__())
    assert isinstance(error, UnsupportedError) and "another thread calls it" in str(error)


def test_segments_take_the_model(model: Any) -> None:
    ids = ids_of(1, 6)
    with serving_segments(model, [Segment("law", 0, 6, torch.Generator())]):
        with pytest.raises(UnsupportedError, match="several adapters"):
            in_thread(lambda: logits(model, ids))
        assert logits(model, ids).shape == (1, 6, 97)


def test_replicas_of_data_parallel_are_refused(model: Any) -> None:
    """They are called in threads, where nothing of adapters_off() or adapter_names is known."""
    replica = model._replicate_for_data_parallel()
    with pytest.raises(UnsupportedError, match="DataParallel"):
        replica(ids_of(1, 6))


def recurrent() -> Any:
    """Its modules hold the state of the sequence that is being answered."""
    config = transformers.RecurrentGemmaConfig(
        **{**SHAPE, "num_key_value_heads": 1, "num_hidden_layers": 3},
        lru_width=32,
        attention_window_size=16,
        head_dim=8,
    )
    model = transformers.RecurrentGemmaForCausalLM(config).eval()
    qgraft.attach_lora(model, r=2, target_modules="linear_out", name="tax")
    return model


@pytest.mark.parametrize(("make", "options"), [(recurrent, {}), (None, {"assistant_early_exit": 1})])
def test_answers_that_keep_something_in_the_model_go_one_by_one(model: Any, make: Any, options: dict[str, Any]) -> None:
    answering = model if make is None else make()
    ids, seen = ids_of(1, 6), []

    def hook(*_: Any) -> None:
        if not seen:
            seen.append(None)
            with pytest.raises(UnsupportedError, match="used for an answer"):
                in_thread(lambda: answering.generate(ids, max_new_tokens=2))
            seen[0] = True

    handle = answering.model.register_forward_hook(hook)
    answering.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False, **options)
    handle.remove()
    assert seen == [True]
    answering.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
