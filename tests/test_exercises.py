"""The exercises: every check fails on the answers as they are handed out, and passes with the solutions."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHECKS = sorted(
    str(path.relative_to(ROOT)) for path in (ROOT / "tests" / "exercises").glob("check_*.py")
)


def outcomes(answers, checks, **environment):
    """Runs checks with a module in the place of answers: {outcome: the checks that have it}, and what pytest printed."""
    code = f"import sys, pytest, {answers}; sys.modules['answers'] = {answers}; pytest.main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "-rA", "-q", "-p", "no:cacheprovider", *checks]
    environment = {**os.environ, "PYTHONPATH": "tests/exercises", **environment}
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    found = {}
    for outcome, check in re.findall(
        r"^(PASSED|FAILED|ERROR) (tests/exercises/check_\w+\.py)", result.stdout, flags=re.M
    ):
        found.setdefault(outcome, []).append(check)
    return {outcome: sorted(set(found[outcome])) for outcome in found}, result.stdout


def test_every_check_fails_until_it_is_solved(tmp_path):
    assert len(CHECKS) == 10
    if (ROOT / "tests/exercises/answers.py").read_text().count(
        "  raise NotImplementedError\n"
    ) < 11:
        pytest.skip("some of the exercises have been solved here")
    found, printed = outcomes("answers", CHECKS, EXERCISE_RUN=str(tmp_path / "none"))
    assert found == {"FAILED": CHECKS}
    assert printed.count("E       NotImplementedError") >= 9 and "there is no run in" in printed


def test_every_check_passes_with_the_solutions_and_the_last_says_what_is_missing(tiny_run):
    found, printed = outcomes("solutions", CHECKS, EXERCISE_RUN=str(tiny_run))
    assert found == {"PASSED": CHECKS[:9], "FAILED": CHECKS[9:]}
    for part in ("n_embd is 16, not 64", "not the default machine"):
        assert part in printed
