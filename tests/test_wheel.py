"""A wheel, unpacked in another place, holds all that the commands need."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata, util
from pathlib import Path

import pytest

from minicode.runtime import extension

ROOT = Path(__file__).parent.parent
COMMANDS = ("train_fsm", "train_text", "sample", "interpret", "bench", "ablate", "topk")


def can_build_wheels():
    """Whether setuptools is here, and can do it: from 70.1 on alone, before with `wheel`."""
    if not util.find_spec("setuptools"):
        return False
    major = int(metadata.version("setuptools").split(".")[0])
    return major > 70 or util.find_spec("wheel") is not None


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The folder of an unpacked wheel. It is built from a copy, as building leaves files behind."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "copy"
    without = shutil.ignore_patterns("__pycache__")
    for name in ("minicode", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=without)
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "pip", "wheel", copy, "--no-deps", "--wheel-dir", folder]
    if can_build_wheels():
        command.append("--no-build-isolation")
    result = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert result.returncode == 0, result.stderr
    (wheel,) = folder.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def files(folder):
    """The paths in a folder, but for what Python leaves there."""
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return {str(path) for path in paths if "__pycache__" not in path.parts}


def test_every_file_is_in_the_wheel(unpacked):
    package = unpacked / "minicode"
    assert files(ROOT / "csrc") == files(package / "csrc")
    inside = files(package)
    assert files(ROOT / "minicode") <= inside
    assert {"csrc/topk.h", "language/stories.txt"} <= inside
    assert {"study/report.html", "study/network.js"} <= inside


RUN = """
import os, runpy, sys
import minicode
from minicode import control  # the commands share it, and all of torch that comes with it
from minicode.runtime import extension
print(minicode.__file__)
print(extension.load("cpu")[1])
for name in sys.argv[1:]:
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        sys.argv = [name, "--help"]
        try:
            runpy.run_module(f"minicode.{name}", run_name="__main__")
        except SystemExit as end:
            sys.stdout.flush()
            os._exit(end.code or 0)
        os._exit(99)  # it does not end with its help
    _, status = os.waitpid(child, 0)
    print(name, os.waitstatus_to_exitcode(status))
"""


def test_every_command_runs_from_it_and_its_search_is_the_clones(unpacked, tmp_path):
    """Each prints its help; and as the sources are the same, so is the binary that they make."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN, *COMMANDS],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(unpacked)},
        cwd=tmp_path,
    )
    lines = result.stdout.splitlines()
    assert lines[0] == str(unpacked / "minicode" / "__init__.py")
    assert lines[1] == extension.load("cpu")[1]
    for name in COMMANDS:
        assert f"usage: python -m minicode.{name} [" in result.stdout, result.stderr
        assert f"{name} 0" in lines, result.stderr
