"""What is wrong with the arguments of a search, said by name."""

import torch

SIMILARITIES = ("cosine", "distance", "dot")  # in the order of csrc/topk.h
SELECTIONS = ("pursuit", "nearest")


def check_search(x, codes, k, similarity, selection, blocked):
    """TypeError or ValueError unless these are what topk_codes takes."""
    _check_floats("x", x)
    _check_floats("codes", codes)
    if codes.dim() not in (2, 3):
        raise ValueError(f"codes must be (C, d) or (G, C, d), not {tuple(codes.shape)}")
    tail = (*codes.shape[:-2], codes.shape[-1])  # (d,) or (G, d)
    if tuple(x.shape[-len(tail) :]) != tail or x.shape[-1] == 0:
        wanted = ", ".join(str(n) for n in tail)
        shapes = f"codes {tuple(codes.shape)}, not {tuple(x.shape)}"
        raise ValueError(f"x must be (..., {wanted}) to go with {shapes}")
    if x.device != codes.device:
        raise ValueError(f"x is on {x.device} but codes are on {codes.device}")
    if type(k) is not int:
        raise TypeError(f"k must be an int, not {type(k).__name__}")
    n_codes = codes.shape[-2]
    if not 1 <= k <= n_codes:
        raise ValueError(f"k must be from 1 to the {n_codes} codes of the codebook, not {k}")
    check_one_of("similarity", similarity, SIMILARITIES)
    check_one_of("selection", selection, SELECTIONS)
    if blocked is not None:
        wanted = (*x.shape[:-1], n_codes)
        if not isinstance(blocked, torch.Tensor) or blocked.dtype != torch.bool:
            raise TypeError(f"blocked must be a tensor of bool {wanted}")
        if blocked.shape != wanted:
            raise ValueError(f"blocked must be {wanted}, not {tuple(blocked.shape)}")


def check_one_of(name, value, values):
    if value not in values:
        raise ValueError(f"{name} must be one of {', '.join(values)}, not {value!r}")


def _check_floats(name, value):
    wanted = f"{name} must be a tensor of float32, float16 or bfloat16"
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{wanted}, not {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{wanted}, not {value.dtype}")
