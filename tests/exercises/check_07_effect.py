import pytest
import torch
from answers import effect

from minicode import GPT, GPTConfig, block, record


def test_effect():
    torch.manual_seed(7)
    shape = dict(
        vocab_size=11,
        block_size=12,
        n_layer=2,
        n_head=2,
        n_embd=16,
        n_codes=12,
        n_codes_head=4,
        k=2,
    )
    model, tokens = GPT(GPTConfig(**shape)).eval(), torch.randint(11, (3, 12))
    with torch.no_grad(), record(model) as codes:
        p = model(tokens)[0].softmax(-1)
    names = [
        (f"mlp.{layer}.{i}", codes[f"mlp.{layer}"][:, :, 0], i)
        for layer in range(2)
        for i in range(12)
    ]
    names += [(f"head.0.1.{i}", codes["head.0"][:, :, 1], i) for i in range(4)]
    never = [name for name, ids, i in names if not (ids == i).any()]
    assert never, "this check is broken: every code fires"
    for name, ids, i in names:
        with torch.no_grad(), block(model, name):
            without = model(tokens)[0].softmax(-1)
        at = [(b, t) for b in range(3) for t in range(12) if i in ids[b, t]]
        wanted = sum((p[b, t] * (p[b, t] / without[b, t]).log()).sum().item() for b, t in at) / max(
            len(at), 1
        )
        back = sum(
            (without[b, t] * (without[b, t] / p[b, t]).log()).sum().item() for b, t in at
        ) / max(len(at), 1)
        got = effect(model, tokens, name)
        assert got != pytest.approx(back, rel=1e-3) or back == wanted, (
            f"{name}: that is KL(p' || p), the other way round"
        )
        what = f"{name} fires {len(at)} times; its effect is {wanted:.4f} nats, not {got:.4f}"
        assert got == pytest.approx(wanted, rel=1e-3), what
