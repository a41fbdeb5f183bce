"""Top-1 of a trained model in float, simulated and in ONNX Runtime, as one row of the table in README.

    python examples/accuracy.py deit_tiny_p8_64 --fixtures ../shared/fixtures --bits 8

The fixtures folder holds trained models and labelled images behind `load_model(name)` and
`load_images(split, count, size)`; replace those two calls to measure a model of your own.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor, nn

import ptq4vit_fx as ptq

BATCH = 25


@torch.inference_mode()
def classify(model: nn.Module, images: Tensor, what: str) -> Tensor:
    """Return the top-1 class of each image, (images,) int64, with a progress bar."""
    batches = track(images.split(BATCH), what)
    return torch.cat([model(batch).argmax(1) for batch in batches])


def main() -> None:
    """Quantize, classify, verify, print one Markdown row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--fixtures", type=Path, required=True)
    parser.add_argument("--recipe", choices=["ptq4vit", "base_ptq"], default="ptq4vit")
    parser.add_argument("--bits", type=int, default=8, help="of weights and activations")
    parser.add_argument("--images", type=int, default=5000, help="validation images")
    parser.add_argument("--verified", type=int, default=500, help="images on which ONNX Runtime is compared")
    parser.add_argument("--onnx", type=Path, help="where to keep the ONNX file")
    arguments = parser.parse_args()
    sys.path.insert(0, str(arguments.fixtures))
    import fixtures

    model, size = fixtures.load_model(arguments.model)
    calibration_images = fixtures.load_images("calib", 32, size)[0]
    mapping = getattr(ptq.recipes, arguments.recipe)(arguments.bits, arguments.bits)
    converted = ptq.quantize(model, calibration_images, qconfig_mapping=mapping)
    hits = {"float": 0, "simulated": 0}
    started = time.perf_counter()
    for start in range(0, arguments.images, 1000):  # a thousand images at a time bound the memory
        images, labels = fixtures.load_images("val", min(1000, arguments.images - start), size, start)
        for name, network in (("float", model), ("simulated", converted)):
            hits[name] += int((classify(network, images, f"{name} from image {start}") == labels).sum())
    seconds = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.onnx or Path(folder) / "model.onnx"
        exported = ptq.export_onnx(converted, path, calibration_images[:1])
        images = fixtures.load_images("val", arguments.verified, size)[0]
        report = ptq.verify_onnx(path, converted, list(images.split(BATCH)))
    print(report)
    top1 = {name: count / arguments.images for name, count in hits.items()}
    print(f"{arguments.images} images, {seconds:.0f} s")
    print("| model | recipe | bits | float | simulated | ONNX Runtime agrees | MB | calibration |")
    print("|---|---|---|---|---|---|---|---|")
    print(
        f"| {arguments.model} | {arguments.recipe} | W{arguments.bits}A{arguments.bits} | {top1['float']:.2%} "
        f"| {top1['simulated']:.2%} | {report.same_functions.agreement:.2%} ({report.simulation.agreement:.2%}) "
        f"| {exported.bytes / 1e6:.1f} | {converted.calibration.provenance['seconds']:.0f} s |"
    )


if __name__ == "__main__":
    main()
