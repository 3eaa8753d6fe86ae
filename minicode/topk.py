"""The search: for every activation, the k codes that are most similar to it.

`definition` says what is meant, in five lines of PyTorch. `topk_codes` gives the same ids (but
where scores differ by rounding alone) and never stores the N x C scores: by the extension in csrc/
where it can be built, else in PyTorch, chunk by chunk. `python -m minicode.topk` tells which.
"""

import torch

from minicode.runtime import extension, native
from minicode.runtime.arguments import check_search
from minicode.runtime.precision import float32_throughout


def definition(x, codes, k, similarity):
    """x (G, N, d), codes (G, C, d) -> scores, ids (G, N, k), best first; of equals the lower id."""
    scale, offset = scale_and_offset(codes, similarity)
    scores = (x.float() @ codes.float().mT) * scale + offset  # (G, N, C)
    scores = scores.masked_fill(scores.isnan(), -torch.inf)
    scores, ids = scores.sort(dim=-1, descending=True, stable=True)
    return scores[..., :k], ids[..., :k]


def scale_and_offset(codes, similarity):
    """Every similarity is x·c * scale + offset: one scale and one offset a code, both (G, 1, C).

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


@torch.no_grad()
def topk_codes(x, codes, k=1, similarity="cosine"):
    """The k best codes for each row of x (paper, section 2.1): `(scores, ids)`, best first.

    x (..., d) with codes (C, d), giving (..., k); or x (..., G, d) with codes (G, C, d), giving
    (..., G, k): G codebooks, searched in one call. Any float type; computed in float32. Scores are
    float32, ids int64. A NaN score loses to every number. Not differentiable: `Codebook` does the
    gradients. TypeError or ValueError names the argument and what was expected.
    """
    check_search(x, codes, k, similarity)
    table = codes if codes.dim() == 3 else codes.unsqueeze(0)  # (G, C, d)
    groups, _, dim = table.shape
    rows = x.reshape(-1, groups, dim).transpose(0, 1)  # (G, N, d)
    scores, ids = torch.ops.minicode.topk_codes(rows, table, k, similarity)  # (G, N, k)
    shape = (*x.shape[:-1], k)  # (..., k) or (..., G, k)
    scores = scores.transpose(0, 1).reshape(shape)
    ids = ids.transpose(0, 1).reshape(shape)
    return scores, ids


@torch.library.custom_op("minicode::topk_codes", mutates_args=())
def _search(
    x: torch.Tensor, codes: torch.Tensor, k: int, similarity: str
) -> tuple[torch.Tensor, torch.Tensor]:
    # An operator of its own: torch.compile sees one node, and autocast can't halve its precision.
    with torch.autocast(x.device.type, enabled=False):
        if native.serves(x, k):
            return native.search(x, codes, k, similarity, scale_and_offset)
        with float32_throughout():
            return search_in_chunks(x, codes, k, similarity)


@_search.register_fake
def _(x, codes, k, similarity):
    scores = x.new_empty((*x.shape[:2], k), dtype=torch.float32)
    return scores, torch.empty_like(scores, dtype=torch.int64)


def search_in_chunks(x, codes, k, similarity):
    """The definition, in chunks of rows whose scores take 64 MB, or on a CPU 8."""
    scale, offset = scale_and_offset(codes, similarity)
    table = (codes.float() * scale.mT).mT  # (G, d, C)
    n_scores = codes.shape[0] * codes.shape[1]  # a row
    most = 1 << 24 if x.is_cuda else 1 << 21
    at_once = max(1, most // n_scores)
    scores = []
    ids = []
    for rows in x.split(at_once, dim=1):
        best, which = best_of(torch.baddbmm(offset, rows.float(), table), k)
        scores.append(best)
        ids.append(which)
    return torch.cat(scores, dim=1), torch.cat(ids, dim=1)


def best_of(scores, k):
    """The k best of scores (G, n, C), without sorting them all."""
    scores.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    if k == 1:
        return scores.max(dim=-1, keepdim=True)  # the first of equals
    best, ids = scores.topk(min(k + 1, scores.shape[-1]))  # one more, which may equal the k-th
    tied = (best[..., 1:] == best[..., :-1]).any(-1)  # (G, n): of equals topk takes any
    best = best[..., :k]
    ids = ids[..., :k]
    if tied.any():
        every, columns = scores[tied].sort(dim=-1, descending=True, stable=True)
        best[tied] = every[:, :k]
        ids[tied] = columns[:, :k]
    return best, ids


if __name__ == "__main__":
    extension.main()
