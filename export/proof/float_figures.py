"""Outputs of a quantized model beside float's: arrays in, `AgainstFloat` out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptq4vit_fx.errors import failure, unknown_name
from ptq4vit_fx.export.proof.against_float import KINDS, NEIGHBOURS, AgainstFloat, Closeness, Kind, Share, Worst
from ptq4vit_fx.passes.graph.outputs import logits_in

Array = NDArray[Any]

#: Rows of similarities at a time.
ROWS = 1024
#: What models call the embedding that they return beside other outputs.
EMBEDDINGS = frozenset(["pooler_output", "image_embeds", "embedding", "embeddings", "features", "x_norm_clstoken"])


@np.errstate(all="ignore")
def against_float(
    reference: Mapping[str, Array],
    actual: Mapping[str, Array],
    *,
    kind: Kind | None = None,
    says: str | None = None,
    names: Sequence[str] = (),
    unseen: bool | None = None,
) -> AgainstFloat:
    """Compare the outputs of a quantized model (`actual`) with float's: name -> array (images, ...), the same names.

    kind: what the output is that counts, or None: `decide`. says: what the model says that it is, "classes" or
    "embeddings", where it says so. names: of the images, in their order. Raises PTQError on arrays without images, on
    other sizes than float's, on an unknown kind and on one that the output cannot be.
    """
    for name, array in actual.items():
        other = reference[name].shape
        if (len(array), array.size) != (len(reference[name]), reference[name].size) or not array.size:
            do = "compare a file with the model that it was made from"
            got = str(array.shape)
            raise failure("compare_float", f"output {name}", expected=f"float's shape {other}", got=got, do=do)
    output, found, decided = decide(actual, kind, says)
    mine, theirs = (np.asarray(side[output], np.float64).reshape(len(side[output]), -1) for side in (reference, actual))
    cosines = _cosines(*_comparable(mine, theirs))
    figures: dict[str, Any] = {}
    place, divergence, classes = int(cosines.argmin()), None, None
    if found == "classes":
        divergences, top, other_top = _divergences(mine, theirs), mine.argmax(1), theirs.argmax(1)
        same = (top == other_top) & np.isfinite(theirs.max(1))
        figures = {"same_class": Share(int(same.sum()), len(same)), "divergence": float(divergences.mean())}
        place = _farthest(divergences, same)
        divergence, classes = float(divergences[place]), (int(top[place]), int(other_top[place]))
    elif found == "embeddings" and len(mine) > 1:
        figures = dict(zip(("recall", "neighbours"), _retrieval(mine, theirs), strict=True))
    return AgainstFloat(
        kind=found,
        output=output,
        decided=decided,
        images=len(mine),
        closeness=closeness(mine, theirs),
        worst=Worst(place, names[place] if place < len(names) else "", float(cosines[place]), divergence, classes),
        others={n: closeness(reference[n], x) for n, x in actual.items() if n != output and x.dtype.kind in "fiub"},
        unseen=unseen,
        **figures,
    )


def decide(outputs: Mapping[str, Array], kind: Kind | None, says: str | None) -> tuple[str, Kind, str]:
    """Return the output that counts, what it is, and what decided that.

    The user (`kind`) decides, then the model (`says`), then names and shapes: an output (images, values) of at least
    two values is classes, unless its name is one of EMBEDDINGS; any other shape is values.
    """
    if kind is not None and kind not in KINDS:
        raise unknown_name("compare_float", "kind", kind, KINDS)
    floats = {name: x for name, x in outputs.items() if x.dtype.kind == "f"} or dict(outputs)
    named = [name for name in floats if name.rpartition(".")[2] in EMBEDDINGS]
    name = logits_in(floats) or next(iter(named or floats))
    is_table = floats[name].ndim == 2 and floats[name].shape[1] > 1
    if kind in ("classes", "embeddings") and not is_table:
        expected, do = f"(images, values) as {kind} have it", 'pass kind="values"'
        got = str(floats[name].shape)
        raise failure("compare_float", f"output {name}", expected=expected, got=got, do=do)
    if kind is not None:
        return name, kind, "as asked for"
    if not is_table:
        return name, "values", f"of shape {floats[name].shape}"
    if says in ("classes", "embeddings"):
        return name, "classes" if says == "classes" else "embeddings", "as the model says"
    if name in named:
        return name, "embeddings", f"by the name {name}"
    return name, "classes", f"by the shape (images, {floats[name].shape[1]})"


@np.errstate(all="ignore")
def closeness(reference: Array, actual: Array) -> Closeness:
    """Return how close an output is to float's; both (images, ...)."""
    mine, theirs = _comparable(*(np.asarray(x, np.float64).reshape(len(x), -1) for x in (reference, actual)))
    cosines = _cosines(mine, theirs)
    noise, signal = float(np.linalg.norm(theirs - mine)), float(np.linalg.norm(mine))
    error = 0.0 if noise == 0 else math.inf if signal == 0 or math.isnan(noise) else noise / signal
    snr = math.inf if error == 0 else -20 * math.log10(error) if error < math.inf else -math.inf
    return Closeness(float(cosines.mean()), float(cosines.min()), error, snr)


def _comparable(mine: Array, theirs: Array) -> tuple[Array, Array]:
    """Return both with 0 where they have the same infinity or NaN: a mask is no difference."""
    same = ~np.isfinite(mine) & ((mine == theirs) | (np.isnan(mine) & np.isnan(theirs)))
    return np.where(same, 0.0, mine), np.where(same, 0.0, theirs)


def _cosines(mine: Array, theirs: Array) -> Array:
    """Return the cosine per row: 1 of two that are equal, 0 where either is zero or not finite."""
    products = np.linalg.norm(mine, axis=1) * np.linalg.norm(theirs, axis=1)
    cosines = np.clip((mine * theirs).sum(1) / products, -1.0, 1.0)
    return np.where((mine == theirs).all(1), 1.0, np.where(np.isfinite(cosines), cosines, 0.0))


def _divergences(mine: Array, theirs: Array) -> Array:
    """Return KL(softmax(mine) || softmax(theirs)) per row, in nats; infinite where theirs is no distribution."""
    logs = [x - x.max(1, keepdims=True) for x in (mine, theirs)]
    logs = [x - np.log(np.exp(x).sum(1, keepdims=True)) for x in logs]
    weight = np.exp(logs[0])
    divergences = np.where(weight > 0, weight * (logs[0] - logs[1]), 0.0).sum(1)
    return np.where(np.isnan(divergences), np.inf, np.maximum(divergences, 0.0))


def _farthest(divergences: Array, same: Array) -> int:
    """Return the image of the largest divergence, among those with another class if there are any.

    A wrong answer is worse than one that is less certain.
    """
    counted = divergences if same.all() else np.where(same, -1.0, divergences)
    return int(counted.argmax())


def _retrieval(mine: Array, theirs: Array) -> tuple[Share, float]:
    """Return recall@1 of int8 embeddings among float's, and the share of nearest other images that are the same."""
    mine, theirs = (np.nan_to_num(x / np.linalg.norm(x, axis=1, keepdims=True)) for x in (mine, theirs))
    nearest, hits, common = min(NEIGHBOURS, len(mine) - 1), 0, 0
    for start in range(0, len(mine), ROWS):
        rows = np.arange(start, min(start + ROWS, len(mine)))
        from_float, from_int8 = mine[rows] @ mine.T, theirs[rows] @ mine.T
        own = from_int8[rows - start, rows]
        # Equal images have equal embeddings: one of them is found as well as the other.
        hits += int((own >= from_int8.max(1) - 1e-12).sum())
        for similar in (from_float, from_int8):
            similar[rows - start, rows] = -np.inf
        found = (np.argpartition(-similar, nearest - 1, axis=1)[:, :nearest] for similar in (from_float, from_int8))
        common += sum(len(set(a) & set(b)) for a, b in zip(*found, strict=True))
    return Share(hits, len(mine)), common / (nearest * len(mine))
