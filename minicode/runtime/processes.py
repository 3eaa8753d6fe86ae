"""Several processes: torchrun starts the same program once for each, and they train as one.

Every rank draws the whole batch and works on its rows of it; DistributedDataParallel averages the
gradients; what the codebooks count is added up. So a run is the same, to rounding, on any number of
processes, and its codes are the same on all of them. Rank 0 alone evaluates, prints and writes. In
a single process nothing here does anything.
"""

import os
import warnings
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

asked = []  # the signals by which this process was asked to stop
at_once = False  # whether `check_stop` obeys them


class Stopped(Exception):
    """Some rank was asked to stop while the codebooks started: resuming does that again."""


def join():
    """Joins the processes that torchrun started, if it did."""
    if "RANK" in os.environ:
        # Where there is a GPU torch alone would choose nccl, which takes no tensor on a CPU.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend)


def joined():
    return dist.is_available() and dist.is_initialized()


def leave():
    if joined():
        dist.destroy_process_group()


def ranks():
    return dist.get_world_size() if joined() else 1


def rank():
    return dist.get_rank() if joined() else 0


def wrap(model, unused):
    """The model, with gradients that are averaged over all ranks; `unused`: some have none."""
    if ranks() == 1:
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.13 renames broadcast_buffers
        return DistributedDataParallel(
            model, broadcast_buffers=False, find_unused_parameters=unused
        )


def my_rows(batch):
    """This rank's rows of a tensor that all ranks have."""
    return batch.chunk(ranks())[rank()]


def all_rows(rows):
    """The tensor whose rows the ranks have: the opposite of `my_rows`."""
    if ranks() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(ranks())]
    dist.all_gather(parts, rows)
    return torch.cat(parts)


def add_up(tensor):
    """Adds a tensor up over the ranks, in place, and returns it."""
    if ranks() > 1:
        dist.all_reduce(tensor)
    return tensor


def take_from_first(module):
    """Gives every rank the tensors of rank 0: on GPUs the same sums differ in the last bits."""
    if ranks() > 1:
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, src=0)


def stopping(device):
    """Whether any rank was asked to stop, so that all end at the same step."""
    if ranks() == 1:
        return bool(asked)
    return add_up(torch.tensor(len(asked), device=device)).item() > 0


def ask(number, frame):
    """Handles a signal, of which all processes have to hear at the same point of their work."""
    asked.append(number)


def check_stop(device):
    if at_once and stopping(device):
        raise Stopped


@contextmanager
def together():
    """What goes wrong in the block on any rank goes wrong on all: none is left waiting."""
    error = None
    try:
        yield
    except (ValueError, OSError, ArithmeticError) as raised:
        error = raised
    if ranks() > 1:
        errors = [None] * ranks()
        dist.all_gather_object(errors, error)
        error = next(filter(None, errors), None)
    if error:
        raise error


def first(work, *arguments):
    """What rank 0 alone does: work(*arguments); None on the others. They share its errors."""
    with together():
        return work(*arguments) if rank() == 0 else None
