"""The Python snippets of the README run, each by itself, and its links lead somewhere."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def snippets() -> dict[int, str]:
    """Every ``python`` block, by the number of the line that opens it."""
    text = README.read_text(encoding="utf-8")
    blocks = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return {text.count("\n", 0, block.start()) + 1: block[1] for block in blocks}


@pytest.mark.parametrize("line", snippets())
def test_snippet_runs(line: int) -> None:
    code = "\n" * line + snippets()[line]  # a traceback then names the README's own lines
    exec(compile(code, README, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_relative_links(page: str) -> None:
    text = (README.parent / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", text):
        assert (README.parent / target).exists(), target
