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


# Runs all checks, in a process forked for each module that takes the place of answers.
RUNS = """
import ast, os, sys
import pytest
import minicode.control
runs, flags = map(ast.literal_eval, sys.argv[1:])
for answers, (run, printed) in runs.items():
    if os.fork() == 0:
        os.dup2(os.open(printed, os.O_WRONLY | os.O_CREAT), 1)
        os.environ["EXERCISE_RUN"] = run
        sys.modules["answers"] = __import__(answers)
        pytest.main(flags)
        sys.stdout.flush()
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def outcomes(tiny_run, tmp_path_factory):
    """{module: ({outcome: the checks that have it}, what pytest printed)}."""
    folder = tmp_path_factory.mktemp("exercises")
    runs = {
        "answers": (str(folder / "none"), str(folder / "answers")),
        "solutions": (str(tiny_run), str(folder / "solutions")),
    }
    flags = ["-rA", "-q", "-p", "no:cacheprovider", *CHECKS]
    environment = {**os.environ, "PYTHONPATH": str(FOLDER)}
    command = [sys.executable, "-c", RUNS, repr(runs), repr(flags)]
    subprocess.run(command, check=True, cwd=ROOT, env=environment)
    return {name: outcomes_of(Path(printed)) for name, (_, printed) in runs.items()}


def outcomes_of(file):
    printed = file.read_text(encoding="utf-8")
    found = {}
    for outcome, check in OUTCOME.findall(printed):
        found.setdefault(outcome, set()).add(check)
    return {outcome: sorted(checks) for outcome, checks in found.items()}, printed


def test_every_check_fails_until_it_is_solved(outcomes):
    assert len(CHECKS) == 10
    handed_out = (FOLDER / "answers.py").read_text(encoding="utf-8")
    if handed_out.count("  raise NotImplementedError\n") < 11:
        pytest.skip("some of the exercises have been solved here")
    found, printed = outcomes["answers"]
    assert found == {"FAILED": CHECKS}
    assert printed.count("E       NotImplementedError") >= 9
    assert "there is no run in" in printed


def test_every_check_passes_with_the_solutions_and_the_last_says_what_is_missing(outcomes):
    found, printed = outcomes["solutions"]
    assert found == {"PASSED": CHECKS[:9], "FAILED": CHECKS[9:]}
    assert "n_embd is 16, not 64" in printed
    assert "not the default machine" in printed
