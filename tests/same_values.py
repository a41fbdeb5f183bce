"""Whether two versions of this project calibrate and compute the same bits.

Run it on each version and compare what they wrote:

    python tests/same_values.py record --fixtures FOLDER before.json     # in the old checkout
    python tests/same_values.py record --fixtures FOLDER after.json      # in the new one
    python tests/same_values.py compare before.json after.json

Per model it records the fingerprint of each calibration, and per exported file a hash of the outputs that ONNX Runtime
computes from it: other names or another order of nodes are no difference, another bit of a result is. Only the public
API is used, so that the same script runs in both.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import json
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import nn

import ptq4vit_fx as ptq

TRAINED = ("deit_tiny_p8_64", "swin_micro_64", "vit_s14")
RECIPES: dict[str, Any] = {
    "W8A8": lambda: ptq.recipes.ptq4vit(8, 8),
    "W4A4": lambda: ptq.recipes.ptq4vit(4, 4),
    "W8A8 uniform": lambda: ptq.recipes.ptq4vit(8, 8, twins="uniform"),
    "W6A6 wide, group": lambda: ptq.recipes.ptq4vit(6, 6, weights="group", twins="wide"),
    "base W8A8": lambda: ptq.recipes.base_ptq(8, 8),
    "tensorrt": ptq.recipes.tensorrt,
}
#: Recipes per model: every one where a calibration takes seconds, the default alone on the largest.
CHOICES = {"vit_s14": ("W8A8",), "deit_tiny_p8_64": tuple(RECIPES), "swin_micro_64": ("W8A8", "W8A8 uniform")}
#: Targets and the other arguments of export_onnx; what a target refuses is recorded as its sentence.
FILES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("onnxruntime", {}),
    ("onnxruntime", {"batch": 1}),
    ("onnxruntime", {"opset": 17}),
    ("onnxruntime-avx2", {}),
    ("onnxruntime-arm", {}),
    ("openvino", {}),
    ("tensorrt", {}),
    ("generic", {"opset": 21}),
)


def models(fixtures: Path) -> Iterator[tuple[str, nn.Module, torch.Tensor, torch.Tensor]]:
    """Yield name, model, 32 calibration images and 8 others of each model."""
    new = importlib.util.find_spec("ptq4vit_fx.tools") is not None
    digits = importlib.import_module("ptq4vit_fx.tools.digits" if new else "ptq4vit_fx.digits")
    images = digits.load_digits_images("train")[0]
    yield "digits", digits.load_digits_model(), images[:32], images[32:40]
    sys.path.insert(0, str(fixtures))
    trained = importlib.import_module("fixtures")
    for name in TRAINED:
        model, size = trained.load_model(name)
        pixels = trained.load_images("calib", 40, size)[0]
        yield name, model, pixels[:32], pixels[32:]


def file_values(converted: Any, images: torch.Tensor, target: str, arguments: dict[str, Any]) -> str:
    """Return a hash of the file's outputs, or why it was not written."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        try:
            ptq.export_onnx(converted, path, images[:1], target=target, **arguments)
        except ptq.PTQError as error:
            return f"refused: {error}"
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    batch, name = arguments.get("batch", len(images)), session.get_inputs()[0].name
    digest = hashlib.sha256()
    for part in torch.split(images, batch):
        for output in session.run(None, {name: part.numpy()}):
            digest.update(output.tobytes())
    return digest.hexdigest()[:16]


def record(fixtures: Path, out: Path, only: list[str]) -> None:
    """Write the fingerprints and hashes of this version, of all models or of some."""
    found: dict[str, str] = {}
    for name, model, calibration, images in models(fixtures):
        if only and name not in only:
            continue
        for recipe in CHOICES.get(name, tuple(RECIPES)):
            prepared = ptq.prepare_fx(model, RECIPES[recipe](), calibration[:1])
            found[f"{name}, {recipe}"] = ptq.calibrate(prepared, calibration, progress=False).fingerprint()
            converted = ptq.convert_fx(prepared)
            with torch.inference_mode():
                simulated = hashlib.sha256(converted(images).numpy().tobytes()).hexdigest()[:16]
            found[f"{name}, {recipe}, simulated"] = simulated
            for target, arguments in FILES:
                key = f"{name}, {recipe}, {target} {arguments or ''}".strip()
                found[key] = file_values(converted, images, target, arguments)
                print(key, found[key], flush=True)
            out.write_text(json.dumps(found, indent=1))


def compare(before: Path, after: Path) -> int:
    """Print what differs; return the exit code."""
    old, new = (json.loads(path.read_text()) for path in (before, after))
    differing = [key for key in new if old.get(key) != new[key]]
    for key in differing:
        print(f"{key}: {old.get(key)} before, {new[key]} after")
    refused = sum(value.startswith("refused") for value in new.values())
    left_out = f", {len(old.keys() - new.keys())} of before were left out"
    print(f"{len(new)} values compared, {refused} of them refusals{left_out}: {len(differing)} differ")
    return 1 if differing or not new else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("--fixtures", type=Path, required=True, help="the folder with the trained models")
    recording.add_argument("--only", action="append", default=[], help="a model, repeatable")
    recording.add_argument("out", type=Path)
    comparing = commands.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.command == "compare":
        return compare(arguments.before, arguments.after)
    record(arguments.fixtures, arguments.out, arguments.only)
    return 0


if __name__ == "__main__":
    sys.exit(main())
