"""`--scheduler`: the workers of a Dask cluster, as the executor that calibration and `eval` take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ptq4vit_fx.errors import failure, foreign, reason_of

#: Seconds within which a scheduler answers, and has a worker.
PATIENCE = 30
#: Groups of products per worker: with one, the slowest decides how long all take; each costs a pass over the images.
PER_WORKER = 2


@contextmanager
def workers_at(address: str | None, operation: str = "quantize") -> Iterator[dict[str, Any]]:
    """Give the arguments of `calibrate` that say where its work is done; none without an address.

    address: of a Dask scheduler, `tcp://HOST:PORT`. Raises PTQError where `distributed` is not installed, and where no
    scheduler answers, or has no worker, within PATIENCE seconds.
    """
    if address is None:
        yield {}
        return
    try:
        import distributed
    except ImportError as error:
        do = "pip install ptq4vit-fx[distributed]"
        raise failure(operation, "--scheduler", expected="the package distributed", got=str(error), do=do) from error
    expected, do = "a Dask scheduler at tcp://HOST:PORT", "start one with `dask scheduler`"
    with foreign(operation, f"--scheduler {address}", expected=expected, do=do):
        client = distributed.Client(address, timeout=PATIENCE)
    with client:
        try:
            client.wait_for_workers(1, timeout=PATIENCE)
        except TimeoutError as error:
            expected, do = "workers", f"start them with `dask worker {address}`"
            subject = f"--scheduler {address}"
            raise failure(operation, subject, expected=expected, got=reason_of(error), do=do) from error
        yield {"executor": client.get_executor(), "groups": PER_WORKER * len(client.nthreads())}
