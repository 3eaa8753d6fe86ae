import torch
from answers import residual

from minicode import topk_codes


def test_residual():
    torch.manual_seed(8)
    a = torch.randn(200, 8)
    E = torch.randn(64, 8) * torch.rand(64, 1)
    k = 4
    ids = residual(a, E, k)
    assert ids.shape == (200, k), f"ids must be (200, {k}), not {tuple(ids.shape)}"
    left = a.clone()
    for j in range(k):
        wanted = (left.unsqueeze(1) - E).norm(dim=-1).argmin(1)
        wrong = (ids[:, j] != wanted).sum().item()
        what = f"for {wrong} of 200 another code is the nearest to what is left"
        assert wrong == 0, f"choice {j + 1}: {what}"
        left -= E[wanted]
    together = topk_codes(a, E, k, "distance")[1]
    theirs = (a - E[together].sum(1)).square().mean().item()
    yours = (a - E[ids].sum(1)).square().mean().item()
    what = f"far below that of the {k} nearest together, {theirs:.3f}, not {yours:.3f}"
    assert yours < theirs / 2, f"the error must be {what}"
