"""What a merge kept, in numbers: for Python, for merge.json, and as a table."""

import io
import math
import textwrap
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from qgraft import storage
from qgraft.errors import MergeError, option
from qgraft.merging.layer import LayerReport

STEP_WORDS = {  # of layer.CHAINS, for a narrow table
    "fit_reals": "scales", "descend_codes": "codes", "descend_integers": "sub-scales", "feed_errors": "feedback",
    "nearest": "nearest", "nearest_codes": "grid", "exact": "exact",
}  # fmt: skip


@dataclass(frozen=True)
class Kept:
    """Base, adapter and merged model on rows that the merge has not seen.

    Attributes:
        base, adapter, merged: losses on the task, in nats an answer token.
        task_kl: mean KL(adapter || merged) on the task, nats an answer token.
        drift_kl: mean KL(adapter || merged) on unrelated text, nats a token.
        adapter_kl: mean KL(base || adapter) on the same text: how far the adapter itself moves the model there.
        rows, labels: of the task.
        held_out: False where the rows were taken from the calibration set, so that the adapter may know them.
        before: the retained gain on these rows before a last round that learned from them, too; None where there was none.
        same_token: the share of the answers' tokens before which merged and adapter's model find the same token likeliest.
        unit: what was compared: the next "token" of a model that writes, the "label" of a classifier.
    """

    base: float
    adapter: float
    merged: float
    task_kl: float
    drift_kl: float
    adapter_kl: float
    rows: int
    labels: int
    held_out: bool
    same_token: float
    before: float | None = None
    unit: str = "token"

    @property
    def retained_gain(self) -> float | None:
        """(base - merged) / (base - adapter); None where the adapter lowers the loss by less than 0.01."""
        gain = self.base - self.adapter
        return (self.base - self.merged) / gain if gain >= 0.01 else None


@dataclass(frozen=True)
class MergeReport:
    """What merge() did.

    Attributes:
        adapters: name -> weight of what was merged.
        method: as asked for.
        layers: in the order of the forward pass.
        kept: what was measured; None without rows to measure on.
        calibration_rows, calibration_tokens: that the layers were solved and judged on, unrelated text included.
        distilled_steps: optimizer steps of the last part; 0 where it was not needed or did not help.
        seconds, peak_memory_bytes: of the merge; memory is the process's peak.
        notes: what a reader should know, each one sentence.
    """

    adapters: dict[str, float]
    method: str
    layers: list[LayerReport]
    kept: Kept | None
    calibration_rows: int
    calibration_tokens: int
    distilled_steps: int
    seconds: float
    peak_memory_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def retained_gain(self) -> float | None:
        """The share of the adapter's gain that the merged weights keep; None where it was not measured."""
        return None if self.kept is None else self.kept.retained_gain

    @property
    def warning(self) -> str | None:
        """What is wrong with a merge of which the share that it keeps says nothing; None where nothing is."""
        if self.kept is None or self.kept.adapter < self.kept.base + 0.01:
            return None
        return (
            "warning: with the adapter the loss on these rows is higher than without it, so whether the merge has kept "
            "what it learned cannot be told: give rows of its task, or look at the adapter"
        )

    def __str__(self) -> str:
        """The table and what was kept, as `print` has it, in 80 columns."""
        out = io.StringIO()
        self.print(Console(file=out, width=80))
        return out.getvalue().rstrip("\n")

    def _before(self) -> str:
        before = None if self.kept is None else self.kept.before
        return "" if before is None else f" ({before:.1%} before these rows took part, in last rounds)"

    def as_dict(self) -> dict[str, Any]:
        """All of it for JSON."""
        return {"retained_gain": self.retained_gain, "warning": self.warning, **asdict(self)}

    def save(self, path: str | Path) -> None:
        """Write it as JSON. Raises StorageError."""
        storage.write_json(Path(path), self.as_dict())

    def print(self, console: Console) -> None:
        """One line for each kind of layer, then what was kept."""
        console.print(layer_table(self.layers))
        for line in self.summary():
            if "/" not in line:  # paths stay as they are
                line = textwrap.fill(line, 80, subsequent_indent="  ", break_on_hyphens=False)
            console.print(line, highlight=False, markup=False, soft_wrap=True)

    def summary(self) -> list[str]:
        """What was kept, line by line."""
        lines = []
        if self.calibration_rows:
            rows, tokens = self.calibration_rows, self.calibration_tokens
            lines.append(f"calibrated on {rows} rows, {tokens} tokens, unrelated text included")
        if (kept := self.kept) is not None:
            where = "held-out rows" if kept.held_out else "rows kept back from the calibration set"
            if kept.before is not None:
                where = "rows of the calibration set"
            losses = (kept.base, kept.adapter, kept.merged)
            perplexities = [f"{math.exp(min(loss, 700.0)):.4g}" for loss in losses]
            lines.append(
                f"loss on {kept.rows} {where}: base {kept.base:.4f}, with the adapter {kept.adapter:.4f}, "
                f"merged {kept.merged:.4f}"
            )
            if kept.unit == "token":
                lines.append(f"perplexity there: base {perplexities[0]}, with the adapter {perplexities[1]}, "
                             f"merged {perplexities[2]}")  # fmt: skip
            unit, same = kept.unit, f"{kept.same_token:.1%} of {kept.labels} {kept.unit}s"
            lines.append(f"same likeliest {unit} as with the adapter: {same}")
            lines.append(
                f"drift on unrelated text: KL {kept.drift_kl:.4f} from the adapter's model, "
                f"which itself is {kept.adapter_kl:.4f} from the base"
            )
        if (gain := self.retained_gain) is not None:
            lines.append(f"retained gain: {gain:.1%}" + self._before())
        elif self.warning is not None:
            lines.append("retained gain: none to keep, the adapter makes the loss on these rows worse")
        elif kept is not None:
            lines.append("retained gain: none to keep, the adapter lowers the loss on these rows by less than 0.01")
        else:
            lines.append("retained gain: not measured")
        return [*lines, *self.notes, *filter(None, [self.warning])]


def layer_table(layers: Sequence[LayerReport]) -> Table:
    """The layers by kind (q_proj, k_proj, ...), with medians; "effect kept" is LayerReport.effect_kept."""
    kinds: dict[tuple[str, str], list[LayerReport]] = defaultdict(list)
    for layer in layers:
        kinds[layer.path.rpartition(".")[2], layer.format].append(layer)
    table = Table(title="merged layers (medians)", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("layer", "format", "number", "delta /\nstep", "codes\nchanged", "effect\nkept", "method"):
        left = heading in ("layer", "format", "method")
        table.add_column(heading, justify="left" if left else "right", min_width=22 if heading == "method" else None)
    for (kind, format_), group in kinds.items():
        effects = [layer.effect_kept for layer in group if layer.effect_kept is not None]
        steps = Counter(layer.steps for layer in group).most_common(1)[0][0]
        table.add_row(
            kind,
            format_,
            str(len(group)),
            f"{median(layer.delta_in_steps for layer in group):.3f}",
            f"{median(layer.codes_changed for layer in group):.1%}",
            f"{median(effects):.0%}" if effects else "-",
            ", ".join(STEP_WORDS[step] for step in steps) or "as it was",
        )
    return table


def check_kept(report: MergeReport, least: float, larger: str = "q8_0") -> None:
    """Raise MergeError where less of the gain would be kept, or the losses that say so are no numbers.

    Args:
        larger: a format to merge into that the model can be saved in.
    """
    kept, gain = report.kept, report.retained_gain
    losses = {} if kept is None else {"base": kept.base, "adapter": kept.adapter, "merged": kept.merged}
    if odd := [f"{which} {loss}" for which, loss in losses.items() if not math.isfinite(loss)]:
        raise MergeError(
            f"merge: the losses are no numbers ({', '.join(odd)}); nothing is replaced",
            hint="the adapters, by their weights, are too large for the model to compute with",
            report=report,
        )
    if gain is not None and gain < least:
        raise MergeError(
            f"merge: {gain:.1%} of the adapter's gain would be kept, expected at least {least:.0%}; nothing is replaced",
            hint=_advice(report.method, larger),
            report=report,
        )


def _advice(method: str, larger: str) -> str:
    others = f"or merge into another format ({option('to', larger)}), or accept less ({option('min_retained', 0.5)})"
    if method != "auto":
        return f"method auto keeps more; {others}"
    return f"give more calibration rows, {others}"
