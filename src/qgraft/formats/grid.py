"""Grid: a packed weight as the integers and the real numbers that it is made of, without the bit layout.

    weight[o, i] = (d[o, g] * sub_scales[o, s]) * codes[o, i] + m[o, g] * sub_minimums[o, s]

    g = i * G // in   the group of weight i (a block of the format, or the whole row)
    s = i * S // in   its sub-group, where the format has sub-groups; S is a multiple of G, and S = G without them

    format            weights in a group, sub-group    codes, as written     integers of a sub-group
    q4_0  q5_0        32                               -8..7     -16..15
    q8_0              32                               -127..127
    q4_1  q5_1        32                               0..15     0..31       m is the minimum
    q2_k              256, 16                          0..3                  0..15 both, m = -dmin
    q4_k  q5_k        256, 32                          0..15     0..31       0..63 both, m = -dmin
    q3_k  q6_k        256, 16                          -4..3     -32..31     -32..31, -128..127
    chatglm-int4      in                               -7..7
    chatglm-int8      in                               -127..127

Two's complement has one code more at the lower end, which q8_0 and the row-wise formats are read with and can store.

Every format with codes is one of these rows, so that whatever chooses integers or scales (the quantizers, merging) is
written once for all of them. A product of `d`, a sub-scale and a code has more than 24 bits only in the K-quants: there
`d * sub_scale` is rounded to float32 first, as the C code does, so the brackets above belong to the format.

Not chosen: float64 fields or codes of a wider dtype, easier to calculate with and eight times as large as the codes.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from qgraft.errors import UnsupportedError


@dataclass(frozen=True, eq=False)
class Grid:
    """One weight matrix [out, in] in G groups and S sub-groups a row; its tensors share no memory with packed bytes.

    Attributes:
        codes: int8 [out, in], the offset of the format (8, 16, 32) already taken off.
        d: float32 [out, G], the real scale of each group.
        m: float32 [out, G], the real factor of its minimum; None for symmetric formats.
        sub_scales: int8 [out, S], the integer scale of each sub-group; None where all are 1.
        sub_minimums: int8 [out, S], its integer minimum; None where all are 1.
        low, high: the codes that a writer may choose, both inclusive.
        sub_low, sub_high: the integers that a writer may choose for a sub-group, both inclusive.
        real_dtype: in which `d` and `m` are stored.
    """

    codes: Tensor
    d: Tensor
    m: Tensor | None = None
    sub_scales: Tensor | None = None
    sub_minimums: Tensor | None = None
    low: int = field(kw_only=True)
    high: int = field(kw_only=True)
    sub_low: int = 1
    sub_high: int = 1
    real_dtype: torch.dtype = torch.float16

    def steps(self) -> Tensor:
        """What one step of a code is worth in each sub-group: d * sub_scales, [out, S] float32."""
        return _by_sub_group(self.d, self.sub_scales)

    def offsets(self) -> Tensor | None:
        """What the code 0 is worth in each sub-group: m * sub_minimums, [out, S] float32; None for symmetric formats."""
        return None if self.m is None else _by_sub_group(self.m, self.sub_minimums)

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out, in], computed in float32 and rounded once to `dtype`: what `dequantize` gives."""
        return combine(self.codes, self.steps(), self.offsets()).to(dtype)

    def rounded(self) -> "Grid":
        """The same grid with `d` and `m` as they will be stored; UnsupportedError where they do not fit."""
        d = self.d.to(self.real_dtype)
        m = None if self.m is None else self.m.to(self.real_dtype)
        bad, total = _not_finite(d), d.numel()
        if m is not None:
            bad, total = bad + _not_finite(m), total + m.numel()
        if bad:
            largest = torch.finfo(self.real_dtype).max
            raise UnsupportedError(
                f"grid: got {bad} of {total} scales and minimums NaN or too large to store, expected at most {largest:g}"
                f" ({str(self.real_dtype).removeprefix('torch.')})",
                hint="the weights are too large for this format: f32 and bf16 hold them",
            )
        return replace(self, d=d.float(), m=None if m is None else m.float())

    def reshape(self, rows: int, width: int) -> "Grid":
        """The same weights in rows of another width: a block each, or a row of the matrix each."""

        old = self.codes.shape[1]

        def fold(each: Tensor) -> Tensor:
            return each.reshape(rows, each.shape[1] * width // old)

        return replace(
            self,
            codes=fold(self.codes),
            d=fold(self.d),
            m=None if self.m is None else fold(self.m),
            sub_scales=None if self.sub_scales is None else fold(self.sub_scales),
            sub_minimums=None if self.sub_minimums is None else fold(self.sub_minimums),
        )

    def require(self, name: str, groups: int, subs: int = 1, m: bool = False, sub_minimums: bool = False) -> None:
        """ValueError unless the grid has the parts of format `name`: `groups` groups a row, `subs` sub-groups in each."""
        rows = len(self.codes)
        per_group, per_sub = (torch.float32, (rows, groups)), (torch.int8, (rows, groups * subs))
        want = {"codes": (torch.int8, tuple(self.codes.shape)), "d": per_group, "m": per_group if m else None}
        want |= {"sub_scales": per_sub if subs > 1 else None, "sub_minimums": per_sub if sub_minimums else None}
        parts = {part: getattr(self, part) for part in want}
        got = {part: None if each is None else (each.dtype, tuple(each.shape)) for part, each in parts.items()}
        if wrong := [f"{part} {got[part]}, expected {want[part]}" for part in want if got[part] != want[part]]:
            raise ValueError(f"{name}: got a grid with {'; '.join(wrong)}")


def combine(codes_OI: Tensor, steps_OS: Tensor, offsets_OS: Tensor | None) -> Tensor:
    """The formula of every format: codes * steps + offsets, [out, in] in the dtype of `steps`.

    Product and sum are each rounded, as in the C code; memory: one matrix of the result's dtype.
    """
    rows, width = codes_OI.shape
    sub_groups = steps_OS.shape[1]
    w_OSW = codes_OI.to(steps_OS.dtype).reshape(rows, sub_groups, width // sub_groups).mul_(steps_OS[:, :, None])
    if offsets_OS is not None:
        w_OSW.add_(offsets_OS[:, :, None])
    return w_OSW.view(rows, width)


def _by_sub_group(real_OG: Tensor, integers_OS: Tensor | None) -> Tensor:
    """The real number of each group times the integers of its sub-groups, [out, S]; the real numbers without them."""
    if integers_OS is None:
        return real_OG
    shape, groups = integers_OS.shape, real_OG.shape[1]
    integers = integers_OS.float().view(shape[0], groups, shape[1] // groups)
    return integers.mul_(real_OG[:, :, None]).view(shape)


def _not_finite(values: Tensor) -> int:
    return values.numel() - int(values.isfinite().sum())


def require_range(name: str, what: str, integers: Tensor, low: int, high: int) -> None:
    """ValueError when one of the int8 `integers` does not fit in the bits that format `name` has for it."""
    if integers.numel() == 0:
        return
    least, most = (int(each) for each in integers.aminmax())
    if least < low or most > high:
        raise ValueError(f"{name}: got {what} from {least} to {most}, expected {low} to {high}")
