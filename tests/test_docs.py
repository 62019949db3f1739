"""The Python snippets of the documentation run, those of a page one after the other.

A page with a line ``<!-- needs: NAME -->`` needs that package. Blocks marked ``py`` show other
libraries' code and do not run.
"""

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = [str(page.relative_to(DOCS)) for page in sorted(DOCS.rglob("*.md"))]


def blocks(page: str, kind: str) -> dict[int, str]:
    """Every block of a kind, by the number of the line that opens it."""
    text = (DOCS / page).read_text(encoding="utf-8")
    found = re.finditer(rf"^```{kind}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return {text.count("\n", 0, block.start()) + 1: block[1] for block in found}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # from peft
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_snippets_run(page: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for needed in re.findall(
        r"^<!-- needs: (\w+) -->$", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE
    ):
        pytest.importorskip(needed)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for line, code in blocks(page, "python").items():
        exec(compile("\n" * line + code, DOCS / page, "exec"), namespace)  # with the page's own line numbers


def test_only_other_libraries_are_not_run() -> None:
    others = "torchjd|opacus|backpack|neural_tangents|jax|vmap"
    for page in PAGES:
        for line, code in blocks(page, "py").items():
            assert re.search(others, code) and "gramjd" not in code, f"{page}:{line}"


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(
        r": (\S+\.md)$", (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert sorted(listed) == sorted(PAGES)


def test_every_public_name_is_in_the_reference() -> None:
    import gramjd

    reference = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "reference").glob("*.md"))
    errors = {name for name in gramjd.__all__ if name.endswith(("Error", "Warning"))}  # as one module
    pictures = (DOCS / "reference" / "diagnostics.md").read_text(encoding="utf-8")
    for name in {*gramjd.__all__, *gramjd.weighting.__all__} - errors - {"weighting", "diagnostics"}:
        assert re.search(rf"^::: gramjd\.([\w.]+\.)?{name}$", reference, re.MULTILINE), name
    for name in gramjd.diagnostics.__all__:
        assert re.search(rf"\b{name}\b", pictures), name


def test_every_public_member_of_a_jacobian_is_in_the_reference() -> None:
    from gramjd import Jacobian

    page = (DOCS / "reference" / "jacobian.md").read_text(encoding="utf-8")
    listed = re.findall(r"^::: gramjd\.Jacobian\.(\w+)$", page, re.MULTILINE)
    public = {name for name in vars(Jacobian) if not name.startswith("_")}
    assert sorted(listed) == sorted(public - {"of", "intact"})  # which are for the library itself


def test_excerpts_of_examples_are_whole() -> None:
    """They begin at a definition and end before two empty lines."""
    found = [m for page in PAGES for m in re.findall(r'--8<-- "(.+):(\d+):(\d+)"', (DOCS / page).read_text())]
    assert found
    for name, start, stop in found:
        lines = (DOCS.parent / name).read_text(encoding="utf-8").splitlines()
        assert re.match(r"class |def |@|    def ", lines[int(start) - 1]), name
        assert lines[int(stop) - 1] and not lines[int(stop)] and not lines[int(stop) + 1], name


def test_every_picture_is_shown_and_described() -> None:
    pages = [*DOCS.rglob("*.md"), DOCS.parent / "README.md"]
    shown = [
        (alt, (page.parent / path).resolve())
        for page in pages
        for alt, path in re.findall(r"!\[([^\]]*)\]\(([^)]+\.png)\)", page.read_text(encoding="utf-8"))
    ]
    assert all(alt and path.exists() for alt, path in shown)
    assert {path for _, path in shown} >= set(DOCS.rglob("*.png"))


def test_figures_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that take no training; each is on a page."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    monkeypatch.setattr(sys, "path", [*sys.path])
    figures = runpy.run_path(str(DOCS / "figures.py"))
    pages = "\n".join((DOCS / page).read_text(encoding="utf-8") for page in PAGES)
    for name in ("conflict", "blocks", "plans", "directions", "proofs", "remedies"):
        assert figures[name]().axes
        assert f"/{name}.png" in pages
