"""`--device`: a device of torch by name, or the best one that there is."""

from __future__ import annotations

import torch

from ptq4vit_fx.errors import failure

AUTO = "auto"


def check_device(name: str) -> str:
    """Return the name of the device that calibration runs on: of `auto` that of the GPU, or `cpu` without one.

    Raises PTQError on what is no device, or none that is here.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == AUTO:
        return "cuda" if gpus else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        expected, do = "cpu, cuda, cuda:0 or auto", "choose one"
        raise failure("quantize", "--device", expected=expected, got=f"{name!r}", do=do) from error
    here = ["cpu", *(f"cuda:{number}" for number in range(gpus))]
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and (device.index or 0) >= gpus):
        found = ", ".join(here)
        raise failure("quantize", "--device", expected=f"one of {found}", got=repr(name), do="choose one, or auto")
    return str(device)
