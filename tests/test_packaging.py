"""The wheel holds what git holds, under one import name."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_wheel_claims_one_name_and_holds_every_file(tmp_path):
    """Built from a copy of what git holds: a folder `build` of an earlier wheel would add the files that it knew."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "source" / name, follow_symlinks=False)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", ".", "source"]
    built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr[-2000:]
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    files = {name for name in names if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in files} == {"ptq4vit_fx"}
    expected = {name for name in tracked if name.startswith("ptq4vit_fx/") and (ROOT / name).is_file()}
    expected |= {f"ptq4vit_fx/{name}" for name in tracked if name.startswith(("passes/", "export/"))}
    assert files == expected


@pytest.mark.parametrize("folder", ["passes", "export"])
def test_folders_refuse_another_import_name(folder):
    command = [sys.executable, "-c", f"import {folder}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert f"import this package as ptq4vit_fx.{folder}" in result.stderr


def floors() -> dict[str, str]:
    """Return what installation needs and what its extras for users add: package -> the oldest that is accepted."""
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    bounds = [
        re.fullmatch(r"([a-z-]+)>=([0-9.]+)", line)
        for line in [*project["dependencies"], *extras["data"], *extras["hf"], *extras["openvino"]]
    ]
    assert all(bounds), "a floor, and nothing above"
    return {found[1]: found[2] for found in bounds if found}


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_the_oldest_environment_is_every_floor():
    command = ["make", "-n", "-B", ".venv-oldest/.installed"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert dict(re.findall(r"(\S+)==(\S+)", shown)) == floors()


@pytest.mark.skipif(Path(sys.prefix).name != ".venv-oldest", reason="this is not the environment of make test-oldest")
def test_the_oldest_environment_holds_the_floors():
    assert {name: version(name).split("+")[0] for name in floors()} == floors()
