"""The wheel holds what git holds, under one import name; one version, and floors that are installed as they stand."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    return subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory, tracked) -> zipfile.ZipFile:
    """Built from a copy of what git holds: a folder `build` of an earlier wheel would add the files that it knew."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in tracked:
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "source" / name, follow_symlinks=False)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", ".", "source"]
    built = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr[-2000:]
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_wheel_claims_one_name_and_holds_every_file(wheel, tracked):
    files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in files} == {"ptq4vit_fx"}
    expected = {name for name in tracked if name.startswith("ptq4vit_fx/") and (ROOT / name).is_file()}
    expected |= {f"ptq4vit_fx/{name}" for name in tracked if name.startswith(("passes/", "export/"))}
    assert files == expected


USE = """\
from typing import Any

import ptq4vit_fx as ptq


def use(model: Any, images: Any) -> int:
    prepared = ptq.prepare_fx(model, ptq.recipes.best(4, 8).with_bits("blocks.0.mlp", w=8, a=8), images, skip="head")
    reveal_type(prepared.plan)
    reveal_type(ptq.calibrate(prepared, images))
    converted = ptq.quantize(model, images, skip=["head"])
    reveal_type(converted.plan)
    reveal_type(converted.calibration)
    reveal_type(ptq.verify_onnx("model.onnx", converted, images).ok)
    return converted.plan.ops
"""


def test_mypy_knows_the_installed_package(wheel, tmp_path):
    """As a user has it: in site-packages. Without torch there, which takes mypy a minute and changes no answer."""
    pytest.importorskip("mypy")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    site = next((tmp_path / "venv").glob("[lL]ib*/**/site-packages"))  # lib64 is a link to lib
    wheel.extractall(site)
    (tmp_path / "use.py").write_text(USE)
    python = next(path for path in (tmp_path / "venv").glob("*/python*") if path.stem == "python")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--cache-dir=cache", "use.py"]
    result = subprocess.run(
        [*command, f"--python-executable={python}"],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name not in ("MYPYPATH", "PYTHONPATH")},
        capture_output=True,
        text=True,
        check=False,
    )
    plan, calibration = "ptq4vit_fx.plan.QuantPlan", "ptq4vit_fx.calibration.Calibration"
    said = re.findall(r"use\.py:\d+: (?:note: Revealed type is \"(.*)\"|error: (.*))", result.stdout)
    assert [revealed or error for revealed, error in said] == [
        plan,
        calibration,
        plan,
        f"{calibration} | None",
        "bool",
        'Incompatible return value type (got "tuple[QuantOp, ...]", expected "int")  [return-value]',
    ], result.stdout + result.stderr


@pytest.mark.parametrize("folder", ["passes", "export"])
def test_folders_refuse_another_import_name(folder):
    command = [sys.executable, "-c", f"import {folder}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert f"import this package as ptq4vit_fx.{folder}" in result.stderr


#: Extras for users; the others hold tools of developers.
USERS = ("data", "demo", "distributed", "report", "hf", "openvino")


def floors() -> dict[str, str]:
    """Return what installation needs here and what its extras for users add: package -> the oldest that is accepted."""
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    bounds = [
        re.fullmatch(r"([a-z0-9-]+)>=([0-9.]+)", line)
        for line in [*project["dependencies"], *(line for name in USERS for line in extras[name])]
        if not line.endswith("; python_version < '3.11'")
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
