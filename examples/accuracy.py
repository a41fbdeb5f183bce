"""Top-1 of a trained model in float, simulated and in ONNX Runtime, as one row of the table in README.

    python examples/accuracy.py deit_tiny_p8_64 --fixtures ../shared/fixtures --bits 8

Before the row it proves the file on the first 1,000 images: same class as the simulation on 99.8 % of them, and a top-1
within 0.1 points. Only the proof: `--images 0`.

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
from ptq4vit_fx.export.proof.comparison import Comparison
from ptq4vit_fx.export.proof.runtime import open_session

BATCH = 25
#: What the exported file promises against its simulation: share of images with the same top-1, top-1 in points.
AGREEMENT, POINTS = 0.998, 0.1


@torch.inference_mode()
def classify(model: Callable[[Tensor], Tensor], images: Tensor, what: str) -> Tensor:
    """Return the top-1 class of each image, (images,) int64, with a progress bar."""
    batches = track(images.split(BATCH), what)
    return torch.cat([model(batch).argmax(1) for batch in batches])


def run_session(session: InferenceSession, batch: Tensor) -> Tensor:
    """Return the logits of the exported file."""
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: batch.numpy()})[0])


def parse_arguments() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--fixtures", type=Path, required=True)
    parser.add_argument("--recipe", choices=["best", "ptq4vit", "base_ptq"], default="ptq4vit")
    parser.add_argument("--bits", type=int, default=8, help="of weights and activations")
    parser.add_argument("--images", type=int, default=5000, help="validation images")
    parser.add_argument("--simulated", type=int, help="validation images for the simulation (default: all)")
    parser.add_argument("--first", type=int, default=0, help="number of the first of the 32 calibration images")
    parser.add_argument("--weights", choices=["channel", "group"], default="channel", help="not of base_ptq")
    parser.add_argument("--loss", help="default: the recipe's")
    parser.add_argument("--metric", help="of the search (default: the recipe's)")
    parser.add_argument("--verified", type=int, default=1000, help="images of the proof, 0 for none")
    parser.add_argument("--onnx", type=Path, help="where to keep the ONNX file")
    return parser.parse_args()


def prove(report: ptq.VerifyReport, labels: Tensor) -> bool:
    """Print agreement and top-1 difference of the file against the simulation; return whether they are as promised.

    The promise is for the simulation with the runtime's LayerNorm, softmax and GELU, which is what the file is to
    compute. With PyTorch's, which differ in the last bit, quantizers make whole steps of it: printed, not promised.
    """
    agreement, points = _against(report.same_functions, labels)
    holds = agreement >= AGREEMENT and abs(points) <= POINTS
    print(
        f"proof on {report.images} images, file against simulation: top-1 agreement {agreement:.2%} (promised: at "
        f"least {AGREEMENT:.1%}), top-1 difference {points:+.2f} points (promised: within {POINTS}): "
        f"{'holds' if holds else 'DOES NOT HOLD'}"
    )
    agreement, points = _against(report.simulation, labels)
    print(f"  with PyTorch's LayerNorm, softmax and GELU: agreement {agreement:.2%}, difference {points:+.2f} points")
    return holds


def _against(comparison: Comparison, labels: Tensor) -> tuple[float, float]:
    """Return the agreement, and the top-1 of the file minus that of the simulation in points."""
    won = sum(int(item.actual == labels[item.image]) for item in comparison.disagreements)
    lost = sum(int(item.simulated == labels[item.image]) for item in comparison.disagreements)
    return comparison.agreement, 100 * (won - lost) / comparison.images


def main() -> None:
    """Quantize, verify, classify, print one Markdown row; exit code 1 if the proof fails."""
    arguments = parse_arguments()
    sys.path.insert(0, str(arguments.fixtures))
    import fixtures

    model, size = fixtures.load_model(arguments.model)
    calibration_images = fixtures.load_images("calib", 32, size, arguments.first)[0]
    own = () if arguments.recipe == "base_ptq" else (arguments.weights,)
    mapping = getattr(ptq.recipes, arguments.recipe)(arguments.bits, arguments.bits, *own)
    if arguments.metric:
        mapping = mapping.with_search(metric=arguments.metric)
    converted = ptq.quantize(model, calibration_images, qconfig_mapping=mapping, loss=arguments.loss)
    agreement, proven = "", True
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.onnx or Path(folder) / "model.onnx"
        exported = ptq.export_onnx(converted, path, calibration_images[:1])
        if arguments.verified:
            images, labels = fixtures.load_images("val", arguments.verified, size)
            report = ptq.verify_onnx(path, converted, list(images.split(BATCH)))
            print(report)
            proven = prove(report, labels)
            agreement = f"{report.same_functions.agreement:.2%} ({report.simulation.agreement:.2%})"
        session = open_session(path, exact=True)
    networks = {"float": model, "simulated": converted, "ONNX Runtime": partial(run_session, session)}
    scores = score(networks, arguments, partial(fixtures.load_images, "val"), size)
    settings = (arguments.weights, arguments.loss, arguments.metric, f"images from {arguments.first}")
    defaults = ("channel", None, None, "images from 0")
    variant = "".join(f", {mine}" for mine, usual in zip(settings, defaults, strict=True) if mine != usual)
    print("| model | recipe | bits | " + " | ".join(networks) + " | agreement | MB | calibration |")
    print("|---|---|---|---|---|---|---|---|---|")
    print(
        f"| {arguments.model} | {arguments.recipe}{variant} | W{arguments.bits}A{arguments.bits} "
        f"| {' | '.join(scores)} | {agreement} "
        f"| {exported.bytes / 1e6:.1f} | {converted.calibration.provenance['seconds']:.0f} s |"
    )
    if not proven:
        raise SystemExit(1)


def score(
    networks: dict[str, Callable[[Tensor], Tensor]],
    arguments: argparse.Namespace,
    load: Callable[[int, int, int], tuple[Tensor, Tensor]],
    size: int,
) -> list[str]:
    """Return each network's top-1 with its number of images, "" without; load: count, size, first -> images, labels."""
    limits = dict.fromkeys(networks, arguments.images)
    if arguments.simulated is not None:
        limits |= {"float": arguments.simulated, "simulated": arguments.simulated}
    hits, seen = dict.fromkeys(networks, 0), dict.fromkeys(networks, 0)
    for start in range(0, arguments.images, 1000):  # a thousand images at a time bound the memory
        images, labels = load(min(1000, arguments.images - start), size, start)
        for name, network in networks.items():
            if count := max(0, min(len(images), limits[name] - start)):
                found = classify(network, images[:count], f"{name} from image {start}")
                hits[name] += int((found == labels[:count]).sum())
                seen[name] += count
    return [f"{hits[name] / seen[name]:.2%} of {seen[name]}" if seen[name] else "" for name in networks]


if __name__ == "__main__":
    main()
