"""The extension's search, on a CPU and on a GPU; csrc/README.md tells how it works."""

from functools import partial

import torch

from minicode.runtime import extension
from minicode.runtime.arguments import SIMILARITIES
from minicode.runtime.gpu import coarse_pass


def serves(x, k):
    """Whether the extension searches x (G, N, d) here: on a GPU it keeps lists of up to 32."""
    if x.device.type not in extension.load()[0]:
        return False
    return x.is_cpu or (k <= 32 and x.shape[1] >= 512)


def search(x, codes, k, similarity, scale_and_offset, coarse=True):
    """x (G, N, d), codes (G, C, d), of any type -> scores, ids (G, N, k), computed in float32.

    scale_and_offset: the function of minicode.topk. coarse: after a pass in half precision, where
    the search is large enough for that to pay.
    """
    codes = codes.float().contiguous()
    if x.is_cpu:
        kind = SIMILARITIES.index(similarity)
        search_part = partial(_on_cpu, codes=codes, k=k, kind=kind, coarse=coarse)
        if x.dtype == torch.float32 and x.stride(-1) == 1:
            return search_part(x)  # it is read where it lies
    else:
        scale, offset = scale_and_offset(codes, similarity)
        search_part = partial(_on_gpu, codes=codes, scale=scale, offset=offset, k=k, coarse=coarse)
    held = codes.shape[0] * max(128, x.shape[2])  # a row, or on a GPU its list of candidates
    most = 1 << 24 if x.is_cuda else 1 << 21
    parts = x.split(max(1, most // held), dim=1)
    found = [search_part(rows.float().contiguous()) for rows in parts]
    scores, ids = zip(*found)
    return torch.cat(scores, dim=1), torch.cat(ids, dim=1)


def _on_cpu(x, codes, k, kind, coarse):
    return torch.ops.minicode_native.topk(x, codes, k, kind, coarse)


def _on_gpu(x, codes, scale, offset, k, coarse):
    halves = []
    if coarse and _pays(x, codes):
        halves = coarse_pass(x, codes, scale, offset)
    scale = scale.contiguous()
    offset = offset.contiguous()
    return torch.ops.minicode_native.topk_cuda(x, codes, scale, offset, k, halves)


def _pays(x, codes):
    """Whether a GPU with tensor cores is faster with a coarse pass first."""
    n_dims = x.shape[2]
    n_codes = codes.shape[1]
    work = x.numel() * n_codes
    large = n_dims >= 16 and n_codes >= 1024 and work >= 1 << 33
    return large and torch.cuda.get_device_capability(x.device) >= (8, 0)
