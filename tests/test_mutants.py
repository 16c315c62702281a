"""The tables of `make mutants`: every module of the reference has tests, they exist, and every verdict says one thing."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
TABLES = ROOT / "tests" / "mutants"
TABLE = tomllib.loads((TABLES / "modules.toml").read_text(encoding="utf-8"))
TESTS: dict[str, list[str]] = TABLE["tests"]


def assert_exists(test: str) -> None:
    """`test`: a file, or one test in it."""
    file, _, name = test.partition("::")
    assert (ROOT / file).is_file(), f"{test}: no such file"
    name = name.partition("[")[0]
    assert not name or f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{test}: no such test"


def test_every_module_of_the_reference_has_tests() -> None:
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "reference").rglob("*.py")}
    assert sorted(TESTS) == sorted(modules)
    assert {str(Path(module).parent) for module in TESTS} >= TABLE["shared"].keys()
    for where, tests in [*TESTS.items(), *TABLE["shared"].items()]:
        assert tests, f"{where} has none"
        for test in tests:
            assert_exists(test)


def test_every_verdict_is_of_a_mutant_and_says_one_thing() -> None:
    seen = set()
    for entry in tomllib.loads((TABLES / "verdicts.toml").read_text(encoding="utf-8")).get("verdict", []):
        verdict = entry.keys() - {"module", "operator", "line", "occurrence"}
        assert len(entry) == 5, entry
        assert verdict in ({"equivalent"}, {"killed_by"}), entry
        assert entry["module"] in TESTS, entry
        key = (entry["module"], entry["operator"], entry["line"], entry["occurrence"])
        assert key not in seen, f"two verdicts of {key}"
        seen.add(key)
        if "killed_by" in entry:
            assert_exists(entry["killed_by"])
        else:
            assert entry["equivalent"].strip(), f"no reason: {entry}"
