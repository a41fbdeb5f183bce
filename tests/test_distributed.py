"""Calibration on real clusters: Dask with a scheduler and two workers, one of which dies, and two workers of MPI."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import ptq4vit_fx as ptq
from ptq4vit_fx.tools.cli import app

QUICK = ptq.recipes.best().with_search(n=4, rounds=1)
pytestmark = [pytest.mark.sweep, pytest.mark.filterwarnings("ignore:calibrate. data. 12 images")]
DASK = "distributed.cli.dask_"
WORKER = f"{DASK}worker --nworkers 1 --nthreads 1 --no-nanny --no-dashboard --local-directory"
SCHEDULER = f"{DASK}scheduler --host 127.0.0.1 --port 0 --no-dashboard --scheduler-file"


@pytest.fixture
def cluster(tmp_path):
    """A scheduler and two worker processes on loopback: a client, and the processes of the workers."""
    distributed = pytest.importorskip("distributed")
    file = str(tmp_path / "scheduler.json")
    commands = [[*SCHEDULER.split(), file], *([[*WORKER.split(), str(tmp_path), "--scheduler-file", file]] * 2)]
    with contextlib.ExitStack() as stack:
        started = []
        for command in commands:
            process = subprocess.Popen([sys.executable, "-m", *command], stderr=subprocess.DEVNULL)
            stack.callback(process.wait)
            stack.callback(process.kill)
            started.append(process)
        client = stack.enter_context(distributed.Client(scheduler_file=file, timeout=60))
        client.wait_for_workers(2, timeout=60)
        yield client, started[1:]


@pytest.fixture
def prepared(small_vit, small_images):
    return ptq.prepare_fx(small_vit, QUICK, small_images[:1])


def test_dask_finds_the_same_bits_though_a_worker_is_killed(prepared, small_images, cluster, tmp_path):
    client, workers = cluster
    here = ptq.calibrate(prepared, small_images, progress=False)
    checkpoint = tmp_path / "scales.safetensors"

    def kill(moment: Any) -> None:
        if moment.phase == "search and round" and moment.done:
            workers[0].kill()

    arguments: dict[str, Any] = {"executor": client.get_executor(), "groups": 6, "checkpoint": checkpoint}
    found = ptq.calibrate(prepared, small_images, progress=kill, **arguments)
    assert found.fingerprint() == here.fingerprint() == ptq.Calibration.load(checkpoint).fingerprint()
    assert workers[0].wait(60) != 0
    assert len(client.nthreads()) == 1
    again = ptq.calibrate(prepared, small_images, progress=False, executor=client.get_executor())
    assert again.fingerprint() == here.fingerprint()


def test_the_command_line_calibrates_on_a_cluster(cluster, tmp_path, monkeypatch):
    client, _ = cluster
    monkeypatch.chdir(tmp_path)
    pixels = torch.randint(0, 256, (20, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    np.savez("images.npz", images=pixels.numpy())
    sizes: dict[str, Any] = {"img_size": 32, "depth": 2, "num_classes": 3}
    save_file(timm.create_model("deit_tiny_patch16_224", **sizes).state_dict(), "weights.safetensors")
    arguments = " ".join(f"--model-arg {name}={value}" for name, value in sizes.items())
    line = f"quantize deit_tiny_patch16_224 --weights weights.safetensors {arguments} --data images.npz --images 8"
    address = client.scheduler_info()["address"]
    for number, where in enumerate(("", f" --scheduler {address}")):
        done = CliRunner().invoke(
            app, f"{line} --no-bench --checkpoint {number}.safetensors --out m.onnx{where}".split()
        )
        assert done.exit_code == 0, done.output
    here, there = (ptq.Calibration.load(f"{number}.safetensors") for number in range(2))
    assert here.fingerprint() == there.fingerprint()
    np.savez("labelled.npz", images=pixels.numpy(), labels=np.arange(20) % 3)
    counted = "eval m.onnx --data labelled.npz --batch-size 1 --json"
    scores = [CliRunner().invoke(app, f"{counted}{where}".split()).stdout for where in ("", f" --scheduler {address}")]
    assert json.loads(scores[0])["images"] == 20
    assert scores[0] == scores[1]
    refused = CliRunner().invoke(app, f"{line} --out n.onnx --scheduler nonsense://1".split())
    assert refused.exit_code == 1
    assert "--scheduler nonsense://1: expected a Dask scheduler at tcp://HOST:PORT" in refused.output


#: What each process of MPI runs; all but the first one are workers, which only import it.
BOTH = """
import timm, torch
from mpi4py.futures import MPIPoolExecutor
import ptq4vit_fx as ptq

if __name__ == "__main__":
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3).eval()
    images, found = torch.randn(16, 3, 32, 32), []
    with MPIPoolExecutor() as pool:
        print(pool.num_workers, "workers")
        for arguments in ({}, {"executor": pool, "groups": 4}):
            prepared = ptq.prepare_fx(model, ptq.recipes.best(4, 8).with_search(n=4, rounds=1), images[:1])
            found.append(ptq.calibrate(prepared, images, progress=False, **arguments).fingerprint())
    print("the same bits" if found[0] == found[1] else "other bits")
"""


def test_mpi_finds_the_same_bits(tmp_path):
    pytest.importorskip("mpi4py")
    mpiexec = Path(sys.executable).with_name("mpiexec")
    if not mpiexec.exists():
        pytest.skip("no mpiexec beside this Python: the package mpich brings one")
    (tmp_path / "both.py").write_text(BOTH)
    command = [str(mpiexec), "-n", "3", sys.executable, "-m", "mpi4py.futures", "both.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.splitlines() == ["2 workers", "the same bits"], done.stderr
