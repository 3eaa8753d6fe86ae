"""python -m minicode.train_text: trains a language model with codebooks on stories or your text."""

import json
import sys

from minicode.hooks import detach
from minicode.language.text import Text
from minicode.runtime.command import command, table
from minicode.runtime.files import write
from minicode.runtime.progress import bar
from minicode.runtime.runs import load_model
from minicode.runtime.session import make_optimizer, pick_device
from minicode.train import evaluate, n_evaluated, train_step

PRESETS = {
    "default": {
        "codebooks": "head",
        "k": 8,
        "n_codes_head": 512,
        "n_layer": 2,
        "n_embd": 128,
        "n_head": 4,
        "steps": 3000,
        "eval_every": 500,
        # Late: with codebooks from half way on, codes die on real text.
        "dense_share": 0.8334,
        # At 5, as on TokFSM, layer 1's activations crowd around a few codes: 30 % dead.
        "commitment": 0.5,
    },
}
# A pretrained model is finetuned: the preset that --model begins with.
PRESETS["pretrained"] = {
    "codebooks": "head,mlp",
    "n_codes": 1024,
    "n_codes_head": 1024,
    "k": 8,
    "groups_mlp": 16,
    "block_size": 256,
    "batch_size": 4,
    "steps": 300,
    "eval_every": 100,
    "lr": 1e-4,
    "refit": 30.0,
    "revive_every": 0,
    "dense_share": 0.0,
    "commitment": 0.0,
}
ROWS = (
    "loss",
    "perplexity",
    "accuracy",
    "bits_per_byte",
    "dead_code_fraction",
    "fvu",
    "codes_per_token",
    "gain_kept",
    "loss_recovered",
)


def main(argv=None):
    return command(argv, "train_text", __doc__, Text, PRESETS, "runs/text", compare)


def compare(run):
    """A run's figures beside those of a model that knows each token's frequency alone.

    gain_kept: of the dense model's gain over that one, the share that the codebooks keep.
    loss_recovered: the same, over a model whose sites are zero. Of a pretrained model it is its
    twin with which both are compared: the dense model, finetuned on the very same batches.
    """
    summary = dict(run.summary)
    unigram = summary["loss_unigram"]
    others = {"unigram": {"loss": unigram}}
    dense = summary["dense"]
    if run.data.model and dense:
        summary["twin"] = dense = summary.get("twin") or finetune_twin(run)
        others = {"dense, finetuned alike": dense, "codes, not finetuned": summary["started"]}
    if dense:
        summary["gain_kept"] = (unigram - summary["loss"]) / (unigram - dense["loss"])
        zero = summary["loss_zero"]
        summary["loss_recovered"] = (zero - summary["loss"]) / (zero - dense["loss"])
        others["sites zero"] = {"loss": zero}
    return table(summary, others, ROWS)


def finetune_twin(run):
    """The figures of a run's dense model, trained on as the run was, on the very same batches."""
    config = run.config
    device = pick_device(config.device)
    model = load_model(config, run.data, run.folder / "dense.pt", device)
    detach(model.model)
    optimizer = make_optimizer(model, config)
    model.train()
    for step in bar(range(config.dense_steps, config.steps), desc="its dense twin"):
        train_step(model, model, optimizer, config, step, run.data)
    figures = evaluate(model, run.data, config.seed, n_evaluated(run.data, True))
    write(run.folder / "summary.json", json.dumps({**run.summary, "twin": figures}, indent=1))
    return figures


if __name__ == "__main__":
    sys.exit(main())
