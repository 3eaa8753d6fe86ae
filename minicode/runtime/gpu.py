"""The coarse pass of a GPU's search: what csrc/topk_coarse.cu takes."""

import torch
import torch.nn.functional as F


def coarse_pass(x, codes, scale, offset):
    """What csrc/topk_coarse.cu takes: x and scale * codes less their means, in bfloat16; the offsets that go with these; for
    each row of x twice the bound of the error. csrc/topk_coarse.cpp derives it; its x' and c' are `rows` and `table`."""

    def length(v):
        return (
            torch.linalg.vector_norm(v, dim=-1) * 1.0001 + 1e-20
        )  # above its rounding, and squares that underflow

    (m, rows), (mu, table) = _centred(x), _centred(codes * scale.mT)
    scale, offset = scale.squeeze(-2), offset.squeeze(-2)
    plus, half_rows, half_table = (table * m).sum(-1) + offset, rows.bfloat16(), table.bfloat16()
    row, row_lost, whole = (
        length(rows),
        length(rows - half_rows),
        length(rows) + length(m),
    )  # whole: at least |x|
    of_codes = (
        length(table),
        length(table - half_table),
        length(codes),
        torch.maximum(plus.abs(), offset.abs()),
        scale,
    )
    code, code_lost, longest, largest, steepest = (v.amax(-1, keepdim=True) for v in of_codes)
    sizes = (row + whole) * (2 * code + length(mu)) + largest
    bound = row_lost * code + (row + row_lost) * code_lost + (x.shape[2] + 16) * 2**-22 * sizes
    # Before they are scaled, products may underflow, which adds to the error; where they may overflow nothing is certain.
    bound = (bound + 1e-40 * steepest).masked_fill(whole * longest > 1e37, torch.inf)
    depth, width = -x.shape[2] % 32, -codes.shape[1] % 128
    plus = F.pad(plus, (0, width), value=-torch.inf)
    halves = F.pad(half_rows, (0, depth)), F.pad(half_table, (0, depth, 0, width))
    return [*(half.contiguous() for half in halves), plus, 2.001 * bound + 1e-30]


def _centred(v):
    mean = v.mean(1, keepdim=True).nan_to_num(0, 0, 0)  # any will do
    return mean, v - mean
