import torch
from answers import lloyd


def test_lloyd():
    torch.manual_seed(5)
    a = torch.randn(200, 3)
    E = torch.randn(30, 3)
    E[4] += 100  # nearest to none
    before = E.clone()
    ids = (a.unsqueeze(1) - E).norm(dim=-1).argmin(1)
    empty = [i for i in range(30) if i not in ids]
    wanted = torch.stack([E[i] if i in empty else a[ids == i].mean(0) for i in range(30)])
    got = lloyd(a, E)
    assert torch.equal(E, before), "E itself was changed: return new codes"
    assert got.shape == (30, 3), f"the new codes must be (30, 3), not {tuple(got.shape)}"
    assert not got.isnan().any(), "there are NaNs: the mean of no activation is 0 / 0"
    what = f"the codes {empty} are nearest to no activation, and must stay where they are"
    assert torch.equal(got[empty], E[empty]), what
    wrong = [i for i in range(30) if not torch.allclose(got[i], wanted[i], atol=1e-5)]
    what = f"the codes {wrong} are not the means of the activations to which they are the nearest"
    assert not wrong, what
