"""Top-1 of a trained model in float, simulated and in ONNX Runtime, as one row of the table in README.

    python examples/accuracy.py deit_tiny_p8_64 --fixtures ../shared/fixtures --bits 8

The fixtures folder holds trained models and labelled images behind `load_model(name)` and
`load_images(split, count, size)`; replace those two calls to measure a model of your own.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from onnxruntime import InferenceSession
from rich.progress import track
from torch import Tensor

import ptq4vit_fx as ptq
from ptq4vit_fx.export.runtime import open_session
from ptq4vit_fx.losses import DEFAULT_LOSS

BATCH = 25


@torch.inference_mode()
def classify(model: Callable[[Tensor], Tensor], images: Tensor, what: str) -> Tensor:
    """Return the top-1 class of each image, (images,) int64, with a progress bar."""
    batches = track(images.split(BATCH), what)
    return torch.cat([model(batch).argmax(1) for batch in batches])


def run_session(session: InferenceSession, batch: Tensor) -> Tensor:
    """Return the logits of the exported file."""
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: batch.numpy()})[0])


def main() -> None:
    """Quantize, classify, verify, print one Markdown row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--fixtures", type=Path, required=True)
    parser.add_argument("--recipe", choices=["ptq4vit", "base_ptq"], default="ptq4vit")
    parser.add_argument("--bits", type=int, default=8, help="of weights and activations")
    parser.add_argument("--images", type=int, default=5000, help="validation images")
    parser.add_argument("--simulated", type=int, help="validation images for the simulation (default: all)")
    parser.add_argument("--first", type=int, default=0, help="number of the first of the 32 calibration images")
    parser.add_argument("--weights", choices=["channel", "group"], default="channel", help="of the recipe ptq4vit")
    parser.add_argument("--loss", default=DEFAULT_LOSS)
    parser.add_argument("--metric", help="of the search (default: the recipe's)")
    parser.add_argument("--verified", type=int, default=500, help="images on which ONNX Runtime is compared")
    parser.add_argument("--onnx", type=Path, help="where to keep the ONNX file")
    arguments = parser.parse_args()
    sys.path.insert(0, str(arguments.fixtures))
    import fixtures

    model, size = fixtures.load_model(arguments.model)
    calibration_images = fixtures.load_images("calib", 32, size, arguments.first)[0]
    if arguments.recipe == "ptq4vit":
        mapping = ptq.recipes.ptq4vit(arguments.bits, arguments.bits, arguments.weights)
    else:
        mapping = ptq.recipes.base_ptq(arguments.bits, arguments.bits)
    if arguments.metric:
        mapping = mapping.with_search(metric=arguments.metric)
    converted = ptq.quantize(model, calibration_images, qconfig_mapping=mapping, loss=arguments.loss)
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.onnx or Path(folder) / "model.onnx"
        exported = ptq.export_onnx(converted, path, calibration_images[:1])
        if arguments.verified:
            images = fixtures.load_images("val", arguments.verified, size)[0]
            report = ptq.verify_onnx(path, converted, list(images.split(BATCH)))
            print(report)
        session = open_session(path, exact=True)
    limit = arguments.images if arguments.simulated is None else arguments.simulated
    networks = {
        "float": (model, limit),
        "simulated": (converted, limit),
        "ONNX Runtime": (partial(run_session, session), arguments.images),
    }
    hits, seen = dict.fromkeys(networks, 0), dict.fromkeys(networks, 0)
    for start in range(0, arguments.images, 1000):  # a thousand images at a time bound the memory
        images, labels = fixtures.load_images("val", min(1000, arguments.images - start), size, start)
        for name, (network, images_of) in networks.items():
            if count := max(0, min(len(images), images_of - start)):
                found = classify(network, images[:count], f"{name} from image {start}")
                hits[name] += int((found == labels[:count]).sum())
                seen[name] += count
    agreement = ""
    if arguments.verified:
        agreement = f"{report.same_functions.agreement:.2%} ({report.simulation.agreement:.2%})"
    settings = (arguments.weights, arguments.loss, arguments.metric, f"images from {arguments.first}")
    defaults = ("channel", DEFAULT_LOSS, None, "images from 0")
    variant = "".join(f", {mine}" for mine, usual in zip(settings, defaults, strict=True) if mine != usual)
    print("| model | recipe | bits | " + " | ".join(networks) + " | agreement | MB | calibration |")
    print("|---|---|---|---|---|---|---|---|---|")
    scores = [f"{hits[name] / seen[name]:.2%} of {seen[name]}" if seen[name] else "" for name in networks]
    print(
        f"| {arguments.model} | {arguments.recipe}{variant} | W{arguments.bits}A{arguments.bits} "
        f"| {' | '.join(scores)} | {agreement} "
        f"| {exported.bytes / 1e6:.1f} | {converted.calibration.provenance['seconds']:.0f} s |"
    )


if __name__ == "__main__":
    main()
