"""The page that follows one loss through the code names only what exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "one-loss.md").read_text(encoding="utf-8")
NAMES = re.findall(r"`([\w/]+\.py):(\w+)`", TEXT)
FILES = re.findall(r"`([\w/]+\.py)`", TEXT)


def defined(file: Path) -> set[str]:
    """Names that a module defines at its top level."""
    body = ast.parse(file.read_text(encoding="utf-8")).body
    return {node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


@pytest.mark.parametrize(("file", "name"), NAMES)
def test_names_exist(file: str, name: str) -> None:
    assert name in defined(ROOT / "gramjd" / file)


def test_files_exist() -> None:
    assert len(NAMES) > 20 and FILES
    assert all((ROOT / "gramjd" / file).is_file() for file in FILES)
