"""Files: images of every format that is read, ONNX files with their metadata, checkpoints."""

from __future__ import annotations

import io
import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import timm.data
import torch
from hostile.records import PREPROCESSING
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from safetensors.torch import save
from torch import nn

import ptq4vit_fx as ptq
from fuzz.models import IMAGES, prepared
from fuzz.mutations import changed_bytes
from fuzz.target import Target
from ptq4vit_fx.data.reading import read_images
from ptq4vit_fx.export.metadata import PROVENANCE_KEY
from ptq4vit_fx.export.proof.inspection import inspect_file
from ptq4vit_fx.export.scales import read_scales
from ptq4vit_fx.tools.checkpoints import load_weights
from ptq4vit_fx.tools.evaluation import evaluate_file
from ptq4vit_fx.tools.phases import Phases
from ptq4vit_fx.tools.shards import Question

TRANSFORM = timm.data.create_transform((3, 16, 16))
FORMATS = ("PNG", "JPEG", "PPM", "TIFF", "BMP", "WEBP", "GIF")


def from_file(read: Callable[[Path], object], name: str) -> Callable[[bytes], None]:
    """Return a reader of bytes that writes them to a file of that name first."""
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / name

    def read_bytes(content: bytes, _keep: Any = folder) -> None:
        path.write_bytes(content)
        read(path)

    return read_bytes


def picture(kind: str) -> bytes:
    stream = io.BytesIO()
    Image.linear_gradient("L").resize((20, 30)).convert("RGB").save(stream, kind)
    return stream.getvalue()


def read_picture(path: Path) -> None:
    """Read an image; one that is skipped is refused."""
    skipped: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own, of a file that it reads all the same
        list(read_images([path], TRANSFORM, skipped))
    if skipped:
        assert skipped[0].isprintable()
        raise ptq.PTQError(skipped[0])


def image_reader() -> Target:
    """Return the reader of a folder's images, on images of every format with bytes changed, and other bytes."""
    wholes = [picture(kind) for kind in FORMATS]
    inputs = st.one_of(*map(changed_bytes, wholes), st.binary(max_size=200))
    return Target("images", "images, `data/image_files.py`", inputs, from_file(read_picture, "a.png"))


def read_onnx(path: Path, images: Path) -> None:
    """Read a file in every way; it is refused if one of them refuses it."""
    refused: list[ptq.PTQError] = []
    readers: tuple[Callable[[], object], ...] = (
        lambda: str(inspect_file(path)).isprintable() and inspect_file(path).to_json(),
        lambda: read_scales(path),
        lambda: evaluate_file(Question(path, images), Phases(Console(quiet=True))),
    )
    for read in readers:
        try:
            read()
        except ptq.PTQError as error:
            refused.append(error)
    if refused:
        raise refused[0]


def onnx_reader() -> Target:
    """Return inspect, eval and read_scales, on a file of a model of one block with bytes changed."""
    made = tempfile.TemporaryDirectory()
    folder = Path(made.name)
    ptq.export_onnx(ptq.convert_fx(prepared()), folder / "good.onnx", IMAGES[:1])
    model = onnx.load(folder / "good.onnx")
    for entry in model.metadata_props:
        if entry.key == PROVENANCE_KEY:
            entry.value = json.dumps({"preprocessing": PREPROCESSING})
    whole = model.SerializeToString()
    for label in range(5):
        (folder / "images" / str(label)).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(folder / "images" / str(label) / "a.png")
    read = from_file(lambda path: read_onnx(path, Path(made.name) / "images"), "a.onnx")
    return Target("onnx", "ONNX files: inspect, eval, `read_scales`", changed_bytes(whole) | st.binary(), read)


def checkpoint_reader() -> Target:
    """Return the reader of weights, on checkpoints of both formats with bytes changed."""
    network = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    stream = io.BytesIO()
    torch.save({"state_dict": network.state_dict(), "epoch": 3}, stream)
    inputs = changed_bytes(stream.getvalue()) | changed_bytes(save(network.state_dict())) | st.binary(max_size=200)

    def read(path: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, of pickles
            load_weights(network, path)

    return Target("checkpoints", "`.pth` and safetensors weights", inputs, from_file(read, "a.pth"))
