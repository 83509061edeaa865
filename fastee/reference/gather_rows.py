from torch import Tensor


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    return x.index_select(0, index)


def scatter_rows(out: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    return out.index_copy_(0, index, rows)
