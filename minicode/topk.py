"""The search: for every activation, the k codes that are nearest to it, or that rebuild it best.

`topk_codes` takes the k codes most similar to the activation, as in the paper. `pursue` takes them
one after the other: the most similar to the activation, then the most similar to what that one
leaves over, and so on ("matching pursuit", Mallat and Zhang 1993). At k = 1 they are the same.

`definition` and `pursuit_definition` say what is meant, in a few lines of PyTorch. The functions
give the same ids (but where scores differ by rounding alone) and never store the N x C scores: by
the extension in csrc/ where it can be built and serves, else in PyTorch, chunk by chunk.
`python -m minicode.topk` tells which.
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


def pursuit_definition(x, codes, k, similarity):
    """x (G, N, d), codes (G, C, d) -> ids (G, N, k), in the order of choice, each code once."""
    chosen = torch.empty((*x.shape[:2], 0), dtype=torch.int64, device=x.device)
    left = x.float()
    for n_chosen in range(k):
        _, ranked = definition(left, codes, n_chosen + 1, similarity)  # one at least is new
        old = (ranked.unsqueeze(-1) == chosen.unsqueeze(-2)).any(-1)
        best = ranked.gather(-1, old.long().argmin(-1, keepdim=True))  # the first that is new
        chosen = torch.cat((chosen, best), dim=-1)
        left = left - codes.float().gather(1, best.expand(*best.shape[:-1], codes.shape[-1]))
    return chosen


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
def topk_codes(x, codes, k=1, similarity="cosine", blocked=None):
    """The k best codes for each row of x (paper, section 2.1): `(scores, ids)`, best first.

    x (..., d) with codes (C, d), giving (..., k); or x (..., G, d) with codes (G, C, d), giving
    (..., G, k): G codebooks, searched in one call. Any float type; computed in float32. Scores are
    float32, ids int64. A NaN score loses to every number. blocked: bool (..., C) or (..., G, C),
    the codes that must not be chosen, if any. Not differentiable: `Codebook` does the gradients.
    TypeError or ValueError names the argument and what was expected.
    """
    check_search(x, codes, k, similarity, blocked)
    rows, table, blocked = by_group(x, codes, blocked)
    scores, ids = torch.ops.minicode.topk_codes(rows, table, k, similarity, blocked)  # (G, N, k)
    shape = (*x.shape[:-1], k)  # (..., k) or (..., G, k)
    scores = scores.transpose(0, 1).reshape(shape)
    ids = ids.transpose(0, 1).reshape(shape)
    return scores, ids


@torch.no_grad()
def pursue(x, codes, k=1, similarity="cosine", blocked=None):
    """k codes for each row of x whose sum comes near to it: ids, in the order of choice.

    The first is the best for x, each next one the best for x less the codes before it, and none is
    taken twice. Arguments and errors as for `topk_codes`; ids (..., k) or (..., G, k).
    """
    if k == 1:
        return topk_codes(x, codes, k, similarity, blocked)[1]
    check_search(x, codes, k, similarity, blocked)
    rows, table, blocked = by_group(x, codes, blocked)
    ids = torch.ops.minicode.pursue(rows, table, k, similarity, blocked)  # (G, N, k)
    return ids.transpose(0, 1).reshape(*x.shape[:-1], k)


def by_group(x, codes, blocked):
    """x as (G, N, d), codes as (G, C, d), and blocked, if there is any, as (G, N, C)."""
    table = codes if codes.dim() == 3 else codes.unsqueeze(0)
    groups, n_codes, dim = table.shape
    rows = x.reshape(-1, groups, dim).transpose(0, 1)
    if blocked is not None:
        blocked = blocked.reshape(-1, groups, n_codes).transpose(0, 1)
    return rows, table, blocked


# Operators of their own: torch.compile sees one node, and autocast can't halve their precision.


@torch.library.custom_op("minicode::topk_codes", mutates_args=())
def _search(
    x: torch.Tensor,
    codes: torch.Tensor,
    k: int,
    similarity: str,
    blocked: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        if blocked is None and native.serves(x, k):
            return native.search(x, codes, k, similarity, scale_and_offset)
        with float32_throughout():
            return search_in_chunks(x, codes, k, similarity, blocked)


@_search.register_fake
def _(x, codes, k, similarity, blocked=None):
    scores = x.new_empty((*x.shape[:2], k), dtype=torch.float32)
    return scores, torch.empty_like(scores, dtype=torch.int64)


@torch.library.custom_op("minicode::pursue", mutates_args=())
def _pursue(
    x: torch.Tensor,
    codes: torch.Tensor,
    k: int,
    similarity: str,
    blocked: torch.Tensor | None = None,
) -> torch.Tensor:
    with torch.autocast(x.device.type, enabled=False), float32_throughout():
        return pursue_in_chunks(x, codes, k, similarity, blocked)


@_pursue.register_fake
def _(x, codes, k, similarity, blocked=None):
    return x.new_empty((*x.shape[:2], k), dtype=torch.int64)


def chunks(x, n_codes, blocked, most):
    """x (G, N, d) as float32, and blocked or None, by so many rows as have `most` scores."""
    at_once = max(1, most // (len(x) * n_codes))
    for start in range(0, x.shape[1] or 1, at_once):
        part = slice(start, start + at_once)
        yield x[:, part].float(), None if blocked is None else blocked[:, part]


def search_in_chunks(x, codes, k, similarity, blocked=None):
    """The definition, in chunks of rows whose scores take 64 MB, or on a CPU 8."""
    scale, offset = scale_and_offset(codes, similarity)
    table = (codes.float() * scale.mT).mT  # (G, d, C)
    scores = []
    ids = []
    for rows, bad in chunks(x, codes.shape[1], blocked, 1 << 24 if x.is_cuda else 1 << 21):
        of_rows = torch.baddbmm(offset, rows, table)
        if bad is not None:
            of_rows.masked_fill_(bad, -torch.inf)
        best, which = best_of(of_rows, k)
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


def pursue_in_chunks(x, codes, k, similarity, blocked=None):
    """pursuit_definition, in chunks of rows whose scores take 64 MB, or on a CPU 1.

    All scores are computed once, and then k times what the code just chosen takes off them, by the
    Gram matrix (the products of all codes with each other). Where that would take more than 256 MB,
    or more work than it saves on few rows, what is left is searched again instead.
    """
    groups, n_codes, _ = codes.shape
    codes = codes.float()
    scale, offset = scale_and_offset(codes, similarity)
    table = (codes * scale.mT).mT  # (G, d, C)
    change = None
    if x.shape[1] * k >= n_codes and groups * n_codes**2 <= 1 << 26:
        change = change_by_choice(codes, table)  # (G * C, C)
    first = n_codes * torch.arange(groups, device=x.device).unsqueeze(-1)  # (G, 1)
    chosen = []
    for left, bad in chunks(x, n_codes, blocked, 1 << 24 if x.is_cuda else 1 << 18):
        scores = finite(torch.baddbmm(offset, left, table))  # (G, n, C)
        if bad is not None:
            scores.masked_fill_(bad, -torch.inf)
        ids = []
        for _ in range(k):
            best = scores.max(dim=-1).indices  # (G, n): the first of equals
            ids.append(best)
            rows = (first + best).flatten()
            if change is not None:
                scores += change.index_select(0, rows).view_as(scores)
                continue
            taken = scores.isneginf().scatter_(-1, best.unsqueeze(-1), True)
            left = left - codes.flatten(0, 1).index_select(0, rows).view_as(left)
            scores = finite(torch.baddbmm(offset, left, table))
            scores.masked_fill_(taken, -torch.inf)
        chosen.append(torch.stack(ids, dim=-1))
    return torch.cat(chosen, dim=1)


def change_by_choice(codes, table):
    """By how much the scores of all codes change when one is chosen; its own, to -inf: (G * C, C).

    Finite, so that no score becomes NaN, and none but those of chosen and blocked codes is -inf.
    """
    change = finite(-codes @ table).clamp_(-1e30, 1e30)  # (G, C, C)
    change.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    return change.flatten(0, 1)


def finite(scores):
    """In place: NaN becomes the lowest number, infinity the highest."""
    lowest = torch.finfo(scores.dtype).min
    return scores.nan_to_num_(nan=lowest, posinf=-lowest, neginf=lowest)


if __name__ == "__main__":
    extension.main()
