import torch
import torch.nn.functional as F
from answers import TopK

from minicode import Codebook


def unexplained(layer, train, test):
    """The share of the variance of test that is left over, after a second of training on train."""
    optimizer = torch.optim.Adam(layer.parameters(), lr=3e-3)
    for step in range(600):
        start = step * 128 % 4096
        layer(train[start : start + 128])
        optimizer.zero_grad()
        layer.autoencoding.backward()
        optimizer.step()
    layer.eval()
    return ((layer(test) - test).square().mean() / test.var(0).mean()).item()


def test_it_is_the_layer_of_the_equations():
    torch.manual_seed(9)
    layer = TopK(8, 32, k=6)  # k so large that some z_i are 0
    a = torch.randn(2, 5, 32, requires_grad=True)
    for parameter in layer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    z, S = ((a - layer.bias) @ layer.encoder.T).topk(6, dim=-1)
    wanted = layer.bias + (z.relu().unsqueeze(-2) @ layer.codes[0][S]).squeeze(-2)
    q = layer(a)
    assert q.shape == a.shape, f"q must be {tuple(a.shape)}, not {tuple(q.shape)}"
    assert torch.allclose(q, wanted, atol=1e-4), "q is not b + the sum of z_i E_i over S"
    what = "ids are not the k features with the highest W_i·(a - b), best first"
    assert torch.equal(layer.ids, S.unsqueeze(-2)), what
    error = (wanted - a).square().mean()
    what = "autoencoding is not mean |q - a|^2"
    assert torch.allclose(layer.autoencoding, error, atol=1e-4), what
    inputs = (a, layer.codes, layer.encoder, layer.bias)
    got = torch.autograd.grad(q.sin().sum(), inputs, allow_unused=True)
    true = torch.autograd.grad(wanted.sin().sum(), inputs)
    for name, g, t in zip("aEWb", got, true):
        assert g is not None, f"{name} gets no gradient"
        assert torch.allclose(g, t, atol=1e-3), f"{name} gets a wrong gradient"


def test_it_learns_what_a_codebook_can_not():
    torch.manual_seed(9)
    # Each activation is a sum of 4 directions, more or less of each.
    directions = F.normalize(torch.randn(64, 32), dim=-1)
    which = torch.rand(5120, 64).topk(4).indices
    amount = 0.5 + torch.rand(5120, 4, 1)
    train, test = (amount * directions[which]).sum(1).split((4096, 1024))
    codebook = Codebook(64, 32, k=4, similarity="distance", selection="nearest")
    topk = TopK(64, 32, k=4)
    codebook.start(train)
    theirs = unexplained(codebook, train, test)
    yours = unexplained(topk, train, test)
    what = f"it leaves {yours:.3f} of the variance; the codebook {theirs:.3f}, and the aim is 0.2"
    assert yours < min(theirs, 0.2), what
