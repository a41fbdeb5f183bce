"""Embeddings on labelled images: whether the image nearest to each is of its class. Arrays in, numbers out."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
#: Rows of similarities at a time.
ROWS = 1024


def vectors_of(output: Array) -> Array:
    """Return an output as one vector per image: tokens (images, tokens, values) and maps (images, channels, height,
    width) by their mean over what is no channel, other shapes as they are.
    """
    if output.ndim == 3:
        return np.asarray(output.mean(1))
    return np.asarray(output.reshape(len(output), -1) if output.ndim != 4 else output.mean((2, 3)))


def unit(vectors: Array) -> Array:
    """Return vectors of length 1, float64; what is zero or not finite is near to nothing, and becomes 0."""
    values = np.asarray(vectors, np.float64)
    with np.errstate(all="ignore"):
        found = values / np.linalg.norm(values, axis=1, keepdims=True)
    return np.asarray(np.nan_to_num(found, posinf=0.0, neginf=0.0))


def neighbours(vectors: Array, labels: Array) -> tuple[Array, Array]:
    """Return how many others are nearer to each image than the nearest of its class, and which image is the nearest.

    vectors: (images, values), compared by their cosine; of equal ones the first is nearer. An image that is alone in
    its class has all others in front.
    """
    units, images = unit(vectors), np.arange(len(vectors))
    rank, first = np.empty(len(units), np.int64), np.empty(len(units), np.int64)
    for start in range(0, len(units), ROWS):
        rows = images[start : start + ROWS]
        similar = units[rows] @ units.T
        similar[rows - start, rows] = -np.inf
        own = np.where(labels[rows, None] == labels, similar, -np.inf)
        best = own.argmax(1)
        value = own[rows - start, best][:, None]
        front = (similar > value) | ((similar == value) & (images < best[:, None]))
        rank[rows] = np.where(np.isfinite(value[:, 0]), front.sum(1), len(units))
        first[rows] = similar.argmax(1)
    return rank, first


def alone(labels: Array) -> Array:
    """Return whether an image is the only one of its class: no other can be found."""
    _, place, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return np.asarray(counts[place] == 1)
