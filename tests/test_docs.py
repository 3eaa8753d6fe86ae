"""README.md and tutorial.md: their code runs, their map is true, and the project keeps its budget of lines."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from minicode.sample import main as sample
from minicode.train_fsm import main as train_fsm

ROOT = Path(__file__).parent.parent
PYTHON = sorted((ROOT / "minicode").glob("*.py"))
QUICK = "--steps 12 --batch-size 64 --eval-every 12 --device cpu".split()


def blocks(name, language):
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / name).read_text(), flags=re.M | re.S)


@pytest.fixture(scope="session")
def default_run(tmp_path_factory):
    """A folder with runs/fsm in it: the default machine and codebooks, hardly trained."""
    folder = tmp_path_factory.mktemp("docs")
    train_fsm(["--out", str(folder / "runs" / "fsm"), *QUICK])
    return folder


@pytest.mark.parametrize("name", ["README.md", "tutorial.md"])
def test_python_blocks_run_in_order(name, default_run, monkeypatch):
    monkeypatch.chdir(default_run)
    code, namespace = blocks(name, "python"), {}
    assert code
    for block in code:
        exec(compile(block, name, "exec"), namespace)


@pytest.mark.parametrize("name", ["README.md", "tutorial.md"])
def test_commands_are_accepted(name, default_run, tmp_path, monkeypatch, capsys):
    """Each command as it stands, but training is cut short and goes elsewhere."""
    monkeypatch.chdir(default_run)
    lines = [line for block in blocks(name, "sh") for line in block.splitlines()]
    commands = [command.strip() for line in lines for command in line.split("&&") if "-m minicode." in command]
    assert commands
    for i, command in enumerate(commands):
        _, _, module, *flags = shlex.split(command, comments=True)
        if module == "minicode.sample":
            sample(flags)
        else:
            assert module == "minicode.train_fsm"
            cut = ["--steps", "2", "--batch-size", "32", "--out", str(tmp_path / str(i))]
            assert train_fsm([*flags, *cut]) == 0


def test_set_up_and_test_commands_are_there():
    first, second = [block for block in blocks("README.md", "sh") if "venv" in block]
    for block in (first, second):
        assert block.startswith("python3 -m venv .venv && . .venv/bin/activate && pip install torch==2.13.0 ")
    assert "python -m minicode.train_fsm" in first and "python -m pytest" in second


def test_map_of_the_files_is_true():
    rows = re.findall(r"^\| `(minicode/\w+\.py)` \| (\d+) \|", (ROOT / "README.md").read_text(), flags=re.M)
    lines = {f"minicode/{path.name}": len(path.read_text().splitlines()) for path in PYTHON if path.name != "__init__.py"}
    assert {name: int(n) for name, n in rows} == lines
    place = {name.removesuffix(".py").replace("/", "."): i for i, (name, _) in enumerate(rows)}
    for name, i in place.items():  # every file imports only files that stand before it
        text = (ROOT / (name.replace(".", "/") + ".py")).read_text()
        assert all(place[other] < i for other in re.findall(r"^from (minicode\.\w+) import", text, flags=re.M))


def test_budget_of_lines():
    lines = {path.name: len(path.read_text().splitlines()) for path in [*PYTHON, ROOT / "setup.py"]}
    assert max(lines.values()) <= 350 and sum(lines.values()) <= 2900
    native = [path for path in (ROOT / "csrc").glob("*") if path.is_file()]
    assert sum(len(path.read_text().splitlines()) for path in native) <= 700


def test_set_up_imports_no_torch_and_importing_minicode_is_quiet():
    assert "import torch" not in (ROOT / "setup.py").read_text()
    result = subprocess.run([sys.executable, "-c", "import minicode"], capture_output=True, text=True, cwd=ROOT)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
