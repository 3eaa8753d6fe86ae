import pytest
import torch
from answers import effect

from minicode import GPT, GPTConfig, block, record


def mean_kl(p, q, fires):
    """KL(p || q) of distributions (B, T, vocab_size), averaged over the positions that fire."""
    if not fires.any():
        return 0.0
    return (p * (p / q).log()).sum(-1)[fires].mean().item()


def test_effect():
    torch.manual_seed(7)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_codes": 12, "n_codes_head": 4, "k": 2}
    model = GPT(GPTConfig(vocab_size=11, block_size=12, **shape)).eval()
    tokens = torch.randint(11, (3, 12))
    with torch.no_grad(), record(model) as codes:
        p = model(tokens)[0].softmax(-1)
    fires = {}  # by code, where it does: (B, T)
    for i in range(12):
        for layer in range(2):
            fires[f"mlp.{layer}.{i}"] = (codes[f"mlp.{layer}"][:, :, 0] == i).any(-1)
    for i in range(4):
        fires[f"head.0.1.{i}"] = (codes["head.0"][:, :, 1] == i).any(-1)
    assert not all(at.any() for at in fires.values()), "this check is broken: every code fires"
    for name, at in fires.items():
        with torch.no_grad(), block(model, name):
            without = model(tokens)[0].softmax(-1)
        wanted = mean_kl(p, without, at)
        back = mean_kl(without, p, at)
        got = effect(model, tokens, name)
        if back != wanted:
            what = f"{name}: that is KL(p' || p), the other way round"
            assert got != pytest.approx(back, rel=1e-3), what
        what = f"{name} fires {at.sum()} times; its effect is {wanted:.4f} nats, not {got:.4f}"
        assert got == pytest.approx(wanted, rel=1e-3), what
