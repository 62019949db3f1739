"""The Python snippets of the README run, each by itself; links lead somewhere; the map of files is whole."""

import fnmatch
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


def test_the_map_of_files_is_whole() -> None:
    root = README.parent
    text = (root / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text[text.index("## Where things live") : text.index("## Add a rule")]
    named = {Path(name).name for name in re.findall(r"`([\w./*]+(?:\.py|/))`", section)}
    folders = [root / name for name in ("benchmarks", "docs", "examples", "gramjd", "tests")]
    files = [path.name for folder in folders for path in (folder, *folder.rglob("*"))]
    assert [name for name in named if not fnmatch.filter(files, name)] == []
    there = {path.name for path in (root / "gramjd").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert there - {"__init__.py", "__pycache__"} <= named
