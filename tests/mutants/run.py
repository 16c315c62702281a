"""`make mutants`: change the reference in one place at a time, and see whether the tests of the changed module notice.

It works on copies in build/mutants, one a worker, and keeps each result there as it comes: a run that was stopped goes on where
it stood. Results of a module are used as long as its source is the same. What was found is written to tests/mutants/REPORT.md.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import queue
import re
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TypeVar

from tests.mutants.report import Findings, Outcome, page, read_verdicts, stub
from tests.mutants.sample import Mutant, mutants_of, mutate, sample

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "mutants"
RESULTS = BUILD / "results.jsonl"
COPIED = ("reference", "accelerated", "kernels", "tests", "pyproject.toml", "setup.py", "README.md", "LICENSE", "CHANGELOG.md")
MEMORY = 16 << 30  # bytes of address space that one run of tests may take: a mutant may ask for any amount
PYTEST = ["-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-p", "tests.mutants.profile"]

Job = TypeVar("Job")
Result = TypeVar("Result")


class Stop(Exception):
    """A reason not to go on, in a sentence for the person at the terminal."""


def compile_twins() -> Path:
    """Compile the twins as their sources now are, in a folder that is kept so that only what changed is compiled again."""
    folder, sources = BUILD / "twins", ROOT / "reference" / "nn"
    nn = folder / "reference" / "nn"
    nn.mkdir(parents=True, exist_ok=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, folder)
    for suffix in ("*.pyx", "*.pxd", "*.h"):
        for stale in nn.glob(suffix):
            stale.unlink()
        for path in sources.glob(suffix):
            shutil.copy2(path, nn)  # with its time, by which the build sees what changed
    build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    done = subprocess.run(build, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise Stop(f"the twins cannot be compiled:\n{done.stdout[-2000:]}")
    return nn


def copy_checkout(workers: int) -> list[Path]:
    """Copy what the tests need to one folder a worker, with the twins compiled, and return the folders."""
    for stale in BUILD.glob("worker-*"):
        shutil.rmtree(stale)
    folders = [BUILD / f"worker-{k}" for k in range(workers)]
    first, *others = folders
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, first / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.c", "*.cpp"))
        else:
            shutil.copy2(ROOT / name, first / name)
    compiled = compile_twins()
    for source in compiled.glob("*.pyx"):
        shutil.copy2(source.with_name(source.stem + sysconfig.get_config_var("EXT_SUFFIX")), first / "reference" / "nn")
    for folder in others:
        shutil.copytree(first, folder)
    return folders


def run_tests(folder: Path, tests: list[str], limit: int | None) -> tuple[Outcome, str]:
    """Run tests in a copy of the checkout for `limit` seconds of the processor; return how that ended, and pytest's output."""
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    # No bytecode: a mutant of the same second and size as another would be taken for it.
    own = {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0"}
    process = subprocess.Popen(
        [sys.executable, *PYTEST, *tests],
        cwd=folder,
        env=os.environ | one_thread | own,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that what the tests started ends with them
    )
    resource.prlimit(process.pid, resource.RLIMIT_AS, (MEMORY, MEMORY))
    if limit is not None:
        resource.prlimit(process.pid, resource.RLIMIT_CPU, (limit, limit + 1))  # waiting for a busy machine does not count
    try:
        output, _ = process.communicate(timeout=None if limit is None else 10 * limit)
    except subprocess.TimeoutExpired:  # it waits for what never comes
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return Outcome("timed out"), output
    if process.returncode == 0:
        return Outcome("survived"), output
    if process.returncode == -signal.SIGXCPU:
        return Outcome("timed out"), output
    failed = [line.split(" ", 1)[1].split(" - ")[0] for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return Outcome("killed", failed[0] if failed else ""), output


def in_parallel(work: Callable[[Path, Job], Result], jobs: Iterable[Job], folders: list[Path]) -> Iterator[tuple[Job, Result]]:
    """Yield each job with what `work(folder, job)` returned, as they end; no two have a folder at the same time."""
    free: queue.SimpleQueue[Path] = queue.SimpleQueue()
    for folder in folders:
        free.put(folder)

    def with_folder(job: Job) -> Result:
        folder = free.get()
        try:
            return work(folder, job)
        finally:
            free.put(folder)

    with ThreadPoolExecutor(len(folders)) as pool:
        running = {pool.submit(with_folder, job): job for job in jobs}
        try:
            for done in as_completed(running):
                yield running[done], done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def baselines(modules: Iterable[str], tests: dict[str, list[str]], folders: list[Path]) -> dict[str, float]:
    """Run each module's tests on the unchanged code and return their processor seconds; Stop if any do not pass."""

    def run(folder: Path, job: tuple[str, ...]) -> tuple[Outcome, str]:
        return run_tests(folder, list(job), None)

    seconds: dict[str, float] = {}
    failures = []
    of = {module: tuple(tests[module]) for module in modules}
    for job, (outcome, output) in in_parallel(run, sorted(set(of.values())), folders):
        names = [module for module in of if of[module] == job]
        clock = re.search(r"^processor seconds: ([\d.]+)$", output, re.MULTILINE)
        if outcome.end != "survived" or clock is None:
            failures.append(f"the tests of {', '.join(names)} do not pass on the unchanged code:\n{output[-2000:]}")
            continue
        seconds |= dict.fromkeys(names, float(clock[1]))
        print(f"{float(clock[1]):6.1f} s  unchanged: {', '.join(names)}", flush=True)
    if failures:
        raise Stop("\n".join(failures))
    return seconds


def read_results(digests: dict[str, str]) -> dict[tuple[str, str, str, int], Outcome]:
    """Return the kept results of the modules as they now are; of several for one mutant, the last."""
    results = {}
    for line in RESULTS.read_text().splitlines() if RESULTS.exists() else []:
        try:
            kept = json.loads(line)
        except json.JSONDecodeError:
            continue  # the run was stopped while it wrote
        module, *rest = kept["key"]
        if kept["source"] == digests.get(module):
            results[(module, *rest)] = Outcome(kept["end"], kept["test"])
    return results


def run_mutants(
    mutants: list[Mutant], sources: dict[str, str], tests: dict[str, list[str]], folders: list[Path]
) -> Iterator[tuple[Mutant, Outcome]]:
    """Run the tests of each mutant's module with it in place, and yield how it ended."""
    seconds = baselines(dict.fromkeys(mutant.module for mutant in mutants), tests, folders)

    def run(folder: Path, mutant: Mutant) -> Outcome:
        path = folder / mutant.module
        changed = mutate(sources[mutant.module], mutant)
        assert changed is not None, "the sample holds only what can be made"
        path.write_text(changed, encoding="utf-8")
        try:
            return run_tests(folder, tests[mutant.module], round(5 * seconds[mutant.module] + 10))[0]
        finally:
            path.write_text(sources[mutant.module], encoding="utf-8")

    began = time.monotonic()
    for number, (mutant, outcome) in enumerate(in_parallel(run, mutants, folders), 1):
        left = (time.monotonic() - began) / number * (len(mutants) - number)
        at = f"{mutant.module}:{mutant.line}"
        print(f"{number:4}/{len(mutants)}  {left / 60:3.0f} min left  {outcome.end:9}  {at:38} {mutant.operator}", flush=True)
        yield mutant, outcome


def read_tests() -> dict[str, list[str]]:
    """Return the tests of each module: its own, then those that its folder shares."""
    table = tomllib.loads((HERE / "modules.toml").read_text(encoding="utf-8"))
    shared = table["shared"]
    own = table["tests"].items()
    return {module: list(dict.fromkeys(tests + shared.get(os.path.dirname(module), []))) for module, tests in own}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants.run", description=__doc__)
    parser.add_argument("--sample", type=int, default=400, help="mutants to draw, at least (default 400)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default 0)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="runs at a time (default: one a core)")
    parser.add_argument("--module", action="append", metavar="PATH", help="run this module's mutants alone; may be repeated")
    parser.add_argument("--survivors", action="store_true", help="run those again that survived")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Stop(f"another run is at work in {BUILD.relative_to(ROOT)}") from None
        return conclude(find(options))


def find(options: argparse.Namespace) -> Findings:
    """Draw the sample, run what the options ask for, and return all that is known."""
    tests = read_tests()
    folders = copy_checkout(options.workers)
    modules = sorted(path.relative_to(folders[0]).as_posix() for path in (folders[0] / "reference").rglob("*.py"))
    if unknown := set(options.module or ()) - set(modules):
        raise Stop(f"there is no module {', '.join(sorted(unknown))}: expected, say, {modules[-1]}")
    if missing := set(modules) - tests.keys():
        raise Stop(f"modules.toml names no tests of {', '.join(sorted(missing))}")
    sources = {module: (folders[0] / module).read_text(encoding="utf-8") for module in modules}
    digests = {module: hashlib.sha256(source.encode()).hexdigest() for module, source in sources.items()}
    mutants = {module: list(mutants_of(module, source)) for module, source in sources.items()}
    found = Findings(
        options.seed,
        sources,
        {module: len({mutant.place for mutant in all_of_it}) for module, all_of_it in mutants.items()},
        sample(mutants, sources, options.sample, options.seed),
        read_results(digests),
        read_verdicts(HERE / "verdicts.toml"),
    )
    wanted = ("pending", "open", "equivalent") if options.survivors else ("pending",)
    selected = [m for m in found.sampled if m.module in (options.module or modules) and found.status(m) in wanted]
    with RESULTS.open("a") as kept:
        for mutant, outcome in run_mutants(selected, sources, tests, folders):
            found.outcomes[mutant.key] = outcome
            line = {"key": mutant.key, "source": digests[mutant.module], "end": outcome.end, "test": outcome.test}
            print(json.dumps(line), file=kept, flush=True)
    return found


def conclude(found: Findings) -> int:
    """Write the report, and stubs for the verdicts that are missing; return the status to exit with."""
    complete = all(mutant.key in found.outcomes for mutant in found.sampled)
    report = (HERE if complete else BUILD) / "REPORT.md"
    report.write_text(page(found), encoding="utf-8")
    stubs = BUILD / "open.toml"
    stubs.write_text("\n".join(stub(m) for m in found.sampled if found.status(m) == "open"), encoding="utf-8")
    print(page(found))
    problems = found.problems()
    for problem in problems:
        print(f"mutants: {problem}")
    print(f"The report is {report.relative_to(ROOT)}; verdicts to fill in are {stubs.relative_to(ROOT)}.")
    return 1 if problems else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Stop as reason:
        sys.exit(f"mutants: {reason}")
    except KeyboardInterrupt:
        sys.exit("mutants: stopped; the same command goes on from here")
