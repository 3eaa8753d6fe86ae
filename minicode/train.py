"""The training loop.

A run trains the dense model for `dense_share` of its steps, starts the codebooks from its
activations, and goes on with the codebooks in place. Batch and random numbers of a step follow from
(seed, step) alone, so that resuming needs no random state, and a resumed run ends as the unbroken
one, to the last bit.
"""

import math
import sys
import time
from contextlib import ExitStack, suppress

import numpy as np
import torch
from tqdm import tqdm

from minicode.codebook import codebooks
from minicode.fsm import FSM
from minicode.hooks import start_codebooks
from minicode.model import evaluating
from minicode.runtime import processes
from minicode.runtime.files import write_tensors
from minicode.runtime.precision import autocast
from minicode.runtime.progress import bar, describe, say, show
from minicode.runtime.session import save_checkpoint, stop_signals, summarise
from minicode.study.detectors import usage
from minicode.study.fidelity import Errors, zeroed
from minicode.study.machine import accuracies


def learning_rate(config, step):
    """Two cosines from a peak to a tenth: dense, and with codebooks. The first has a warm-up."""
    start = 0
    end = config.dense_steps or config.steps
    peak = config.lr
    if step >= end:
        start = end
        end = config.steps
        peak *= config.codebook_lr
    angle = math.pi * (step - start) / (end - start)
    cosine = 0.5 * (1 + math.cos(angle))
    warm_up = min(1, (step + 1) / min(100, config.steps))
    return peak * (0.1 + 0.9 * cosine) * warm_up


def batch(config, data, device, *key):
    """Inputs and targets (B, T), which follow from the seed and the key."""
    rng = np.random.default_rng((config.seed, *key))
    sequences = data.sequences(rng, config.batch_size, config.block_size + 1)
    tokens = torch.from_numpy(sequences).to(device, non_blocking=True)
    return tokens[:, :-1], tokens[:, 1:]


def active_codebooks(model):
    """The codebooks that are in use, by name."""
    books = codebooks(model).items()
    return {name: codebook for name, codebook in books if codebook.enabled}


def begin_codebooks(session, generator):
    """Starts the codebooks from what the model makes of 32 tokens a code."""
    config = session.config
    model = session.model
    processes.first(write_tensors, session.folder / "dense.pt", model.state_dict())
    if session.step == 0:
        processes.first(look, session)
    say("starting the codebooks by k-means")
    most = max(codebook.n_codes for codebook in codebooks(model).values())
    n_batches = math.ceil(32 * max(most, 1024) / (config.batch_size * config.block_size))
    processes.at_once = True
    try:
        batches = [batch(config, session.data, model.device, 1, i)[0] for i in range(n_batches)]
        start_codebooks(model, torch.cat(batches), generator=generator)
    finally:
        processes.at_once = False
    if session.data.model:
        processes.first(look, session)


def seed_of(config, step):
    """Of the random numbers of a step."""
    return (config.seed * 1_000_003 + step) % 2**63


def train_step(model, forward, optimizer, config, step, data):
    """One step of the optimizer and of the codebooks; returns this process's loss, a tensor.

    forward: the model as it is called, compiled or wrapped.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
    optimizer.zero_grad()
    torch.manual_seed(seed_of(config, step))  # for dropout, which a pretrained model may have
    x, y = batch(config, data, model.device, 0, step)
    with autocast(config, x.device):
        _, loss = forward(processes.my_rows(x), processes.my_rows(y))
    pull = 0
    books = active_codebooks(model).values()
    for codebook in books:
        moves_codes = config.autoencoding * codebook.autoencoding
        holds_activations = config.commitment * codebook.commitment
        pull = pull + (moves_codes + holds_activations)
    (loss + pull).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if config.refit:
        for codebook in books:
            codebook.refit(config.refit)
    return loss.detach()


def pass_over(model, data, tokens):
    """Loss and accuracy on tokens (n, T + 1); Errors by site."""
    books = active_codebooks(model)
    loss = 0.0
    accuracy = 0.0
    errors = {name: Errors() for name in books}
    for part in torch.from_numpy(tokens).to(model.device).split(8 if data.model else 64):
        targets = part[:, 1:]
        with evaluating(model), ExitStack() as stack:
            for name, codebook in books.items():
                stack.enter_context(codebook.register_forward_hook(errors[name].add))
            logits, part_loss = model(part[:, :-1], targets)
        right = (logits.argmax(-1) == targets).float().mean()
        loss += part_loss.item() * len(part) / len(tokens)
        accuracy += right.item() * len(part) / len(tokens)
    if not math.isfinite(loss):
        raise FloatingPointError("the loss on held-out data is no number: try a lower --lr")
    return loss, accuracy, errors


def evaluate(model, data, seed, n, zero=False):
    """The measures of a model on n fresh sequences, ready for JSON.

    zero: with the loss of the model whose sites pass on nothing.
    """
    tokens = data.held_out(np.random.default_rng((seed, 2)), n, model.config.block_size + 1)
    loss, accuracy, errors = pass_over(model, data, tokens)
    figures = {"loss": loss, "accuracy": accuracy, **data.measures(tokens, loss)}
    if isinstance(data, FSM):
        figures |= accuracies(data, model, seed)
    counts = {name: site.count for name, site in errors.items()}
    if counts:
        every = torch.cat([count.flatten() for count in counts.values()])
        figures["dead_code_fraction"] = (every == 0).float().mean().item()
        figures["sites"] = usage(counts)
        for name, site in figures["sites"].items():
            site["fvu"] = errors[name].fvu()
        figures["fvu"] = np.mean([site["fvu"] for site in figures["sites"].values()]).item()
        books = active_codebooks(model).values()
        figures["codes_per_token"] = sum(codebook.groups * codebook.k for codebook in books)
        if zero:
            with zeroed(model):
                figures["loss_zero"] = pass_over(model, data, tokens)[0]
    return figures


def train(session):
    """Trains to the end; returns the summary (on rank 0, else {}), or None if a signal stops it.

    A stopped run has a checkpoint. Raises FloatingPointError when the weights are no numbers any
    more, OSError on a full disk; the last checkpoint stays.
    """
    config = session.config
    model = session.model
    forward = wrapped(session)
    began = time.monotonic() - session.seconds
    model.train()
    session.paced = session.step, session.seconds
    steps_bar = bar(total=config.steps, initial=session.step, unit="step", leave=True)
    with stop_signals(), steps_bar, suppress(processes.Stopped):
        for step in range(session.step, config.steps):
            generator = torch.Generator(model.device).manual_seed(seed_of(config, step))
            if step == session.start_step:
                begin_codebooks(session, generator)
                forward = wrapped(session)
                session.paced = step, time.monotonic() - began

            loss = train_step(model, forward, session.optimizer, config, step, session.data)
            stopped = processes.stopping(model.device)
            session.step = step + 1
            session.seconds = time.monotonic() - began

            if config.revival_is_due(session.step):
                check_weights(session)
                for codebook in codebooks(model).values():
                    codebook.revive(session.optimizer, generator=generator)
            if session.step == config.steps:
                for codebook in active_codebooks(model).values():
                    codebook.merge()
            if config.checkpoint_is_due(session.step) or stopped:
                processes.first(keep, session)
            show(steps_bar, session, loss)
            if stopped:
                break
    if session.step < config.steps:
        return None
    return processes.first(summarise, session) or {}


def wrapped(session):
    """The model as a step calls it: compiled if that is asked for, in step with other processes."""
    model = session.model
    books = codebooks(model).values()
    waiting = any(book.codes.requires_grad and not book.enabled for book in books)
    forward = torch.compile(model) if session.config.compile else model
    return processes.wrap(forward, unused=waiting)


def check_weights(session):
    """FloatingPointError if they are no numbers: they can't be saved, and nothing mends them."""
    if not all(parameter.isfinite().all() for parameter in session.model.parameters()):
        raise FloatingPointError(
            f"the weights are no numbers after step {session.step}: "
            f"try a lower --lr than {session.config.lr}"
        )


def keep(session):
    """Evaluates, if it is time to, and saves what there is so far."""
    check_weights(session)
    if session.config.evaluation_is_due(session.step):
        look(session)
    save_checkpoint(session)


def n_evaluated(data, at_the_end):
    """Held-out sequences that figures are of: of a pretrained model, which is larger, always 64."""
    if data.model:
        return 64
    return 1024 if at_the_end else 256


def look(session):
    """Evaluates, and adds a line to the metrics."""
    config = session.config
    done = session.step
    at_the_end = done == config.steps
    n = n_evaluated(session.data, at_the_end)
    figures = evaluate(session.model, session.data, config.seed, n, zero=at_the_end)
    seen = done * config.batch_size * config.block_size
    session.metrics.append({"step": done, "tokens": seen, **figures})
    tqdm.write(describe(session.metrics[-1]))
    sys.stdout.flush()  # for a log, which has no bar
