"""The ways of searching, timed side by side."""

import importlib.util
import time
from functools import partial
from statistics import median

import numpy as np
import torch

from minicode import topk
from minicode.runtime import extension, native

SIDE = 4096  # of the square matmul


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


def peak_of(device):
    """What shares are of: "what", and its "gflops"; on a CPU also 10^9 operations on bytes."""
    if device.type == "cpu" and extension.load("cpu")[0]:
        gflops, bytes_too = torch.ops.minicode_native.cpu_peak()
        return {"what": "the peak in float32", "gflops": gflops, "gops_in_bytes": bytes_too}
    square = torch.randn(SIDE, SIDE).to(device)
    matmul = timed({"matmul": lambda: square @ square})["matmul"]
    what = f"torch's matmul of {SIDE} x {SIDE}"
    return {"what": what, "gflops": 2 * SIDE**3 / matmul["lowest"] / 1e6}


def searches(x, codes, k):
    """The ways of searching there are here, {name: function}; x (G, N, d), codes (G, C, d)."""
    scale, offset = topk.scale_and_offset(codes, "cosine")
    table = (codes * scale.mT).contiguous()
    search = (x, codes, k, "cosine")
    methods = {
        "matmul + topk": lambda: torch.baddbmm(offset, x, table.mT).topk(k),
        "PyTorch, chunks": lambda: topk.search_in_chunks(*search),
    }

    if native.serves(x, k):
        by_extension = partial(native.search, *search, topk.scale_and_offset)
        methods["float32"] = partial(by_extension, coarse=False)
        methods["coarse + float32"] = by_extension
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
    return {**sizes(x, codes, k), "methods": results}


def bench_pursuit(x, codes, k):
    """One table of pursuits: times, and times_nearest, in units of the search of the k nearest."""

    def search(selection):
        return topk.topk_codes(x.transpose(0, 1), codes, k, "distance", selection)

    how = (x, codes, k, "distance")
    methods = {
        "nearest": partial(search, "nearest"),
        "definition": lambda: topk.pursuit_definition(*how),
        "PyTorch, chunks": lambda: topk.pursue_in_chunks(*how),
        "pursuit": partial(search, "pursuit"),
    }
    results = timed(methods)
    for result in results.values():
        result["times_nearest"] = result["ms"] / results["nearest"]["ms"]
    return {**sizes(x, codes, k), "methods": results}


def sizes(x, codes, k):
    n_groups, n_rows, dim = x.shape
    return {"groups": n_groups, "N": n_rows, "d": dim, "C": codes.shape[1], "k": k}
