"""The ablations: each idea changes what it says it changes, and leaves the Codebook as it was."""

import json

import pytest
import torch
from test_train import refusal

from minicode import Codebook, ablate
from minicode.ablate import main


@torch.no_grad()
def test_rotation_hands_on_q_and_turns_the_gradient():
    torch.manual_seed(0)
    a, q = (
        torch.randn(5, 8, dtype=torch.float64, requires_grad=True),
        torch.randn(5, 8, dtype=torch.float64),
    )
    with torch.enable_grad():
        out = ablate.rotation(None, a, q)
        grad = torch.randn(5, 8, dtype=torch.float64)
        out.backward(grad)
    torch.testing.assert_close(out, q)
    for i in range(
        5
    ):  # the map is linear in a, takes a to q, and keeps angles: its columns are orthogonal, of one length
        matrix = torch.autograd.functional.jacobian(
            lambda x, i=i: ablate.rotation(None, x[None], q[i : i + 1])[0], a[i].detach()
        )
        torch.testing.assert_close(matrix @ a[i], q[i])
        torch.testing.assert_close(
            matrix @ matrix.T, (q[i].norm() / a[i].norm()) ** 2 * torch.eye(8, dtype=torch.float64)
        )
        torch.testing.assert_close(a.grad[i], matrix.T @ grad[i])


def test_random_inputs_are_inputs():
    book, x = Codebook(6, 4, groups=2), torch.randn(50, 8)
    ablate.start_at_random(book, x)
    assert all(
        (x.view(50, 2, 4)[:, group] == code).all(1).any()
        for group in range(2)
        for code in book.codes[group]
    )


def test_k_falls_from_4_to_1_while_it_is_trained():
    book, x = Codebook(6, 4, similarity="distance"), torch.randn(50, 4)
    ablate.start_with_four(book, x)
    assert (
        ablate.one_less(book, x) == book.sum_codes(book.ids)[0].flatten(-2)
    ).all() and book.ids.shape == (50, 1, 4)
    book.batches = 598
    ks = [ablate.one_less(book, x) is not None and book.k for _ in range(3)]
    ablate.one_less(book.eval(), x)
    assert ks == [2, 1, 1] and (book.k, book.batches) == (1, 601)


def test_table_is_made_once(tmp_path, monkeypatch, capsys):
    flags = ["--out", str(tmp_path), "--seeds", "1", "--steps", "2", "LayerNorm in front"]
    main(flags)
    table = capsys.readouterr().out.splitlines()[-1:]
    assert table[0].startswith("| LayerNorm in front `--layer-norm` | 2.")
    figures = json.loads((tmp_path / "LayerNorm-in-front-0" / "ablation.json").read_text())
    assert 0 <= figures["control_mlp"] <= 1 and figures["step"] == 2
    monkeypatch.setattr(ablate, "train_fsm", lambda argv: pytest.fail("trained again"))
    main(flags)
    assert capsys.readouterr().out.splitlines() == [
        "| idea | loss | transition accuracy | dead codes | control, MLPs |",
        "|---|---|---|---|---|",
        *table,
    ]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["magic"], "there is no idea 'magic'; there are: the default"),
        (["--seeds", "0"], "must be at least 1"),
    ],
)
def test_bad_input_ends_in_one_line(flags, words, capsys):
    assert words in refusal(main, *flags, capsys=capsys)
