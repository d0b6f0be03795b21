"""The mistakes that `benchmarks/rl/mutations.py` makes can still be made: what it would change is there."""

from __future__ import annotations

import pytest

from benchmarks.rl.mutations import MUTATIONS, ROOT, Mutation


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_what_is_changed_is_there(mutation: Mutation) -> None:
    text = (ROOT / mutation.file).read_text(encoding="utf-8")
    assert mutation.right in text and mutation.also[0] in text
    assert text.replace(mutation.right, mutation.wrong, 1) != text
    for test in mutation.tests:
        assert (ROOT / test.partition("::")[0]).exists()
