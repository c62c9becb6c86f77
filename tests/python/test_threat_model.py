"""The threat model names tests that are there."""

import re
from pathlib import Path

TOP = Path(__file__).parents[2]


def test_every_promise_has_a_test_that_exists() -> None:
    text = (TOP / "docs/threat-model.md").read_text()
    named = set(re.findall(r"`([a-z0-9]+(?:_[a-z0-9]+){3,})`", text))
    defined: set[str] = set()
    for place, pattern in (("tests", "*.py"), ("tests", "*.rs"), ("src", "*.rs"), ("fuzz", "*.rs")):
        for path in (TOP / place).rglob(pattern):
            defined |= set(re.findall(r"^ *(?:def|fn) (\w+)\(", path.read_text(), re.MULTILINE))
    assert len(named) > 50
    assert named - defined == set()


def test_every_row_of_a_promise_names_its_test() -> None:
    text = (TOP / "docs/threat-model.md").read_text()
    tables = re.findall(r"^\|.* test \|\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert len(tables) == 7
    for row in "".join(tables).splitlines():
        assert re.search(r"`\w+(_\w+){3,}` ?(,|\|$)", row), row
