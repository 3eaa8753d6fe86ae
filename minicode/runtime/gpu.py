"""The search on a GPU: when it serves, and what its coarse pass in bfloat16 takes."""

import torch
import torch.nn.functional as F


def serves(x, k):
    """Whether the extension's search on a GPU takes this one: it keeps lists of up to 32."""
    return k <= 32 and x.shape[1] >= 512


def search(x, codes, scale, offset, k, coarse):
    """csrc/topk_cuda.cu, after the coarse pass where the search is large enough to pay for it."""
    n_dims = x.shape[2]
    n_codes = codes.shape[1]
    large = n_dims >= 16 and n_codes >= 1024 and x.numel() * n_codes >= 1 << 33
    halves = []
    if coarse and large and torch.cuda.get_device_capability(x.device) >= (8, 0):
        halves = coarse_pass(x, codes, scale, offset)
    return torch.ops.minicode_native.topk_cuda(x, codes, scale, offset, k, halves)


def coarse_pass(x, codes, scale, offset):
    """What csrc/topk_coarse.cu takes, for x (G, N, d), codes (G, C, d), scale and offset (G, 1, C).

    x and scale * codes, less their means, in bfloat16; the offsets (G, C) that go with these; and
    for each row twice the bound of the error (G, N). d is filled up to a multiple of 32, C of 128.
    csrc/topk_coarse.cpp derives the bound: its x' and c' are `rows` and `table`.
    """
    m, rows = _centred(x)
    mu, table = _centred(codes * scale.mT)
    rounded_rows = rows.bfloat16()
    rounded_table = table.bfloat16()
    scale = scale.squeeze(-2)  # (G, C)
    offset = offset.squeeze(-2)
    plus = (table * m).sum(-1) + offset

    # Of each row, (G, N).
    row = _length(rows)
    row_lost = _length(rows - rounded_rows)
    whole = row + _length(m)  # at least |x|

    # Of all codes of a group, (G, 1).
    code = _most(_length(table))
    code_lost = _most(_length(table - rounded_table))
    longest = _most(_length(codes))
    largest_offset = _most(torch.maximum(plus.abs(), offset.abs()))
    steepest = _most(scale)

    lost_to_bfloat16 = row_lost * code + (row + row_lost) * code_lost
    sizes = (row + whole) * (2 * code + _length(mu)) + largest_offset
    bound = lost_to_bfloat16 + (x.shape[2] + 16) * 2**-22 * sizes
    # Products may underflow before they are scaled; where they may overflow nothing is certain.
    bound = bound + 1e-40 * steepest
    bound = bound.masked_fill(whole * longest > 1e37, torch.inf)

    depth = -x.shape[2] % 32
    width = -codes.shape[1] % 128
    half_x = F.pad(rounded_rows, (0, depth)).contiguous()
    half_codes = F.pad(rounded_table, (0, depth, 0, width)).contiguous()
    plus = F.pad(plus, (0, width), value=-torch.inf)
    return [half_x, half_codes, plus, 2.001 * bound + 1e-30]


def _centred(v):
    """The mean of v (G, n, d) over n, 0 where it is no number as any will do; and v less it."""
    mean = v.mean(1, keepdim=True).nan_to_num(0, 0, 0)
    return mean, v - mean


def _length(v):
    """At least the length of v: above its rounding, and squares that underflow."""
    return torch.linalg.vector_norm(v, dim=-1) * 1.0001 + 1e-20


def _most(v):
    return v.amax(-1, keepdim=True)
