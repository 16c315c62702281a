"""Train a DPT: `python -m accelerated.train [RECIPE] [--key value ...]`; without arguments, the recipe `demo`.

Exit status: 0 when the run is finished and kept the recipe's promises, 3 when it is finished and did not, 2 for a command line
or recipe that cannot be used, 1 for a run that could not go on, 130 when interrupted.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from accelerated.recipe import CommandLine, RecipeError, parse_command_line
from accelerated.run_folder import RunFolder


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; every foreseeable trouble is one sentence on stderr."""
    started = time.monotonic()
    try:
        command = parse_command_line(sys.argv[1:] if arguments is None else arguments)
        return run(command, started)
    except RecipeError as error:
        return _complain(error, 2)
    except (RuntimeError, ValueError, OSError, ImportError) as error:
        return _complain(error, 1)
    except KeyboardInterrupt:
        return _complain("interrupted: the run is not finished, the same command starts it anew", 130)


def run(command: CommandLine, started: float) -> int:
    """Train as `command` says, unless that has been done already; print how the model compares; return the exit status."""
    recipe, folder = command.to_recipe(), RunFolder(command.runs / command.name)
    results = None if command.overwrite else folder.finished(recipe)
    if results is None:
        folder.start(recipe, command.overwrite)
        from accelerated.engine import train  # here, since torch takes seconds to import: --help and a wrong key should not

        results = train(recipe, folder, command.cache, started)
    else:
        print(f"{folder.path} holds a finished run of this recipe: nothing to train (--overwrite true trains it again)")
    ...
