"""python -m minicode.train_text: trains a language model with codebooks on stories or your text."""

import sys

from minicode.language.text import Text
from minicode.runtime.command import command, table

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
ROWS = ("loss", "perplexity", "accuracy", "bits_per_byte", "dead_code_fraction", "gain_kept")


def main(argv=None):
    return command(argv, "train_text", __doc__, Text, PRESETS, "runs/text", compare)


def compare(run):
    """A run's figures beside those of a model that knows each token's frequency alone.

    gain_kept: of the dense model's gain over that one, the share that the codebooks keep.
    """
    summary = dict(run.summary)
    unigram = summary["loss_unigram"]
    if summary["dense"]:
        dense_gain = unigram - summary["dense"]["loss"]
        summary["gain_kept"] = (unigram - summary["loss"]) / dense_gain
    return table(summary, {"unigram": {"loss": unigram}}, ROWS)


if __name__ == "__main__":
    sys.exit(main())
