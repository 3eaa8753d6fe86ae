"""A training under way: its model, its optimizer, and the checkpoint from which it goes on."""

import json
import math
import os
import signal
import socket
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from minicode.codebook import codebooks, use_codebooks
from minicode.fsm import FSM
from minicode.language.pretrained import Pretrained
from minicode.language.text import Text
from minicode.model import GPT
from minicode.runtime import extension, processes
from minicode.runtime.arguments import check_range
from minicode.runtime.files import (
    check_tensors,
    figures,
    read_json,
    read_tensors,
    reading,
    write,
    write_tensors,
)
from minicode.runtime.runs import TrainConfig, check_run, make_run
from minicode.runtime.streams import handled


def pick_device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not name.startswith(("cpu", "cuda")):
        raise ValueError(f"device must be cpu, cuda or auto, not {name!r}")
    if name == "cuda":  # of several processes, torchrun gives each its own
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.empty(0, device=name).device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} can't be used here: {reason}") from None


def make_optimizer(model, config):
    """AdamW, with weight decay on matrices, but on no bias, gain or code.

    Codes that are refitted take no gradient.
    """
    for codebook in codebooks(model).values():
        codebook.codes.requires_grad_(not config.refit)
    weights = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in weights if p.dim() == 2], "weight_decay": 0.1},
        {"params": [p for p in weights if p.dim() != 2]},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), weight_decay=0)


@contextmanager
def stop_signals():
    """Within the block Ctrl-C and SIGTERM ask this process to stop, and a second one ends it."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    threading.Thread(target=end_at_second, args=[reader], daemon=True).start()
    before = signal.set_wakeup_fd(writer.fileno())
    with writer, handled(processes.ask, "SIGINT", "SIGTERM"):
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            processes.asked.clear()


def end_at_second(reader):
    """Reads signals in a thread: the main one hears none before the search that it is in is done.

    Not of several processes, to which torchrun passes on the Ctrl-C that they have had already.
    """
    with reader:
        if reader.recv(1) and reader.recv(1) and processes.ranks() == 1:
            os._exit(130)


@dataclass
class Session:
    """A training under way: what the loop works on, and where it stands."""

    config: TrainConfig
    data: FSM | Text
    folder: Path
    model: GPT
    optimizer: torch.optim.Optimizer
    metrics: list  # a dict of figures for each evaluation so far
    step: int = 0
    seconds: float = 0.0
    paced: tuple = (0, 0.0)  # the step, and the seconds, from which the time left is reckoned

    @property
    def start_step(self):
        """The step at which the codebooks start from data; None: they are random, and always on."""
        dense_steps = self.config.dense_steps
        return dense_steps if dense_steps or self.data.model else None


def open_session(config, data, folder, resume=False, overwrite=False):
    """A session, new or resumed. A user's mistake is a ValueError, before any file is touched."""
    with processes.together():
        check_run(folder, config, data, resume, overwrite)
        torch.manual_seed(config.seed)
        device = pick_device(config.device)
        if processes.rank() == 0:
            extension.load(device.type)  # what it has to say comes before the first step
        try:
            torch.empty(config.batch_size, config.block_size + 1, dtype=torch.int64)
            model = Pretrained(config, data.model) if data.model else GPT(config)
            model.to(device)
        except RuntimeError as error:
            raise ValueError(f"there is no room for this model, or its batches: {error}") from None
        session = Session(config, data, folder, model, make_optimizer(model, config), [])
        use_codebooks(model, session.start_step is None)
        if resume and (folder / "train_state.pt").is_file():
            load_checkpoint(session)
    processes.first(make_run, folder, config, data, resume)
    data.settle(folder)
    return session


def check_sizes(config, data):
    """ValueError for a block that the data can't fill, or a batch that processes can't share."""
    check_range("block_size", config.block_size, data.least_block, data.most_block + 1)
    n = processes.ranks()
    if config.batch_size % n:
        raise ValueError(f"batch_size ({config.batch_size}) must be a multiple of {n} (processes)")


def save_checkpoint(session):
    """A checkpoint is train_state.pt alone, so that it is never half old and half new.

    The other files are to be read, and come first: resuming makes up for a kill in between.
    """
    lines = [json.dumps(line) + "\n" for line in session.metrics]
    write(session.folder / "metrics.jsonl", "".join(lines))
    model = session.model.state_dict()
    write_tensors(session.folder / "model.pt", model)
    state = {
        "step": session.step,
        "seconds": session.seconds,
        "metrics": session.metrics,
        "model": model,
        "optimizer": session.optimizer.state_dict()["state"],
    }
    write_tensors(session.folder / "train_state.pt", state)


def load_checkpoint(session):
    """Puts a session where its folder's checkpoint was taken; ValueError if that is damaged."""
    path = session.folder / "train_state.pt"
    state = read_tensors(path)
    with reading(path, "is not a checkpoint of this run"):
        check_tensors(state["model"], session.model.state_dict())
        session.step = int(state["step"])
        session.seconds = float(state["seconds"])
        session.metrics = [figures(line) for line in state["metrics"]]
        if not (0 < session.step <= session.config.steps and 0 <= session.seconds < math.inf):
            raise ValueError(f"step {session.step}, after {session.seconds} seconds")
        session.model.load_state_dict(state["model"])
        load_moments(session.optimizer, state["optimizer"])


def load_moments(optimizer, found):
    """Gives AdamW the moments that were found: {number of the parameter: {name: tensor}}."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = optimizer.state_dict()
    for i, moments in found.items():
        like = parameters[i]
        check_tensors(moments, {"step": torch.tensor(0.0), "exp_avg": like, "exp_avg_sq": like})
        # Off the disk:
        state["state"][i] = {name: tensor.clone() for name, tensor in moments.items()}
    optimizer.load_state_dict(state)


def summarise(session):
    """Writes summary.json: the final figures, and those of the model just before its codebooks."""
    config = session.config
    seconds = round(session.seconds, 1)
    summary = {**session.metrics[-1], "seconds": seconds, "dense": None}
    for line in session.metrics:
        if line["step"] == config.dense_steps < config.steps:
            summary["started" if "sites" in line else "dense"] = line
    path = session.folder / "summary.json"
    before = read_json(path, figures) if path.exists() else {}
    if "twin" in before:  # the run was done before it was resumed
        summary["twin"] = before["twin"]
    write(path, json.dumps(summary, indent=1))
    return summary
