"""Images to compare int8 with float on: others of the same folder than calibration has seen, where there are some."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ptq4vit_fx.tools.models import evenly_spread, read_images

#: Images that are compared at most; with fewer than FEWEST that calibration has not seen, its own are compared.
MOST, FEWEST = 64, 8


@dataclass(frozen=True)
class Compared:
    """Pixels (images, channels, height, width), the name of each image, and whether calibration has not seen them.

    others: how many images the folder has that calibration did not take; repeated: how many of those that were read
    are the same picture as one that it took.
    """

    pixels: Tensor
    names: tuple[str, ...]
    unseen: bool
    others: int
    repeated: int = 0

    @property
    def reason(self) -> str:
        """Why these are the images of the calibration; "" if they are not."""
        if self.unseen:
            return ""
        if not self.others:
            return "the folder holds no others"
        same = f", and {self.repeated} of them are the same pictures" * bool(self.repeated)
        return f"the folder holds {self.others} others{same}: fewer than {FEWEST} to compare on"


def images_to_compare(
    paths: Sequence[Path],
    taken: Sequence[Path],
    calibrated: tuple[Sequence[Path], Tensor],
    transform: Callable[[Image.Image], Tensor],
    channels: int,
) -> Compared:
    """Return up to MOST images of `paths` that calibration has not seen, evenly spread; else its own.

    taken: what calibration was given, readable or not. calibrated: the paths of the images that it read, and their
    pixels; a copy of one of them under another name counts as seen.
    """
    own, pixels = calibrated
    given, seen = set(taken), {_bytes(image) for image in pixels}
    rest = [path for path in paths if path not in given]
    found: list[tuple[Path, Tensor]] = []
    repeated, chosen = 0, evenly_spread(rest, MOST)
    for number, image in read_images(chosen, transform, [], channels):
        if _bytes(image) in seen:
            repeated += 1
        else:
            found.append((chosen[number], image))
    if len(found) < FEWEST:
        names = tuple(str(path) for path in own[:MOST])
        return Compared(pixels[:MOST], names, unseen=False, others=len(rest), repeated=repeated)
    names = tuple(str(path) for path, _ in found)
    return Compared(torch.stack([image for _, image in found]), names, unseen=True, others=len(rest), repeated=repeated)


def _bytes(image: Tensor) -> bytes:
    return image.contiguous().numpy().tobytes()
