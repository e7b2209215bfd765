"""Makes the table and the plot of a comparison from its ``results.json``.

Example:
  python benchmarks/report.py runs/peers
  python benchmarks/report.py docs/results/benchmarks --page docs/benchmarks.md
"""

import argparse
import json
from pathlib import Path

from comparison.plot import draw
from comparison.table import render

BEGIN = "<!-- benchmarks/report.py: begin -->"
END = "<!-- benchmarks/report.py: end -->"


def replaced(page: str, table: str) -> str:
    """Returns the page with the table between its markers.

    Args:
        page: The page, with one pair of markers.
        table: What to put between them.

    Returns:
        The new page.

    Raises:
        ValueError: If the page has not one of each marker, in order.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ValueError(f"page: expected one {BEGIN} and one {END} after it.")
    return f"{before}{BEGIN}\n\n{table}\n{END}{after}"


def main() -> None:
    """Prints the table and draws the plot; with a page, updates it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where results.json is")
    parser.add_argument("--page", type=Path, help="the page to update")
    options = parser.parse_args()
    results = json.loads((options.folder / "results.json").read_text())
    table = render(results)
    print(table)
    draw(results["rows"], options.folder / "benchmarks.png")
    if options.page:
        options.page.write_text(replaced(options.page.read_text(), table))


if __name__ == "__main__":
    main()
