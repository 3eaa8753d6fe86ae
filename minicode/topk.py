"""The search: for every activation, the k codes that are nearest to it, or that rebuild it best.

`topk_codes` takes the k codes most similar to the activation, as in the paper ("nearest"), or one
after the other: the most similar to the activation, then the most similar to what that one leaves
over, and so on ("pursuit": matching pursuit, Mallat and Zhang 1993). At k = 1 they are the same.

`definition` and `pursuit_definition` say what is meant, in a few lines of PyTorch. `topk_codes`
gives the same ids (but where scores differ by rounding alone) and never stores the N x C scores: by
the extension in csrc/ where it can be built and serves, else in PyTorch, chunk by chunk.
`python -m minicode.topk` tells which.
"""

from functools import partial

import torch
import torch.nn.functional as F

from minicode.runtime import extension, native
from minicode.runtime.arguments import check_left, check_search
from minicode.runtime.precision import float32_throughout


def definition(x, codes, k, similarity):
    """x (G, N, d), codes (G, C, d) -> scores, ids (G, N, k), best first; of equals the lower id."""
    scale, offset = scale_and_offset(codes, similarity)
    scores = nan_loses((x.float() @ codes.float().mT) * scale + offset)  # (G, N, C)
    scores, ids = scores.sort(dim=-1, descending=True, stable=True)
    return scores[..., :k], ids[..., :k]


def pursuit_definition(x, codes, k, similarity):
    """x (G, N, d), codes (G, C, d) -> ids (G, N, k), in the order of choice, each code once."""
    scale, offset = scale_and_offset(codes, similarity)
    left = x.float()
    ids = []
    taken = torch.zeros((*x.shape[:2], codes.shape[1]), dtype=torch.bool, device=x.device)
    for _ in range(k):
        scores = finite((left @ codes.float().mT) * scale + offset)  # (G, N, C)
        best = scores.masked_fill(taken, -torch.inf).max(dim=-1, keepdim=True).indices
        ids.append(best)
        taken.scatter_(-1, best, True)
        left = left - torch.take_along_dim(codes.float(), best, dim=1)
    return torch.cat(ids, dim=-1)


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
def topk_codes(x, codes, k=1, similarity="cosine", selection="nearest", blocked=None):
    """k codes for each row of x (paper, section 2.1): `(scores, ids)`, in the order of choice.

    x (..., d) with codes (C, d), giving (..., k); or x (..., G, d) with codes (G, C, d), giving
    (..., G, k): G codebooks, searched in one call. Any float type; computed in float32. Scores are
    float32, ids int64; in pursuit the score is that for what was left over, and no code is taken
    twice. A NaN score loses to every number. blocked: bool (..., C) or (..., G, C), the codes that
    must not be chosen, if any; k have to be left. Not differentiable: `Codebook` does the
    gradients. TypeError or ValueError names the argument and what was expected.
    """
    check_search(x, codes, k, similarity, selection, blocked)
    table = codes if codes.dim() == 3 else codes.unsqueeze(0)
    groups, n_codes, dim = table.shape
    rows = x.reshape(-1, groups, dim).transpose(0, 1)  # (G, N, d)
    if blocked is not None:
        blocked = blocked.reshape(-1, groups, n_codes).transpose(0, 1)  # (G, N, C)
    found = torch.ops.minicode.topk_codes(rows, table, k, similarity, selection, blocked)
    shape = (*x.shape[:-1], k)  # (..., k) or (..., G, k)
    scores, ids = (part.transpose(0, 1).reshape(shape) for part in found)  # from (G, N, k)
    return scores, ids


# An operator of its own: torch.compile sees one node, and autocast can't halve its precision.


@torch.library.custom_op("minicode::topk_codes", mutates_args=())
def _search(
    x: torch.Tensor,
    codes: torch.Tensor,
    k: int,
    similarity: str,
    selection: str = "nearest",
    blocked: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    check_left(blocked, k)
    pursuit = selection == "pursuit" and k > 1
    search = pursue_in_chunks if pursuit else search_in_chunks
    pays = not pursuit or (x.is_cpu and gram_pays(x, codes, k))
    with torch.autocast(x.device.type, enabled=False):
        if blocked is None and pays and native.serves(x, k):
            return native.search(x, codes, k, similarity, scale_and_offset, pursuit)
        with float32_throughout():
            return search(x, codes, k, similarity, blocked)


@_search.register_fake
def _(x, codes, k, *how):
    scores = x.new_empty((*x.shape[:2], k), dtype=torch.float32)
    return scores, torch.empty_like(scores, dtype=torch.int64)


def scaled(codes, similarity):
    """What x is multiplied with, and what is added then: (G, d, C) and (G, 1, C)."""
    scale, offset = scale_and_offset(codes, similarity)
    return (codes.float() * scale.mT).mT, offset


def score(x, table, offset, blocked, clean, on_cpu=1 << 21):
    """Scores (G, n, C) of some rows after the other, cleaned of NaN, those of blocked codes -inf.

    At once so many as take 8 MB (on_cpu: how many that is), or on a GPU 64.
    """
    most = 1 << 24 if x.is_cuda else on_cpu
    at_once = max(1, most // offset.numel())
    parts = x.split(at_once, dim=1)
    bad = [None] * len(parts) if blocked is None else blocked.split(at_once, dim=1)
    for rows, bad_of_rows in zip(parts, bad):
        scores = clean(torch.baddbmm(offset, rows.float(), table))
        if bad_of_rows is not None:
            scores.masked_fill_(bad_of_rows, -torch.inf)
        yield scores


def search_in_chunks(x, codes, k, similarity, blocked=None):
    """The definition, in chunks of rows."""
    clean = nan_loses if blocked is None else finite  # so that only what is blocked is -inf
    chunks = score(x, *scaled(codes, similarity), blocked, clean)
    return native.joined([best_of(scores, k) for scores in chunks])


def best_of(scores, k):
    """The k best of scores (G, n, C), without sorting them all."""
    if k == 1:
        return scores.max(dim=-1, keepdim=True)  # the first of equals
    best, ids = scores.topk(min(k + 1, scores.shape[-1]))  # one more, which may equal the k-th
    tied = (best[..., 1:] == best[..., :-1]).any(-1)  # (G, n): of equals topk takes any
    every, columns = scores[tied].sort(dim=-1, descending=True, stable=True)
    best = best[..., :k].contiguous()
    ids = ids[..., :k].contiguous()
    best[tied] = every[:, :k]
    ids[tied] = columns[:, :k]
    return best, ids


def gram_pays(x, codes, k):
    """Whether pursuit shall compute the products of all codes with each other, the Gram matrix.

    Not where that takes more than 256 MB, or more work than it saves on few rows.
    """
    groups, n_codes, _ = codes.shape
    return x.shape[1] * k >= n_codes and groups * n_codes**2 <= 1 << 26


def pursue_in_chunks(x, codes, k, similarity, blocked=None):
    """pursuit_definition, in chunks of rows.

    All scores are computed once, and then k times what the code just chosen takes off them: a row
    of the Gram matrix, or where that does not pay, the products as they are needed.
    """
    groups, n_codes, _ = codes.shape
    codes = codes.float()
    table, offset = scaled(codes, similarity)
    change = partial(change_by_choice, -codes, table)
    on_cpu = 1 << 21
    if gram_pays(x, codes, k):
        every = torch.arange(n_codes, device=x.device).expand(groups, -1)
        change = partial(rows_of, change(every))  # (G, C, C)
        on_cpu = 1 << 18
    found = []
    for scores in score(x, table, offset, blocked, finite, on_cpu):
        chosen = []
        for _ in range(k):
            best = scores.max(dim=-1)  # the first of equals; (G, n)
            chosen.append(best)
            scores += change(best.indices)
        found.append([torch.stack(parts, dim=-1) for parts in zip(*chosen)])
    return native.joined(found)


def rows_of(table, ids):
    """Rows (G, n, d) of table (G, C, d), by ids (G, n)."""
    first = table.shape[1] * torch.arange(len(table), device=ids.device).unsqueeze(-1)
    return F.embedding(ids + first, table.flatten(0, 1))


def change_by_choice(minus_codes, table, ids):
    """By how much choosing the codes ids (G, n) changes all scores; their own, to -inf: (G, n, C).

    Finite, so that no score becomes NaN, and none but those of chosen and blocked codes is -inf.
    """
    change = finite(rows_of(minus_codes, ids) @ table).clamp_(-1e30, 1e30)
    return change.scatter_(-1, ids.unsqueeze(-1), -torch.inf)


def nan_loses(scores):
    """In place: NaN becomes -infinity."""
    return scores.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def finite(scores):
    """In place: NaN and -infinity become the lowest number, infinity the highest."""
    return scores.nan_to_num_(nan=torch.finfo(scores.dtype).min)


if __name__ == "__main__":
    extension.main()
