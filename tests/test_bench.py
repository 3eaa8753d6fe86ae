"""The benchmark, on sizes that take no time: that its figures are about what they say."""

import json

import pytest
import torch

from minicode import bench


def test_bench_prints_every_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "SHAPES", [(2, 80, 4, 300, 2), (1, 1, 4, 300, 3)])
    monkeypatch.setattr(
        bench,
        "bench_layer",
        lambda device, dim, n_codes, groups, real=bench.bench_layer: real(
            device, dim // 8, n_codes // 50, groups
        ),
    )
    monkeypatch.setattr(
        bench,
        "bench_sweep",
        lambda device, real=bench.bench_sweep: real(device, n=8, d=4, n_codes=64),
    )
    bench.main(["--json", "--device", "cpu"])
    result = json.loads(capsys.readouterr().out)
    assert [row["N"] for row in result["search"]] == [80, 1] and result["peak_gflops"] > 1
    for row in result["search"]:
        assert {"matmul + topk", "PyTorch, chunks"} <= row["methods"].keys()
        assert row["methods"]["matmul + topk"]["times_as_fast"] == 1
        for name, method in row["methods"].items():
            assert (
                method["lowest"] <= method["ms"] <= method["highest"]
                and method.get("different_ids", 0) == 0
            ), name
    shapes = [(row["N"], row["C"], row["d"], row["k"]) for row in result["sweep"]]
    assert shapes[1::2] == [
        (16, 64, 4, 1),
        (8, 128, 4, 1),
        (8, 64, 8, 1),
        (8, 64, 4, 4),
        (8, 64, 4, 64),
    ]
    for row in result["sweep"]:
        assert row["times_first"] == pytest.approx(row["ms"] / result["sweep"][0]["ms"])
        assert row["per_ncd"] * row["N"] * row["C"] * row["d"] / (8 * 64 * 4) == pytest.approx(
            row["times_first"]
        )
    assert result["training_step"]["dense"]["times_dense"] == 1
    assert "training step" in bench.describe(result)


def test_trained_cases_are_what_reaches_the_last_codebooks(tiny_run):
    (head, mlp) = bench.trained(tiny_run)
    assert (
        head[0].shape == (2, 64 * 12, 8)
        and mlp[0].shape == (1, 64 * 12, 16)
        and mlp[1].shape == (1, 32, 16)
    )
    assert head[3] == "distance" and mlp[4].endswith("mlp.1")


def test_extra_memory_sees_what_a_call_takes():
    taken = bench.extra_memory(lambda: torch.ones(16 << 20).sum())
    if taken is None:
        pytest.skip("this system does not tell its peak of memory")
    assert 60 < taken < 80
