"""Labels of images beside the classes of a model: numbers, or the names of sub-folders in their order."""

from __future__ import annotations

import os
from pathlib import Path

from ptq4vit_fx.data.classes import class_number, class_numbers
from ptq4vit_fx.data.pictures import Images
from ptq4vit_fx.errors import failure, some_names, warn


def class_names(folder: Images, classes: int) -> list[str]:
    """Return the name of each class, that of its sub-folder for example, or its number."""
    return [str(number) for number in range(classes)] if _numbered(folder) else list(folder.classes)


def _numbered(folder: Images) -> bool:
    """Return whether classes are known by their numbers alone."""
    return not folder.classes or bool(class_numbers(folder.classes))


def check_classes(folder: Images, classes: int, data: Path) -> None:
    """Raise PTQError if a model of so many classes cannot have these labels; warns of numbers sorted as text."""
    _check_names(folder, classes, data)
    numbered, highest = _numbered(folder), max(folder.labels)
    if highest < classes and (len(folder.classes) == classes or numbered):
        return
    if not os.path.isdir(data) or not folder.classes:
        got = f"{len(folder.classes)}" if folder.classes else f"numbers up to {highest}"
        do = "pass the images that the model was trained for"
        raise failure("eval", str(data), expected=f"the {classes} classes of the model", got=got, do=do)
    raise failure(
        "eval",
        str(data),
        expected=f"{classes} sub-folders, one per class of the model",
        got=f"{len(folder.classes)}" + (f", numbered up to {highest}" if numbered else ""),
        do="name the sub-folders by class number (0, 1, ...) if some classes have no images",
    )


def _check_names(folder: Images, classes: int, data: Path) -> None:
    """Raise PTQError if one name among numbers makes the order of the names another one than that of the numbers.

    Warn if all are numbers, and their order as text, which is that of torchvision's ImageFolder, is another one.
    """
    names = folder.classes
    numbers = {name: number for name in names if (number := class_number(name)) is not None}
    others = [name for name in names if name not in numbers]
    moved = [name for place, name in enumerate(names) if numbers.get(name, place) != place]
    if not others and moved and len(names) == classes:
        warn(
            f"eval: {data}: sub-folders are classes by their number; torchvision's ImageFolder sorts them as text, "
            f"{names[2]} before {names[-1]}: if the model was trained that way, give the names leading zeros"
        )
    if len(numbers) > len(others) > 0 and moved and all(number < classes for number in numbers.values()):
        raise failure(
            "eval",
            str(data),
            expected="sub-folders that are all named by class number, or none",
            got=f"{some_names(others)} beside {some_names(numbers)}",
            do="move what is no class out of the folder",
        )


def warn_of_empty(folder: Images, data: Path) -> None:
    """Warn (PTQWarning) of sub-folders without images."""
    filled = set(folder.labels)
    numbers = class_numbers(folder.classes)
    empty = [name for place, name in enumerate(folder.classes) if numbers.get(name, place) not in filled]
    if empty:
        warn(
            f"eval: {data}: {len(empty)} of {len(folder.classes)} sub-folders hold no image, and count as classes: "
            f"{some_names(empty)}"
        )
