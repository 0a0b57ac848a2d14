"""Every chapter keeps the contract, and holds at a seed nobody tuned. (nbval compares its outputs; see the Makefile.)"""

from __future__ import annotations

import pytest

from kexue.book import contract, notebooks, regress, runner

CHAPTERS = notebooks.chapters(notebooks.ROOT)


def other_seed(chapter: notebooks.Chapter) -> int:
    """A seed from 1 to 99 that follows from the content, and is not the stored one."""
    seed = 1 + int(notebooks.content_hash(chapter.path), 16) % 99
    stored = notebooks.parameters(notebooks.read(chapter.path))["seed"]
    return seed if seed != stored else seed % 99 + 1


def test_there_are_chapters_with_checks():
    assert sum(len(notebooks.checks(notebooks.read(chapter.path))) for chapter in CHAPTERS) > 0


def test_contract():
    found = contract.book(notebooks.ROOT)
    assert [f"{key}: {text}" for key, texts in found.items() for text in texts] == []


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: f"chapter:{chapter.key}")
def test_chapter_holds_at_another_seed(chapter, tmp_path):
    jobs = regress.plan([chapter], [other_seed(chapter)])
    (result,) = runner.sweep(jobs, root=notebooks.ROOT, report=tmp_path / "report.jsonl", workers=1, timeout=600.0)
    assert result.held, f"at {result.parameters}:\n{result.error}"
