"""Put the tables of bench/results/ into README.md, so that every figure there is one that was measured.

README.md names where each of its tables comes from, and which rows it shows, in comments around it:

    <!-- bench/results/memory.md -->             the first table of a file
    <!-- bench/results/methods-tiny.md # moments -->     the first one below the heading "## moments"
    <!-- bench/results/memory.md ~ 7b -->           its rows in which "7b" is found
    <!-- end -->

    python bench/readme.py            fills them
    python bench/readme.py --check    exits with 1 where README.md is not what it would write (.ci/run)
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- (bench/results/\S+)(?: # (.+?))?(?: ~ (.+?))? -->\n).*?(<!-- end -->)", re.S)


def first_table(path: str, heading: str | None, pattern: str | None) -> str:
    """The first Markdown table of a file, below a heading where one is named, and of it the rows that match."""
    text = (ROOT / path).read_text()
    if heading:
        text = re.split(rf"(?m)^## {re.escape(heading)}$", text)[1]
    rows = re.search(r"(?m)(^\|.*\n?)+", text)[0].splitlines()
    if not any(re.search(pattern or "", row) for row in rows[2:]):
        sys.exit(f"README.md: no row of {path} matches {pattern}")
    return "".join(f"{row}\n" for n, row in enumerate(rows) if n < 2 or re.search(pattern or "", row))


def main() -> None:
    """Rewrite README.md, or check it."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    filled = BLOCK.sub(lambda m: f"{m[1]}\n{first_table(m[2], m[3], m[4])}\n{m[5]}", text)
    if "--check" not in sys.argv:
        readme.write_text(filled)
    elif filled != text:
        sys.exit("README.md: its figures are not those of bench/results/; run: python bench/readme.py")


if __name__ == "__main__":
    main()
