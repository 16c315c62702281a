"""Train a DPT: `python -m accelerated.train [RECIPE] [--key value ...]`; without arguments, the recipe `demo`.

`torchrun --nproc-per-node N -m accelerated.train ...` does it in N processes, each with a share of every batch. `--help` lists
every key. A run that is finished already is not repeated. What a run leaves behind is said in `accelerated.run_folder`, what it
does in `accelerated.engine`.

Exit status: 0 when the run is finished and kept the recipe's promises, 3 when it is finished and did not, 2 for a command line
or recipe that cannot be used, 1 for a run that could not go on, 130 when interrupted, 143 when terminated: the same command then
goes on where the run was.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from accelerated.recipe import CommandLine, RecipeError, parse_command_line
from accelerated.run_folder import RunError, RunFolder


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status; foreseeable trouble is one sentence on stderr."""
    started = time.monotonic()
    try:
        return run(parse_command_line(sys.argv[1:] if arguments is None else arguments), started)
    except RecipeError as error:
        return _complain(error, 2)
    except RunError as error:
        return _complain(error, error.status)
    except (OSError, ImportError) as error:
        return _complain(error, 1)
    except KeyboardInterrupt:
        return _complain("interrupted: the run is not finished, the same command goes on with it", 130)


def run(command: CommandLine, started: float) -> int:
    """Train as `command` says, unless that is done already; print how the model compares; return the exit status."""
    recipe, folder = command.to_recipe(), RunFolder(command.runs / command.name)
    results = None if command.overwrite else folder.finished(recipe)
    if results is None:
        if not command.overwrite:
            folder.refuse_another(recipe)
        from accelerated.engine import train  # torch takes seconds to import, which --help or a wrong key should not cost

        resume = command.resume == "auto" and not command.overwrite
        results = train(recipe, folder, command.cache, command.threads, resume, command.snapshot_seconds)
        words = f"finished in {(time.monotonic() - started) / 60:.1f} minutes, rendering included: {folder.path}"
    else:
        words = f"{folder.path} holds a finished run of this recipe, which is not repeated (--overwrite true would)"
    if speaks():
        print(words)
        print(table(results))
    return 0 if results["met"] else 3


def table(results: Mapping[str, Any]) -> str:
    """Lay results out for reading: every score on the held-out scenes, the model's divided by it, and the promises."""
    metric, model = results["metric"], results["model"]
    lines = [f"{'held-out ' + metric:34} {'score':>8} {'model / it':>11}", f"{'the model':34} {model:8.4f}"]
    lines += [f"{name:34} {score:8.4f} {model / score:11.3f}" for name, score in results["others"].items()]
    sign = "<=" if metric == "AbsRel" else ">="
    for promise in results["promises"]:
        verdict = "met" if promise["kept"] else "MISSED"
        lines.append(f"promised: {sign} {promise['bound']:g} of '{promise['against']}': {promise['ratio']:.3f}, {verdict}")
    return "\n".join(lines)


def speaks() -> bool:
    """Whether this process is the one of several, as torchrun numbers them, that says what all know."""
    return os.environ.get("RANK", "0") == "0"


def _complain(error: Exception | str, status: int) -> int:
    if speaks() or isinstance(error, (OSError, ImportError)):  # these may be one process's own
        print(f"error: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
