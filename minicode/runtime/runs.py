"""A run: its configuration, which becomes the flags of the commands, and the folder of files it leaves.

Nothing read from a folder is executed, and nothing in it is overwritten by accident or left half written.
"""

import functools
import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from minicode.fsm import FSM
from minicode.language.text import Text
from minicode.model import GPT, GPTConfig
from minicode.runtime.files import check_tensors, figures, read_json, read_tensors, reading, write
from minicode.runtime.options import option

VERSION = 4  # of the files in a run's folder
KINDS = (FSM, Text)  # of data that a run may be about; each has a file of its own
MADE_LATER = (
    "interpret.json",
    "report.html",
    "codes.npy",
    "tokens.npy",
    "steering.json",
)  # by minicode.interpret
FILES = (
    "config.json", *(kind.file for kind in KINDS), Text.tokens_file, "model.pt", "train_state.pt", "metrics.jsonl", "summary.json",
    "dense.pt", *MADE_LATER,  # dense.pt: the model just before its codebooks came in
)  # fmt: skip


@dataclass
class TrainConfig(GPTConfig):
    seed: int = option(
        0, "seed of everything but the machine: weights, batches, k-means", least=0, below=2**63
    )
    steps: int = option(4000, "training steps", least=1)
    batch_size: int = option(16, "sequences in a batch, of all processes together", least=1)
    accumulate: int = option(
        1, "parts that a batch is run in, one after the other, to save memory", least=1
    )
    lr: float = option(4e-3, "peak learning rate; warm-up, then a cosine to a tenth of it", least=0)
    autoencoding: float = option(
        1.0, "weight of |q - stop_gradient(a)|^2, which moves codes that learn by gradient", least=0
    )
    # Not the paper's: the next five, and similarity. With them all the transition accuracy is 0.996; without one, see below.
    dense_share: float = option(
        0.5,
        "share of steps dense, before k-means; 0: random codes, accuracy 0.12",
        least=0,
        below=1,
    )
    codebook_lr: float = option(
        0.5, "learning rate with codebooks, as a share of lr; 1: 16 % of the codes dead", least=0
    )
    commitment: float = option(
        5.0, "weight of |a - stop_gradient(q)|^2, holds activations; 0: accuracy 0.11", least=0
    )
    revive_every: int = option(
        100, "steps between revivals of dead codes; 0: never, 29 % dead", least=0
    )
    revive_after: float = option(
        0.7, "share of the steps with codebooks before the first revival", least=0
    )
    device: str = option("auto", "cpu, cuda, or auto: cuda where there is one")
    dtype: str = option(
        "float32", "float32, or bfloat16 (but for the search)", choices=("float32", "bfloat16")
    )
    compile: bool = option(False, "compile the model with torch.compile")
    eval_every: int = option(400, "steps between evaluations", least=1)
    checkpoint_every: int = option(1000, "steps between checkpoints", least=1)

    @property
    def dense_steps(self):
        """Steps before the codebooks come in: all of them for a model without."""
        return int(self.dense_share * self.steps) if self.sites() else self.steps

    def evaluation_is_due(self, done):
        """After `done` steps."""
        return done % self.eval_every == 0 or done in (self.dense_steps, self.steps)

    def revival_is_due(self, done):
        """Codes die as those of one thing merge into one. Revived at once they would split it again; so late."""
        first = self.dense_steps + self.revive_after * (self.steps - self.dense_steps)
        on_time = self.revive_every > 0 and done % self.revive_every == 0
        return on_time and first <= done < self.steps


def config_from_json(data):
    data = dict(data)
    if data.pop("version") != VERSION:
        raise ValueError(
            f"it was written by another version of minicode; this one reads version {VERSION}"
        )
    types = {f.name: f.type for f in fields(TrainConfig)}
    if data.keys() != types.keys():
        raise ValueError(f"unknown or missing: {', '.join(sorted(data.keys() ^ types.keys()))}")
    for name, value in data.items():
        kind = float | int if types[name] is float else types[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{name} is {value!r}")
    return TrainConfig(**data)


def check_run(folder, config, data, resume=False, overwrite=False):
    """Checks that a folder is free for a new run, or holds this one; an existing run is never lost by accident."""
    exists = (folder / "config.json").is_file()
    if resume:
        if not exists:
            raise ValueError(f"there is no run in {folder} to resume")
        saved = read_json(folder / "config.json", config_from_json)
        free = ("device", "compile", "accumulate")
        differ = [
            name
            for name, value in asdict(config).items()
            if value != getattr(saved, name) and name not in free
        ]
        if (folder / data.file).is_file() and read_data(
            folder
        ) != data:  # without the file it was killed before
            differ.append("its data")
        if differ:
            raise ValueError(
                f"the run in {folder} has other settings than these (repeat its flags): {', '.join(differ)}"
            )
    elif exists and not overwrite:
        raise ValueError(
            f"{folder} holds a run already: --resume continues it, --overwrite replaces it"
        )
    elif folder.exists() and not exists and any(path.suffix != ".tmp" for path in folder.iterdir()):
        raise ValueError(f"{folder} is not empty, and not a run")


def make_run(folder, config, data, resume=False):
    """Makes the folder of a run, or what a resumed one lacks."""
    folder.mkdir(parents=True, exist_ok=True)
    stale = FILES[
        1:
    ]  # config.json stays: by it a folder is known as a run, however often it is killed here
    if resume:  # what was made of an unfinished run is of other weights
        stale = () if (folder / "summary.json").exists() else MADE_LATER
    for name in stale:
        (folder / name).unlink(missing_ok=True)
    if not resume:
        write(folder / "config.json", json.dumps({"version": VERSION, **asdict(config)}, indent=1))
    if not (folder / data.file).exists():
        for name, content in data.files().items():
            write(folder / name, content)


def read_data(folder):
    """What the run in a folder is about: its machine, or its text."""
    kind = next((kind for kind in KINDS if (folder / kind.file).exists()), KINDS[0])
    data = read_json(folder / kind.file, kind.from_json)
    data.settle(folder)
    return data


@dataclass
class Run:
    """A run as read back from its folder."""

    folder: Path
    config: TrainConfig
    model: GPT
    data: FSM | Text
    summary: dict  # the final figures; empty while the run is unfinished

    @functools.cached_property
    def dense(self):
        """The model just before its codebooks came in; None where they were there from the start."""
        path = self.folder / "dense.pt"
        return load_model(self.config, path, self.model.device) if path.exists() else None

    def sites(self):
        """The sites whose codebooks are in use; ValueError where there are none."""
        sites = [site for site, codebook in self.model.codebooks().items() if codebook.enabled]
        if not sites:
            raise ValueError(
                f"the run in {self.folder} has no codebooks, or they were not started yet: there are no codes"
            )
        return sites

    fsm = property(
        lambda self: self.data if isinstance(self.data, FSM) else None,
        doc="The machine of a run on TokFSM.",
    )
    tokenizer = property(
        lambda self: getattr(self.data, "tokenizer", None), doc="The tokenizer of a run on text."
    )


def load_model(config, path, device):
    """The model in a file, in evaluation mode; ValueError if it is not one of this config."""
    state = read_tensors(path)
    with reading(path, "does not hold the model of config.json"):
        if config.n_layer > len(state):
            raise ValueError(f"it has {len(state)} tensors, for {config.n_layer} layers")
        with torch.device(
            "meta"
        ):  # without memory, until it is known to be no more than the file's
            expected = GPT(config).state_dict()
        if (wanted := sum(tensor.nbytes for tensor in expected.values())) > (
            size := path.stat().st_size
        ):
            raise ValueError(f"it has {size} bytes, of {wanted}")
        check_tensors(state, expected)
    model = GPT(config)
    model.load_state_dict(state)
    return model.to(device).eval()


def load_run(folder, device="cpu"):
    """The run in a folder, its model in evaluation mode; ValueError if there is none, or a file is damaged."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"there is no run in {folder}: python -m minicode.train_fsm --out {folder} makes one"
        )
    if not (folder / "model.pt").is_file():
        raise ValueError(
            f"the run in {folder} has no checkpoint yet: its command with --resume goes on with it"
        )
    config = read_json(folder / "config.json", config_from_json)
    data = read_data(folder)
    if config.vocab_size != data.vocab_size:
        raise ValueError(
            f"{folder / data.file} is damaged: its vocab_size is {data.vocab_size}, config.json's {config.vocab_size}"
        )
    done = (folder / "summary.json").is_file()
    summary = read_json(folder / "summary.json", figures) if done else {}
    return Run(folder, config, load_model(config, folder / "model.pt", device), data, summary)


def latest_run():
    """The folder of the run that was written last."""
    runs = [path.parent for path in Path("runs").glob("*/model.pt")]
    if not runs:
        raise ValueError("there is no run in runs/ yet: python -m minicode.train_fsm makes one")
    return max(runs, key=lambda folder: (folder / "model.pt").stat().st_mtime)


def read_metrics(folder, up_to=math.inf):
    """The lines of metrics.jsonl, one an evaluation, up to a step; half a line at the end does not count."""
    path = folder / "metrics.jsonl"
    with reading(path):
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        metrics = [figures(json.loads(line)) for line in lines if line.endswith("\n")]
        return [line for line in metrics if line["step"] <= up_to]
