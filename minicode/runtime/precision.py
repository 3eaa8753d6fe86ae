"""Searches in float32, whatever precision the user allows elsewhere."""

import threading
from contextlib import contextmanager

import torch

_lock, _held = threading.Lock(), []  # what was allowed before, once for each thread that searches


@contextmanager
def float32_throughout():
    """No matmul in TF32 or bfloat16, whatever the user allows elsewhere; of several threads the last one out restores it."""
    new = hasattr(
        torch.backends.cuda.matmul, "fp32_precision"
    )  # from torch 2.9 on; once used, the older calls raise errors
    kinds = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul) if new else ()

    def allow(values):
        if not new:
            return torch.set_float32_matmul_precision(*values)
        for kind, value in zip(kinds, values):
            kind.fp32_precision = value

    with _lock:
        before = (
            [kind.fp32_precision for kind in kinds]
            if new
            else [torch.get_float32_matmul_precision()]
        )
        _held.append(_held[0] if _held else before)
        allow(["ieee", "ieee"] if new else ["highest"])
    try:
        yield
    finally:
        with _lock:
            before = _held.pop()
            if not _held:
                allow(before)
