"""The mutants of a module: where cosmic-ray's operators apply to it, without what cannot matter, and a sample by a seed.

The order in which mutants are drawn is that of a hash of the seed and the mutant's key, which names no line number: a change to
a module changes little of its sample, and next to nothing of the others'.
"""

from __future__ import annotations

import ast
import hashlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

LEAST = 4  # mutants of a module, where it has so many

EXCLUDED = """\
- annotations, type aliases and `if TYPE_CHECKING`, which nothing evaluates or nobody reads at run time;
- what is computed inside the message of a `raise`;
- the removal of `functools.wraps`, which keeps names and docstrings;
- an arithmetic operator in place of one on bits, or the reverse, and `~x` for `-x`: TypeError on the first array of floats;
- the number in `reshape(-1)`, where NumPy takes any negative one for the same;
- `+x` for `-x`, which equals its removal; `is` for `==`, which is an accident of the interpreter;
- `/` and `*` in a list of parameters, which are no operators; and what does not parse, or parses to the same program.

Docstrings, `__all__` and other strings have no mutants: no operator of cosmic-ray changes strings."""

_ARITHMETIC = {"Add", "Sub", "Mul", "Div", "FloorDiv", "Mod", "Pow"}
_BITS = {"BitOr", "BitAnd", "BitXor"}
_IDENTITY = {"Is", "IsNot"}
_BINARY = {"arith_expr", "term", "power", "expr", "xor_expr", "and_expr"}  # parso's names of expressions with two operands
_TYPE_ALIAS = re.compile(r"_?[A-Z]\w*[a-z]\w*")  # a module's constants are in capitals


@dataclass(frozen=True)
class Mutant:
    """One change of one place of a module. Its key (module, operator, text, occurrence) outlives changes elsewhere in it."""

    module: str  # path from the root of the checkout
    operator: str  # cosmic-ray's name
    text: str  # the line that is changed, without its indentation
    occurrence: int  # how many mutants of the same operator on lines of the same text come before it
    index: int  # how many mutants of the same operator come before it: what cosmic-ray knows it by
    line: int
    place: tuple[str, int, int]  # kind of change, line, column: the alternatives at one place share it

    @property
    def key(self) -> tuple[str, str, str, int]:
        return self.module, self.operator, self.text, self.occurrence


def mutants_of(module: str, source: str) -> Iterator[Mutant]:
    """Yield all mutants of a module that may matter."""
    nodes, lines = list(ast_nodes(get_ast(source))), source.splitlines()
    for name in _operators():
        operator = get_operator(f"core/{name}")()
        places = ((node, start) for node in nodes for start, _ in operator.mutation_positions(node))
        seen: Counter[str] = Counter()
        for index, (node, (line, column)) in enumerate(places):
            text = lines[line - 1].strip()
            if _matters(name, node):
                yield Mutant(module, name, text, seen[text], index, line, (name.partition("_")[0], line, column))
            seen[text] += 1


def sample(mutants: dict[str, list[Mutant]], sources: dict[str, str], size: int, seed: int) -> list[Mutant]:
    """Draw at least `size` mutants: of each module its share, at least LEAST, at most one a place."""
    places = {module: _by_place(found, seed) for module, found in mutants.items()}
    total = sum(map(len, places.values()))
    chosen = []
    for module, groups in places.items():
        quota = max(LEAST, math.ceil(size * len(groups) / total))
        drawn = (next((m for m in group if mutate(sources[module], m) is not None), None) for group in groups)
        kept = [mutant for _, mutant in zip(range(quota), filter(None, drawn), strict=False)]
        chosen += sorted(kept, key=lambda mutant: (mutant.line, mutant.operator, mutant.index))
    return chosen


def mutate(source: str, mutant: Mutant) -> str | None:
    """Return the source of the mutant, or None where it does not parse or is the same program."""
    changed = mutate_code(source, get_operator(f"core/{mutant.operator}")(), mutant.index)
    try:
        same = changed is None or ast.dump(ast.parse(changed)) == ast.dump(ast.parse(source))
    except SyntaxError:
        return None
    return None if same else changed


def _by_place(mutants: list[Mutant], seed: int) -> list[list[Mutant]]:
    """The mutants of each place, in the order in which they are drawn."""

    def rank(mutant: Mutant) -> bytes:
        return hashlib.sha256(repr((seed, *mutant.key)).encode()).digest()

    places: dict[tuple[str, int, int], list[Mutant]] = defaultdict(list)
    for mutant in mutants:
        places[mutant.place].append(mutant)
    return [sorted(group, key=rank) for group in sorted(places.values(), key=lambda group: rank(group[0]))]


def _operators() -> list[str]:
    """The operators that need no arguments, without the replacements that cannot matter."""
    chosen = []
    for full in operator_names():
        name = full.removeprefix("core/")
        kind, _, change = name.partition("_")
        before, _, after = change.partition("_")
        useful = {
            "ReplaceBinaryOperator": {before, after} <= _ARITHMETIC or {before, after} <= _BITS,
            "ReplaceComparisonOperator": (before in _IDENTITY) == (after in _IDENTITY),
            "ReplaceUnaryOperator": before == "Delete",
            "NoOp": False,
        }.get(kind, not get_operator(full).arguments())
        if useful:
            chosen.append(name)
    return chosen


def _matters(operator: str, node: Any) -> bool:
    if operator.startswith("ReplaceBinaryOperator") and node.parent.type not in _BINARY:
        return False
    if operator == "NumberReplacer" and _is_rest_of_reshape(node):
        return False
    if operator == "RemoveDecorator" and "functools.wraps" in node.get_code():
        return False
    inside_string, child, parent = False, node, node.parent
    while parent is not None:
        inside_string |= parent.type == "fstring"
        if _is_typing(child, parent) or (inside_string and parent.type == "raise_stmt"):
            return False
        child, parent = parent, parent.parent
    return True


def _is_rest_of_reshape(number: Any) -> bool:
    """Whether `number` is the 1 of `reshape(..., -1, ...)`."""
    call = number.search_ancestor("trailer")
    name = call.get_previous_sibling() if call else None
    return number.parent.type == "factor" and name is not None and name.get_code() == ".reshape"


def _is_typing(child: Any, parent: Any) -> bool:
    """Whether `child` is the part of `parent` that is an annotation, an alias of a type or for the type checker alone."""
    if parent.type == "annassign":
        return child is parent.children[1] or parent.children[1].get_code().strip() == "TypeAlias"
    if parent.type == "tfpdef":
        return child is not parent.children[0]
    if parent.type == "funcdef":
        return child is parent.annotation
    if parent.type == "if_stmt":
        return "TYPE_CHECKING" in parent.children[1].get_code()
    if parent.type == "expr_stmt" and parent.parent.type == "simple_stmt" and parent.parent.parent.type == "file_input":
        return bool(_TYPE_ALIAS.fullmatch(parent.children[0].get_code().strip()))
    return False
