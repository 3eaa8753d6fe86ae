import itertools

import numpy as np
import pytest
import torch
from answers import precision_recall

from minicode import FSM, GPT, GPTConfig, record
from minicode.study.detectors import detect, record_codes


def test_precision_recall():
    torch.manual_seed(6)
    fsm = FSM(n_states=16, n_edges=3, base=4)
    shape = {"n_layer": 1, "n_embd": 16, "codebooks": "mlp", "n_codes": 24, "k": 2}
    model = GPT(GPTConfig(vocab_size=5, block_size=16, **shape)).eval()
    array, kinds = fsm.labelled(np.random.default_rng(6), 12, 16)
    found = detect(record_codes(model, array), *kinds["state"])
    tokens = torch.from_numpy(array)
    with record(model) as codes:
        model(tokens)
    ids = codes["mlp.0"][:, :, 0]
    for code, state in itertools.product(range(24), range(16)):
        precision, recall = precision_recall(fsm, tokens, ids, code, state)
        where = f"code {code} and state {fsm.name(state)}"
        wanted = found.precision[code, state]
        what = f"{where}: the precision is {wanted:.3f}, not {precision:.3f}"
        assert precision == pytest.approx(wanted), what
        wanted = found.recall[code, state]
        what = f"{where}: the recall is {wanted:.3f}, not {recall:.3f}"
        assert recall == pytest.approx(wanted), what
