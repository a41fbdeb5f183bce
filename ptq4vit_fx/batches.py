"""Image batches out of whatever a user has: a tensor, a list of tensors, a DataLoader."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ptq4vit_fx.errors import failure

#: Images per forward and backward when the data is one tensor.
BATCH_SIZE = 8


def image_batches(data: Tensor | Iterable[Any]) -> list[Tensor]:
    """Return the image batches of a tensor, or of an iterable of tensors or (tensor, anything) pairs.

    Raises PTQError if there is no image, if an item is neither, or if an image holds NaN or infinity.
    """
    if isinstance(data, Tensor):
        batches = list(torch.split(data, BATCH_SIZE)) if data.ndim else [data]
    else:
        batches = [_images_of(item) for item in data]
    batches = [batch.detach().float() for batch in batches if batch.ndim == 0 or len(batch)]
    if not batches:
        raise failure(
            "calibrate",
            "data",
            expected="one image or more",
            got="none",
            do="pass a tensor (images, channels, height, width) or an iterable of such batches",
        )
    for number, batch in enumerate(batches):
        if batch.ndim != 4:
            raise failure(
                "calibrate",
                f"batch {number}",
                expected="shape (images, channels, height, width)",
                got=str(tuple(batch.shape)),
                do="add the batch dimension" if batch.ndim == 3 else "pass image batches",
            )
        finite = torch.isfinite(batch).flatten(1).all(1)
        if not finite.all():
            raise failure(
                "calibrate",
                f"batch {number}, image {int((~finite).nonzero()[0])}",
                expected="finite pixels",
                got="NaN or infinity",
                do="check the preprocessing or leave that image out",
            )
    return batches


def _images_of(item: Any) -> Tensor:
    images = item[0] if isinstance(item, (tuple, list)) and item else item
    if isinstance(images, Tensor):
        return images
    raise failure(
        "calibrate",
        "an item of data",
        expected="a tensor, or a tuple that starts with one",
        got=type(images).__name__,
        do="pass a tensor or a DataLoader of images",
    )
