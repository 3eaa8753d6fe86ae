"""What is computed in bfloat16 where a run asks for it, and searches in float32 whatever is."""

import threading
from contextlib import contextmanager

import torch

_lock = threading.Lock()
_held = []  # what was allowed before, once for each thread that searches


def autocast(config, device):
    """The arithmetic of a run's forward pass, by its --dtype."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16")


@contextmanager
def float32_throughout():
    """No matmul in TF32 or bfloat16; the last of several threads restores what was allowed."""
    with _lock:
        before = _allow("ieee", "ieee")
        _held.append(_held[0] if _held else before)
    try:
        yield
    finally:
        with _lock:
            before = _held.pop()
            if not _held:
                _allow(*before)


def _allow(on_gpu, on_cpu):
    """Sets what a matmul of float32 may be computed in; returns what was allowed before."""
    gpu = torch.backends.cuda.matmul
    if not hasattr(gpu, "fp32_precision"):  # before torch 2.9, with one setting for both
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest" if on_gpu == "ieee" else on_gpu)
        return before, before
    cpu = torch.backends.mkldnn.matmul
    before = gpu.fp32_precision, cpu.fp32_precision
    gpu.fp32_precision = on_gpu  # from here on, the older calls would raise errors
    cpu.fp32_precision = on_cpu
    return before
