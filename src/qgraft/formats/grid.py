"""Grid: a packed weight as the integers and the real numbers that it is made of, without the bit layout.

    weight[o, i] = (d[o, g] * sub_scales[o, s]) * value[o, i] + m[o, g] * sub_minimums[o, s]

    value             codes[o, i], or codes[o, i] - zeros[o, g], or levels[codes[o, i] - low]
    g = i * G // in   the group of weight i (a block of the format, or the whole row), or group_of[i]
    s = i * S // in   its sub-group, where the format has sub-groups; S is a multiple of G, and S = G without them

    format            weights in a group, sub-group    codes, as written     integers of a sub-group
    q4_0  q5_0        32                               -8..7     -16..15
    q8_0              32                               -127..127
    q4_1  q5_1        32                               0..15     0..31       m is the minimum
    q2_k              256, 16                          0..3                  0..15 both, m = -dmin
    q4_k  q5_k        256, 32                          0..15     0..31       0..63 both, m = -dmin
    q3_k  q6_k        256, 16                          -4..3     -32..31     -32..31, -128..127
    iq4_nl mxfp4      32                               0..15     of 16 levels; d of mxfp4 is a power of two
    nvfp4             16                               0..15     of 16 levels; d is a float of 8 bits
    iq4_xs            256, 32                          0..15     of 16 levels -32..31
    chatglm-int4      in                               -7..7
    chatglm-int8      in                               -127..127

Two's complement has one code more at the lower end, which q8_0 and the row-wise formats are read with and can store.

Formats that other libraries write are rows of the same table: GPTQ and AWQ have an integer zero point for each group
(`zeros`), GPTQ's act-order a group for each column (`group_of`, its g_idx); NF4, FP4, IQ4 and MXFP4 choose among the
`levels` of a codebook, which need be neither even nor in order; MXFP4 stores powers of two as scales (`real_dtype`), and
NF4 with double quantization stores its scales as codes of another codebook (`d_grid`).

Every format with codes is one of these rows, so that whatever chooses integers or scales (the quantizers, merging) is
written once for all of them. A product of `d`, a sub-scale and a code has more than 24 bits only in the K-quants: there
`d * sub_scale` is rounded to float32 first, as the C code does, so the brackets above belong to the format.

Not chosen: float64 fields or codes of a wider dtype, easier to calculate with and eight times as large as the codes.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from qgraft.errors import UnsupportedError

_LEAST = {
    torch.float8_e8m0fnu: 2.0**-127,
    torch.float8_e4m3fn: 0.0,
}  # dtypes without a sign, as scales are stored in them


@dataclass(frozen=True, eq=False)
class Grid:
    """One weight matrix [out, in] in G groups and S sub-groups a row; its tensors share no memory with packed bytes.

    Attributes:
        codes: int8 [out, in], the offset of the format (8, 16, 32; 128 for zero points of 8 bits) already taken off.
        d: float32 [out, G], the real scale of each group.
        m: float32 [out, G], the real factor of its minimum; None for symmetric formats.
        sub_scales: int8 [out, S], the integer scale of each sub-group; None where all are 1.
        sub_minimums: int8 [out, S], its integer minimum; None where all are 1.
        low, high: the codes that a writer may choose, both inclusive.
        sub_low, sub_high: the integers that a writer may choose for a sub-group, both inclusive.
        real_dtype: in which `d` and `m` are stored.
        real_unit: what a stored 1 is worth, a power of two.
        levels: float32 [high - low + 1], what the codes stand for, the first for `low`; None: the codes themselves.
        zeros: int8 [out, G], the code of the weight 0 in each group, the offset of the codes taken off; None: 0.
        zero_low, zero_high: the zeros that a writer may choose, both inclusive.
        group_of: int64 [in], the group of each column, where groups are not neighbours; only without sub-groups.
        d_grid: the grid [out, G] that `d` itself lies on, each number of it a group of its own; None: any real number.
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
    real_unit: float = 1.0
    levels: Tensor | None = None
    zeros: Tensor | None = None
    zero_low: int = 0
    zero_high: int = 0
    group_of: Tensor | None = None
    d_grid: "Grid | None" = None

    def values(self) -> Tensor:
        """What each code stands for before it is scaled, [out, in] float32, in memory of its own."""
        if self.levels is not None:
            return self.levels[self.codes.int() - self.low]
        values = self.codes.float()
        return values if self.zeros is None else values.sub_(self.spread(self.zeros.float()))

    def nearest(self, values_ON: Tensor) -> Tensor:
        """The codes [out, n], as float32, whose levels or integers are nearest to `values_ON` (zeros not taken off)."""
        if self.levels is None:
            return values_ON.round().clamp_(self.low, self.high)
        ordered, order = self.levels.sort(stable=True)
        middles = (ordered[1:] + ordered[:-1]) / 2
        return order[torch.bucketize(values_ON, middles)].to(values_ON.dtype) + self.low

    def spacing(self) -> float:
        """How far neighbouring codes are apart before they are scaled: 1, or the mean distance of the levels."""
        if self.levels is None:
            return 1.0
        return float(self.levels.max() - self.levels.min()) / max(len(self.levels) - 1, 1)

    def steps(self) -> Tensor:
        """What a value of 1 is worth in each sub-group: d * sub_scales, [out, S] float32."""
        return _by_sub_group(self.d, self.sub_scales)

    def offsets(self) -> Tensor | None:
        """What the value 0 is worth in each sub-group: m * sub_minimums, [out, S] float32; None for symmetric formats."""
        return None if self.m is None else _by_sub_group(self.m, self.sub_minimums)

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out, in], computed in float32 and rounded once to `dtype`: what `dequantize` gives."""
        steps, offsets = self.steps(), self.offsets()
        if self.group_of is not None:
            steps, offsets = self.spread(steps), None if offsets is None else self.spread(offsets)
        return combine(self.values(), steps, offsets).to(dtype)

    # ------------------------------------------------------------ groups and their columns

    def spread(self, values_OS: Tensor) -> Tensor:
        """Values of groups or sub-groups [out, S] over their columns, [out, in]."""
        if self.group_of is not None:
            return values_OS[:, self.group_of]
        return values_OS.repeat_interleave(self.codes.shape[1] // values_OS.shape[1], dim=1)

    def group_sums(self, values_OI: Tensor) -> Tensor:
        """The sums of [out, in] over the columns of each group, [out, G]."""
        groups = self.d.shape[1]
        if self.group_of is None:
            return values_OI.unflatten(1, (groups, -1)).sum(dim=2)
        return values_OI.new_zeros(len(values_OI), groups).index_add_(1, self.group_of, values_OI)

    def columns(self, number: int, of: int) -> Tensor | slice:
        """The columns of group or sub-group `number`, there being `of` of them."""
        if self.group_of is not None:
            return (self.group_of == number).nonzero()[:, 0]
        width = self.codes.shape[1] // of
        return slice(number * width, (number + 1) * width)

    # ------------------------------------------------------------ storing

    def rounded(self) -> "Grid":
        """The same grid with `d` and `m` as they will be stored; UnsupportedError where they do not fit."""
        d = self.stored_d(self.d, 0)
        m = None if self.m is None else stored_reals(self.m, self.real_dtype, self.real_unit)
        bad, total = _not_finite(d), d.numel()
        if m is not None:
            bad, total = bad + _not_finite(m), total + m.numel()
        if bad:
            largest = torch.finfo(self.real_dtype).max * self.real_unit
            raise UnsupportedError(
                f"grid: got {bad} of {total} scales and minimums NaN or too large to store, expected at most {largest:g}"
                f" ({str(self.real_dtype).removeprefix('torch.')})",
                hint="the weights are too large for this format: f32 and bf16 hold them",
            )
        return replace(self, d=d, m=m)

    def stored_d(self, values_ON: Tensor, first: int) -> Tensor:
        """`values_ON` as they are stored in the place of d[:, first : first + n], in float32."""
        if self.d_grid is None:
            return stored_reals(values_ON, self.real_dtype, self.real_unit)
        part = self.d_grid.groups(first, values_ON.shape[1])
        offsets = part.offsets()
        scaled = (values_ON if offsets is None else values_ON - offsets) / part.steps()
        return replace(part, codes=part.nearest(scaled).to(torch.int8)).weight()

    def groups(self, first: int, count: int) -> "Grid":
        """Some groups of a grid whose groups are one weight each."""
        assert self.d.shape == self.codes.shape, "groups of several weights"
        columns = slice(first, first + count)
        m = None if self.m is None else self.m[:, columns]
        return replace(self, codes=self.codes[:, columns], d=self.d[:, columns], m=m)

    def rows(self, start: int, stop: int) -> "Grid":
        """The rows start..stop."""

        def cut(each: Tensor | None) -> Tensor | None:
            return None if each is None else each[start:stop]

        codes, d, m, zeros = self.codes[start:stop], self.d[start:stop], cut(self.m), cut(self.zeros)
        sub_scales, sub_minimums = cut(self.sub_scales), cut(self.sub_minimums)
        d_grid = None if self.d_grid is None else self.d_grid.rows(start, stop)
        cut_grid = replace(self, codes=codes, d=d, m=m, zeros=zeros, d_grid=d_grid)
        return replace(cut_grid, sub_scales=sub_scales, sub_minimums=sub_minimums)

    def reshape(self, rows: int, width: int) -> "Grid":
        """The same weights in rows of another width: a block each, or a row of the matrix each. Not for `group_of`."""
        assert self.group_of is None and self.d_grid is None, "not made of blocks"
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
            zeros=None if self.zeros is None else fold(self.zeros),
        )

    def require(
        self,
        name: str,
        groups: int,
        subs: int = 1,
        m: bool = False,
        sub_minimums: bool = False,
        levels: int = 0,
        zeros: bool = False,
        group_of: bool = False,
        d_grid: bool = False,
    ) -> None:
        """ValueError unless the grid has the parts of format `name`: `groups` groups a row, `subs` sub-groups in each."""
        rows, width = self.codes.shape
        per_group, per_sub = (torch.float32, (rows, groups)), (torch.int8, (rows, groups * subs))
        want = {"codes": (torch.int8, tuple(self.codes.shape)), "d": per_group, "m": per_group if m else None}
        want |= {"sub_scales": per_sub if subs > 1 else None, "sub_minimums": per_sub if sub_minimums else None}
        want |= {"levels": (torch.float32, (levels,)) if levels else None}
        want |= {"zeros": (torch.int8, (rows, groups)) if zeros else None}
        want |= {"group_of": (torch.int64, (width,)) if group_of else None}
        parts = {part: getattr(self, part) for part in want}
        got = {part: None if each is None else (each.dtype, tuple(each.shape)) for part, each in parts.items()}
        if (self.d_grid is not None) != d_grid:
            raise ValueError(f"{name}: got a grid {'with' if self.d_grid else 'without'} a grid of its scales")
        if wrong := [f"{part} {got[part]}, expected {want[part]}" for part in want if got[part] != want[part]]:
            raise ValueError(f"{name}: got a grid with {'; '.join(wrong)}")


def combine(values_OI: Tensor, steps_OS: Tensor, offsets_OS: Tensor | None) -> Tensor:
    """The formula of every format: values * steps + offsets, [out, in] in the dtype of `steps`.

    Product and sum are each rounded, as in the C code; memory: one matrix of the result's dtype, which is that of
    `values_OI` where it has this dtype already.
    """
    rows, width = values_OI.shape
    sub_groups = steps_OS.shape[1]
    w_OSW = values_OI.to(steps_OS.dtype).reshape(rows, sub_groups, width // sub_groups).mul_(steps_OS[:, :, None])
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


def stored_reals(values: Tensor, dtype: torch.dtype, unit: float = 1.0) -> Tensor:
    """Real numbers as they are stored in `dtype` in units of `unit`, in float32; what is too large becomes NaN or infinite.

    Powers of two (e8m0) have no sign and no zero, the scales of NVFP4 (e4m3) no sign.
    """
    if dtype in _LEAST:
        values = (values / unit).clamp(min=_LEAST[dtype])
        stored = values.to(dtype).float().mul_(unit)
        return stored.masked_fill_(values > torch.finfo(dtype).max, torch.inf)  # torch saturates e4m3
    return values.to(dtype).float()


def _not_finite(values: Tensor) -> int:
    return values.numel() - int(values.isfinite().sum())


def require_range(name: str, what: str, integers: Tensor, low: int, high: int) -> None:
    """ValueError when one of the int8 `integers` does not fit in the bits that format `name` has for it."""
    if integers.numel() == 0:
        return
    least, most = (int(each) for each in integers.aminmax())
    if least < low or most > high:
        raise ValueError(f"{name}: got {what} from {least} to {most}, expected {low} to {high}")
