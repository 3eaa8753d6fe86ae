import pytest
from answers import loss_floor

from minicode import FSM

MACHINES = [FSM(), FSM(8, 3, base=8), FSM(60, 7, base=3), FSM(50, 1)]


@pytest.mark.parametrize("machine", MACHINES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 64])
def test_loss_floor(machine, n):
    got = loss_floor(machine.n_states, machine.n_edges, machine.digits, n)
    wanted = machine.loss_floor(n * machine.digits)
    hint = "a single state is one of n_states"
    if n > 1:
        hint = "the first state has more entropy than the others"
    what = f"{n} states of {machine.digits} tokens: {got:.4f} instead of {wanted:.4f}; {hint}"
    assert got == pytest.approx(wanted), what
