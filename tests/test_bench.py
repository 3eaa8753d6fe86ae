"""The benchmark, on sizes that take no time: that its figures are about what they say."""

import json

import pytest
import torch

from minicode import bench


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Sizes that take no time, in a folder without a run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "SHAPES", [(2, 80, 4, 300, 2), (1, 1, 4, 300, 3)])
    monkeypatch.setattr(bench, "SIDE", 64)


def test_bench_prints_every_table(small, capsys):
    bench.main(["--json", "--device", "cpu"])
    result = json.loads(capsys.readouterr().out)
    assert result["peak_gflops"] > 0.01
    assert [row["N"] for row in result["search"]] == [80, 1]
    for row in result["search"]:
        methods = row["methods"]
        assert {"matmul + topk", "PyTorch, chunks"} <= methods.keys()
        assert methods["matmul + topk"]["times_as_fast"] == 1
        for name, method in methods.items():
            assert method["lowest"] <= method["ms"] <= method["highest"], name
            assert method.get("different_ids", 0) == 0, name
    steps = result["training_step"]
    assert list(steps) == ["dense", "codebooks, PyTorch", "codebooks, extension"]
    assert steps["dense"]["times_dense"] == 1
    assert {"nearest, PyTorch", "pursuit, PyTorch"} <= result["text_step"].keys()

    text = bench.describe(result)
    assert "2 x (80, 4) against 300 codes, k = 2" in text
    assert f"{steps['codebooks, PyTorch']['times_dense']:.2f} of dense" in text


def test_the_gflops_of_a_method_are_its_operations_over_its_time(small, capsys):
    x = torch.randn(2, 80, 4)
    codes = torch.randn(2, 300, 4)
    table = bench.bench_search(x, codes, 2)
    for method in table["methods"].values():
        operations = 2 * 2 * 80 * 4 * 300
        assert method["gflops"] == pytest.approx(operations / (method["ms"] / 1e3) / 1e9)
