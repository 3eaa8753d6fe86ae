"""A run: its configuration, which becomes the flags of the commands, and its folder of files.

Nothing read from a folder is executed; nothing in it is overwritten by accident or half written.
"""

import functools
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from minicode.codebook import codebooks
from minicode.fsm import FSM
from minicode.language.pretrained import FOLDER as PRETRAINED
from minicode.language.pretrained import Pretrained
from minicode.language.text import Text
from minicode.model import GPT, GPTConfig
from minicode.runtime.files import (
    check_name,
    check_tensors,
    figures,
    read_json,
    read_tensors,
    reading,
    write,
)
from minicode.runtime.options import option

VERSION = 7  # of the files in a run's folder
# By minicode.interpret and minicode.sample:
MADE_LATER = ("interpret.json", "report.html", "steering.json", "answers.json")
FILES = (
    "config.json",
    FSM.file,
    Text.file,
    Text.tokens_file,
    "model.pt",
    "train_state.pt",
    "metrics.jsonl",
    "summary.json",
    "dense.pt",  # the model just before its codebooks came in
    *MADE_LATER,
)


@dataclass
class TrainConfig(GPTConfig):
    steps: int = option(4000, "training steps", section="training", least=1)
    batch_size: int = option(16, "sequences in a batch, of all processes together", least=1)
    lr: float = option(4e-3, "peak learning rate; warm-up, then a cosine to a tenth of it")
    seed: int = option(0, "seed of everything but the data: weights, batches, k-means")
    eval_every: int = option(400, "steps between evaluations", least=1)
    checkpoint_every: int = option(
        1000, "steps between checkpoints, besides those at evaluations", least=1
    )
    # Not the paper's, but for `autoencoding`: tutorial.md, section 14, has what each gains.
    dense_share: float = option(
        0.5,
        "share of the steps without codebooks, which then start by k-means; 0: from random codes",
        section="how codebooks learn",
        below=1,
    )
    codebook_lr: float = option(0.5, "learning rate with codebooks, as a share of lr")
    refit: float = option(
        0.0,
        "codes move by least squares on each batch, held back as by so many activations; "
        "0: by gradient",
    )
    autoencoding: float = option(
        1.0, "weight of |q - stop_gradient(a)|^2, which moves codes to activations"
    )
    commitment: float = option(
        5.0, "weight of |a - stop_gradient(q)|^2, which keeps activations near their codes"
    )
    revive_every: int = option(100, "steps between revivals of dead codes; 0: never")
    revive_after: float = option(0.7, "share of the steps with codebooks before the first revival")
    device: str = option(
        "auto", "cpu, cuda, or auto: cuda where there is one", section="where it runs"
    )
    dtype: str = option(
        "float32", "float32, or bfloat16 (but for the search)", choices=("float32", "bfloat16")
    )
    compile: bool = option(False, "compile the model with torch.compile")

    @property
    def dense_steps(self):
        """Steps before the codebooks come in: all of them for a model without."""
        return int(self.dense_share * self.steps) if self.sites() else self.steps

    def evaluation_is_due(self, done):
        """After `done` steps."""
        return done % self.eval_every == 0 or done in (self.dense_steps, self.steps)

    def checkpoint_is_due(self, done):
        return done % self.checkpoint_every == 0 or self.evaluation_is_due(done)

    def revival_is_due(self, done):
        """Late: codes die as those of one thing merge, and revived at once would split it again."""
        first = self.dense_steps + self.revive_after * (self.steps - self.dense_steps)
        on_time = self.revive_every > 0 and done % self.revive_every == 0
        return on_time and first <= done < self.steps


def config_from_json(data):
    version = data.pop("version")
    if version != VERSION:
        raise ValueError(f"another version of minicode wrote it ({version}, not {VERSION})")
    return TrainConfig(**data)


def check_run(folder, config, data, resume=False, overwrite=False):
    """ValueError unless a folder is free for a new run, or holds the one that is resumed."""
    exists = (folder / "config.json").is_file()
    others = [path for path in folder.glob("*") if path.suffix != ".tmp"]
    if resume and not exists:
        raise ValueError(f"there is no run in {folder} to resume")
    if others and not exists:
        raise ValueError(f"{folder} is not empty, and not a run")
    if resume:
        check_same(folder, config, data)
    elif exists and not overwrite:
        raise ValueError(
            f"{folder} holds a run already: --resume continues it, --overwrite replaces it"
        )


def check_same(folder, config, data):
    """ValueError unless the run in a folder has these settings and this data."""
    saved = read_json(folder / "config.json", config_from_json)
    differ = []
    for name, value in vars(saved).items():
        if value != getattr(config, name) and name not in ("device", "compile"):
            differ.append(name)
    # Without its file the run was killed before it was written.
    if (folder / data.file).is_file() and read_data(folder) != data:
        differ.append("its data")
    if differ:
        names = ", ".join(differ)
        raise ValueError(f"{folder} has other settings than these (repeat its flags): {names}")


def make_run(folder, config, data, resume=False):
    """Makes the folder of a run, or what a resumed one lacks."""
    folder.mkdir(parents=True, exist_ok=True)
    # config.json stays: by it a folder is known as a run, however often it is killed here.
    stale = FILES[1:]
    if resume:  # what was made of an unfinished run is of other weights
        stale = () if (folder / "summary.json").exists() else MADE_LATER
    for name in stale:
        (folder / name).unlink(missing_ok=True)
    if not resume:
        shutil.rmtree(folder / PRETRAINED, ignore_errors=True)
        write(folder / "config.json", json.dumps({"version": VERSION, **vars(config)}, indent=1))
    if not (folder / data.file).exists():
        for name, content in data.files().items():
            (folder / name).parent.mkdir(exist_ok=True)
            write(folder / name, content)


def read_data(folder):
    """What the run in a folder is about: its machine, or its text."""
    kind = Text if (folder / Text.file).exists() else FSM
    data = read_json(folder / kind.file, lambda found: kind.from_json(found, folder))
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
        """The model just before its codebooks came in; None where they were always there."""
        path = self.folder / "dense.pt"
        if not path.exists():
            return None
        return load_model(self.config, self.data, path, self.model.device)

    @property
    def fsm(self):
        """The machine of a run on TokFSM."""
        return self.data if isinstance(self.data, FSM) else None

    @property
    def tokenizer(self):
        """The tokenizer of a run on text."""
        return getattr(self.data, "tokenizer", None)

    def sites(self):
        """The sites whose codebooks are in use; ValueError where there are none."""
        sites = [site for site, codebook in codebooks(self.model).items() if codebook.enabled]
        if not sites:
            raise ValueError(
                f"the run in {self.folder} has no codebooks, or they were not started yet"
            )
        return sites


def load_model(config, data, path, device):
    """The model in a file, in evaluation mode; ValueError if it is not one of this config."""
    state = read_tensors(path)
    with reading(path, "does not hold the model of config.json"):
        # Of each piece of memory once: tied weights are one.
        largest_last = sorted(state.values(), key=lambda tensor: tensor.nbytes)
        sizes = {tensor.data_ptr(): tensor.nbytes for tensor in largest_last}
        size = sum(sizes.values())
        if config.n_layer > len(state) or size > path.stat().st_size:
            raise ValueError(f"{len(state)} tensors of {size} bytes, for {config.n_layer} layers")
        if data.model:
            model = Pretrained(config, data.model, weights=False)
        else:
            with torch.device("meta"):  # it takes no memory until the file is known to fill it
                model = GPT(config)
        check_tensors(state, model.state_dict())
        model = model.to(device) if data.model else model.to_empty(device=device)
        model.load_state_dict(state)
    return model.eval()


def load_run(folder, device="cpu"):
    """The run in a folder, its model in evaluation mode.

    ValueError if there is none, or a file is damaged.
    """
    folder = Path(folder)
    check_name(folder)
    if folder.is_file():
        raise ValueError(f"{folder} is a file, not the folder of a run")
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"there is no run in {folder}: python -m minicode.train_fsm --out {folder} makes one"
        )
    if not (folder / "model.pt").is_file():
        raise ValueError(f"the run in {folder} has no checkpoint yet; --resume goes on with it")
    config = read_json(folder / "config.json", config_from_json)
    data = read_data(folder)
    if config.vocab_size != data.vocab_size:
        raise ValueError(
            f"{folder / data.file} is damaged: its vocab_size is {data.vocab_size}, "
            f"config.json's {config.vocab_size}"
        )
    model = load_model(config, data, folder / "model.pt", device)
    path = folder / "summary.json"
    summary = read_json(path, figures) if path.is_file() else {}
    return Run(folder, config, model, data, summary)


def latest_run():
    """The folder of the run that was written last."""
    models = list(Path("runs").glob("*/model.pt"))
    if not models:
        raise ValueError("there is no run in runs/ yet: python -m minicode.train_fsm makes one")
    return max(models, key=os.path.getmtime).parent
