"""`why`: the products that cost most, by operand, channel and token, and what leaving them float gives, measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from ptq4vit_fx.calibrating.capture import recording
from ptq4vit_fx.calibration import Calibration
from ptq4vit_fx.errors import failure, printable
from ptq4vit_fx.export.proof.against_float import AgainstFloat, Kind
from ptq4vit_fx.inputs.batches import batches_for
from ptq4vit_fx.names import OPERANDS, Operand, join, owner_of, site
from ptq4vit_fx.passes.graph.contract import calibration_of, plan_of
from ptq4vit_fx.passes.graph.exclusive import exclusive
from ptq4vit_fx.passes.graph.staged_model import model_at
from ptq4vit_fx.passes.graph.stages import Stage
from ptq4vit_fx.plan import QuantOp, QuantPlan
from ptq4vit_fx.torch_state import independent_of_caller
from ptq4vit_fx.tuning.measuring import PASS_IMAGES, Measuring, divergence

#: Products that are looked into, and images that these look at.
NAMED, LOOKED_AT = 5, 16
#: A channel or token this many times as large as the median one, or with this share of the noise, is worth its name.
FAR_OUT, MUCH = 8.0, 0.3
#: Attention whose largest probabilities are this large on average chooses one token: its scores must not change places.
ONE_HOT = 0.95


@dataclass(frozen=True)
class Outlier:
    """A channel (of the dimension that is summed over) or a token of an operand that stands out.

    times: its largest magnitude over that of the median one. noise: its share in the noise of the operand.
    """

    what: str
    number: int
    times: float
    noise: float

    def __str__(self) -> str:
        return f"{self.what} {self.number}: {self.times:.3g} times the median, {self.noise:.0%} of the noise"


@dataclass(frozen=True)
class Culprit:
    """A product that costs much. cost: divergence with it alone quantized; share: of the sum over all products.

    snr: of its output with the lhs, the rhs, or both quantized, in dB. outliers: operand -> what stands out there.
    one_hot: mean of the largest probabilities of the attention whose scores depend on it, None of any other product.
    """

    product: str
    cost: float
    share: float
    snr: dict[str, float]
    outliers: dict[str, tuple[Outlier, ...]]
    one_hot: float | None = None

    def lines(self) -> tuple[str, ...]:
        """Return what there is to say of it."""
        ratios = ", ".join(f"{name} {value:.1f}" for name, value in self.snr.items())
        found = [
            f"{self.product}: KL {self.cost:.3g} alone, {self.share:.0%} of the sum; SNR in dB by operand: {ratios}"
        ]
        found += [f"  {operand}, {outlier}" for operand, several in self.outliers.items() for outlier in several]
        if self.one_hot is not None and self.one_hot >= ONE_HOT:
            told = f"{self.one_hot:.1%} of the attention lies on one token"
            found.append(f"  softmax is one-hot, {told}: errors of its scores make it choose another")
        return tuple(found)


@dataclass(frozen=True)
class Suggestion:
    """What may help, and the model with it, measured on the same images."""

    products: tuple[str, ...]
    divergence: float
    score: float

    def __str__(self) -> str:
        flags = " ".join(f"--skip {name}" for name in self.products)
        return f"{flags}: KL {self.divergence:.3g}, agreement {self.score:.2%}"


@dataclass(frozen=True)
class Why:
    """Where a quantized model loses: the whole, the products that cost most, the largest first, and what would help."""

    against: AgainstFloat
    divergence: float
    culprits: tuple[Culprit, ...]
    suggestions: tuple[Suggestion, ...]
    costs: Mapping[str, float]

    def __str__(self) -> str:
        lines = [
            self.against.headline(),
            f"KL {self.divergence:.3g}, by the sum of the products {sum(self.costs.values()):.3g}",
        ]
        lines += [line for culprit in self.culprits for line in culprit.lines()]
        lines += ["left in float, measured:", *(f"  {suggestion}" for suggestion in self.suggestions)]
        return printable("\n".join(lines), keep="\n")

    def to_dict(self) -> dict[str, Any]:
        """Return every figure, JSON-ready."""
        return {
            "against": self.against.to_dict(),
            "divergence": self.divergence,
            "culprits": [asdict(culprit) for culprit in self.culprits],
            "suggestions": [asdict(suggestion) for suggestion in self.suggestions],
            "costs": dict(self.costs),
        }


@independent_of_caller()
def why(
    prepared: GraphModule, data: Any, *, kind: Kind | None = None, most: int = NAMED, images: int | None = None
) -> Why:
    """Return what makes a calibrated model worse than float, on images that calibration should not have seen.

    Every product is measured with itself alone quantized; the `most` that cost most are looked into, operand by
    operand, channel by channel, token by token; what leaving them in float gives is measured. Raises PTQError if the
    model is not calibrated.
    """
    prepared = model_at(Stage.OBSERVED, prepared, "why", "call prepare_fx and calibrate first")
    calibration = calibration_of(prepared)
    if calibration is None:
        do = "call calibrate(prepared, images) first"
        raise failure("why", "prepared model", expected="scales", got="a model that was not calibrated", do=do)
    measuring = Measuring.of(prepared, calibration, batches_for(prepared, data, "why", images=images), kind)
    names = [op.name for op in plan_of(prepared).ops]
    whole = dict.fromkeys(names, calibration)
    against = measuring.whole(whole)
    few = measuring.on_few(PASS_IMAGES)
    costs = {name: values[0] for name, values in few.alone({name: [calibration] for name in names})}
    worst = sorted(names, key=lambda name: (-costs[name], name))[:most]
    seen = _seen(measuring.on_few(LOOKED_AT), worst)
    total = sum(costs.values()) or 1.0
    culprits = tuple(_culprit(prepared, name, costs[name], costs[name] / total, seen, calibration) for name in worst)
    suggestions = []
    for products in dict.fromkeys((tuple(worst[:1]), tuple(worst[:3]))):
        left = measuring.whole({name: own for name, own in whole.items() if name not in products})
        suggestions.append(Suggestion(products, divergence(left), left.score))
    return Why(against, divergence(against), culprits, tuple(suggestions), costs)


#: What a product read and gave: lhs, rhs, bias, out.
Seen = tuple[Tensor, Tensor, Tensor | None, Tensor]


def _attention_behind(plan: QuantPlan, name: str) -> str | None:
    """Return the product of softmax and values whose scores a product computes, or what they are computed of."""
    order = [op.name for op in plan.ops]
    scores, attention = (join(owner_of(name), role) for role in ("matmul_qk", "matmul_av"))
    known = scores in order and attention in order
    return attention if known and order.index(name) <= order.index(scores) else None


def _seen(measuring: Measuring, names: Sequence[str]) -> dict[str, list[Seen]]:
    found: dict[str, list[Seen]] = {}

    def record(name: str, lhs: Tensor, rhs: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
        found.setdefault(name, []).append((lhs, rhs, bias, out))
        return out

    plan = plan_of(measuring.observed)
    wanted = {*names, *filter(None, (_attention_behind(plan, name) for name in names))}
    with recording(measuring.observed, wanted, record), torch.no_grad():
        for batch in measuring.batches:
            with exclusive():
                measuring.observed(*batch)
    return found


def _culprit(
    prepared: GraphModule,
    name: str,
    cost: float,
    share: float,
    seen: Mapping[str, list[Seen]],
    calibration: Calibration,
) -> Culprit:
    op = plan_of(prepared).op(name)
    attention = _attention_behind(plan_of(prepared), name)
    largest = [lhs.amax(-1).mean() for lhs, *_ in seen.get(attention or "", [])]
    one_hot = float(torch.stack(largest).mean()) if largest else None
    quantized = [_quantized(op, own, calibration) for own in seen[name]]
    snr = {}
    for label, chosen in (("lhs", (True, False)), ("rhs", (False, True)), ("both", (True, True))):
        signal = noise = 0.0
        for (lhs, rhs, bias, out), (left, right) in zip(seen[name], quantized, strict=True):
            made = op.compute(left if chosen[0] else lhs, right if chosen[1] else rhs, bias)
            signal, noise = signal + float(out.square().sum()), noise + float((made - out).square().sum())
        snr[label] = 10 * float(torch.log10(torch.tensor(signal / noise))) if noise and signal else float("inf")
    outliers = {operand: _outliers(op, operand, seen[name], quantized) for operand in OPERANDS}
    return Culprit(name, cost, share, snr, {operand: own for operand, own in outliers.items() if own}, one_hot)


def _quantized(op: QuantOp, own: Seen, calibration: Calibration) -> tuple[Tensor, Tensor]:
    lhs, rhs, _, _ = own
    rounded = calibration.rounded(site(op.name, "rhs"))
    keys = [site(op.name, operand) for operand in OPERANDS]
    quantizers = [calibration.plan.quantizers[key] for key in keys]
    left = quantizers[0].fake_quantize(lhs, calibration.params[keys[0]])
    return left, quantizers[1].fake_quantize(rhs, calibration.params[keys[1]]) if rounded is None else rounded


def _outliers(
    op: QuantOp, operand: Operand, seen: Sequence[Seen], quantized: Sequence[tuple[Tensor, Tensor]]
) -> tuple[Outlier, ...]:
    """Return the channel and the token of an operand that stand out, if one does."""
    weight, both = operand == "rhs" and op.rhs_is_weight, list(zip(seen, quantized, strict=True))
    pairs = [(own[0], other[0]) if operand == "lhs" else (own[1], other[1]) for own, other in both]
    pairs = pairs[:1] if weight else pairs
    dims = _dimensions(op, operand, pairs[0][0].ndim)
    found = []
    for what, dim in dims.items():
        values = [x.movedim(dim, -1).flatten(0, -2) for x, _ in pairs]
        errors = [(other - x).movedim(dim, -1).flatten(0, -2) for x, other in pairs]
        if len({x.shape[-1] for x in values}) > 1 or values[0].shape[-1] < 2:
            continue
        ranges = torch.stack([x.abs().amax(0) for x in values]).amax(0)
        noise = torch.stack([e.square().sum(0) for e in errors]).sum(0)
        times = ranges / ranges.median().clamp_min(1e-30)
        shares = noise / noise.sum().clamp_min(1e-30)
        much = max(MUCH, FAR_OUT / len(shares))  # of a few channels each has a large share
        number = int((times / FAR_OUT + shares / much).argmax())
        if times[number] >= FAR_OUT or shares[number] >= much:
            found.append(Outlier(what, number, float(times[number]), float(shares[number])))
    return tuple(found)


def _dimensions(op: QuantOp, operand: Operand, ndim: int) -> dict[str, int]:
    """Return what an operand's outliers may be, and along which dimension: the summed one, and tokens."""
    if op.kind == "conv2d":
        return {"channel": 1}
    if operand == "rhs" and op.kind == "linear":
        return {"channel": -1}
    if operand == "rhs":
        return {"channel": -2} if op.rhs_is_weight else {"channel": -2, "token": -1}
    return {"channel": -1} | ({"token": -2} if ndim > 2 else {})
