"""The report as JSON, as a table and as a picture, measured or not."""

import dataclasses
import io
import json
import re
from dataclasses import replace

import matplotlib.image
import pytest
from rich.console import Console

from qgraft.merging.layer import LayerReport
from qgraft.merging.report import STEP_WORDS, Kept, MergeReport, layer_table
from qgraft.plots import plot_merge

LAYERS = [
    LayerReport("model.layers.0.q_proj", "q4_1", 0.02, 0.01, 0.2, ("fit_reals",)),
    LayerReport("model.layers.0.up_proj", "q4_k", 0.04, 0.03, 0.4, ("fit_reals", "descend_codes")),
    LayerReport("model.layers.1.q_proj", "q4_1", 0.04, 0.03, 0.6, ("fit_reals", "descend_codes", "fit_reals")),
    LayerReport("model.layers.1.up_proj", "f16", 0.0, 0.0, None, ("nearest",)),
    LayerReport("model.layers.2.q_proj", "q4_1", 0.03, 0.02, 0.1, ("fit_reals",)),
    LayerReport("model.layers.2.up_proj", "q4_k", 0.02, 0.0, 1.0, ()),
]
KEPT = Kept(2.5, 0.9, 0.916, 0.001, 0.005, 0.108, 9, 180, True, 0.975)
REPORT = MergeReport(
    {"law": 0.7}, "auto", LAYERS, KEPT, 44, 4200, 3, 1.5, 1 << 30, ("rows of the task: the rows given",)
)
BARE = replace(REPORT, kept=None, calibration_rows=0, calibration_tokens=0, notes=())


def printed(report: MergeReport, width: int = 160) -> str:
    out = io.StringIO()
    report.print(Console(file=out, width=width))
    return out.getvalue()


@pytest.mark.parametrize(
    ("base", "adapter", "merged", "gain"),
    [(2.5, 0.9, 0.9, 1.0), (2.5, 0.9, 2.5, 0.0), (2.0, 1.0, 1.25, 0.75), (2.0, 1.0, 2.5, -0.5), (2.0, 1.0, 0.9, 1.1),
     (1.0, 0.995, 0.9, None), (1.0, 1.2, 1.1, None)],
)  # fmt: skip
def test_the_gain_that_is_kept(base, adapter, merged, gain):
    kept = replace(KEPT, base=base, adapter=adapter, merged=merged)
    assert kept.retained_gain == (None if gain is None else pytest.approx(gain))
    assert replace(REPORT, kept=kept).retained_gain == kept.retained_gain


def test_the_json_holds_every_field(tmp_path):
    REPORT.save(tmp_path / "merge.json")
    read = json.loads((tmp_path / "merge.json").read_text())
    assert read == json.loads(json.dumps(REPORT.as_dict()))
    assert set(read) == {"retained_gain", "warning"} | {field.name for field in dataclasses.fields(MergeReport)}
    assert read["retained_gain"] == pytest.approx(0.99)
    assert read["kept"] == dataclasses.asdict(KEPT)
    assert [layer["path"] for layer in read["layers"]] == [layer.path for layer in LAYERS]
    assert read["layers"][3]["error"] is None and read["layers"][1]["steps"] == ["fit_reals", "descend_codes"]
    BARE.save(tmp_path / "bare.json")
    bare = json.loads((tmp_path / "bare.json").read_text())
    assert bare["kept"] is None and bare["retained_gain"] is None


def test_the_summary_says_what_was_kept():
    lines = REPORT.summary()
    assert lines[0] == "calibrated on 44 rows, 4200 tokens, unrelated text included"
    assert "loss on 9 held-out rows: base 2.5000, with the adapter 0.9000, merged 0.9160" in lines
    assert lines[2] == "perplexity there: base 12.18, with the adapter 2.46, merged 2.499"
    assert lines[3] == "same likeliest token as with the adapter: 97.5% of 180 tokens"
    assert "KL 0.0050 from the adapter's model, which itself is 0.1080 from the base" in lines[4]
    assert lines[5:] == ["retained gain: 99.0%", "rows of the task: the rows given"]
    not_held = replace(REPORT, kept=replace(KEPT, held_out=False)).summary()
    assert "rows kept back from the calibration set" in not_held[1]
    learned = replace(REPORT, kept=replace(KEPT, held_out=False, before=0.954)).summary()
    assert "loss on 9 rows of the calibration set: base" in learned[1]
    assert learned[5] == "retained gain: 99.0% (95.4% before these rows took part, in last rounds)"
    no_gain = replace(REPORT, kept=replace(KEPT, base=0.9)).summary()
    assert no_gain[5].startswith("retained gain: none to keep, the adapter lowers the loss on these rows by less")
    assert BARE.summary() == ["retained gain: not measured"]
    assert not [report for report in (REPORT, BARE, replace(REPORT, kept=replace(KEPT, base=0.9))) if report.warning]


def test_an_adapter_that_makes_the_rows_worse_is_warned_of_at_the_end():
    worse = replace(REPORT, kept=replace(KEPT, base=0.88))
    *_, told, note, warning = worse.summary()
    assert told == "retained gain: none to keep, the adapter makes the loss on these rows worse"
    assert note == REPORT.notes[0] and warning.startswith("warning: with the adapter the loss on these rows is higher")
    assert worse.as_dict()["warning"] == worse.warning == warning


def test_the_table_has_a_line_for_each_kind_of_layer_with_its_medians():
    cells = [re.split(r"  +", line.strip()) for line in printed(REPORT).splitlines()]
    assert ["q_proj", "q4_1", "3", "0.030", "2.0%", "96%", "scales"] in cells
    assert ["up_proj", "f16", "1", "0.000", "0.0%", "-", "nearest"] in cells
    both = next(line for line in cells if line[:2] == ["up_proj", "q4_k"])
    assert both[2:6] == ["2", "0.030", "1.5%", "42%"]
    wide = [replace(LAYERS[0], path="model.layers.0.down_proj", steps=tuple(STEP_WORDS)[:4])]
    report = replace(REPORT, layers=[*LAYERS, *wide])
    table = str(replace(report, notes=("a sentence " * 20, "with_an_option_as_long_as_it_gets " * 9))).splitlines()
    assert max(map(len, table)) <= 80 and any("sub-scales" in line for line in table)
    assert [layer.effect_kept for layer in LAYERS[2:6]] == [pytest.approx(0.64), None, pytest.approx(0.99), 0.0]
    assert layer_table(LAYERS[-1:]).row_count == 1
    assert "as it was" in printed(replace(REPORT, layers=LAYERS[-1:]))


def test_printing_ends_with_the_gain_and_the_notes():
    assert printed(REPORT).endswith("retained gain: 99.0%\nrows of the task: the rows given\n")
    assert printed(BARE).endswith("retained gain: not measured\n")
    path = f"rows of the task: the training set: /data/{'long/' * 30}rows[old].jsonl"  # neither markup nor wrapped
    assert printed(replace(REPORT, notes=(path,)), width=80).endswith(path + "\n")


@pytest.mark.spread(2)
@pytest.mark.parametrize("report", [REPORT, BARE, replace(REPORT, kept=replace(KEPT, base=0.9)),
                                    replace(BARE, layers=[replace(LAYERS[0], error=None)])])  # fmt: skip
def test_the_picture_is_drawn(report, tmp_path):
    report.save(tmp_path / "merge.json")
    plot_merge(tmp_path / "merge.json", tmp_path / "merge.png")
    image = matplotlib.image.imread(tmp_path / "merge.png")
    assert image.shape[:2] == (504, 1200)
    left, right = image[:, :400, :3], image[:, 400:, :3]
    colored = (left.max(2) - left.min(2) > 0.2).sum()  # bars are there only where losses were measured
    assert (colored > 1000) == (report.kept is not None)
    points = (right.max(2) - right.min(2) > 0.2).sum()
    assert (points > 20) == any(layer.error is not None for layer in report.layers)


def test_a_kind_whose_name_ends_like_anothers_gets_its_own_points(tmp_path, monkeypatch):
    """qkv_proj ends like v_proj."""
    from matplotlib.axes import Axes

    layers = [replace(LAYERS[0], path=f"h.{n}.{kind}") for n, kind in enumerate(("v_proj", "qkv_proj", "qkv_proj"))]
    replace(BARE, layers=layers).save(tmp_path / "merge.json")
    drawn = {}
    real = Axes.plot

    def plot(self, *args, **kwargs):
        drawn[kwargs["label"]] = len(args[0])
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Axes, "plot", plot)
    plot_merge(tmp_path / "merge.json", tmp_path / "merge.png")
    assert drawn == {"v_proj": 1, "qkv_proj": 2}
