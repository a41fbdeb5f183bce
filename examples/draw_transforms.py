"""Draw what a rotation, balances and rounding change in one block of a trained model, for docs/transforms.md.

    python examples/draw_transforms.py vit_s14 --fixtures ../shared/fixtures --block 6 --out docs/transforms.png

Above: ranges of the channels that queries, keys and values are computed of, and of keys and values themselves, without
the steps and with them. Below: the distance of every product from its float output when its weight is rounded by the
Gram matrix, as a share of that when it is rounded to nearest. The fixtures folder is described in accuracy.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from simulate import Source, open_source
from torch import Tensor
from torch.fx import GraphModule

import ptq4vit_fx as ptq
from ptq4vit_fx.calibrating.capture import recording
from ptq4vit_fx.names import product_of
from ptq4vit_fx.passes.graph.contract import calibration_of
from ptq4vit_fx.pipeline import CONVERSION

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def shown(prepared: GraphModule, images: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Return what the product of that name was given and gave: (rows, inputs) and (rows, outputs)."""
    seen: list[Tensor] = []

    def record(_: str, lhs: Tensor, __: Tensor, ___: Tensor | None, out: Tensor) -> Tensor:
        seen.extend(x.detach().flatten(0, -2) for x in (lhs, out))
        return out

    with recording(prepared, {name}, record), torch.inference_mode():
        prepared(images)
    return seen[0], seen[1]


def calibrated(source: Source, mapping: ptq.QConfigMapping, key: str) -> GraphModule:
    """Return the calibrated model, balances applied and observers in place; scales are kept as ablation.py does."""
    images = source.calibration_images(0)
    prepared = ptq.prepare_fx(source.network, mapping, images[:1])
    ptq.calibrate(prepared, images, checkpoint=source.kept / f"{source.name}_{key}_32_0.safetensors")
    return CONVERSION.until("apply_balances").run(prepared)


def draw_ranges(axes: Axes, x: Tensor, title: str) -> None:
    """Draw the range of every column of x, without a thousandth of its values on each side."""
    low, high = x.quantile(0.001, 0), x.quantile(0.999, 0)
    width = high - low
    axes.vlines(torch.arange(len(low)), low, high, linewidth=0.6, color="tab:blue")
    axes.set_title(f"{title}\nwidest: {float(width.max() / width.median()):.1f} times the median")
    axes.set_xlabel("channel")


def draw_gains(axes: Axes, nearest: ptq.Calibration, gram: ptq.Calibration) -> None:
    """Draw the distance of every rounded product from its float output, over that of rounding to nearest."""
    ratios = sorted(gram.distances[key][1] / nearest.distances[key][1] for key in map(product_of, gram.codes))
    axes.bar(range(len(ratios)), ratios, color="tab:blue")
    axes.axhline(1.0, color="0.5", linewidth=0.8)
    axes.set_title("distance with weights rounded by the Gram matrix, over that of rounding to nearest")
    axes.set_xlabel("products, sorted")


@app.command(help=__doc__)
def main(
    model: str,
    fixtures: Annotated[Path, typer.Option(help="folder with trained models and images")],
    block: int = 6,
    bits: int = 4,
    scales: Annotated[Path, typer.Option(help="folder of finished scales")] = Path("out/scales"),
    out: Path = Path("out/transforms.png"),
) -> None:
    """Calibrate with and without, and write the picture."""
    source = open_source(model, fixtures, 0, scales)
    bits_of = f"W{bits}A{bits}"
    plain = ptq.recipes.ptq4vit(bits, bits)
    without = calibrated(source, plain, f"PTQ4ViT_{bits_of}")
    stepped = calibrated(source, ptq.recipes.best(bits, bits), f"best_{bits_of}")
    rounded = calibrated(source, plain.with_search(rounding="gram"), f"rounding_{bits_of}")
    figure = Figure(figsize=(12, 10), layout="constrained")
    FigureCanvasAgg(figure)
    places: dict[str, Axes] = figure.subplot_mosaic([["a", "b"], ["c", "d"], ["e", "e"]])
    name = f"blocks.{block}.attn.qkv"
    for graph, how, (left, right) in ((without, "as trained", "ab"), (stepped, "rotated and balanced", "cd")):
        given, gave = shown(graph, source.calibration_images(32, 8), name)
        draw_ranges(places[left], given, f"input of {name}, {how}")
        draw_ranges(places[right], gave[:, gave.shape[1] // 3 :], f"keys and values of {name}, {how}")
    pair = [calibration_of(graph) for graph in (without, rounded)]
    assert pair[0] is not None
    assert pair[1] is not None
    draw_gains(places["e"], pair[0], pair[1])
    figure.savefig(out, dpi=90)
    print(f"wrote {out}")


if __name__ == "__main__":
    app()
