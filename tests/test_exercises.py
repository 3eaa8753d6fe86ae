"""The exercises: every check fails on the answers as handed out, and passes with the solutions."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "tests" / "exercises"
CHECKS = sorted(str(path.relative_to(ROOT)) for path in FOLDER.glob("check_*.py"))
OUTCOME = re.compile(r"^(PASSED|FAILED|ERROR) (tests/exercises/check_\w+\.py)", re.M)


def outcomes(answers, **environment):
    """Runs all checks with a module in the place of answers.

    {outcome: the checks that have it}, and what pytest printed.
    """
    replace = f"import sys, pytest, {answers}; sys.modules['answers'] = {answers}"
    code = f"{replace}; pytest.main(sys.argv[1:])"
    flags = ["-rA", "-q", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [sys.executable, "-c", code, *flags, *CHECKS],
        capture_output=True,
        encoding="utf-8",
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(FOLDER), **environment},
    )
    found = {}
    for outcome, check in OUTCOME.findall(result.stdout):
        found.setdefault(outcome, set()).add(check)
    return {outcome: sorted(checks) for outcome, checks in found.items()}, result.stdout


def test_every_check_fails_until_it_is_solved(tmp_path):
    assert len(CHECKS) == 10
    handed_out = (FOLDER / "answers.py").read_text(encoding="utf-8")
    if handed_out.count("  raise NotImplementedError\n") < 11:
        pytest.skip("some of the exercises have been solved here")
    found, printed = outcomes("answers", EXERCISE_RUN=str(tmp_path / "none"))
    assert found == {"FAILED": CHECKS}
    assert printed.count("E       NotImplementedError") >= 9
    assert "there is no run in" in printed


def test_every_check_passes_with_the_solutions_and_the_last_says_what_is_missing(tiny_run):
    found, printed = outcomes("solutions", EXERCISE_RUN=str(tiny_run))
    assert found == {"PASSED": CHECKS[:9], "FAILED": CHECKS[9:]}
    assert "n_embd is 16, not 64" in printed
    assert "not the default machine" in printed
