"""What others notice of an adapter that is loaded while they are answered: nothing."""

import gc
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from talkers import generated
from waiting import until

import qgraft
from qgraft.adapter_files import folder as files
from qgraft.adapters.attach import attach_lora, detach_adapter
from qgraft.adapters.base import adapter_names
from qgraft.data.new_tokens import add_new_tokens
from qgraft.errors import AdapterError, DataError
from qgraft.model_parts import decoder_of
from qgraft.passes import decoding_adapters
from qgraft.passes.decoding import why_not
from qgraft.serving.catalogue import Catalogue
from qgraft.serving.engine import Engine, answer_all
from qgraft.serving.fields import ApiError
from qgraft.serving.lora_protocol import LoadBody
from qgraft.serving.requests import Request
from qgraft.serving.sampling import Sampling

GREEDY = Sampling(temperature=0)
PROMPT = (5, 6, 7)


@pytest.fixture
def serving(talker: Any, adapters: Path) -> Iterator[tuple[Engine, Catalogue]]:
    """An engine that answers in its thread, and has a folder of adapters."""
    engine = Engine(*talker)
    engine.start()
    yield engine, Catalogue(engine, "base", adapters)
    engine.stop()


def alone(engine: Engine, name: str) -> list[int]:
    """The ids of transformers' own generate() under one adapter."""
    with engine.paused():
        return generated(engine.model, list(PROMPT), {name: 1.0}, 6, [])


def going_on(engine: Engine, count: int) -> None:
    """Wait for so many more tokens, for as many answers as that takes."""
    wanted = engine.counts["generation_tokens"] + count

    def come() -> bool:
        if not engine.running and not engine.waiting:
            engine.submit(Request(PROMPT, {"law": 1.0}, GREEDY, 100, ignore_ends=True), lambda event: None)
        return engine.counts["generation_tokens"] >= wanted

    until(come)


@pytest.fixture
def catalogue(serving: tuple[Engine, Catalogue]) -> Catalogue:
    """The catalogue, with none of its folder's names on the model."""
    for name in ("law", "med"):
        detach_adapter(serving[0].model, name)
    return serving[1]


@pytest.mark.parametrize("slow", ["read_tensors", "changed_files", "made_of_pairs", "put_loras"])
def test_tokens_come_while_an_adapter_is_read_and_put_on(
    serving: tuple[Engine, Catalogue], monkeypatch: pytest.MonkeyPatch, slow: str
) -> None:
    engine, catalogue = serving
    reached, may_go_on, does = threading.Event(), threading.Event(), getattr(files, slow)

    def waits(*args: Any, **given: Any) -> Any:
        reached.set()
        assert may_go_on.wait(60)
        return does(*args, **given)

    monkeypatch.setattr(files, slow, waits)
    loading = threading.Thread(target=catalogue.need, args=(["tax"],))
    loading.start()
    try:
        assert reached.wait(60)
        going_on(engine, 150)
        assert "tax" not in adapter_names(engine.model)
    finally:
        may_go_on.set()
        loading.join(60)
    assert "tax" in catalogue.names()
    told: list[Any] = []
    engine.submit(Request(PROMPT, {"tax": 1.0}, GREEDY, 6, ignore_ends=True), told.append)
    until(lambda: told and hasattr(told[-1], "reason"))
    assert [token.id for event in told[:-1] for token in event.tokens] == alone(engine, "tax")


def test_adapters_that_come_and_go_cost_no_other_anything(
    talker: Any, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = talker
    if why_not(decoder_of(model)) is not None:
        pytest.skip("no native kernels here")
    engine = Engine(model, tokenizer)
    catalogue = Catalogue(engine, "base", adapters)
    made: list[str] = []
    loras, network = decoding_adapters.DecoderLoras, decoding_adapters.Network

    def counted_loras(network: Any, weights: Any) -> Any:
        made.append("+".join(weights))
        return loras(network, weights)

    def counted_network(base: Any) -> Any:
        made.append("network")
        return network(base)

    monkeypatch.setattr(decoding_adapters, "DecoderLoras", counted_loras)
    monkeypatch.setattr(decoding_adapters, "Network", counted_network)

    def answer(name: str) -> list[int]:
        request = Request(PROMPT, {name: 1.0} if name else {}, GREEDY, 6, ignore_ends=True)
        return [token.id for token in answer_all(engine, [request])[0]["tokens"]]

    before = [answer("law"), answer("")]
    assert made == ["network", "law", ""]
    catalogue.need(["tax"])
    assert [answer("law"), answer("")] == before and made == ["network", "law", ""]
    assert answer("tax") and made == ["network", "law", "", "tax"]
    detach_adapter(model, "law")
    catalogue.need(["law"])  # another one under the name
    answers = answer("law"), answer("tax")
    assert answers[0] != before[0] and made == ["network", "law", "", "tax", "law"]
    assert answers == (alone(engine, "law"), alone(engine, "tax"))
    engine.stop()


def test_the_first_adapter_comes_while_the_base_is_answered(talker: Any, adapters: Path) -> None:
    model, tokenizer = talker
    detach_adapter(model)
    request = Request(PROMPT, {}, GREEDY, 100, ignore_ends=True)
    engine = Engine(model, tokenizer)
    (before,) = answer_all(engine, [request])
    told: list[Any] = []
    engine.submit(request, told.append)
    for _ in range(10):
        engine.step()
    Catalogue(engine, "base", adapters).need(["law"])
    while engine.step():
        pass
    assert [token.id for event in told[:-1] for token in event.tokens] == [token.id for token in before["tokens"]]
    (answer,) = answer_all(engine, [Request(PROMPT, {"law": 1.0}, GREEDY, 6, ignore_ends=True)])
    assert [token.id for token in answer["tokens"]] == alone(engine, "law")
    engine.stop()


def test_an_adapter_that_is_loaded_does_not_train(serving: tuple[Engine, Catalogue]) -> None:
    engine, catalogue = serving
    catalogue.need(["tax"])
    assert not any(parameter.requires_grad for parameter in engine.model.parameters())


def test_pythons_collector_passes_over_what_was_there_before(talker: Any) -> None:
    """A full collection goes through all of transformers, in the middle of an answer."""
    engine = Engine(*talker)
    engine.start()
    try:
        assert gc.get_freeze_count() > 10**5 > len(gc.get_objects())
    finally:
        engine.stop()
    assert gc.get_freeze_count() == 0


def test_a_slow_disk_holds_nobody_up_who_asks_for_something_else(
    catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue.need(["law"])
    reached, may_go_on, read = threading.Event(), threading.Event(), files.read_adapter
    opened: list[str] = []

    def waits(folder: Path) -> Any:
        opened.append(folder.name)
        if folder.name == "tax":
            reached.set()
            assert may_go_on.wait(60)
        return read(folder)

    def others() -> None:
        with catalogue.holding(["law"]):
            assert "law" in catalogue.names()
        assert catalogue.knows("med") and "tax" in catalogue.available()
        catalogue.load(LoadBody("other", "med"))
        catalogue.unload("other")

    monkeypatch.setattr(files, "read_adapter", waits)
    failed: list[BaseException] = []

    def tax() -> None:
        try:
            catalogue.need(["tax"])
        except BaseException as error:
            failed.append(error)

    twice = [threading.Thread(target=tax) for _ in range(3)]
    for each in twice:
        each.start()
    try:
        assert reached.wait(60)
        beside = threading.Thread(target=others)
        beside.start()
        beside.join(30)
        assert not beside.is_alive() and opened == ["tax", "med"] and "tax" not in catalogue.names()
    finally:
        may_go_on.set()
        for each in twice:
            each.join(60)
    assert not failed and opened.count("tax") == 1 and "tax" in catalogue.names()


def test_what_changes_while_it_is_read_is_looked_for_again(
    catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, listed = catalogue.engine, catalogue.folder / "served.json"
    read, opened = files.read_adapter, list[str]()

    def changes(folder: Path) -> Any:
        opened.append(folder.name)
        if len(opened) == 1:  # another server loads another adapter under this name meanwhile
            listed.write_text('{"adapters": {"tax": "med"}}')
        return read(folder)

    monkeypatch.setattr(files, "read_adapter", changes)
    try:
        catalogue.need(["tax"])
        assert opened == ["tax", "med"] and catalogue.entries["tax"].path.endswith("med")
        told: list[Any] = []
        engine.submit(Request(PROMPT, {"tax": 1.0}, GREEDY, 6, ignore_ends=True), told.append)
        until(lambda: told and hasattr(told[-1], "reason"))
        catalogue.need(["med"])
        assert [token.id for event in told[:-1] for token in event.tokens] == alone(engine, "med")
    finally:
        listed.unlink()


def test_one_that_does_not_fit_leaves_the_one_before(catalogue: Catalogue) -> None:
    engine = catalogue.engine
    catalogue.need(["tax"])
    before = alone(engine, "tax")
    try:
        catalogue.load(LoadBody("mine", "tax"))
        with pytest.raises(AdapterError):
            catalogue.load(LoadBody("mine", "foreign", replace=True))
        assert alone(engine, "mine") == before and catalogue.entries["mine"].listed == "tax"
        catalogue.load(LoadBody("mine", "med", replace=True))
        catalogue.need(["med"])
        assert alone(engine, "mine") == alone(engine, "med") != before
        assert set(adapter_names(engine.model)) == {"med", "style", "tax", "mine"}
    finally:
        (catalogue.folder / "served.json").unlink(missing_ok=True)


def test_new_tokens_come_only_at_the_start(tiny_gguf: Any, tmp_path: Path) -> None:
    """A running server refuses an adapter whose tokens would change the tokenizer of all answers."""
    model, tokenizer = qgraft.load(tiny_gguf("llama").path, device="cpu")
    size, known = model.config.vocab_size, len(tokenizer)
    new = add_new_tokens(tokenizer, model.qgraft.tokens, ["<call>"], [])[0].id
    attach_lora(model, r=2, target_modules="q_proj", name="calls", trainable_token_indices=both(model, new))
    files.save_adapter(model, tmp_path / "calls", "calls")
    detach_adapter(model, "calls")
    model.qgraft.tokens.clear()
    engine = Engine(model, tokenizer)
    catalogue = Catalogue(engine, "base", tmp_path)
    with pytest.raises(AdapterError, match="has new tokens"):
        catalogue.load(LoadBody("calls", "calls"))
    assert catalogue.names() == [] and model.config.vocab_size == size
    assert str(catalogue.pin("calls", str(tmp_path / "calls"))).startswith("adapter calls: rows of 1 tokens")
    assert model.config.vocab_size == max(size, new + 1) > known - 1
    catalogue.load(LoadBody("again", "calls"))  # the same tokens
    answers = answer_all(engine, [Request((new, 5), {name: 1.0}, GREEDY, 3) for name in ("calls", "again")])
    assert [token.id for token in answers[0]["tokens"]] == [token.id for token in answers[1]["tokens"]]
    with pytest.raises(DataError, match="new tokens of another adapter"):
        answer_all(engine, [Request((new, 5), {}, GREEDY, 3)])
    engine.stop()


def both(model: Any, token: int) -> Any:
    tied = model.get_input_embeddings().packed_weight is model.get_output_embeddings().packed_weight
    return [token] if tied else {"embed_tokens": [token], "lm_head": [token]}


def test_a_name_of_the_folder_can_be_asked_for_again_while_it_is_unloaded(serving: tuple[Engine, Catalogue]) -> None:
    """Clients try again at 409; 404 would have told them that there is none."""
    engine, catalogue = serving
    detach_adapter(engine.model, "law")
    catalogue.need(["law"])
    answers: list[Any] = []
    engine.submit(Request(PROMPT, {"law": 1.0}, GREEDY, 100, ignore_ends=True), answers.append)
    until(lambda: engine.counts["generation_tokens"] > 0)
    with engine.paused():  # whose answer needs it
        catalogue.unload("law")
        assert catalogue.knows("law") and "law" not in catalogue.names()
        with pytest.raises(ApiError, match="'law' is being unloaded: answers still need it") as refused:
            catalogue.need(["law"])
        assert (refused.value.status, refused.value.retry_after) == (409, 1)
    until(lambda: not engine.running)
    catalogue.need(["law"])
    assert catalogue.names() == ["law"]
