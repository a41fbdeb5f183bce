"""What a model takes against how good it is: plans of one form, and those that `tune` finds, as tables and a picture.

    python examples/draw_frontiers.py deit_tiny_p8_64 bits.png --fixtures ../shared/fixtures --kl 0.004
    python examples/draw_frontiers.py deit_tiny_p8_64 time.png --fixtures ../shared/fixtures --minimize time --kl 0.001

32 images of `calib` for the scales, the next ones to choose on, as many of `val` that nothing was chosen on to see
whether the budget holds there too. The fixtures folder is described in accuracy.py.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

import ptq4vit_fx as ptq
from ptq4vit_fx.inputs.batches import batches_for
from ptq4vit_fx.tuning.measuring import Measuring, divergence

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
CALIBRATION_IMAGES = 32


@app.command(help=__doc__)
def main(
    model: str,
    picture: Annotated[Path, typer.Argument(help="to write, PNG")],
    fixtures: Annotated[Path, typer.Option(help="folder with trained models and images")],
    kl: Annotated[float, typer.Option(help="the budget, in nats")],
    minimize: Annotated[str, typer.Option(help="average bits, time, size or multiplications")] = "average bits",
    images: Annotated[int, typer.Option(help="to choose on, and of `val`")] = 96,
    batch: Annotated[int, typer.Option(help="images at a time, of the timings")] = 8,
) -> None:
    """Print the table and the figures on `val`, and draw."""
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(fixtures))
    import fixtures as source

    network, size = source.load_model(model)
    calibration = source.load_images("calib", CALIBRATION_IMAGES, size)[0]
    held_out: Any = source.load_images("calib", images, size, CALIBRATION_IMAGES)[0]
    prepared = ptq.prepare_fx(network, ptq.recipes.best(), calibration[:1])
    tuned = ptq.tune(prepared, calibration, held_out=held_out, kl=kl, minimize=minimize, batch=batch)
    print(tuned.report())
    tuned.draw(picture)
    unseen = batches_for(tuned.prepared, source.load_images("val", images, size)[0], "tune")
    measuring = Measuring.of(tuned.prepared, tuned.calibration, unseen)
    against = measuring.whole({op.name: tuned.calibration for op in tuned.plan.ops})
    print(f"on {images} images of `val`: {against.headline()}, KL {divergence(against):.3g}")


if __name__ == "__main__":
    app()
