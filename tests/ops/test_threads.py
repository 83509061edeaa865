"""Large calls on several threads: the same bits for every count, small calls on one thread, counts checked."""

import os
import subprocess
import sys
import threading
import time

import pytest
import torch

import fastee
from fastee import native

pytestmark = pytest.mark.skipif(native.hot is None, reason=f"native parts: {native.reason.get('_hot')}")


@pytest.fixture
def threads():
    before = native.get_num_threads()
    yield native.set_num_threads
    native.set_num_threads(before)


def large():
    g = torch.Generator().manual_seed(5)
    x, weight = torch.randn(131, 1024, 9, generator=g), torch.randn(301, 1024, generator=g) / 32
    head = fastee.ops.exit_step(x, weight, None, pool="mean", measure="entropy", threshold=-4.5, logits=True)
    q = fastee.ops.quantize_rows(x.flatten(1), "int8")
    index = torch.arange(131).flip(0)
    rows = fastee.ops.gather_rows(x, index)
    into = torch.zeros_like(x)
    fastee.ops.scatter_rows(into, index, rows)
    packed = [fastee.ops.pack_planes(v) for v in (x, x.bfloat16(), x.half()[:, :1000])]
    part = fastee.ops.unpack_planes(packed[0].data, 5000, 1_200_000)
    frames, keep = torch.randn(9, 50, 3000, generator=g), torch.rand(9, 50, generator=g) < 0.5
    half = float(head.confidence.median())
    exits = [fastee.ops.exit_pack(v, weight, None, measure="entropy", threshold=half, format=f) for v, f in ((x, "int8"), (x, "int4"), (x.half(), "bf16"))]
    wide = fastee.ops.exit_head(x[:2], torch.randn(7001, 1024, generator=g).bfloat16(), None, pool="mean")  # shared out by classes
    return [wide.label, wide.confidence, *list(wide.stats)[:5], *[p.data for p in packed], *[fastee.ops.unpack_planes(p) for p in packed], part, *[e.wire for e in exits], exits[0].index,
            fastee.ops.feature_delta(x, x.roll(1, 0)), fastee.ops.mean_entropy(frames), fastee.ops.mean_entropy(frames, keep), head.label, head.confidence, head.exits, head.index, head.logits, *list(head.stats)[:5], *list(fastee.ops.row_stats(x.flatten(1)))[:5],
            q.data, q.scale, fastee.ops.dequantize_rows(q), rows, into]  # fmt: skip


def test_results_are_the_same_bits_for_every_count(threads):
    threads(1)
    one = [t.clone() for t in large()]
    for count in (2, 3, 7):
        threads(count)
        assert native.get_num_threads() == count
        assert all(torch.equal(a, b) for a, b in zip(one, large(), strict=True)), count


def test_python_threads_may_call_together(threads):
    threads(1)
    one = [t.clone() for t in large()]
    threads(3)
    wrong = []

    def call():
        wrong.extend(i for i, (a, b) in enumerate(zip(one, large(), strict=True)) if not torch.equal(a, b))

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert not wrong and not any(caller.is_alive() for caller in callers)


@pytest.mark.parametrize("pooled", [False, True], ids=["product", "pool"])
def test_a_long_call_lets_other_python_threads_run(threads, pooled):
    threads(1)
    x = torch.randn(16, 64, 128, 128) if pooled else torch.randn(64, 4096)
    weight = torch.randn(2, 64) if pooled else torch.randn(1000, 4096)
    ticks, stop = [], threading.Event()

    def tick():
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(1e-4)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(100)  # who holds the interpreter keeps it: a tick inside a call proves that the call let go of it
    ticker = threading.Thread(target=tick)
    ticker.start()
    try:
        inside = 0
        for _ in range(50):
            start = time.perf_counter()
            fastee.ops.exit_head(x, weight, None, pool="mean" if pooled else "none")
            end = time.perf_counter()
            inside += sum(start < t < end for t in ticks)
            if inside > 5:
                break
    finally:
        stop.set()
        ticker.join()
        sys.setswitchinterval(interval)
    assert inside > 5


def test_a_small_call_starts_no_thread():
    code = (
        "import os, torch, fastee\nfastee.native.set_num_threads(4)\nw, x = torch.randn(100, 768), torch.randn(1, 768)\nlarge = torch.randn(64, 65536)\n"
        "fastee.ops.exit_head(x, w, None, pool='none')\nbefore = len(os.listdir('/proc/self/task'))\n"
        "for _ in range(5): fastee.ops.exit_head(x, w, None, pool='none'); fastee.ops.quantize_rows(x, 'int8'); fastee.ops.compact(torch.ones(32, dtype=torch.bool))\n"
        "small = len(os.listdir('/proc/self/task'))\nfastee.ops.quantize_rows(large, 'int8')\n"
        "print(small - before, len(os.listdir('/proc/self/task')) - before)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout.split() == ["0", "3"], run.stdout


@pytest.mark.parametrize(("count", "error", "text"), [(-1, ValueError, "count must lie in [0, 1024], got -1"), (1025, ValueError, "got 1025"), (2.0, TypeError, "must be an int, got float"), (True, TypeError, "got bool")])
def test_wrong_counts_are_refused(count, error, text):
    with pytest.raises(error) as caught:
        native.set_num_threads(count)
    assert text in str(caught.value)


def test_the_environment_sets_the_count():
    def ask(value):
        code = "import fastee; fastee.ops.compact; print(fastee.native.get_num_threads())"
        return subprocess.run([sys.executable, "-c", code], env={**os.environ, "FASTEE_NUM_THREADS": value}, capture_output=True, text=True, timeout=120)

    assert ask("3").stdout.strip() == "3"
    for wrong in ("0", "many", "99999"):
        run = ask(wrong)
        assert run.returncode != 0 and f"FASTEE_NUM_THREADS must be a number from 1 to 1024, got '{wrong}'" in run.stderr
