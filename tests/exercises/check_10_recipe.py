import os

import torch

from minicode import FSM, load_run
from minicode.study.machine import transition_accuracy


def test_recipe():
    folder = os.environ.get("EXERCISE_RUN", "runs/exercise")
    try:
        run = load_run(folder)
    except ValueError as error:
        raise AssertionError(f"{error} (or set EXERCISE_RUN)") from None
    config, model, tokens = run.config, run.model, run.summary.get("tokens")
    wanted = dict(n_layer=2, n_embd=64, block_size=128, k=1)
    differ = [name for name, value in wanted.items() if getattr(config, name) != value]
    missing = [f"{name} is {getattr(config, name)}, not {wanted[name]}" for name in differ]
    if run.data != FSM() or (run.data.transition_matrix != FSM().transition_matrix).any():
        missing.append("its data are not the default machine")
    if config.sites() != ["head", "mlp"] or not all(
        codebook.enabled for codebook in model.codebooks().values()
    ):
        missing.append("its codebooks are not those of head,mlp, all of them on")
    if config.n_codes > 960 or config.n_codes_head > 16:
        missing.append(
            f"{config.n_codes} and {config.n_codes_head} codes are more than 960 an MLP and 16 a head"
        )
    if tokens is None or tokens > 4_096_000:
        missing.append(
            f"it saw {tokens:,} tokens, not 4,096,000 at most"
            if tokens
            else "its training has not ended"
        )
    if not missing:  # measured again, on ten times as many samples as training does
        reached = transition_accuracy(run.fsm, model, torch.Generator().manual_seed(10), n=1000)
        missing += (
            [f"its transition accuracy is {reached:.4f}, not 0.995"] if reached < 0.995 else []
        )
    assert not missing, f"the run in {folder}: {'; '.join(missing)}"
