"""The linter of the vocabulary finds retired words, and the pages that users read have none."""

import subprocess
import sys
from pathlib import Path

import pytest
import vocabulary

# One for each line of the list, in its order.
RETIRED = """\
Engine(ways=["rows"])
the slower way
it goes another step, then takes the way of rows
Parameters go row by row
as soon as samples meet
layers that mix samples
where samples are mixed
the mixing of samples
un-batched tensors
derived weights
an expansion of the op
a float32 island
owners of a factor
believed without a check
factors are let go, and the engine lets go of them
each stands for one parameter
"""


def test_each_retired_word_is_found() -> None:
    found = {pattern for pattern in vocabulary.retired() if pattern.search(RETIRED)}
    assert found == set(vocabulary.retired())


def test_a_retired_word_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.md").write_text("# Title\n\nIt is exact, but goes row\nby row.\n")
    (tmp_path / "README.md").write_text("All is well.\n")
    assert vocabulary.main(tmp_path) == 1
    assert capsys.readouterr().out == "docs/page.md:3: row by row -> per-row backward\n"


def test_ordinary_words_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "Data flows one way. Mixed precision rows meet the budget of mixtures.\n"
    (tmp_path / "README.md").write_text(text)
    assert vocabulary.main(tmp_path) == 0
    assert not capsys.readouterr().out


def test_left_out_text_passes_and_what_follows_it_does_not() -> None:
    text = "<!-- vocabulary: off -->\nan owner\n<!-- vocabulary: on -->\n\nan owner\n"
    assert [line for line, *_ in vocabulary.found_in(text)] == [5]


def test_the_tree_has_no_retired_word() -> None:
    script = vocabulary.ROOT / "tests" / "vocabulary.py"
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stdout
    assert len(list(vocabulary.files(vocabulary.ROOT))) > 50  # it looked at something


def test_every_term_is_explained_to_contributors() -> None:
    text = (vocabulary.ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for term in vocabulary.retired().values():
        assert term.removesuffix("=") in text, term
