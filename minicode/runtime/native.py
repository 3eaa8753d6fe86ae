"""The extension's search, on a CPU and on a GPU; csrc/README.md tells how it works."""

import torch

from minicode.runtime import extension, gpu
from minicode.runtime.arguments import SIMILARITIES


def serves(x, k):
    """Whether the extension searches for the k best codes of x (G, N, d) here."""
    served, _ = extension.load(x.device.type)
    return served and (x.is_cpu or gpu.serves(x, k))


def joined(found):
    """The scores and ids of all parts of the rows [(scores, ids), ...] as one pair."""
    if len(found) == 1:
        return tuple(found[0])
    scores, ids = zip(*found)
    return torch.cat(scores, dim=1), torch.cat(ids, dim=1)


def search(x, codes, k, similarity, scale_and_offset, pursuit=False, coarse=True):
    """x (G, N, d), codes (G, C, d), of any type -> scores, ids (G, N, k), in float32.

    scale_and_offset: the function of minicode.topk. pursuit: on a CPU alone. coarse: after a pass
    in a rounded form, where the search is large enough for that to pay.
    """
    codes = codes.float().contiguous()
    if x.is_cpu:
        kind = SIMILARITIES.index(similarity)
        search_rows = torch.ops.minicode_native.topk
        how = (codes, k, kind, coarse)
        if pursuit:  # in one part, as the Gram matrix is computed for each
            x = x.float()
            x = x if x.stride(-1) == 1 else x.contiguous()
            search_rows = torch.ops.minicode_native.pursuit
            how = (codes, k, kind)
        if x.dtype == torch.float32 and x.stride(-1) == 1:  # it is read where it lies
            return search_rows(x, *how)
    else:
        search_rows = gpu.search
        how = (codes, *scale_and_offset(codes, similarity), k, coarse)
    held = codes.shape[0] * max(128, x.shape[2])  # a row, or on a GPU its list of candidates
    most = 1 << 24 if x.is_cuda else 1 << 21
    parts = x.split(max(1, most // held), dim=1)
    return joined([search_rows(rows.float().contiguous(), *how) for rows in parts])
