"""The benchmark, on sizes that take no time: that its figures are about what they say."""

import json

import pytest
import torch

from minicode import bench
from minicode.runtime import extension
from minicode.study import timing


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Sizes that take no time, in a folder without a run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "SHAPES", [(2, 80, 4, 300, 2), (1, 1, 4, 300, 3)])
    monkeypatch.setattr(bench, "PURSUITS", [(2, 80, 4, 30, 2)])
    monkeypatch.setattr(bench, "STEP_ROUNDS", 1)
    monkeypatch.setattr(timing, "SIDE", 64)


def test_bench_prints_every_table(small, capsys):
    bench.main(["--json", "--device", "cpu"])
    result = json.loads(capsys.readouterr().out)
    peak = result["peak"]
    assert peak["gflops"] > 0.01
    # A loop of multiply-adds in registers; where there is no extension, what it is.
    measured = extension.load("cpu")[0]
    assert peak["what"] == ("the peak in float32" if measured else "torch's matmul of 64 x 64")
    assert ("gops_in_bytes" in peak) == measured
    assert [row["N"] for row in result["search"]] == [80, 1]
    for row in result["search"]:
        methods = row["methods"]
        assert {"matmul + topk", "PyTorch, chunks"} <= methods.keys()
        assert methods["matmul + topk"]["times_as_fast"] == 1
        for name, method in methods.items():
            assert method["lowest"] <= method["ms"] <= method["highest"], name
            assert method.get("different_ids", 0) == 0, name
    steps = result["training_step"]
    for row in result["pursuit"]:
        nearest = row["methods"]["nearest"]["ms"]
        for method in row["methods"].values():
            assert method["times_nearest"] == method["ms"] / nearest
    assert list(steps) == ["dense", "codebooks, PyTorch", "codebooks, extension"]
    assert steps["dense"]["times_dense"] == 1
    assert {"nearest, PyTorch", "pursuit, PyTorch"} <= result["text_step"].keys()

    text = bench.describe(result)
    assert f"{peak['what']}: {peak['gflops']:.0f} GFLOP/s" in text
    assert "2 x (80, 4) against 300 codes, k = 2" in text
    assert "2 x (80, 4) against 30 codes, k = 2, by pursuit" in text
    assert f"{steps['codebooks, PyTorch']['times_dense']:.2f} of dense" in text


def test_the_gflops_of_a_method_are_its_operations_over_its_time(small, capsys):
    x = torch.randn(2, 80, 4)
    codes = torch.randn(2, 300, 4)
    table = bench.bench_search(x, codes, 2)
    for method in table["methods"].values():
        operations = 2 * 2 * 80 * 4 * 300
        assert method["gflops"] == pytest.approx(operations / (method["ms"] / 1e3) / 1e9)
