"""Classes by the names of their folders: in the order of the names, or the numbers that these are."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from ptq4vit_fx.errors import failure, some_names

#: Digits of a class number: more would be a date or an identifier.
DIGITS = 9


def numbers_of(folders: Sequence[str], classes: Sequence[str], data: str) -> tuple[int, ...]:
    """Return the class number of each of some pictures. folders: where each lies; classes: all folders, in order.

    Raises PTQError on two folders of one number.
    """
    numbers = class_numbers(classes) or {name: number for number, name in enumerate(classes)}
    counts = Counter(numbers.values())
    same = [name for name in classes if counts[numbers[name]] > 1]
    if same:
        do = "put their images into one"
        raise failure("read images", data, expected="one sub-folder per class", got=some_names(same), do=do)
    return tuple(numbers[name] for name in folders)


def class_numbers(classes: Sequence[str]) -> dict[str, int]:
    """Return name -> class number if all sub-folders are named by one, else {}."""
    numbers = {name: class_number(name) for name in classes}
    found = {name: number for name, number in numbers.items() if number is not None}
    return found if len(found) == len(numbers) else {}


def class_number(name: str) -> int | None:
    """Return the number that a sub-folder is named by, in digits of ASCII; None if it is named by something else."""
    return int(name) if re.fullmatch(f"[0-9]{{1,{DIGITS}}}", name) else None
