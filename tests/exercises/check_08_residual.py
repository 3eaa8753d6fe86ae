import torch
from answers import residual

from minicode import topk_codes


def test_residual():
    torch.manual_seed(8)
    a, E, k = torch.randn(200, 8), torch.randn(64, 8) * torch.rand(64, 1), 4
    ids = residual(a, E, k)
    assert ids.shape == (200, k) and ids.dtype == torch.int64, f"ids must be int64 (200, {k}), not {ids.dtype} {tuple(ids.shape)}"
    together = topk_codes(a, E, k, "distance")[1]
    errors = [(a - E[some].sum(1)).square().mean().item() for some in (together, ids)]
    left = a.clone()
    for j in range(k):
        wanted = (left.unsqueeze(1) - E).norm(dim=-1).argmin(1)
        wrong = (ids[:, j] != wanted).sum().item()
        assert wrong == 0, f"choice {j + 1}: for {wrong} of 200 another code is the nearest to what is left"
        left -= E[wanted]
    assert errors[1] < errors[0] / 2, f"the error must fall far below that of the {k} nearest: {errors[0]:.3f}, yours {errors[1]:.3f}"
