import os

import torch

from minicode import FSM, load_run
from minicode.codebook import codebooks
from minicode.study.machine import transition_accuracy


def test_recipe():
    folder = os.environ.get("EXERCISE_RUN", "runs/exercise")
    try:
        run = load_run(folder)
    except ValueError as error:
        raise AssertionError(f"{error} (or set EXERCISE_RUN)") from None
    missing = what_is_missing(run)
    if not missing:  # measured again, on ten times as many samples as training does
        generator = torch.Generator().manual_seed(10)
        reached = transition_accuracy(run.fsm, run.model, generator, n=1000)
        if reached < 0.995:
            missing.append(f"its transition accuracy is {reached:.4f}, not 0.995")
    assert not missing, f"the run in {folder}: {'; '.join(missing)}"


def what_is_missing(run):
    """In what a run is not as the exercise wants it."""
    config = run.config
    missing = []
    for name, wanted in {"n_layer": 2, "n_embd": 64, "block_size": 128, "k": 1}.items():
        value = getattr(config, name)
        if value != wanted:
            missing.append(f"{name} is {value}, not {wanted}")
    if run.data != FSM():
        missing.append("its data are not the default machine")
    on = all(codebook.enabled for codebook in codebooks(run.model).values())
    if config.sites() != ["head", "mlp"] or not on:
        missing.append("its codebooks are not those of head,mlp, all of them on")
    if config.n_codes > 960 or config.n_codes_head > 16:
        codes = f"{config.n_codes} and {config.n_codes_head} codes"
        missing.append(f"{codes} are more than 960 an MLP and 16 a head")
    tokens = run.summary.get("tokens")
    if tokens is None:
        missing.append("its training has not ended")
    elif tokens > 4_096_000:
        missing.append(f"it saw {tokens:,} tokens, not 4,096,000 at most")
    return missing
