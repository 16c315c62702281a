"""How fast the NumPy/Cython reference is beside PyTorch: `python -m benchmarks.reference [--models ...] [--openblas CORE]`.

For DPT-Base, -Hybrid and -Large at 384 x 384, batch 1, float32, on the same CPU threads and interleaved with each other, one
forward pass of

    reference      reference.forward (with --training: reference.apply and its vjp), its compiled twins in use
    accelerated    accelerated's plain model of the same configuration, PyTorch eager
    transformers   Hugging Face's DPT of the same configuration, PyTorch eager

and (--training) one forward and backward pass. Printed: the median times, the reference's divided by the faster of the others,
the share of the machine's limit, and the peak memory of a process of its own that makes one such pass.

The limit: every product and convolution of the pass alone, at its own shape, by whichever of NumPy, PyTorch and the reference
does it fastest here. Its share is that ideal time divided by the reference's time.

`--openblas CORE` restarts this program with OPENBLAS_CORETYPE=CORE, which NumPy's OpenBLAS reads when it is loaded and which an
import must not change: on a processor that OpenBLAS does not recognise it chooses slower kernels than the processor could run
(SkylakeX asks for those with AVX-512). The reference's compiled twins multiply by themselves, so it changes the limit alone.
"""

from __future__ import annotations

import argparse
import collections
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

SIDE = 384
FORMS = ("reference", "accelerated", "transformers")
MODELS = {"base": "dpt_base", "hybrid": "dpt_hybrid", "large": "dpt_large"}
Pass = Callable[[], Any]


def main() -> None:
    """Measure what the command line asks for and print it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reference", description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=7, help="passes of each form, interleaved, after one that is not counted")
    parser.add_argument("--training", action="store_true", help="forward and backward; Hugging Face's model is left out")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads of every form")
    parser.add_argument("--openblas", metavar="CORE", help="restart with OPENBLAS_CORETYPE=CORE")
    parser.add_argument("--one-pass", nargs=2, metavar=("FORM", "MODEL"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    restart_with_environment(arguments)
    if arguments.one_pass:
        print(peak_of_one_pass(*arguments.one_pass, arguments.training))
        return
    import torch

    torch.set_num_threads(arguments.threads)
    print(f"{processor()}; {arguments.threads} threads; {openblas()}; NumPy {np.__version__}, torch {torch.__version__}")
    for model in arguments.models:
        measure(MODELS[model], arguments)


def restart_with_environment(arguments: argparse.Namespace) -> None:
    """Begin anew where the variables that the libraries read when they are loaded are not as asked."""
    threads = str(arguments.threads)
    wanted = {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    if arguments.openblas:
        wanted["OPENBLAS_CORETYPE"] = arguments.openblas
    if any(os.environ.get(key) != value for key, value in wanted.items()):
        if not arguments.one_pass:
            print("restarting with " + " ".join(f"{key}={value}" for key, value in wanted.items()), flush=True)
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.reference", *sys.argv[1:]], os.environ | wanted)


def measure(name: str, arguments: argparse.Namespace) -> None:
    """Print the times, ratios, share of the limit and peak memories of one model."""
    forms = FORMS[:2] if arguments.training else FORMS
    passes = make_passes(name, arguments.training, forms)
    times = interleaved(passes, arguments.repeats)
    fastest = min(forms[1:], key=lambda form: times[form])
    what = "forward and backward" if arguments.training else "forward"
    print(f"\n{name}, {SIDE} x {SIDE}, batch 1, {what}")
    for form in forms:
        print(f"  {form:13} {times[form] * 1e3:8.0f} ms  {times[form] / times[fastest]:5.2f} x {fastest}")
    if not arguments.training:
        ideal, operations = limit(passes["reference"], arguments.repeats)
        rate, share = operations / ideal / 1e9, ideal / times["reference"]
        print(f"  limit         {ideal * 1e3:8.0f} ms  for {operations / 1e9:.0f} GFLOP, at {rate:.0f} GFLOP/s")
        print(f"  the reference reaches {share:.0%} of the limit")
    peaks = {form: peak_in_a_process(form, name, arguments) for form in forms}
    for form in forms:
        ratio = peaks[form] / peaks[fastest]
        print(f"  {form:13} {peaks[form]:8.0f} MB  at the peak of one pass, weights included  {ratio:5.2f} x {fastest}")


def interleaved(passes: dict[str, Pass], repeats: int) -> dict[str, float]:
    """Median seconds of each pass, made in turn, after one round that is not counted."""
    times: dict[str, list[float]] = collections.defaultdict(list)
    for turn in range(repeats + 1):
        for form, run in passes.items():
            started = time.perf_counter()
            run()
            if turn:
                times[form].append(time.perf_counter() - started)
    return {form: statistics.median(values) for form, values in times.items()}


def make_passes(name: str, training: bool, forms: tuple[str, ...]) -> dict[str, Pass]:
    """One function per form, each with random weights of its own, and the same image."""

    import reference

    config = reference.configuration(name)
    image = np.random.default_rng(0).standard_normal((1, 3, SIDE, SIDE)).astype(np.float32)
    passes: dict[str, Pass] = {}
    if "reference" in forms:
        params = reference.initialize(config, np.random.default_rng(0))

        def train() -> None:
            output, vjp = reference.apply(params, image, config)
            vjp(np.ones_like(output))

        passes["reference"] = train if training else lambda: reference.forward(params, image, config)
    if "accelerated" in forms:
        import accelerated.dpt

        model = accelerated.dpt.from_config(config)
        passes["accelerated"] = torch_pass(model.train(training), image, training)
    if "transformers" in forms:
        passes["transformers"] = torch_pass(their_model(config).eval(), image, training)
    return passes


def torch_pass(model: Any, image: np.ndarray, training: bool) -> Pass:
    """One pass of a torch model."""
    import torch

    tensor = torch.from_numpy(image)

    def run() -> None:
        if not training:
            with torch.inference_mode():
                model(tensor)
            return
        model.zero_grad()
        model(tensor).sum().backward()

    return run


def their_model(config: dict[str, Any]) -> Any:
    """Hugging Face's DPT for depth, of the same sizes, with random weights."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    hybrid = config["embedding"] == "resnet"
    common = {
        "hidden_size": config["embed_dim"],
        "num_hidden_layers": config["depth"],
        "num_attention_heads": config["num_heads"],
        "intermediate_size": config["mlp_dim"],
        "image_size": config["image_size"],
        "neck_hidden_sizes": config["reassemble_widths"],
        "is_hybrid": hybrid,
    }
    if hybrid:
        widths = {"backbone_featmap_shape": [1, 1024, 24, 24], "neck_ignore_stages": [0, 1]}
        return transformers.DPTForDepthEstimation(transformers.DPTConfig(**common, **widths, backbone_out_indices=[2, 5, 8, 11]))
    return transformers.DPTForDepthEstimation(transformers.DPTConfig(**common, backbone_out_indices=config["taps"]))


# ---- the limit -----------------------------------------------------------------------------------------------------------------


@contextmanager
def recorded(calls: collections.Counter[tuple[Any, ...]]) -> Iterator[None]:
    """Count what products and convolutions the reference makes, by operation and shapes, within a `with` block."""
    from reference import nn

    originals = {name: getattr(nn, name) for name in ("linear", "scaled_dot_product_attention", "conv2d", "conv_transpose2d")}

    def watch(name: str, x: np.ndarray, weight: np.ndarray, *rest: Any, **options: Any) -> Any:
        stride, padding = options.get("stride", 1), options.get("padding", 0)
        calls[name, x.shape, weight.shape, stride, padding] += 1
        return originals[name](x, weight, *rest, **options)

    for name in originals:
        setattr(nn, name, lambda x, weight, *rest, name=name, **options: watch(name, x, weight, *rest, **options))
    try:
        yield
    finally:
        for name, function in originals.items():
            setattr(nn, name, function)


def limit(run: Pass, repeats: int) -> tuple[float, float]:
    """Seconds that the products and convolutions of a pass of the reference take at their best, and their operations."""
    calls: collections.Counter[tuple[Any, ...]] = collections.Counter()
    with recorded(calls):
        run()
    seconds = operations = 0.0
    for call, count in calls.items():
        candidates, work = contenders(*call)
        seconds += count * min(undisturbed(run, repeats) for run in candidates.values())
        operations += count * work
    return seconds, operations


def undisturbed(run: Pass, repeats: int) -> float:
    """The least seconds of a few passes in a row, after the threads of other libraries have gone to sleep."""
    time.sleep(0.05)
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def contenders(
    name: str, x_shape: tuple[int, ...], weight_shape: tuple[int, ...], stride: int, padding: Any
) -> tuple[dict[str, Pass], float]:
    """Who can compute one operation, and how many floating-point operations it takes when written out."""
    import torch
    import torch.nn.functional as F

    from reference import nn

    rng = np.random.default_rng(0)
    x, weight = (rng.standard_normal(shape).astype(np.float32) for shape in (x_shape, weight_shape))
    tx, tw = torch.from_numpy(x), torch.from_numpy(weight)
    if name == "linear":
        return {
            "reference": lambda: nn.linear(x, weight),
            "NumPy": lambda: np.matmul(x, weight.T),
            "torch": lambda: F.linear(tx, tw),
        }, 2.0 * x.size * len(weight)
    if name == "scaled_dot_product_attention":  # queries, and keys that serve as values too
        return {
            "reference": lambda: nn.scaled_dot_product_attention(x, weight, weight),
            "torch": lambda: F.scaled_dot_product_attention(tx, tw, tw),
        }, 4.0 * x.size * weight.shape[-2]
    if name == "conv_transpose2d":
        work = 2.0 * x_shape[0] * x_shape[2] * x_shape[3] * weight.size
        ours: Pass = lambda: nn.conv_transpose2d(x, weight, stride=stride)  # noqa: E731
        return {"reference": ours, "torch": lambda: F.conv_transpose2d(tx, tw, stride=stride)}, work
    y = nn.conv2d(x, weight, None, stride=stride, padding=padding)[0]
    (top, bottom), (left, right_) = padding if isinstance(padding, tuple) else ((padding, padding), (padding, padding))
    padded = F.pad(tx, (left, right_, top, bottom)) if (top, left) != (bottom, right_) else tx
    side = 0 if padded is not tx else (top, left)
    work = 2.0 * y.size * weight[0].size
    return {
        "reference": lambda: nn.conv2d(x, weight, None, stride=stride, padding=padding),
        "torch": lambda: F.conv2d(padded, tw, stride=stride, padding=side),
    }, work


# ---- memory and the machine ----------------------------------------------------------------------------------------------------


def peak_of_one_pass(form: str, name: str, training: bool) -> float:
    """Megabytes that weights and one pass take at their peak, over what the process held when the libraries were loaded."""
    import torch  # noqa: F401  what is loaded must not count

    import accelerated  # noqa: F401
    import reference  # noqa: F401

    if form == "transformers":
        their_model(_tiny())
    before = resident("VmRSS")
    one = make_passes(name, training, (form,))[form]
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # how the model came to be must not count: the peak begins anew
    one()
    return resident("VmHWM") - before


def resident(key: str) -> float:
    """Megabytes of this process in memory, now (VmRSS) or at its peak (VmHWM). Linux alone tells them apart."""
    with open("/proc/self/status", encoding="ascii") as file:
        return float(next(line.split()[1] for line in file if line.startswith(key))) / 1024


def _tiny() -> dict[str, Any]:
    """A configuration whose model is built only to have everything imported."""
    import reference

    small = {"embed_dim": 8, "depth": 4, "num_heads": 1, "mlp_dim": 8, "taps": [0, 1, 2, 3], "reassemble_widths": [8] * 4}
    return reference.configuration("dpt_base") | small


def peak_in_a_process(form: str, name: str, arguments: argparse.Namespace) -> float:
    """`peak_of_one_pass` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.reference", "--one-pass", form, name, "--threads", str(arguments.threads)]
    done = subprocess.run(command + ["--training"] * arguments.training, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def processor() -> str:
    """The processor's name, as the kernel knows it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def openblas() -> str:
    """What NumPy multiplies with, and the kernels asked for."""
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]  # type: ignore[index]
    return f"{blas['name']} {blas['version']}, OPENBLAS_CORETYPE {os.environ.get('OPENBLAS_CORETYPE', 'as detected')}"


if __name__ == "__main__":
    main()
