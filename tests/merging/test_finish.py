"""When rounds of distilling begin and end, what a last one is taken for, and what the report says of it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Q
from torch import nn

import qgraft
from qgraft.adapters.targets import lora_layers
from qgraft.formats import PackedTensor, quantize
from qgraft.merging import calibration, finish
from qgraft.merging.calibration import Calibration, find_rows
from qgraft.merging.exact import merge_exactly
from qgraft.merging.finish import DRIFT, LAST_ROUNDS, ROUNDS, TARGET, WORTH_IT, wanting
from qgraft.merging.measure import Measurement, compare, states_of
from qgraft.merging.merge import merge
from qgraft.merging.report import Kept
from qgraft.passes.decoder import output_head

KEPT = Kept(base=2.0, adapter=1.0, merged=1.0, task_kl=0.01, drift_kl=0.0, adapter_kl=0.2, rows=5, labels=50,
            held_out=False, same_token=0.9)  # fmt: skip
GRID, FLOAT, POWERS = (quantize(torch.ones(1, 32), format_) for format_ in ("q4_1", "f16", "mxfp4"))


def kept(gain: float, **others: Any) -> Kept:
    return replace(KEPT, merged=2.0 - gain, **others)


def halved(times: int) -> Kept:
    """What is kept where each round brought half of what was missing."""
    return kept(TARGET - 0.09 * 0.5**times)


@pytest.mark.parametrize(
    ("result", "wants"),
    [
        (kept(TARGET + 0.001), False),
        (kept(TARGET - 0.001), True),
        (kept(1.2), False),
        (kept(-1.0), True),
        (kept(1.0, drift_kl=0.2 * DRIFT), False),
        (kept(1.0, drift_kl=0.2 * DRIFT + 1e-4), True),
        (kept(1.0, drift_kl=1e-6, adapter_kl=0.0), True),
        (kept(0.5, drift_kl=9.0), True),
        (replace(kept(0.5, drift_kl=9.0), base=1.005), False),  # no gain to keep
        (replace(kept(0.5, drift_kl=9.0), base=0.5), False),  # the adapter makes it worse
        (kept(math.nan), False),  # which is refused afterwards
    ],
)
def test_a_merge_is_wanting_by_its_gain_or_by_its_drift(result, wants):
    assert wanting(result) is wants


# ---------------------------------------------------------------- the rounds, with results made up


@dataclass
class Script:
    """Rounds whose results are given, and what was asked for.

    Attributes:
        results: what is kept at first and after each round, a last one included.
        closer: whether the rows that judge come closer, round by round.
        further: for how many rounds there are rows that nothing has learned from.
    """

    results: list[Kept]
    closer: list[bool] = field(default_factory=lambda: [True] * ROUNDS)
    further: int = 0
    asked: list[str] = field(default_factory=list)
    made: list[tuple[Any, ...]] = field(default_factory=list)

    def measured(self, packed: Mapping[str, PackedTensor]) -> Kept:
        self.asked.append("measured")
        return self.results.pop(0)

    def distillation(self, *args: Any) -> "Script":
        self.made.append(args)
        return self

    @property
    def unseen(self) -> bool:
        return self.asked.count("round") < self.further

    def round(self, packed: Mapping[str, PackedTensor], progress: Any) -> tuple[Mapping[str, PackedTensor], int]:
        self.asked.append("round")
        return ({**packed, f"round {len(self.asked)}": GRID}, 4) if self.closer.pop(0) else (packed, 0)

    def last_round(self, packed: Mapping[str, PackedTensor], progress: Any) -> tuple[Mapping[str, PackedTensor], int]:
        self.asked.append("last round")
        return {**packed, "last": GRID}, 7


def run(monkeypatch: pytest.MonkeyPatch, script: Script, held_out: bool, **start: PackedTensor) -> Any:
    monkeypatch.setattr(finish, "Distillation", script.distillation)
    rows = Calibration([], [], [], [], held_out)
    model: Any = None
    return finish.finish(model, {}, start or {"layer": GRID}, {}, rows, script.measured, lambda *_: None)


@pytest.mark.parametrize("held_out", [False, True])
def test_what_keeps_enough_is_not_distilled(monkeypatch, held_out):
    script = Script([kept(0.999)])
    packed, result, steps = run(monkeypatch, script, held_out)
    assert (packed, result, steps) == ({"layer": GRID}, kept(0.999), 0)
    assert script.asked == ["measured"] and script.made == []


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("rounds", range(1, ROUNDS + 1))
def test_rounds_end_where_enough_is_kept(monkeypatch, held_out, rounds):
    script = Script([*(halved(n) for n in range(rounds)), kept(0.999)])
    packed, result, steps = run(monkeypatch, script, held_out)
    assert script.asked == ["measured", *["round", "measured"] * rounds]
    assert result == kept(0.999) and steps == 4 * rounds and len(packed) == 1 + rounds and len(script.made) == 1


def test_enough_of_the_gain_is_not_enough_where_the_drift_is_large(monkeypatch):
    script = Script([kept(0.999, drift_kl=1.0), kept(0.999, drift_kl=0.001)])
    _, result, steps = run(monkeypatch, script, True)
    assert script.asked == ["measured", "round", "measured"] and result.drift_kl == 0.001 and steps == 4


@pytest.mark.parametrize("rounds", range(ROUNDS))
def test_rounds_end_where_the_judging_rows_come_no_closer(monkeypatch, rounds):
    """And what such a round has made is not measured, nor taken."""
    results = [halved(n) for n in range(rounds + 1)]
    script = Script([*results], [*[True] * rounds, False])
    packed, result, steps = run(monkeypatch, script, True)
    assert script.asked == ["measured", *["round", "measured"] * rounds, "round"]
    assert result == results[-1] and steps == 4 * rounds and len(packed) == 1 + rounds


def test_rounds_have_an_end(monkeypatch):
    script = Script([halved(n) for n in range(ROUNDS + 1)])
    packed, result, steps = run(monkeypatch, script, True)
    assert script.asked == ["measured", *["round", "measured"] * ROUNDS]
    assert result == halved(ROUNDS) and steps == 4 * ROUNDS and len(packed) == 1 + ROUNDS


@pytest.mark.parametrize(
    ("first", "second", "follows"),
    [
        (kept(TARGET - 0.1), kept(TARGET - 0.1 * (1 - 1.1 * WORTH_IT)), True),
        (kept(TARGET - 0.1), kept(TARGET - 0.1 * (1 - 0.9 * WORTH_IT)), False),
        (kept(TARGET - 0.1), kept(TARGET - 0.2), False),
        (kept(1.0, drift_kl=0.1), kept(1.0, drift_kl=0.05), True),  # the drift is what is wanted
        (kept(1.0, drift_kl=0.1), kept(1.0, drift_kl=0.09), False),
        (kept(TARGET - 0.1, drift_kl=0.02), kept(TARGET - 0.02, drift_kl=0.04), False),  # one for the other
    ],
)
def test_a_round_that_brings_little_is_kept_and_none_follows(monkeypatch, first, second, follows):
    script = Script([first, second, kept(0.999)])
    _, result, steps = run(monkeypatch, script, True)
    assert script.asked.count("round") == 1 + follows and steps == 4 * (1 + follows)
    assert result == (kept(0.999) if follows else second)


@pytest.mark.parametrize("further", range(ROUNDS + 1))
def test_rows_that_nothing_has_learned_from_are_worth_a_round(monkeypatch, further):
    script = Script([kept(TARGET - 0.1)] * (ROUNDS + 1), further=further)
    _, _, steps = run(monkeypatch, script, True)
    assert script.asked.count("round") == max(1, further) and steps == 4 * max(1, further)


@pytest.mark.parametrize("closer", [[True] * ROUNDS, [False], [True, False]])
def test_without_held_out_rows_a_last_round_learns_from_those_that_measured(monkeypatch, closer):
    taken = sum(closer)
    after = kept(0.995, task_kl=0.004)
    script = Script([*(halved(n) for n in range(taken + 1)), after], [*closer])
    packed, result, steps = run(monkeypatch, script, False)
    assert script.asked[-2:] == ["last round", "measured"] and script.asked.count("round") == len(closer)
    assert result == replace(after, before=pytest.approx(halved(taken).retained_gain))
    assert "last" in packed and steps == 4 * taken + 7


@pytest.mark.parametrize("helping", range(1, LAST_ROUNDS + 1))
def test_last_rounds_go_on_while_they_help_and_are_needed(monkeypatch, helping):
    results = [kept(0.95 + 0.005 * n, task_kl=0.008 - 0.001 * n) for n in range(helping)]
    script = Script([kept(0.9), *results, kept(0.98, task_kl=0.5)], [False])
    _, result, steps = run(monkeypatch, script, False)
    assert script.asked.count("last round") == min(helping + 1, LAST_ROUNDS)
    assert result == replace(results[-1], before=pytest.approx(0.9)) and steps == 7 * helping


@pytest.mark.parametrize("task_kl", [0.01, 0.02, math.nan])
def test_a_last_round_that_does_not_help_is_not_taken(monkeypatch, task_kl):
    """Even where more of the gain is kept: a loss below the adapter's says nothing of how near its model is."""
    script = Script([kept(0.9), kept(0.91), kept(0.999, task_kl=task_kl)], [True, False])
    packed, result, steps = run(monkeypatch, script, False)
    assert script.asked[-2:] == ["last round", "measured"]
    assert result == kept(0.91) and result.before is None and "last" not in packed and steps == 4


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("fixed", [FLOAT, POWERS], ids=["floats", "powers of two"])
def test_some_formats_have_nothing_that_could_move(monkeypatch, held_out, fixed):
    script = Script([kept(0.5)])
    packed, result, steps = run(monkeypatch, script, held_out, layer=fixed)
    assert (packed, result, steps) == ({"layer": fixed}, kept(0.5), 0) and script.made == []
    mixed = Script([kept(0.5), kept(0.999)])
    assert run(monkeypatch, mixed, held_out, layer=fixed, other=GRID)[2] == 4


# ---------------------------------------------------------------- whole merges


@pytest.fixture
def never_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finish, "wanting", lambda kept: True)
    monkeypatch.setattr(finish, "ROUNDS", 1)
    monkeypatch.setattr(finish, "LAST_ROUNDS", 1)
    monkeypatch.setattr(calibration, "NEUTRAL_TOKENS", 300)
    monkeypatch.setattr(calibration, "DRIFT_TOKENS", 100)


@pytest.mark.usefixtures("never_enough")
def test_a_merge_that_learned_from_the_rows_that_measured_says_so(trained, rows, monkeypatch):
    model, tokenizer = trained().load()
    results: list[Kept] = []

    def recorded(self: Measurement, packed: Mapping[str, PackedTensor]) -> Kept:
        results.append(measure(self, packed))
        return results[-1]

    measure = Measurement.kept
    monkeypatch.setattr(Measurement, "kept", recorded)
    report = merge(model, tokenizer, calibration=rows)
    assert report.retained_gain > 0.9 and report.distilled_steps > 0
    assert results[-1].task_kl < results[-2].task_kl
    assert report.kept == replace(results[-1], before=results[-2].retained_gain) and not report.kept.held_out
    told = f"retained gain: {report.retained_gain:.1%} ({report.kept.before:.1%} before these rows took part, in last"
    words = " ".join(str(report).split())
    assert told in words and f"loss on {report.kept.rows} rows of the calibration set: base" in words
    assert report.as_dict()["kept"]["before"] == report.kept.before
    chosen = find_rows(model, tokenizer, rows, None, [], {}, 0)
    states, labels = states_of(model, chosen.measure)
    loss = compare(states, states, output_head(model), labels).losses[0]  # of the model as it is now
    assert loss == pytest.approx(report.kept.merged, rel=1e-4)


@pytest.mark.usefixtures("never_enough")
def test_rows_that_are_held_out_are_not_learned_from(trained, rows, monkeypatch):
    model, tokenizer = trained().load()
    monkeypatch.setattr(finish.Distillation, "last_round", None)
    report = merge(model, tokenizer, calibration=rows[:14], eval_dataset=rows[14:])
    assert report.kept.held_out and report.kept.before is None and "last round" not in str(report)
    assert f"loss on {report.kept.rows} held-out rows: base" in " ".join(str(report).split())
    assert report.distilled_steps > 0


@pytest.mark.usefixtures("never_enough")
def test_layers_merged_in_closed_form_stay_so_beside_others_that_are_distilled(tiny_gguf, rows):
    model, tokenizer = qgraft.load(tiny_gguf("llama", types=(Q.Q4_1,)).path)
    qgraft.attach_lora(model, r=2, exact=True, target_modules="up_proj", name="exact")
    qgraft.attach_lora(model, r=2, target_modules="q_proj,down_proj", name="other")
    generator = torch.Generator().manual_seed(0)
    for _, layer in lora_layers(model):
        for lora in layer.loras.values():
            nn.init.normal_(lora.lora_B, std=0.05, generator=generator)
    weights = {"exact": 1.0, "other": 0.5}
    qgraft.use_adapter(model, weights)
    exact = {path: packed for path, (packed, _) in merge_exactly(dict(lora_layers(model)), weights).items()}
    assert {path.rpartition(".")[2] for path in exact} == {"up_proj"}
    chosen = find_rows(model, tokenizer, rows, None, [], {}, 0)
    wanted, _ = states_of(model, chosen.measure)
    report = merge(model, tokenizer, calibration=rows, min_retained=-1e9)
    assert report.distilled_steps > 0
    assert {each.path for each in report.layers if each.steps == ("exact",)} == exact.keys()
    for path, packed in exact.items():
        assert torch.equal(model.get_submodule(path).packed.parts[0], packed.parts[0])
    apart = compare(wanted, states_of(model, chosen.measure)[0], output_head(model)).divergence
    assert report.kept.task_kl == pytest.approx(apart, rel=1e-3)
