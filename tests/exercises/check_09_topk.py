import torch
from answers import TopK

from minicode import Codebook


def unexplained(layer, train, test):
    """The share of the variance of test that the layer leaves over, after a second of training on train."""
    optimizer = torch.optim.Adam(layer.parameters(), lr=3e-3)
    for step in range(600):
        layer(train[step * 128 % 4096 :][:128])
        optimizer.zero_grad(), layer.autoencoding.backward(), optimizer.step()
    return ((layer.eval()(test) - test).square().mean() / test.var(0).mean()).item()


def test_it_is_the_layer_of_the_equations():
    torch.manual_seed(9)
    layer, a = (
        TopK(8, 32, k=6),
        torch.randn(2, 5, 32, requires_grad=True),
    )  # k so large that some z_i are 0
    for parameter in layer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    scores, S = ((a - layer.bias) @ layer.encoder.T).topk(6, dim=-1)
    q, wanted = layer(a), layer.bias + (scores.relu().unsqueeze(-2) @ layer.codes[0][S]).squeeze(-2)
    assert q.shape == a.shape and torch.allclose(q, wanted, atol=1e-4), (
        "q is not b + the sum of z_i E_i over S"
    )
    assert torch.equal(layer.ids, S.unsqueeze(-2)), (
        "ids are not the k features with the highest W_i·(a - b), best first"
    )
    assert torch.allclose(layer.autoencoding, (wanted - a).square().mean(), atol=1e-4), (
        "autoencoding is not mean |q - a|^2"
    )
    inputs = a, layer.codes, layer.encoder, layer.bias
    grads = [torch.autograd.grad(y.sin().sum(), inputs, allow_unused=True) for y in (q, wanted)]
    for name, got, true in zip("aEWb", *grads):
        assert got is not None and torch.allclose(got, true, atol=1e-3), (
            f"{name} gets a wrong gradient, or none"
        )


def test_it_learns_what_a_codebook_can_not():
    torch.manual_seed(9)
    directions = torch.nn.functional.normalize(torch.randn(64, 32), dim=-1)
    which, amount = torch.rand(5120, 64).topk(4).indices, 0.5 + torch.rand(5120, 4, 1)
    train, test = (
        (amount * directions[which]).sum(1).split((4096, 1024))
    )  # each a sum of 4 directions, more or less of each
    codebook, topk = Codebook(64, 32, k=4, similarity="distance"), TopK(64, 32, k=4)
    codebook.start(train)
    theirs, ours = unexplained(codebook, train, test), unexplained(topk, train, test)
    assert ours < min(theirs, 0.2), (
        f"it leaves {ours:.3f} of the variance; the codebook {theirs:.3f}, and the aim is 0.2"
    )
