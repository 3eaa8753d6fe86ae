"""What is wrong with the arguments of a search, said by name."""

import torch


def check_search(x, codes, k, similarity, similarities):
    """TypeError or ValueError unless x, codes, k and similarity are what topk_codes takes."""
    for name, value in {"x": x, "codes": codes}.items():
        if not isinstance(value, torch.Tensor):
            _wrong_type(name, type(value).__name__)
        if not value.is_floating_point():
            _wrong_type(name, value.dtype)

    if codes.dim() not in (2, 3):
        raise ValueError(f"codes must be (C, d) or (G, C, d), not {tuple(codes.shape)}")
    tail = (*codes.shape[:-2], codes.shape[-1])  # (d,) or (G, d)
    if tuple(x.shape[-len(tail) :]) != tail or x.shape[-1] == 0:
        wanted = ", ".join(str(n) for n in tail)
        shapes = f"codes {tuple(codes.shape)}, not {tuple(x.shape)}"
        raise ValueError(f"x must be (..., {wanted}) to go with {shapes}")
    if x.device != codes.device:
        raise ValueError(f"x is on {x.device} but codes are on {codes.device}")

    if not isinstance(k, int) or isinstance(k, bool):
        raise TypeError(f"k must be an int, not {type(k).__name__}")
    n_codes = codes.shape[-2]
    if not 1 <= k <= n_codes:
        raise ValueError(f"k must be from 1 to the {n_codes} codes of the codebook, not {k}")

    if similarity not in similarities:
        one_of = ", ".join(similarities)
        raise ValueError(f"similarity must be one of {one_of}, not {similarity!r}")


def _wrong_type(name, found):
    raise TypeError(f"{name} must be a tensor of float32, float16 or bfloat16, not {found}")
