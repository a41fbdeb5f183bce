"""One line, a small table in a notebook, a DataFrame: of every value that says what it is and has rows."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

from ptq4vit_fx.errors import failure, printable

if TYPE_CHECKING:
    import pandas

#: Rows that a notebook shows.
MOST_ROWS = 20


class Tabular:
    """A value that shows itself by `brief` and `records`; a dataclass of it needs `repr=False`."""

    def brief(self) -> str:
        """Return what the value is, in some words on one line."""
        raise NotImplementedError

    def records(self) -> list[dict[str, Any]]:
        """Return the rows of the value's table, JSON-ready, all with the same keys."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}({printable(self.brief())})"

    def _repr_html_(self) -> str:
        rows = self.records()
        cells = [list(rows[0])] if rows else []
        cells += [list(map(_shown, row.values())) for row in rows[:MOST_ROWS]]
        more = f"<p>{len(rows) - MOST_ROWS} more rows: .to_frame()</p>" * (len(rows) > MOST_ROWS)
        lines = "".join(f"<tr>{''.join(f'<td>{_escaped(cell)}</td>' for cell in row)}</tr>" for row in cells)
        return f"<p>{_escaped(repr(self))}</p><table>{lines}</table>{more}"

    def to_frame(self) -> pandas.DataFrame:
        """Return the rows as a pandas DataFrame; raises PTQError where pandas is not installed."""
        try:
            import pandas
        except ImportError as error:
            do = "pip install pandas, or take .records(), a list of dictionaries"
            name = f"{type(self).__name__}.to_frame"
            raise failure(name, "pandas", expected="the package", got="no such package", do=do) from error
        return pandas.DataFrame(self.records())


def _shown(cell: object) -> str:
    return f"{cell:.4g}" if isinstance(cell, float) else "" if cell is None else str(cell)


def _escaped(text: str) -> str:
    return html.escape(printable(text))
