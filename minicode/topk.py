"""The search: for every activation, the k codes that are most similar to it.

`definition` is the specification, in four lines of PyTorch. `topk_codes` returns the same ids without ever
storing the N x C scores: by the extension in csrc/ where it can be built, else in PyTorch, chunk by chunk.
`python -m minicode.topk` tells which, and builds it.
"""

import torch

from minicode.runtime import extension
from minicode.runtime.gpu import coarse_pass
from minicode.runtime.precision import float32_throughout

SIMILARITIES = ("cosine", "distance", "dot")  # in the order of csrc/topk.h
CHUNK = {"cpu": 1 << 21, "cuda": 1 << 24}  # floats held at a time: 8 MB, or 64


def definition(x, codes, k, similarity):
    """x (G, N, d), codes (G, C, d) -> scores, ids (G, N, k), best first; equal scores: the lower id first."""
    scale, offset = scale_and_offset(codes, similarity)
    scores = (x.float() @ codes.float().mT) * scale + offset
    scores, ids = scores.masked_fill(scores.isnan(), -torch.inf).sort(
        dim=-1, descending=True, stable=True
    )
    return scores[..., :k], ids[..., :k]


def scale_and_offset(codes, similarity):
    """Every similarity is x·c * scale + offset, with one scale and one offset a code; both (G, 1, C).

    cosine: x·c / |c|, as |x| changes no rank (0 for c = 0); distance: x·c - |c|²/2, which ranks as -|x - c|²; dot: x·c.
    """
    norm = torch.linalg.vector_norm(codes, dim=-1, dtype=torch.float64).unsqueeze(-2)
    scale, offset = torch.ones_like(norm), torch.zeros_like(norm)
    if similarity == "cosine":
        scale = torch.where(norm >= torch.finfo(torch.float32).tiny, 1 / norm, 0)
    elif similarity == "distance":
        offset = -0.5 * norm.square()
    return scale.float(), offset.float()


def topk_codes(x, codes, k=1, similarity="cosine"):
    """The k best codes for each row of x (paper, section 2.1): `(scores, ids)`, float32 and int64, best first.

    x (..., d) with codes (C, d), giving (..., k); or x (..., G, d) with codes (G, C, d), giving (..., G, k): G
    codebooks, searched in one call. Any float type; computed in float32. A NaN score loses to every number. Not
    differentiable: `Codebook` does the gradients. TypeError or ValueError names the argument and what was expected.
    """
    _check(x, codes, k, similarity)
    x, codes, grouped = x.detach(), codes.detach(), codes.dim() == 3
    table = codes if grouped else codes.unsqueeze(0)
    rows = x.reshape(-1, *table.shape[::2]).transpose(0, 1)  # (G, N, d)
    scores, ids = torch.ops.minicode.topk_codes(rows, table, k, similarity)  # (G, N, k)
    shape = (*x.shape[:-1], k)  # (..., k) or (..., G, k)
    return scores.transpose(0, 1).reshape(shape), ids.transpose(0, 1).reshape(shape)


@torch.library.custom_op("minicode::topk_codes", mutates_args=())
def _search(
    x: torch.Tensor, codes: torch.Tensor, k: int, similarity: str
) -> tuple[torch.Tensor, torch.Tensor]:
    # An operator of its own, so that torch.compile sees one node and autocast cannot halve its precision.
    device = x.device.type
    served = device in extension.load()[0] and (device == "cpu" or (k <= 32 and x.shape[1] >= 512))
    with torch.autocast(device, enabled=False):
        if not served:
            with float32_throughout():
                return search_in_chunks(x, codes, k, similarity, in_pytorch)
        at_once = device == "cpu" or x.shape[1] <= rows_at_once(x, codes, native)
        if at_once and x.dtype == torch.float32 and x.stride(-1) == 1:
            return native(x, codes.float().contiguous(), k, similarity)
        return search_in_chunks(x, codes, k, similarity, native)


def native(x, codes, k, similarity, coarse=True):
    """The extension's search, after a coarse pass where that is worth it. On a GPU it takes scales and offsets, and k up to 32."""
    if x.device.type == "cpu":
        return torch.ops.minicode_native.topk(x, codes, k, SIMILARITIES.index(similarity), coarse)
    scale, offset = scale_and_offset(codes, similarity)
    # To prepare a coarse pass has its cost, whatever the number of codes.
    large = (
        coarse
        and x.shape[2] >= 16
        and codes.shape[1] >= 1024
        and x.numel() * codes.shape[1] >= 1 << 33
    )
    prepared = (
        coarse_pass(x, codes, scale, offset)
        if large and torch.cuda.get_device_capability(x.device) >= (8, 0)
        else []
    )
    return torch.ops.minicode_native.topk_cuda(
        x, codes, scale.contiguous(), offset.contiguous(), k, prepared
    )


def search_in_chunks(x, codes, k, similarity, search):
    """x (G, N, d), codes (G, C, d), of any type; so many rows at a time that they, or in PyTorch their scores, fill CHUNK."""
    codes, (scores, ids) = codes.float().contiguous(), _empty(x, codes, k, similarity)
    step = rows_at_once(x, codes, search)
    for start in range(0, x.shape[1], step):
        rows = slice(start, start + step)
        scores[:, rows], ids[:, rows] = search(
            x[:, rows].float().contiguous(), codes, k, similarity
        )
    return scores, ids


def rows_at_once(x, codes, search):
    held = (
        codes.shape[1] if search is in_pytorch else max(128, x.shape[2])
    )  # for a row; 128: a GPU's list of candidates
    return max(1, CHUNK.get(x.device.type, CHUNK["cpu"]) // (codes.shape[0] * held))


def in_pytorch(x, codes, k, similarity):
    """The first k of a stable descending sort of all scores, without sorting them all."""
    scale, offset = scale_and_offset(codes, similarity)
    scores = torch.baddbmm(offset, x, (codes * scale.mT).mT)  # (G, n, C)
    if k == 1:
        best, ids = scores.max(dim=-1, keepdim=True)  # the first of equals; but a NaN wins here
        if not best.isnan().any():
            return best, ids
    more = min(k + 1, scores.shape[-1])
    best, ids = scores.topk(more, dim=-1)
    if best.isnan().any():
        scores = scores.masked_fill(scores.isnan(), -torch.inf)
        best, ids = scores.topk(more, dim=-1)
    tied = (best[..., k:] == best[..., k - 1 : k]).any(
        -1
    )  # of equal scores topk may have kept the wrong ones
    ids, order = ids[..., :k].sort(dim=-1)
    best, order = best.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(-1, order)
    if tied.any():
        values, columns = scores[tied].sort(dim=-1, descending=True, stable=True)
        best[tied], ids[tied] = values[:, :k], columns[:, :k]
    return best, ids


@_search.register_fake
def _empty(x, codes, k, similarity):
    shape = (x.shape[0], x.shape[1], k)
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.int64)


def _check(x, codes, k, similarity):
    for name, value in (("x", x), ("codes", codes)):
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
            raise TypeError(f"{name} must be a tensor of float32, float16 or bfloat16, not {kind}")
    if codes.dim() not in (2, 3):
        raise ValueError(f"codes must be (C, d) or (G, C, d), not {tuple(codes.shape)}")
    tail = codes.shape[-1:] if codes.dim() == 2 else (codes.shape[0], codes.shape[2])
    if x.shape[-len(tail) :] != tuple(tail) or x.shape[-1] == 0:
        wanted = ", ".join(str(n) for n in tail)
        raise ValueError(
            f"x must be (..., {wanted}) to go with codes {tuple(codes.shape)}, not {tuple(x.shape)}"
        )
    if x.device != codes.device:
        raise ValueError(f"x is on {x.device} but codes are on {codes.device}")
    if not isinstance(k, int) or isinstance(k, bool):
        raise TypeError(f"k must be an int, not {type(k).__name__}")
    if not 1 <= k <= codes.shape[-2]:
        raise ValueError(
            f"k must be from 1 to the {codes.shape[-2]} codes of the codebook, not {k}"
        )
    if similarity not in SIMILARITIES:
        raise ValueError(f"similarity must be one of {', '.join(SIMILARITIES)}, not {similarity!r}")


if __name__ == "__main__":
    extension.main()
