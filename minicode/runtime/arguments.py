"""What is wrong with an argument, said by name: a number, or what a search is given."""

import operator

import torch

SIMILARITIES = ("cosine", "distance", "dot")  # in the order of csrc/topk.h
SELECTIONS = ("pursuit", "nearest")


def check_range(name, value, least, below):
    """ValueError for a number that is out of range, as NaN is of every one."""
    if not value >= least:
        raise ValueError(f"{name} must be at least {least}, not {value}")
    if not value < below:
        raise ValueError(f"{name} must be below {below}, not {value}")


def check_multiple(name, value, of_name, of):
    if value % of:
        raise ValueError(f"{name} ({value}) must be a multiple of {of_name} ({of})")


def whole(name, value, least=1):
    """A whole number of any kind, NumPy's too, as an int; TypeError or ValueError, by name."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, not {value!r}") from None
    check_range(name, number, least, below=2**63)
    return number


def check_search(x, codes, k, similarity, selection, blocked):
    """TypeError or ValueError unless these are what topk_codes takes."""
    check_floats("x", x)
    check_floats("codes", codes)
    if codes.dim() not in (2, 3):
        raise ValueError(f"codes must be (C, d) or (G, C, d), not {tuple(codes.shape)}")
    tail = (*codes.shape[:-2], codes.shape[-1])  # (d,) or (G, d)
    if tuple(x.shape[-len(tail) :]) != tail or 0 in tail:
        wanted = ", ".join(str(n) for n in tail)
        shapes = f"codes {tuple(codes.shape)}, not {tuple(x.shape)}"
        raise ValueError(f"x must be (..., {wanted}) to go with {shapes}")
    if x.device != codes.device:
        raise ValueError(f"x is on {x.device} but codes are on {codes.device}")
    if type(k) is not int:
        raise TypeError(f"k must be an int, not {type(k).__name__}")
    n_codes = codes.shape[-2]
    check_choice(n_codes, k, similarity, selection)
    if blocked is not None:
        wanted = (*x.shape[:-1], n_codes)
        if not isinstance(blocked, torch.Tensor) or blocked.dtype != torch.bool:
            raise TypeError(f"blocked must be a tensor of bool {wanted}")
        if blocked.shape != wanted:
            raise ValueError(f"blocked must be {wanted}, not {tuple(blocked.shape)}")


def check_choice(n_codes, k, similarity, selection):
    """ValueError unless k of n_codes can be chosen, and in this way."""
    if not 1 <= k <= n_codes:
        raise ValueError(f"k must be from 1 to the {n_codes} codes of the codebook, not {k}")
    check_one_of("similarity", similarity, SIMILARITIES)
    check_one_of("selection", selection, SELECTIONS)


def check_left(blocked, k):
    """ValueError unless blocked (..., C), if anything is, leaves k codes everywhere."""
    if blocked is not None and ((~blocked).sum(-1) < k).any():
        most = blocked.shape[-1] - k
        raise ValueError(f"at most {most} codes can be blocked: {k} must be left to choose from")


def check_inputs(x, width):
    """TypeError or ValueError unless x is what comes into a codebook, so many numbers wide."""
    check_floats("a codebook's input", x)
    if x.shape[-1:] != (width,):
        raise ValueError(f"a codebook's inputs must be (..., {width}), not {tuple(x.shape)}")


def check_tokens(tokens, past, block_size):
    """ValueError unless a model can run tokens (B, T) behind `past` ones; returns past + T."""
    if tokens.dim() != 2 or not tokens.shape[1]:
        raise ValueError(f"tokens must be (B, T), T at least 1, not {tuple(tokens.shape)}")
    end = past + tokens.shape[1]
    if end > block_size:
        raise ValueError(f"{end} tokens are more than the block_size of {block_size}")
    if past and end > past + 1:
        raise ValueError("what follows a cache is run one token at a time")
    return end


def check_ids(site, ids, groups, n_codes):
    """Codes as a tensor of ids (G, k) or (B, G, k); ValueError, by their site, for others."""
    try:
        ids = torch.as_tensor(ids)
        torch.iinfo(ids.dtype)  # a TypeError unless they are whole numbers
    except (TypeError, ValueError, RuntimeError):
        whole_ones = "whole numbers, at least one for each group"
        raise ValueError(f"{site}: ids must be {whole_ones}") from None
    if ids.dim() not in (2, 3) or ids.shape[-2] != groups or not ids.shape[-1]:
        wanted = f"({groups}, k) or (B, {groups}, k)"
        raise ValueError(f"{site}: ids must be {wanted}, not {tuple(ids.shape)}")
    if ids.numel() and not 0 <= ids.min() <= ids.max() < n_codes:
        found = f"{ids.min()} to {ids.max()}"
        raise ValueError(f"{site}: its codes are 0 to {n_codes - 1}, not {found}")
    return ids


def check_one_of(name, value, values):
    if value not in values:
        raise ValueError(f"{name} must be one of {', '.join(values)}, not {value!r}")


def check_floats(name, value):
    wanted = f"{name} must be a tensor of float32, float16 or bfloat16"
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{wanted}, not {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{wanted}, not {value.dtype}")
