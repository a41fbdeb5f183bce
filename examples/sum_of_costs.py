"""Whether the costs of single products add up to that of the whole model, and whether the search predicts their order.

    python examples/sum_of_costs.py
    python examples/sum_of_costs.py --family swin --family mobilevit --form w4a4
    python examples/sum_of_costs.py --fixtures ../shared/fixtures --model vit_s14

Of each family (random weights and images), or of a model of the fixtures folder (described in accuracy.py): every
product alone and all together, the divergence of the output in nats on images that calibration has not seen, and the
rank correlation of the single ones with the distances of the search. Random networks amplify errors, trained ones damp
them: a sum below the whole is what several errors do to each other.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

import ptq4vit_fx as ptq
from ptq4vit_fx.tools.families import FAMILIES
from ptq4vit_fx.tuning.forms import form_of
from ptq4vit_fx.tuning.measuring import divergence
from ptq4vit_fx.tuning.study import split_images, study

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
#: Of a random model: it is as small as its family allows.
IMAGES = 32
#: One family of each kind, as the tests of coverage take them.
QUICK = (
    *("vit", "vit_relpos", "deit_distilled", "swin", "cait", "convit", "eva02", "visformer", "pit", "naflexvit"),
    *("mobilevitv2", "efficientformer", "torchvision_vit", "hf_beit"),
)
HEADER = """\
| model | products | form | KL of the whole | sum of the products | sum / whole | off by 30 % | rank correlation |
|---|---|---|---|---|---|---|---|"""
#: A sum within this of the whole tells what the whole will be.
NEAR = 0.3
#: Forward passes that measuring may take.
EVERYTHING = 1e6


def rows(name: str, network: nn.Module, images: Tensor, forms: list[str]) -> list[str]:
    """Return a row of the table for each form; images: half of them, at most 32, are calibrated on."""
    prepared = ptq.prepare_fx(network, ptq.recipes.best(), images[:1])
    known = study(
        prepared,
        split_images(prepared, images, None, None, "sum_of_costs"),
        tuple(map(form_of, forms)),
        passes=EVERYTHING,
        progress=False,
    )
    known.measure_all()
    found = []
    for form in known.found:
        own = {product: known.candidates.as_form(product, form) for product in known.candidates.pairs}
        whole = divergence(known.few.whole({product: known.found[one] for product, one in own.items()}))
        total = sum(known.sensitivity.of(product, one) for product, one in own.items())
        ratio = total / whole if whole else 1.0
        far = "" if abs(ratio - 1) <= NEAR else "yes"
        found.append(f"| {name} | {len(own)} | {form.name} | {whole:.3g} | {total:.3g} | {ratio:.2f} | {far} |")
    correlation = known.sensitivity.correlation
    return [f"{row} {'' if correlation is None else f'{correlation:.2f}'} |" for row in found]


@app.command(help=__doc__)
def main(
    family: Annotated[list[str] | None, typer.Option(help="name in docs/coverage.md, repeatable")] = None,
    form: Annotated[list[str], typer.Option(help="of every product, repeatable")] = ["w8a8", "w4a8", "w4a4"],  # noqa: B006
    fixtures: Annotated[Path | None, typer.Option(help="trained models and images")] = None,
    model: Annotated[str, typer.Option(help="of the fixtures")] = "deit_tiny_p8_64",
) -> None:
    """Print one Markdown row per model and form."""
    warnings.simplefilter("ignore")
    print(HEADER)
    if fixtures is not None:
        sys.path.insert(0, str(fixtures))
        import fixtures as source

        network, size = source.load_model(model)
        print("\n".join(rows(model, network, source.load_images("calib", 2 * IMAGES, size)[0], form)), flush=True)
        return
    for one in (own for own in FAMILIES if own.name in (family or QUICK)):
        torch.manual_seed(0)
        images = torch.randn(2 * IMAGES, 3, one.image, one.image)
        print("\n".join(rows(one.name, one.create(), images, form)), flush=True)


if __name__ == "__main__":
    app()
