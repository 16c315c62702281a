"""How fast the kernels are: `python -m benchmarks.kernels [--json FILE] [--operations NAME ...] [--repeats N] [--quick]`.

With a CUDA device: for every operation, size and dtype of `benchmarks.kernel_cases`, and every rung, the forward pass, the
backward pass and both, beside PyTorch eager, torch.compile, and for attention PyTorch's fused one, all in turns. `operator` is
the last rung as training calls it, through `accelerated.operators` and autograd. Printed: the median time of the device's work,
and of a call from its beginning until that is done; the least traffic and operations (`benchmarks.kernel_traffic`) per second, as
shares of what copies and products of matrices reach on this card; the peak memory beyond inputs and their gradients; and how many
times as long the peers take. At the end, what the kernels promise, each PASS or FAIL.

Without one, the same is run at small sizes on the host, where the kernels are emulated.

The status is 0 where all went well, 1 where a kernel failed, disagreed with PyTorch or broke a promise, 2 for a command line that
makes no sense or a GPU that cannot be used.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from accelerated import use_kernels
from accelerated.command_line import Parser, sentence
from accelerated.operators import cupy_for
from benchmarks import kernel_clocks
from benchmarks.kernel_bars import Bar, Row, bars
from benchmarks.kernel_cases import OPERATIONS, rungs_of
from benchmarks.kernel_clocks import PARTS, Clock, GpuClock, Limits, Passes, Times, run_of
from benchmarks.kernel_problems import Case, Draw, Problem
from benchmarks.reference import processor

HOST = (
    "There is no CUDA device: the kernels' emulation on the host runs at small sizes, to show that it agrees with PyTorch, "
    "and its times say nothing of a GPU."
)
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 2e-2}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the command line asks for, print it, and return the status."""
    try:
        options = parse(arguments)
    except SystemExit as end:
        return int(end.code or 0)
    with use_kernels("none"):  # the peers are torch alone
        return run(options)


def run(options: argparse.Namespace) -> int:
    """The same for options that make sense."""
    on_gpu = torch.cuda.is_available()
    about, found, clock = {"device": "CUDA" if on_gpu else "host"}, None, Clock()
    if on_gpu:
        try:
            about |= prepare_gpu()
            clock = GpuClock()
            found = kernel_clocks.limits(clock)
        except (ImportError, RuntimeError) as error:
            print(f"error: the GPU cannot be used: {first_line(error)}", file=sys.stderr)
            return 2
    else:
        about["hardware"] = processor()
        print(HOST)
    about |= {"torch": torch.__version__, "NumPy": np.__version__, "Python": platform.python_version()}
    about["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    if found is not None:
        rates = ", ".join(f"{rate / 1e12:.1f} TFLOP/s in {dtype}" for dtype, rate in found.products.items())
        print(f"limits: copies reach {found.copied / 1e9:.0f} GB/s, products of matrices {rates}", flush=True)
    repeats = options.repeats or ((3 if options.quick else 15) if on_gpu else (1 if options.quick else 3))
    rows: list[Row] = []
    stopped = False
    for name in options.operations:
        for case in OPERATIONS[name].cases(name, host=not on_gpu):
            try:
                new = measure(case, clock, repeats, found, compiled=on_gpu and not options.quick)
            except RuntimeError as error:  # memory that does not suffice, or a GPU that an earlier form left in error
                print(f"\nFAIL  {case}: {first_line(error)}")
                stopped = True
                continue
            print_case(case, new)
            rows += new
            write(options.json, about, found, rows, [])  # what was measured so far, should the run be ended
    kept = bars(rows) if on_gpu else []
    write(options.json, about, found, rows, kept)
    if on_gpu:
        print("\n" + "\n".join(bar.text for bar in kept))
    else:
        print_work(options.operations)
    broken = dict.fromkeys(
        (row.operation, row.dtype, row.layout, row.form, row.failure) for row in rows if row.failure and is_kernel(row.form)
    )
    for form in broken:
        print("FAIL  " + " ".join(filter(None, form)))
    return 1 if stopped or broken or not all(bar.passed for bar in kept) else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options. SystemExit with status 2, after one sentence, where they make no sense."""
    parser = Parser(prog="python -m benchmarks.kernels", description=__doc__.split("\n")[0])
    parser.add_argument("--json", metavar="FILE", type=Path, help="write everything measured to this file too")
    parser.add_argument("--operations", metavar="NAME", nargs="+", default=list(OPERATIONS), help=", ".join(OPERATIONS))
    parser.add_argument("--repeats", metavar="N", type=int, help="runs of each form, in turns, after one that is not counted")
    parser.add_argument("--quick", action="store_true", help="few runs, and no torch.compile")
    options = parser.parse_args(arguments)
    for name in options.operations:
        if name not in OPERATIONS:
            parser.error(f"unknown operation {name!r}: expected some of {', '.join(OPERATIONS)}")
    options.operations = list(dict.fromkeys(options.operations))
    if options.repeats is not None and options.repeats < 1:
        parser.error(f"--repeats is {options.repeats}: expected a whole number from 1 on")
    if options.json is not None:
        try:
            with options.json.open("a", encoding="utf-8"):
                pass
        except OSError as error:
            parser.error(f"--json cannot be written: {sentence(error)}")
    return options


def prepare_gpu() -> dict[str, str]:
    """Names and versions of the GPU and its software. ImportError, RuntimeError where the kernels cannot run on it."""
    from kernels import compile as nvrtc

    nvrtc.include_folder(nvrtc.nvrtc().getVersion()[0])
    torch.set_float32_matmul_precision("highest")  # float32 is compared with float32
    return kernel_clocks.versions()


# ---- measuring -----------------------------------------------------------------------------------------------------------------


def poisoned(device: str) -> Any:
    """Allocates results full of what must not stay there."""
    return lambda shape, dtype: torch.full(shape, math.nan if dtype.is_floating_point else 77, device=device).to(dtype)


def forms_of(case: Case, problem: Problem, device: str, compiled: bool) -> dict[str, tuple[Passes, Passes]]:
    """Every form of a case by name, twice: to be checked, and to be timed."""

    def fresh(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    forms = {}
    for rung in rungs_of(case):
        forms[f"rung {rung}"] = problem.kernel(rung, poisoned(device)), problem.kernel(rung, fresh)
    peers = problem.peers | {"eager": problem.plain}
    if compiled:
        torch._dynamo.reset()  # so that the cases before do not count towards its limit of versions
        peers["compiled"] = torch.compile(problem.plain, dynamic=False)
    for name, function in peers.items():
        passes = problem.in_torch(function)
        forms[name] = passes, passes
    return forms


def values(passes: Passes) -> tuple[torch.Tensor, ...]:
    """Results and gradients of one run."""
    state = passes.forward()
    found = passes.results(state)
    return found if passes.backward is None else (*found, *passes.backward(state))


def distance(found: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> float:
    """The largest of ‖x - exact‖ / ‖exact‖; NaN where anything is."""
    errors = [0.0]
    for x, wanted in zip(found, exact, strict=True):
        if x.shape != wanted.shape:
            raise RuntimeError(f"a result has shape {tuple(x.shape)}, expected {tuple(wanted.shape)}")
        wanted = wanted.double()
        errors.append(float((x.detach().double() - wanted).norm()) / (float(wanted.norm()) or 1.0))
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def first_line(error: Exception) -> str:
    """What went wrong, without the advice and traces that CUDA and torch.compile add."""
    return str(error).strip().partition("\n")[0]


def is_kernel(form: str) -> bool:
    """Whether this form is ours and no peer."""
    return form == "operator" or form.startswith("rung")


def compare(case: Case, problem: Problem, forms: dict[str, tuple[Passes, Passes]]) -> tuple[dict[str, float], dict[str, str]]:
    """Run every form once: the errors of those that run, and a sentence for each that does not, or is a kernel and wrong."""
    tolerance = TOLERANCES[case.dtype] if problem.tolerance is None else problem.tolerance
    reference = problem.exact()
    exact = tuple(tensor.detach() for tensor in values(reference.in_torch(reference.plain)))
    errors: dict[str, float] = {}
    failures: dict[str, str] = {}
    for name, (checked, _) in forms.items():
        try:
            errors[name] = distance(values(checked), exact)
        except Exception as error:  # a form that cannot run must not hide the others
            failures[name] = f"{type(error).__name__}: {first_line(error)}"
            continue
        if is_kernel(name) and not errors[name] <= tolerance:
            failures[name] = f"the error against PyTorch is {errors[name]:.2g}, expected at most {tolerance:g}"
    return errors, failures


def measure(case: Case, clock: Clock, repeats: int, found: Limits | None, compiled: bool) -> list[Row]:
    """The rows of one case: every form is run once and compared, then timed, then its memory is measured."""
    problem = OPERATIONS[case.operation].problem(case, Draw(clock.device))
    gradients = sum(leaf.nbytes for leaf in problem.leaves)
    times: dict[str, dict[str, Times]] = {}
    with cupy_for(problem.inputs[0]):
        forms = forms_of(case, problem, clock.device, compiled)
        errors, failures = compare(case, problem, forms)
        timed = {name: passes for name, (_, passes) in forms.items() if name in errors}
        for part in PARTS:
            runs = {name: one for name, passes in timed.items() if (one := run_of(part, passes)) is not None}
            times[part] = clock.interleaved(runs, repeats)
        memory = {name: clock.extra_memory(passes, gradients) for name, passes in timed.items()}
    rows = []
    for name in forms:
        for part in PARTS if problem.dout else PARTS[:1]:
            row = row_of(case, name, part, times[part], found)
            extra = memory.get(name, {}).get(part)
            rows.append(row._replace(extra_bytes=extra, error=errors.get(name), failure=failures.get(name)))
    return rows


def row_of(case: Case, form: str, part: str, times: dict[str, Times], found: Limits | None) -> Row:
    """What the times of all forms in one part say about one of them."""
    moved, operations = OPERATIONS[case.operation].work(case).of(part)
    row = Row(case.operation, case.size, case.dtype, case.layout, form, part, form == f"rung {case.rungs}")
    row = row._replace(bytes=moved, operations=operations)
    if form not in times:
        return row
    seconds, call_seconds = times[form]
    copy, product = kernel_clocks.shares(seconds, moved, operations, case.dtype, found)
    ratios = {peer: taken.seconds / seconds for peer, taken in times.items() if seconds and peer != form and not is_kernel(peer)}
    return row._replace(seconds=seconds, call_seconds=call_seconds, copy_share=copy, product_share=product, peers=ratios)


# ---- what is shown -------------------------------------------------------------------------------------------------------------


def print_case(case: Case, rows: Sequence[Row]) -> None:
    """One case's part of the table, without columns that hold nothing. A form that did not run has one line, its sentence."""
    print(f"\n{case}: at least {work_of(case)}")
    columns = [
        Column("ms", lambda row: row.seconds, 1e3, ".3f"),
        Column("call ms", lambda row: row.call_seconds, 1e3, ".3f"),
        Column("of copy", lambda row: row.copy_share, 1, ".0%"),
        Column("of product", lambda row: row.product_share, 1, ".0%"),
        Column("extra MB", lambda row: row.extra_bytes, 1e-6, ".1f"),
        Column("error", lambda row: row.error, 1, ".1e"),
    ]
    for peer in dict.fromkeys(peer for row in rows for peer in row.peers):
        columns.append(Column(f"x {peer}", lambda row, peer=peer: row.peers.get(peer), 1, ".2f"))
    columns = [column for column in columns if any(column.value(row) is not None for row in rows)]
    print(f"{'':20}" + "".join(f"{column.head:>12}" for column in columns))
    for row in rows:
        if row.seconds is not None:
            print(f"  {row.form:9}{row.part:9}" + "".join(column.cell(row) for column in columns))
    for form, failure in dict.fromkeys((row.form, row.failure) for row in rows if row.failure):
        print(f"  {form:9}{failure}")
    sys.stdout.flush()


class Column(NamedTuple):
    """A column of the table: which number of a row, times a factor, in which format."""

    head: str
    value: Callable[[Row], float | None]
    factor: float
    style: str

    def cell(self, row: Row) -> str:
        """The row's figure, or a dash where there is none."""
        value = self.value(row)
        return f"{'-' if value is None else format(value * self.factor, self.style):>12}"


def work_of(case: Case) -> str:
    """The least that a case must do, in words."""
    work = OPERATIONS[case.operation].work(case)
    texts = []
    for part in PARTS[:2] if work.backward_bytes else PARTS[:1]:
        moved, operations = work.of(part)
        texts.append(f"{part} {moved / 1e6:.4g} MB" + (f" and {operations / 1e9:.4g} GFLOP" if operations else ""))
    return ", ".join(texts)


def print_work(operations: Sequence[str]) -> None:
    """What every case of the table for a GPU must at least do."""
    print("\nThe least that a GPU must do, at the sizes measured there:")
    for name in operations:
        for case in OPERATIONS[name].cases(name, host=False):
            print(f"  {case}: {work_of(case)}")


def write(path: Path | None, about: dict[str, str], found: Limits | None, rows: list[Row], kept: list[Bar]) -> None:
    """Write all of it as JSON, if a file was named. What is not finite is null there."""
    if path is None:
        return
    document = {
        "about": about,
        "limits": None if found is None else found._asdict(),
        "rows": [row._asdict() for row in rows],
        "bars": [bar._asdict() for bar in kept],
    }
    path.write_text(json.dumps(finite(document), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def finite(value: Any) -> Any:
    """The same with None for every number that is not finite."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
