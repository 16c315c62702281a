"""`python -m benchmarks.kernels`: the least traffic is that of the arrays, the table agrees, and what is wrong is said."""

from __future__ import annotations

import functools
import json
import time
import types

import ml_dtypes
import numpy as np
import pytest
import torch

from accelerated import use_kernels
from accelerated.kernel_paths import by_kernel
from benchmarks import kernel_clocks, kernel_problems, kernel_traffic
from benchmarks.kernel_bars import Row, bars
from benchmarks.kernel_cases import OPERATIONS, Operation
from benchmarks.kernel_clocks import Clock, Limits, Run, shares
from benchmarks.kernel_problems import Case, Draw
from benchmarks.kernels import distance, main
from kernels import alignment, attention, confusion, cross_entropy, fusion, losses, reassemble

DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])


def bytes_of(*arrays: np.ndarray) -> int:
    return sum(array.nbytes for array in arrays)


def ones(*shape: int, dtype: object) -> np.ndarray:
    return np.ones(shape, dtype)


# ---- the least traffic ---------------------------------------------------------------------------------------------------------


@DTYPES
def test_traffic_of_the_depth_loss(dtype):
    prediction, target = ones(2, 3, 5, dtype=dtype), ones(2, 3, 5, dtype=np.float32)
    mask = ones(2, 3, 5, dtype=np.bool_)
    loss, saved = losses.depth_loss(prediction, target, mask)
    gradient = losses.depth_loss_backward(np.ones_like(loss), prediction, saved)
    work = kernel_traffic.depth_loss(prediction.size, prediction.itemsize)
    assert work.forward_bytes == bytes_of(prediction, target, mask)
    assert work.backward_bytes == bytes_of(prediction, target, mask, gradient)
    per_pixel = (9, 13) if dtype is np.float32 else (7, 9)
    assert work[:2] == (per_pixel[0] * 30, per_pixel[1] * 30)


@DTYPES
@pytest.mark.parametrize("labels_dtype", [np.uint8, np.int64])
def test_traffic_of_the_cross_entropy(dtype, labels_dtype):
    logits, labels = ones(2, 3, 4, 5, dtype=dtype), ones(2, 7, 9, dtype=labels_dtype)
    found = cross_entropy.cross_entropy(logits, labels)
    dlogits = cross_entropy.cross_entropy_backward(np.ones(1, np.float32), logits, labels, found)
    work = kernel_traffic.cross_entropy(logits.size, labels.size, logits.itemsize, labels.itemsize)
    assert work.forward_bytes == bytes_of(logits, labels, found.log_sum_exp)
    assert work.backward_bytes == bytes_of(logits, labels, found.log_sum_exp, dlogits)


@DTYPES
def test_traffic_of_upsample_add(dtype):
    x, skip = ones(2, 3, 4, 5, dtype=dtype), ones(2, 3, 8, 9, dtype=dtype)
    out = fusion.upsample_add(x, skip)
    dx = fusion.upsample_backward(out, (4, 5))
    work = kernel_traffic.upsample_add(x.size, out.size, x.itemsize)
    assert work.forward_bytes == bytes_of(x, skip, out)
    assert work.backward_bytes == bytes_of(out, dx)


@DTYPES
def test_traffic_and_operations_of_attention(dtype):
    q, k = ones(2, 3, 5, 8, dtype=dtype), ones(2, 3, 7, 8, dtype=dtype)
    out, lse = attention.attend(q, k, k, rung=1)
    gradients = attention.attend_backward(q, k, k, out, lse, out, rung=1)
    work = kernel_traffic.attention(6, 5, 7, 8, q.itemsize)
    assert work.forward_bytes == bytes_of(q, k, k, out, lse)
    assert work.backward_bytes == bytes_of(q, k, k, out, lse, out, *gradients)
    product = 2 * 6 * 5 * 7 * 8  # additions and multiplications of q k^T
    assert (work.forward_operations, work.backward_operations) == (2 * product, 5 * product)


@DTYPES
def test_traffic_of_read_project(dtype):
    tokens, readout, bias = ones(2, 6, 4, dtype=dtype), ones(2, 4, dtype=dtype), ones(4, dtype=dtype)
    out = reassemble.read_project(tokens, readout, bias, (2, 3))
    dtokens = reassemble.read_project_backward(out, tokens, readout, bias).dtokens
    work = kernel_traffic.read_project(tokens.size, tokens.itemsize)
    assert work.forward_bytes == bytes_of(tokens, out)
    assert work.backward_bytes == bytes_of(out, tokens, dtokens)


@DTYPES
def test_traffic_of_least_squares(dtype):
    prediction, mask = ones(2, 3, 5, dtype=dtype), ones(2, 3, 5, dtype=np.bool_)
    alignment.least_squares(prediction, prediction, mask)
    work = kernel_traffic.least_squares(prediction.size, prediction.itemsize)
    assert work.forward_bytes == bytes_of(prediction, prediction, mask)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_traffic_of_confusion(dtype):
    label = ones(2, 3, 5, dtype=dtype)
    counts = confusion.confusion(label, label, 4)
    assert kernel_traffic.confusion(label.size, label.itemsize, 4).forward_bytes == bytes_of(label, label, counts)


def test_the_work_of_both_parts_is_their_sum():
    work = kernel_traffic.Work(3, 5, 7, 11)
    assert [work.of(part) for part in kernel_clocks.PARTS] == [(3, 7), (5, 11), (8, 18)]


@pytest.mark.parametrize("host", [True, False])
@pytest.mark.parametrize("name", OPERATIONS)
def test_the_work_of_a_case_is_that_of_its_data(monkeypatch, name, host):
    """At every size, a GPU's too: tensors on "meta" have no memory."""
    monkeypatch.setattr(kernel_problems, "as_array", lambda tensor: None)
    draw = object.__new__(Draw)
    draw.device, draw.generator = "meta", None
    for case in OPERATIONS[name].cases(name, host):
        problem = OPERATIONS[name].problem(case, draw)
        first, *_ = problem.inputs
        read, written = sum(tensor.nbytes for tensor in problem.inputs), sum(tensor.nbytes for tensor in problem.dout)
        forward = {
            "depth_loss": read,
            "cross_entropy": read + 4 * problem.inputs[1].numel(),
            "upsample_add": read + written,
            "attention": read + written + 4 * first[..., 0].numel(),
            "read_project": first.nbytes + written,
            "least_squares": read,
            "confusion": read + 8 * case.size.get("classes", 0) ** 2,
        }[name]
        backward = {
            "depth_loss": read + first.nbytes,
            "cross_entropy": forward + first.nbytes,
            "upsample_add": written + first.nbytes,
            "attention": forward + read + written,
            "read_project": forward + first.nbytes,
        }.get(name, 0)
        work = OPERATIONS[name].work(case)
        assert (work.forward_bytes, work.backward_bytes) == (forward, backward), case
        if name == "attention":
            assert work.forward_operations == 4 * first.numel() * first.shape[2]


# ---- the program ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_host(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_the_whole_table_on_the_host(on_host, tmp_path, capsys):
    file = tmp_path / "figures.json"
    assert main(["--quick", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("There is no CUDA device: the kernels' emulation on the host runs at small sizes")
    assert "cross_entropy (images 4, classes 150, side 240, labels 480) float32: forward 142.8 MB, backward 281.1 MB" in printed
    assert "attention (images 16, heads 16, tokens 577, depth 64) bfloat16: forward 76.22 MB and 21.82 GFLOP" in printed
    document = json.loads(file.read_text())
    assert document["about"]["device"] == "host" and document["limits"] is None and document["bars"] == []
    rows = document["rows"]
    assert {row["operation"] for row in rows} == set(OPERATIONS)
    for name, operation in OPERATIONS.items():
        for case in operation.cases(name, host=True):
            of_case = [row for row in rows if (row["operation"], row["dtype"], row["layout"]) == (name, case.dtype, case.layout)]
            forms = {row["form"] for row in of_case}
            assert {f"rung {case.rungs}", "eager"} <= forms
            parts = {"forward", "backward", "both"} if operation.work(case).backward_bytes else {"forward"}
            assert {(row["form"], row["part"]) for row in of_case} == {(form, part) for form in forms for part in parts}
            assert {row["form"] for row in of_case if row["last"]} == {f"rung {case.rungs}"}
    for row in rows:
        assert row["failure"] is None
        assert row["seconds"] > 0 and row["bytes"] > 0 and row["error"] < 2e-2
        assert row["extra_bytes"] is None and row["copy_share"] is None and row["call_seconds"] is None
        assert ("eager" in row["peers"]) == (row["form"] != "eager")
    eager = {(row["operation"], row["dtype"], row["layout"], row["part"]): row for row in rows if row["form"] == "eager"}
    for row in rows:
        if row["form"] != "eager":
            theirs = eager[row["operation"], row["dtype"], row["layout"], row["part"]]["seconds"]
            assert row["peers"]["eager"] == pytest.approx(theirs / row["seconds"])


def test_a_kernel_that_writes_nothing_is_found(on_host, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(fusion, "upsample_add", lambda *arrays, **options: None)
    file = tmp_path / "figures.json"
    assert main(["--quick", "--operations", "upsample_add", "--json", str(file)]) == 1
    assert "FAIL  upsample_add float32 channels_first rung 2 the error against PyTorch is nan" in capsys.readouterr().out
    rung = next(row for row in json.loads(file.read_text())["rows"] if row["form"] == "rung 2")
    assert rung["error"] is None and rung["failure"].startswith("the error")


def test_a_form_that_cannot_run_hides_no_other(on_host, monkeypatch, capsys):
    def fails(*arrays: object, **options: object) -> None:
        raise RuntimeError("no such kernel\nwith a long story")

    monkeypatch.setattr(fusion, "upsample_backward", fails)
    assert main(["--quick", "--operations", "upsample_add"]) == 1
    printed = capsys.readouterr().out
    assert "FAIL  upsample_add float32 channels_first rung 2 RuntimeError: no such kernel\n" in printed
    assert "  eager    both" in printed


def test_the_peers_are_torch_whatever_the_switch_says(on_host, monkeypatch):
    switched = []

    def measure(case: Case, *arguments: object, **options: object) -> list[Row]:
        switched.append(by_kernel(case.operation, "cpu"))
        return []

    monkeypatch.setattr("benchmarks.kernels.measure", measure)
    with use_kernels("host"):
        assert by_kernel("confusion", "cpu")
        assert main(["--quick"]) == 0
    assert set(switched) == {False} and len(switched) > len(OPERATIONS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--operations", "fusion"], "unknown operation 'fusion': expected some of depth_loss, cross_entropy"),
        (["--operations"], "expected at least one argument"),
        (["--repeats", "0"], "--repeats is 0: expected a whole number from 1 on"),
        (["--repeats", "two"], "invalid int value: 'two'"),
        (["--json", "no/such/figures.json"], "--json cannot be written: no/such/figures.json: No such file or directory"),
        (["--json", "."], "--json cannot be written: .: Is a directory"),
    ],
)
def test_a_command_line_that_makes_no_sense_is_refused_before_anything_is_computed(monkeypatch, capsys, arguments, words):
    monkeypatch.setattr("benchmarks.kernels.measure", None)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and words in captured.err and captured.err.count("\n") == 1


def test_distance_is_of_the_worst_result():
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64), torch.tensor([True])
    assert distance((torch.tensor([3.0, 4.5]), torch.tensor([True])), exact) == pytest.approx(0.1)
    assert distance((torch.tensor([3.0, 4.0]), torch.tensor([False])), exact) == 1
    assert np.isnan(distance((torch.tensor([3.0, torch.nan]), torch.tensor([False])), exact))
    with pytest.raises(RuntimeError, match=r"a result has shape \(1,\), expected \(2,\)"):
        distance((torch.tensor([3.0]), torch.tensor([True])), exact)


# ---- clocks and promises -------------------------------------------------------------------------------------------------------


def test_forms_take_turns_and_the_first_does_not_count():
    order = []

    def run(name: str, pauses: list[float]) -> Run:
        def once(state: str) -> None:
            order.append(name)
            time.sleep(pauses.pop(0))

        return Run(lambda: name, once)

    times = Clock().interleaved({"a": run("a", [0.3, 0.01, 0.02, 0.1]), "b": run("b", [0] * 4)}, 3)
    assert order == list("abababab")
    assert 0.02 <= times["a"].seconds < 0.06


def test_a_slow_form_takes_part_in_three_turns(monkeypatch):
    monkeypatch.setattr(kernel_clocks, "ENOUGH", 0.0)
    count = iter(range(100))
    Clock().interleaved({"a": Run(lambda: None, lambda _: next(count))}, 20)
    assert next(count) == 4


def test_shares_are_of_the_limits():
    limits = Limits(copied=100.0, products={"float32": 1000.0, "float16": 4000.0})
    assert shares(2.0, 50, 1000, "float16", limits) == (0.25, 0.125)
    assert shares(2.0, 50, 0, "float32", limits) == (0.25, None)
    assert shares(2.0, 50, 1000, "float32", None) == (None, None)


def test_limits_count_what_is_read_and_written(a_pretended_gpu, monkeypatch):
    monkeypatch.setattr(kernel_clocks.GpuClock, "seconds", lambda self, run, ahead: 2.0)
    found = kernel_clocks.limits(object.__new__(kernel_clocks.GpuClock))
    assert found.copied == 2 * 2**20 / 2.0
    assert found.products == dict.fromkeys(("float32", "float16", "bfloat16"), 2 * 32**3 / 2.0)


def row(operation: str, form: str, part: str, last: bool = False, **numbers: object) -> Row:
    return Row(operation, {"images": numbers.pop("images", 16)}, "float32", "", form, part, last, **numbers)


def test_promises_are_judged_by_the_last_rung():
    rows = [
        row("depth_loss", "rung 1", "both", peers={"eager": 0.1}),
        row("depth_loss", "rung 2", "both", True, peers={"eager": 5.0}, copy_share=0.01),
        row("depth_loss", "rung 2", "both", True, images=128, peers={"eager": 1.0}, copy_share=0.19),
        row("depth_loss", "rung 2", "forward", True, peers={"eager": 1.0}),
        row("cross_entropy", "eager", "both", images=4, extra_bytes=500),
        row("cross_entropy", "eager", "forward", images=4, extra_bytes=1),
        row("cross_entropy", "rung 2", "both", True, images=4, peers={"eager": 0.9}, extra_bytes=100),
        row("upsample_add", "rung 2", "forward", True, copy_share=0.8),
        row("upsample_add", "rung 2", "backward", True, copy_share=0.9, failure="the error is large"),
        row("attention", "rung 2", "forward", True, peers={"SDPA": 0.4, "eager": 9.0}),
        row("attention", "rung 2", "backward", True, peers={"eager": 9.0}),
        row("confusion", "rung 3", "forward", True),
    ]
    found = [(bar.passed, bar.figure, bar.least) for bar in bars(rows)]
    assert found == [
        (True, 5.0, 5.0),
        (False, 0.19, 0.2),
        (True, 5.0, 5.0),
        (False, 0.9, 1.0),
        (True, 0.8, 0.8),
        (False, 0.9, 0.8),
        (True, 0.4, 0.4),
        (False, None, 0.4),
    ]
    texts = [bar.text for bar in bars(rows)]
    assert texts[0] == "PASS  depth_loss (images 16) float32 both: 5.00 times as fast as eager, promised 5"
    assert texts[5].startswith("FAIL") and texts[5].endswith("; the error is large")
    assert texts[7] == "FAIL  attention (images 16) float32 backward: not measured, promised 0.4"


class Event:
    """Of a GPU: here, the CPU's time."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at)


@pytest.fixture
def a_pretended_gpu(monkeypatch):
    """The program's path for a GPU, on the CPU: small sizes, a CPU's events, memory that grows by a kilobyte at every look."""
    memory = iter(range(0, 10**9, 1024))
    card = types.SimpleNamespace(name="Pretended", L2_cache_size=1024)
    pretended = {
        "is_available": lambda: True,
        "get_device_properties": lambda device: card,
        "Event": Event,
        "_sleep": lambda cycles: None,
        "synchronize": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: next(memory),
        "max_memory_allocated": lambda: next(memory),
    }
    for name, value in pretended.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    monkeypatch.setattr(kernel_clocks, "DEVICE", "cpu")
    monkeypatch.setattr(kernel_clocks, "OTHER_BYTES", 4096)
    monkeypatch.setattr(kernel_clocks, "limits", functools.partial(kernel_clocks.limits, megabytes=1, side=32))
    cases = Operation.cases
    monkeypatch.setattr(Operation, "cases", lambda self, name, host: cases(self, name, host=True))


def test_the_path_for_a_gpu(a_pretended_gpu, tmp_path, capsys):
    file = tmp_path / "figures.json"
    operations = ["cross_entropy", "upsample_add", "attention", "confusion"]
    main(["--repeats", "1", "--operations", *operations, "--json", str(file)])
    printed = capsys.readouterr().out
    document = json.loads(file.read_text())
    about = document["about"]
    assert about["device"] == "CUDA" and about["hardware"] == "Pretended"
    assert {"driver", "CUDA", "torch", "CuPy", "NumPy", "Python", "date"} <= set(about)
    assert "limits: copies reach" in printed
    assert document["limits"]["copied"] > 0 and set(document["limits"]["products"]) == {"float32", "float16", "bfloat16"}
    for found in document["rows"]:
        assert found["failure"] is None
        assert found["seconds"] > 0 and found["call_seconds"] > 0 and found["extra_bytes"] >= 0
        assert found["copy_share"] == pytest.approx(found["bytes"] / found["seconds"] / document["limits"]["copied"])
        assert (found["product_share"] is not None) == (found["operation"] == "attention")
        assert ("compiled" in found["peers"]) == (found["form"] != "compiled")
        assert ("SDPA" in found["peers"]) == (found["operation"] == "attention" and found["form"] != "SDPA")
    lines = [bar["text"] for bar in document["bars"]]
    assert len(lines) == 3 * 2 + 6 * 2 + 3 * 2
    assert printed.endswith("\n".join(lines) + "\n")
    assert "nothing of a GPU" not in printed


def test_memory_is_what_the_peaks_exceed(a_pretended_gpu, monkeypatch):
    """Allocated: 100 before, 130 after the forward pass, whose peak is 170; the backward pass's peak is 260, its gradients 50."""
    allocated, peaks = iter([100, 130]), iter([170, 260])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: next(allocated))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: next(peaks))
    passes = kernel_clocks.Passes(lambda: "state", lambda state: None, tuple)
    assert kernel_clocks.GpuClock().extra_memory(passes, 50) == {"forward": 70, "backward": 80, "both": 110}


def test_a_gpu_without_cupy_is_refused_in_one_sentence(a_pretended_gpu, monkeypatch, capsys):
    def lacking() -> None:
        raise ImportError("compiling a kernel for a GPU needs CuPy and its NVRTC")

    monkeypatch.setattr("kernels.compile.nvrtc", lacking)
    assert main([]) == 2
    captured = capsys.readouterr()
    assert captured.err == "error: the GPU cannot be used: compiling a kernel for a GPU needs CuPy and its NVRTC\n"
    assert captured.out == ""


def test_what_ends_one_case_is_said_and_the_next_is_measured(a_pretended_gpu, monkeypatch, capsys):
    def out_of_memory(*arguments: object) -> None:
        raise RuntimeError("CUDA out of memory.\nTried to allocate more")

    monkeypatch.setattr(kernel_problems, "plain_upsample_add", out_of_memory)
    assert main(["--repeats", "1", "--operations", "upsample_add", "confusion"]) == 1
    printed = capsys.readouterr().out
    assert "FAIL  upsample_add (images 2, channels 8, side 6, out 12) float32 channels_first: CUDA out of memory.\n" in printed
    assert "\nconfusion (images 2, side 21, classes 7) uint8" in printed


@pytest.mark.gpu
def test_the_table_on_a_gpu(tmp_path):
    file = tmp_path / "figures.json"
    main(["--quick", "--repeats", "1", "--json", str(file)])
    document = json.loads(file.read_text())
    assert {found["operation"] for found in document["rows"]} == set(OPERATIONS)
    for found in document["rows"]:
        assert found["failure"] is None and found["seconds"] > 0 and found["extra_bytes"] is not None
    assert document["bars"]
