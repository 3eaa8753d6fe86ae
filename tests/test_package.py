"""The package as a whole: its public names, and the list of its commands."""

import subprocess
import sys
from pathlib import Path

import pytest

import minicode
from minicode.__main__ import COMMANDS

ROOT = Path(__file__).parent.parent


def test_dir_lists_the_public_names_and_each_is_there():
    assert {"topk_codes", "Codebook", "GPT", "record", "force", "load_run"} <= set(dir(minicode))
    for name in dir(minicode):
        assert getattr(minicode, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        minicode.nothing  # noqa: B018


def test_python_m_minicode_lists_the_commands_without_importing_torch():
    command = [sys.executable, "-X", "importtime", "-m", "minicode"]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=ROOT)
    assert result.returncode == 0, result.stderr
    for name, what in COMMANDS.items():
        assert f"python -m minicode.{name} " in result.stdout
        assert what in result.stdout
    assert "Start with the first" in result.stdout
    assert "torch" not in result.stderr
    assert max(len(line) for line in result.stdout.splitlines()) <= 110


def test_every_command_is_in_the_list():
    modules = []
    for path in (ROOT / "minicode").glob("*.py"):
        runs_as_one = 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")
        if runs_as_one and path.stem != "__main__":
            modules.append(path.stem)
    assert sorted(modules) == sorted(COMMANDS)
