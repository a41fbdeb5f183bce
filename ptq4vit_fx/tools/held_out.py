"""Images to compare int8 with float on: others of the same data than calibration has seen, where there are some."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ptq4vit_fx.data.pictures import Picture, evenly_spread
from ptq4vit_fx.data.reading import Transform, read_images

#: Images that are compared at most; with fewer than FEWEST that calibration has not seen, its own are compared.
MOST, FEWEST = 64, 8


@dataclass(frozen=True)
class Compared:
    """Pixels (images, channels, height, width), each image, and whether calibration has not seen them.

    others: how many images the data have that calibration did not take; repeated: how many of those that were read
    are the same picture as one that it took. numbers: which of the data they are, () of those of the calibration.
    """

    pixels: Tensor
    pictures: tuple[Picture, ...]
    unseen: bool
    others: int
    repeated: int = 0
    numbers: tuple[int, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """What each is called."""
        return tuple(map(str, self.pictures))

    @property
    def reason(self) -> str:
        """Why these are the images of the calibration; "" if they are not."""
        if self.unseen:
            return ""
        if not self.others:
            return "the data hold no others"
        same = f", and {self.repeated} of them are the same pictures" * bool(self.repeated)
        return f"the data hold {self.others} others{same}: fewer than {FEWEST} to compare on"


def images_to_compare(
    items: Sequence[Picture],
    taken: Sequence[int],
    calibrated: tuple[Sequence[Picture], Tensor],
    transform: Transform,
    channels: int,
) -> Compared:
    """Return up to MOST images of `items` that calibration has not seen, evenly spread; else its own.

    taken: the numbers of those that calibration was given, readable or not. calibrated: the images that it read, and
    their pixels; a copy of one of them under another name counts as seen.
    """
    own, pixels = calibrated
    given, seen = set(taken), {_digest(image) for image in pixels}
    rest = [number for number in range(len(items)) if number not in given]
    chosen = [rest[place] for place in evenly_spread(len(rest), MOST)]
    found: list[tuple[int, Tensor]] = []
    repeated = 0
    for place, image in read_images((items[number] for number in chosen), transform, [], channels):
        if _digest(image) in seen:
            repeated += 1
        else:
            found.append((chosen[place], image))
    if len(found) < FEWEST:
        return Compared(pixels[:MOST], tuple(own[:MOST]), unseen=False, others=len(rest), repeated=repeated)
    numbers = tuple(number for number, _ in found)
    pictures = tuple(items[number] for number in numbers)
    others = torch.stack([image for _, image in found])
    return Compared(others, pictures, unseen=True, others=len(rest), repeated=repeated, numbers=numbers)


def _digest(image: Tensor) -> bytes:
    return hashlib.sha256(image.numpy().tobytes()).digest()
