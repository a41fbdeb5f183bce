"""The loader of calibration files: damaged files, and whole ones that say something else."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from hypothesis import strategies as st
from safetensors import safe_open

import ptq4vit_fx as ptq
from fuzz.models import calibrated, prepared
from fuzz.mutations import changed_bytes, changed_json
from fuzz.target import Target
from ptq4vit_fx.inputs.sealed_tensors import sealed

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
SCALES = (-1.0, 0.0, 1e-45, 1e-39, 1e-30, 0.1, 1.0, 1e30, 1e38, float("nan"), float("inf"))


def written() -> tuple[bytes, dict[str, torch.Tensor], dict[str, str]]:
    """Return the bytes of a good file, its tensors and its texts without the digest."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scales.safetensors"
        calibrated().save(path)
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
            texts = dict(file.metadata())
        del texts["digest"]
        return path.read_bytes(), tensors, texts


@st.composite
def resealed(draw: st.DrawFn, tensors: dict[str, torch.Tensor], texts: dict[str, str]) -> bytes:
    """Draw a file with the right digest of a changed tensor, plan or record."""
    tensors, texts = dict(tensors), dict(texts)
    what = draw(st.sampled_from(("tensor", "plan", "record", "record", "texts")))
    if what == "tensor":
        name = draw(st.sampled_from(sorted(tensors)))
        shape = draw(st.sampled_from((tuple(tensors[name].shape), (), (0,), (2,), (1, 1))))
        scale = torch.full(shape, draw(st.sampled_from(SCALES))).to(draw(st.sampled_from(DTYPES)))
        tensors.pop(name) if draw(st.booleans()) else None
        tensors[draw(st.sampled_from(sorted(tensors)) | st.just(name) | st.text(max_size=9))] = scale
    elif what == "texts":
        texts[draw(st.sampled_from(sorted(texts)))] = draw(st.text(alphabet=st.characters(codec="utf-8")))
    else:
        texts[what] = json.dumps(draw(changed_json(json.loads(texts[what]))))
    return sealed(tensors, texts)


def calibration_loader() -> Target:
    """Return a saved calibration with bytes changed, or values changed and the digest made anew."""
    whole, tensors, texts = written()
    folder = tempfile.TemporaryDirectory()

    def read(data: bytes) -> None:
        path = Path(folder.name) / "scales.safetensors"
        path.write_bytes(data)
        calibration = ptq.Calibration.load(path)
        assert calibration.report()
        calibration.save(path)
        assert ptq.Calibration.load(path).fingerprint() == calibration.fingerprint()
        ptq.load_calibration(prepared(), calibration)

    inputs = changed_bytes(whole) | resealed(tensors, texts) | st.binary(max_size=200)
    return Target("calibration", "`Calibration.load`, `save`, `load_calibration`", inputs, read)
