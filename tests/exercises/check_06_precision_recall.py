import numpy as np
import pytest
import torch
from answers import precision_recall

from minicode import FSM, GPT, GPTConfig, record
from minicode.study.detectors import detect, record_codes


def test_precision_recall():
    torch.manual_seed(6)
    fsm = FSM(n_states=16, n_edges=3, base=4)
    model = GPT(
        GPTConfig(
            vocab_size=5, block_size=16, n_layer=1, n_embd=16, codebooks="mlp", n_codes=24, k=2
        )
    ).eval()
    tokens, kinds = fsm.labelled(np.random.default_rng(6), 12, 16)
    found = detect(record_codes(model, tokens), *kinds["state"])
    with record(model) as codes:
        model(torch.from_numpy(tokens))
    for code in range(24):
        for state in range(16):
            got = precision_recall(
                fsm, torch.from_numpy(tokens), codes["mlp.0"][:, :, 0], code, state
            )
            where = f"code {code} and state {fsm.name(state)}: the"
            for name, g, w in zip(
                ("precision", "recall"),
                got,
                (found.precision[code, state], found.recall[code, state]),
            ):
                assert g == pytest.approx(w), f"{where} {name} is {w:.3f}, not {g:.3f}"
