from __future__ import annotations

from ._head import make_op

_op, exit_head = make_op(
    "exit_head",
    step=False,
    doc="""Run an exit's head on an activation and say per row whether it may leave.

    Args:
        x: activation, fp32/bf16/fp16/fp64 (narrow types are widened on load, the arithmetic is fp32). ``pool="mean"``: [B, D, ...] in any
            memory format; ``mean_tokens``, ``cls``, ``last``: [B, T, D]; ``none``: [B, D]. Any row stride.
        weight, bias: the classifier, [C, D] and [C]. `weight` may be ``quantize_rows(weight)``: a quarter of the bytes, for large C;
            natively its products are then exact sums of integers, of rows rounded to 2^-22 of their largest value.
        norm: normalisation between pool and classifier (`fastee.ops.Norm`).
        measure: the score; larger is more confident: ``max_prob`` 1/s, ``margin`` p1 - p2, ``entropy`` -H in nats,
            ``energy`` temperature * lse (arXiv 2010.03759).
        threshold: a row exits when its score is >= this; ``inf`` switches the exit off.
        temperature: logits are divided by it before anything else.
        mask: [B, T], true for real tokens, with ``pool="mean_tokens"``.
        logits: also return the logits [B, C].
        backend: ``cpu``, ``reference`` ...; None chooses (see `fastee.explain`).

    Returns ``.label`` int64 [B], ``.confidence`` fp32 [B], ``.exits`` bool [B], ``.stats`` (`RowStats`), ``.logits``. A row with NaN or
    +inf among its logits has label -1, NaN scores and never exits; ties go to the smaller label; B = 0 gives empty
    results. The native result carries no gradient. Every dot product is summed in one fixed order, so a row's answer
    does not depend on the batch it stands in. Raises `TypeError` and `ValueError` that name the argument.

    >>> import torch, fastee
    >>> out = fastee.ops.exit_head(torch.ones(2, 3, 4, 4), torch.eye(3) * 9, threshold=0.3)
    >>> out.label.tolist(), out.exits.tolist()
    ([0, 0], [True, True])
    """,
)
