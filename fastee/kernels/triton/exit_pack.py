"""exit_pack: `exit_step`, then the survivors' rows gathered and quantised into one wire buffer by one more launch."""

from .exit_head import Head, Out, Plan, Scratch, plan
from .exit_step import exit_step
from .quantize_rows import quantize_rows


def exit_pack(
    head: Head, how: Plan, measure: int, threshold: float, out: Out, scratch: Scratch,
    rows, groups, length, format, scale, wire, codes, native_fp8, tuning,
):  # fmt: skip
    """Run the step on `head`, then quantise rows ``out.index[:count]`` of `rows` (x as [B, groups * length]).

    wire uint8 has room for all rows: the survivors' scales, then their data; `scale` is an fp32 view of its begin. Beyond them it is
    left as it was. `codes` as in `quantize_rows`.
    """
    exit_step(head, how, measure, threshold, out, scratch, tuning)
    quantize_rows(rows, rows.shape[0], groups, length, out.index, out.count, format, wire, scale, codes, native_fp8, True, tuning)


__all__ = ["exit_pack", "plan"]
