"""Lists: text files with the path of a picture in each line, relative to the list, and perhaps its class number."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ptq4vit_fx.data.classes import DIGITS
from ptq4vit_fx.data.pictures import Images
from ptq4vit_fx.errors import failure, foreign, quoted

#: A path, white space, a class number.
NUMBERED = re.compile(rf"(.*\S)\s+([0-9]{{1,{DIGITS}}})")


def open_list(path: Path, *, entry: str | None, labelled: bool) -> Images:
    """Return the pictures of a list; with labels if every line ends with a class number.

    Raises PTQError on what is no text, on a list without lines, and, labelled, where only some have a number.
    """
    do = "write one path per line, relative to the list, in UTF-8"
    with foreign("read images", str(path), expected="text in UTF-8", do=do):
        text = path.read_text(encoding="utf-8-sig")
    # Not by str.splitlines, which takes characters of names for the ends of lines.
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if not lines:
        raise failure("read images", str(path), expected="a path in each line", got="no line", do=do)
    numbered = [(line, NUMBERED.fullmatch(line)) for line in lines]
    if all(match for _, match in numbered):
        pairs = [match.groups() for _, match in numbered if match]
        return Images(_paths([name for name, _ in pairs], path), tuple(int(number) for _, number in pairs))
    if labelled and any(match for _, match in numbered):
        other = quoted(next(line for line, match in numbered if not match))
        raise failure("read images", str(path), expected="a class number behind every path", got=other, do="add it")
    return Images(_paths(lines, path))


def _paths(names: list[str], path: Path) -> tuple[Path, ...]:
    return tuple(Path(os.path.join(path.parent, name)) for name in names)
