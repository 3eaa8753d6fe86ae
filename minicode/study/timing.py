"""The ways of searching, timed side by side."""

import importlib.util
import time
from functools import partial
from statistics import median

import numpy as np
import torch

from minicode import topk
from minicode.runtime import native


def timed(methods, rounds=7):
    """{name: {"ms", "lowest", "highest"}} of functions, run in turn after one round to warm up."""
    times = {name: [] for name in methods}
    for _ in range(rounds + 1):
        for name, method in methods.items():
            _finish()
            start = time.perf_counter()
            method()
            _finish()
            times[name].append(1e3 * (time.perf_counter() - start))
    results = {}
    for name, (_, *ms) in times.items():
        results[name] = {"ms": median(ms), "lowest": min(ms), "highest": max(ms)}
    return results


def _finish():
    """Waits for what a GPU was given to do."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def searches(x, codes, k):
    """The ways of searching there are here, {name: function}; x (G, N, d), codes (G, C, d)."""
    scale, offset = topk.scale_and_offset(codes, "cosine")
    table = (codes * scale.mT).contiguous()
    search = (x, codes, k, "cosine")
    methods = {
        "matmul + topk": lambda: torch.baddbmm(offset, x, table.mT).topk(k),
        "PyTorch, chunks": lambda: topk.joined(topk.search_in_chunks(*search)),
    }

    def extension(coarse):
        return topk.joined(native.search(*search, topk.scale_and_offset, coarse))

    if native.serves(x, k):
        methods["float32"] = partial(extension, coarse=False)
        methods["coarse + float32"] = partial(extension, coarse=True)
    if importlib.util.find_spec("faiss") and not x.is_cuda:
        methods["faiss"] = _faiss(x.numpy(), table.numpy(), k)
    return methods


def _faiss(x, table, k):
    """The search by faiss, as a function: x (G, N, d), table (G, C, d)."""
    import faiss

    searches = []
    for queries, rows in zip(x, table):
        index = faiss.IndexFlatIP(table.shape[2])
        index.add(rows)
        searches.append(partial(index.search, np.ascontiguousarray(queries), k))
    return lambda: [search() for search in searches]


def bench_search(x, codes, k):
    """One table of searches: times, GFLOP/s, and times_as_fast as matmul + topk.

    different_ids: how many of the ids are not those of PyTorch's search.
    """
    methods = searches(x, codes, k)
    exact = methods["PyTorch, chunks"]()[1]
    flop = 2 * x.numel() * codes.shape[1]
    quick = flop < 1e8 or x.is_cuda
    results = timed(methods, rounds=101 if quick else 7)
    for name, result in results.items():
        result["gflops"] = flop / result["ms"] / 1e6
        result["times_as_fast"] = results["matmul + topk"]["ms"] / result["ms"]
        found = methods[name]()
        if isinstance(found, tuple):  # of scores and ids, both tensors
            result["different_ids"] = (found[1] != exact).sum().item()
    n_groups, n_rows, dim = x.shape
    sizes = {"groups": n_groups, "N": n_rows, "d": dim, "C": codes.shape[1], "k": k}
    return {**sizes, "methods": results}
