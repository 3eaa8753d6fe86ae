"""The search: for every activation, the k codes that are most similar to it.

`definition` says what is meant, in five lines of PyTorch. `topk_codes` gives the same ids without
ever storing the N x C scores: by the extension in csrc/ where it can be built, else in PyTorch,
chunk by chunk. `python -m minicode.topk` tells which, and builds it.
"""

import torch

from minicode.runtime import extension, gpu
from minicode.runtime.arguments import check_search
from minicode.runtime.precision import float32_throughout

SIMILARITIES = ("cosine", "distance", "dot")  # in the order of csrc/topk.h


def definition(x, codes, k, similarity):
    """x (G, N, d), codes (G, C, d) -> scores, ids (G, N, k), best first; of equals the lower id."""
    scale, offset = scale_and_offset(codes, similarity)
    scores = (x.float() @ codes.float().mT) * scale + offset  # (G, N, C)
    scores = scores.masked_fill(scores.isnan(), -torch.inf)
    scores, ids = scores.sort(dim=-1, descending=True, stable=True)
    return scores[..., :k], ids[..., :k]


def scale_and_offset(codes, similarity):
    """Every similarity is x·c * scale + offset, with one of each a code: both (G, 1, C).

    cosine: x·c / |c|, as |x| changes no rank (0 for c = 0); distance: x·c - |c|²/2, which ranks
    as -|x - c|² does; dot: x·c.
    """
    norm = torch.linalg.vector_norm(codes, dim=-1, dtype=torch.float64).unsqueeze(-2)
    scale = torch.ones_like(norm)
    offset = torch.zeros_like(norm)
    if similarity == "cosine":
        scale = torch.where(norm >= torch.finfo(torch.float32).tiny, 1 / norm, 0)
    elif similarity == "distance":
        offset = -0.5 * norm.square()
    return scale.float(), offset.float()


def topk_codes(x, codes, k=1, similarity="cosine"):
    """The k best codes for each row of x (paper, section 2.1): `(scores, ids)`, best first.

    x (..., d) with codes (C, d), giving (..., k); or x (..., G, d) with codes (G, C, d), giving
    (..., G, k): G codebooks, searched in one call. Any float type; computed in float32. Scores are
    float32, ids int64. A NaN score loses to every number. Not differentiable: `Codebook` does the
    gradients. TypeError or ValueError names the argument and what was expected.
    """
    check_search(x, codes, k, similarity, SIMILARITIES)
    table = codes.detach() if codes.dim() == 3 else codes.detach().unsqueeze(0)  # (G, C, d)
    rows = x.detach().reshape(-1, table.shape[0], table.shape[2]).transpose(0, 1)  # (G, N, d)
    scores, ids = torch.ops.minicode.topk_codes(rows, table, k, similarity)  # (G, N, k)
    shape = (*x.shape[:-1], k)  # (..., k) or (..., G, k)
    return scores.transpose(0, 1).reshape(shape), ids.transpose(0, 1).reshape(shape)


@torch.library.custom_op("minicode::topk_codes", mutates_args=())
def _search(
    x: torch.Tensor, codes: torch.Tensor, k: int, similarity: str
) -> tuple[torch.Tensor, torch.Tensor]:
    # An operator of its own: torch.compile sees one node, and autocast can't halve its precision.
    served = x.device.type in extension.load()[0] and (x.is_cpu or gpu.serves(x, k))
    with torch.autocast(x.device.type, enabled=False):
        if not served:
            with float32_throughout():
                return search_in_chunks(x, codes, k, similarity, in_pytorch)
        if x.is_cpu and x.dtype == torch.float32 and x.stride(-1) == 1:
            return native(x, codes.float().contiguous(), k, similarity)  # x is read where it lies
        return search_in_chunks(x, codes, k, similarity, native)


def native(x, codes, k, similarity, coarse=True):
    """The extension's search; `coarse`: after a pass in half precision, where that pays."""
    if x.is_cpu:
        kind = SIMILARITIES.index(similarity)
        return torch.ops.minicode_native.topk(x, codes, k, kind, coarse)
    return gpu.search(x, codes, *scale_and_offset(codes, similarity), k, coarse)


def search_in_chunks(x, codes, k, similarity, search):
    """x (G, N, d), codes (G, C, d), of any type; so many rows at a time that what is held is small.

    In PyTorch a row's scores are held, else a row, or on a GPU its list of candidates.
    """
    codes = codes.float().contiguous()
    scores, ids = _empty(x, codes, k, similarity)
    held = codes.shape[1] if search is in_pytorch else max(128, x.shape[2])
    at_once = (1 << 24 if x.is_cuda else 1 << 21) // (codes.shape[0] * held)  # of 64 MB, or 8
    for start in range(0, x.shape[1], max(1, at_once)):
        rows = slice(start, start + max(1, at_once))
        part = x[:, rows].float().contiguous()
        scores[:, rows], ids[:, rows] = search(part, codes, k, similarity)
    return scores, ids


def in_pytorch(x, codes, k, similarity):
    """The definition without sorting all scores: x (G, n, d) -> scores, ids (G, n, k)."""
    scale, offset = scale_and_offset(codes, similarity)
    scores = torch.baddbmm(offset, x, (codes * scale.mT).mT)  # (G, n, C)
    scores.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    if k == 1:
        return scores.max(dim=-1, keepdim=True)  # the first of equals
    best, ids = scores.topk(min(k + 1, scores.shape[-1]))
    tied = (best[..., 1:] == best[..., :-1]).any(-1)  # (G, n): there topk takes any of them
    best = best[..., :k]
    ids = ids[..., :k]
    if tied.any():
        every, columns = scores[tied].sort(dim=-1, descending=True, stable=True)
        best[tied], ids[tied] = every[:, :k], columns[:, :k]
    return best, ids


@_search.register_fake
def _empty(x, codes, k, similarity):
    scores = x.new_empty((*x.shape[:2], k), dtype=torch.float32)
    return scores, torch.empty_like(scores, dtype=torch.int64)


if __name__ == "__main__":
    extension.main()
