"""What `make test` does where there is no Chromium: it never stands in the way of the other tests."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("install_chromium")
SKIPPED = "No Chromium: the tests of the server's page will be skipped. "
SAYS_WHY = 'echo "E: Unable to locate package"; exit 100'
Machine = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A machine of these programs besides the usual ones, to run the script on."""
    for name in ("grep", "tail", "timeout", "touch", "chmod"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))

    def run(environment: dict[str, str] | None = None, **programs: str) -> subprocess.CompletedProcess[str]:
        for name, body in programs.items():
            program = tmp_path / name.replace("_", "-")
            program.write_text(f"#!/bin/sh\n{body}\n")
            program.chmod(0o755)
        given = {"PATH": str(tmp_path), **(environment or {})}
        return subprocess.run(["/bin/sh", str(SCRIPT)], env=given, capture_output=True, text=True, check=True)

    return run


def test_it_is_installed_once(machine: Machine, tmp_path: Path) -> None:
    chromium = tmp_path / "chromium"
    install = f'case "$*" in *install*) touch {chromium}; chmod +x {chromium};; esac'
    assert machine(id="echo 0", apt_get=install).stdout.startswith("Installing Chromium")
    assert chromium.exists()
    assert machine(id="echo 0", apt_get=SAYS_WHY).stdout == ""


@pytest.mark.parametrize(
    ("environment", "programs", "why"),
    [
        ({}, {"id": "echo 0"}, "Install one, or name it"),
        ({}, {"id": "echo 1000", "apt_get": SAYS_WHY}, "sudo apt-get install chromium"),
        ({}, {"id": "echo 0", "apt_get": SAYS_WHY}, "E: Unable to locate package"),
        ({"CHROMIUM": "/nowhere"}, {"id": "echo 0", "apt_get": SAYS_WHY}, "CHROMIUM is /nowhere"),
    ],
)
def test_where_it_cannot_be_had_that_is_said(
    machine: Machine, environment: dict[str, str], programs: dict[str, str], why: str
) -> None:
    told = machine(environment, **programs).stdout.splitlines()
    assert told[-1].startswith(SKIPPED)
    assert why in told[-1]
