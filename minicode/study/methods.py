"""Other methods than codebooks: each makes modules for the sites of a dense model, {site: module}.

As large as the default's codebooks, with the same k; what is trained sees the tokens that codebooks
are trained on.
"""

import copy
import time
from dataclasses import replace
from functools import partial

import torch

from minicode.runtime.files import read_tensors, write_tensors
from minicode.study import sparse
from minicode.study.features import activations, as_it_is, put, sites
from minicode.train import batch


def codebooks_for(run, k):
    """Codebooks as the default has them, of random codes."""
    config = replace(run.config, codebooks="head,mlp", k=k)
    return {
        name: config.codebook(name.partition(".")[0], config.n_embd) for name in sites(run.model)
    }


def seen(run, *key):
    """What comes to the sites in a batch of the training loop."""
    tokens, _ = batch(run.config, run.data, "cpu", *key)
    return activations(run.model, tokens)


def autoencoders(rule, run, k):
    modules = {}
    for name, book in codebooks_for(run, k).items():
        size = (book.n_codes, book.dim, k, book.groups)
        modules[name] = sparse.SparseAutoencoder(rule, *size)
    return modules


def train_autoencoders(run, modules):
    """On the batches of the steps in which a network has codebooks."""
    config = replace(run.config, codebooks="head,mlp")
    steps = range(config.dense_steps, config.steps)
    sparse.train(modules, [partial(seen, run, 0, step) for step in steps])


def sample(run, books):
    """For each codebook 32 activations a code, from which it could start."""
    n_tokens = 32 * max(book.n_codes for book in books.values())
    n_batches = -(-n_tokens // (run.config.batch_size * run.config.block_size))
    parts = [seen(run, 1, i) for i in range(n_batches)]
    for name, book in books.items():
        yield book, torch.cat([part[name] for part in parts])


def k_means(run, books):
    """Codebooks as they start: by k-means, and for k > 1 least squares. Nothing else is trained."""
    for book, a in sample(run, books):
        book.start(a)


def random_codes(run, books):
    """Normal numbers with a k-th of the activations' mean and deviation."""
    for book, a in sample(run, books):
        a = book.activations(a).flatten(0, 1)  # (N, G, d)
        codes = a.mean(0).unsqueeze(1) + a.std(0).unsqueeze(1) * book.codes
        book.codes.data = codes / book.k


READ = {  # a dense model, which they leave as it is: how their modules are made, and learn
    "TopK": (partial(autoencoders, "topk"), train_autoencoders),
    "AbsTopK": (partial(autoencoders, "abstopk"), train_autoencoders),
    "BatchTopK": (partial(autoencoders, "batchtopk"), train_autoencoders),
    "k-means": (codebooks_for, k_means),
    "random codes": (codebooks_for, random_codes),
}


def read(run, method, k, path):
    """The run's model with a method's modules at its sites: those in a file, or trained and kept.

    Returns the model, what its sites pass on, and for how many seconds the modules were trained.
    """
    make, learn = READ[method]
    modules = make(run, k)
    model = copy.deepcopy(run.model)
    if path.exists():
        put(model, modules)
        saved = read_tensors(path)
        seconds = saved.pop("seconds").item()
        model.load_state_dict(saved)
    else:
        began = time.monotonic()
        learn(run, modules)
        seconds = time.monotonic() - began
        put(model, modules)
        write_tensors(path, {"seconds": torch.tensor(seconds), **model.state_dict()})
    return model, as_it_is, seconds
