"""Looks for retired words: ``python tests/vocabulary.py``.

Prints ``file:line: word -> term`` for each one, and exits with 1 if there is any. The list is
``vocabulary.txt``, which says what to write instead. Text between a line that contains ``vocabulary: off``
and one that contains ``vocabulary: on`` is left out.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIST = Path(__file__).with_suffix(".txt")
CHECKED = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "mkdocs.yml", "docs", "examples", "gramjd")
SUFFIXES = {".md", ".py", ".yml"}
LEFT_OUT = re.compile(r"vocabulary: off.*?(?:vocabulary: on|\Z)", re.DOTALL)
SPACE = r"\s+(?:[#>*]\s+)?"  # across lines of a comment or a quotation, too


def retired() -> dict[re.Pattern[str], str]:
    """Each retired pattern with the term that replaces it."""
    lines = LIST.read_text(encoding="utf-8").splitlines()
    pairs = [line.rsplit(" -> ", 1) for line in lines if line and not line.startswith("#")]
    return {re.compile(pattern.replace(" ", SPACE), re.IGNORECASE): term for pattern, term in pairs}


def found_in(text: str) -> Iterator[tuple[int, str, str]]:
    """Every retired word: line, word, term."""
    text = LEFT_OUT.sub(lambda part: "\n" * part[0].count("\n"), text)
    for pattern, term in retired().items():
        for match in pattern.finditer(text):
            yield text.count("\n", 0, match.start()) + 1, " ".join(match[0].split()), term


def files(root: Path) -> Iterator[Path]:
    """The checked files below a folder."""
    for name in CHECKED:
        path = root / name
        nested = path.rglob("*") if path.is_dir() else [path]
        yield from sorted(each for each in nested if each.suffix in SUFFIXES and each.is_file())


def main(root: Path = ROOT) -> int:
    """The exit status."""
    status = 0
    for path in files(root):
        for line, word, term in sorted(found_in(path.read_text(encoding="utf-8"))):
            print(f"{path.relative_to(root)}:{line}: {word} -> {term}")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
