import json

import numpy as np
import pytest
import torch

from minicode import FSM, GPT, GPTConfig
from minicode.runtime.runs import FILES, MADE_LATER
from minicode.train_fsm import main as train_fsm

torch.set_num_threads(1)  # the models here are far too small for two

SIZE = "--n-layer 2 --n-head 2 --n-embd 16 --block-size 12 --n-codes 32 --n-codes-head 8"
STEPS = "--steps 60 --batch-size 8 --eval-every 30 --checkpoint-every 20 --revive-every 5"
TINY = f"--n-states 16 --n-edges 3 --base 4 {SIZE} {STEPS} --device cpu".split()

# Of a finished run on TokFSM:
RUN_FILES = sorted({*FILES} - {"text.json", "tokens.bin", *MADE_LATER})


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """A run folder, trained in a second or two. Tests copy it before they change it."""
    folder = tmp_path_factory.mktemp("runs") / "fsm"
    assert train_fsm(["--out", str(folder), *TINY]) == 0
    return folder


@pytest.fixture
def fsm():
    return FSM(n_states=16, n_edges=3, base=4)


def make_model(codebooks="head,attn,mlp_mid,mlp,block", k=2, seed=0, **more):
    torch.manual_seed(seed)
    size = {"vocab_size": 5, "block_size": 12, "n_layer": 2, "n_head": 2, "n_embd": 16}
    settings = {**size, "n_codes": 32, "n_codes_head": 8, "codebooks": codebooks, "k": k, **more}
    return GPT(GPTConfig(**settings)).eval()


def make_tokens(fsm, n=3, length=8, seed=0):
    return torch.from_numpy(fsm.sequences(np.random.default_rng(seed), n, length))


def read_metrics(folder):
    return [
        json.loads(line)
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
