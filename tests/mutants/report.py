"""What a run found, as a page: counts of every module, survivors with their verdicts, and what is wrong with it."""

from __future__ import annotations

import difflib
import platform
import tomllib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from tests.mutants.sample import EXCLUDED, Mutant, mutate

DEMANDED = 0.95  # share of the mutants that are not equivalent which the tests must kill
Key = tuple[str, str, str, int]


@dataclass(frozen=True)
class Outcome:
    """How one mutant ended: "killed", "timed out" (which counts as killed) or "survived", and the test that failed first."""

    end: str
    test: str = ""


@dataclass
class Findings:
    """The sample, what is known of each mutant, and a person's verdicts of those that survived at some time."""

    seed: int
    sources: dict[str, str]
    places: dict[str, int]
    sampled: list[Mutant]
    outcomes: dict[Key, Outcome]
    verdicts: dict[Key, dict[str, str]] = field(default_factory=dict)

    def status(self, mutant: Mutant) -> str:
        """Return "pending", "killed", "timed out", "equivalent" (a verdict) or "open" (it survived, and nothing excuses it)."""
        outcome = self.outcomes.get(mutant.key)
        if outcome is None:
            return "pending"
        if outcome.end != "survived":
            return outcome.end
        return "equivalent" if "equivalent" in self.verdicts.get(mutant.key, {}) else "open"

    def share(self, statuses: Iterable[str]) -> float:
        """Return which part of the mutants that are not equivalent was killed; 1 where there are none."""
        count = Counter(statuses)
        killed = count["killed"] + count["timed out"]
        return killed / (killed + count["open"]) if killed + count["open"] else 1.0

    def problems(self) -> list[str]:
        """Return what a person must still do, in sentences."""
        status = {mutant.key: self.status(mutant) for mutant in self.sampled}
        count, share = Counter(status.values()), self.share(status.values())
        found = []
        if count["open"]:
            found.append(
                f"{count['open']} survivors are open: kill them by a test, or say in verdicts.toml why they are equivalent"
            )
        if count["pending"]:
            found.append(f"{count['pending']} mutants of the sample have not been run")
        if share < DEMANDED:
            found.append(f"{share:.1%} of the mutants that are not equivalent are killed: expected {DEMANDED:.0%}")
        for key, verdict in self.verdicts.items():
            if "equivalent" in verdict and status.get(key) in ("killed", "timed out"):
                found.append(f"verdicts.toml calls a mutant equivalent that {self.outcomes[key].test or 'a test'} kills: {key}")
        return found


def read_verdicts(path: Path) -> dict[Key, dict[str, str]]:
    entries = tomllib.loads(path.read_text(encoding="utf-8")).get("verdict", [])
    return {(entry["module"], entry["operator"], entry["line"], entry["occurrence"]): entry for entry in entries}


def stub(mutant: Mutant) -> str:
    """Return the entry of verdicts.toml that a person completes."""
    return (
        f'[[verdict]]\nmodule = "{mutant.module}"\noperator = "{mutant.operator}"\n'
        f"line = '''{mutant.text}'''\noccurrence = {mutant.occurrence}\nequivalent = \"\"\n"
    )


def page(found: Findings) -> str:
    """Return the report in Markdown."""
    status = {mutant.key: found.status(mutant) for mutant in found.sampled}
    of = {module: [status[m.key] for m in found.sampled if m.module == module] for module in found.places}
    rows = [row(f"`{module}`", places, of[module], found) for module, places in found.places.items()]
    rows.append(row("**all**", sum(found.places.values()), list(status.values()), found))
    survivors = [m for m in found.sampled if status[m.key] in ("equivalent", "open")]
    since = [
        m for m in found.sampled if "killed_by" in found.verdicts.get(m.key, {}) and status[m.key] in ("killed", "timed out")
    ]
    parts = [
        "# Mutants of the reference",
        "`make mutants` changes `reference/` in one place at a time, in a copy, and runs the changed module's tests, which "
        "`modules.toml` names. A mutant is killed where a test fails or the tests take five times as long; else it survives.",
        f"cosmic-ray {version('cosmic-ray')}, Python {platform.python_version()}, NumPy {version('numpy')}, pytest "
        f"{version('pytest')}, hypothesis {version('hypothesis')}; seed {found.seed}. "
        "Drawn are places, with equal chances, and one of the changes that are possible at each. Left out:",
        EXCLUDED,
        "| module | places | sampled | killed | of these timed out | survived | of these equivalent | open | killed, "
        "of the not equivalent |\n|:--|--:|--:|--:|--:|--:|--:|--:|--:|\n" + "\n".join(rows),
        "## Survivors",
        *([entry(mutant, found) for mutant in survivors] or ["None."]),
        "## Survivors of an earlier run, which a test written since kills",
        *([entry(mutant, found) for mutant in since] or ["None."]),
    ]
    return "\n\n".join(parts) + "\n"


def row(name: str, places: int, statuses: list[str], found: Findings) -> str:
    count = Counter(statuses)
    killed, survived = count["killed"] + count["timed out"], count["equivalent"] + count["open"]
    share = f"{found.share(statuses):.1%}" if killed + count["open"] else ""
    cells = [name, places, len(statuses), killed, count["timed out"], survived, count["equivalent"], count["open"], share]
    return f"| {' | '.join(map(str, cells))} |"


def entry(mutant: Mutant, found: Findings) -> str:
    """Return one mutant: where it is, what it changes, and the verdict."""
    source = found.sources[mutant.module]
    before, after = source.splitlines(), (mutate(source, mutant) or "").splitlines()
    difference = difflib.unified_diff(before, after, lineterm="", n=0)
    changed = [line for line in difference if line[1:].strip() and not line.startswith(("---", "+++", "@@"))]
    status, verdict = found.status(mutant), found.verdicts.get(mutant.key, {})
    if status == "equivalent":
        words = f"equivalent: {verdict['equivalent']}"
    elif status == "open":
        words = f"**open**, although {verdict['killed_by']} is said to kill it" if "killed_by" in verdict else "**open**"
    else:
        words = f"killed by {verdict['killed_by']}"
    diff = "\n".join(changed)
    return f"`{mutant.module}:{mutant.line}` {mutant.operator}\n\n```diff\n{diff}\n```\n\n{words}"
