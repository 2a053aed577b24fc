"""Workers that die, hang or are inherited: the verifier answers, in time, and leaves no process behind."""

import contextlib
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from light_import import PRELUDE

from fura_rl.errors import FuraError
from fura_rl.rewards import MathVerifier

# Neither can be decided without algebra; the second outlasts every deadline.
EASY = (r"\boxed{(x+1)(x-1)}", "x^2-1")
ENDLESS = (r"\boxed{\sum_{k=1}^{10^{12}} \frac{1}{k}}", "3")


def easy(count: int) -> tuple[list[str], list[str]]:
    """Pairs that need algebra, all different."""
    return [rf"\boxed{{(x+{i})(x-1)}}" for i in range(count)], [f"x^2+{i - 1}x-{i}" for i in range(count)]


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_gone(pids: list[int], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, f"still alive: {[pid for pid in pids if alive(pid)]}"
        time.sleep(0.05)


def test_an_overrunning_worker_is_killed_and_the_rest_is_graded() -> None:
    completions, answers = easy(12)
    with MathVerifier(timeout=3.0) as verifier:
        verifier.start()
        before = verifier.worker_pids
        started = time.monotonic()
        grades = verifier.grade([ENDLESS[0], *completions], [ENDLESS[1], *answers])
        assert time.monotonic() - started < 3 * (3.0 + 0.1 * 7)
        assert grades[0].reason == "timeout" and grades[0].correct is None
        assert grades[0].extracted == ENDLESS[0][7:-1]
        assert all(grade.correct for grade in grades[1:])
        assert len(set(before) & set(verifier.worker_pids)) == 1  # one was replaced
        assert verifier.grade(*map(list, zip(EASY, strict=True)))[0].correct


def test_the_batch_deadline_holds_when_every_answer_hangs() -> None:
    completions = [rf"\boxed{{\sum_{{k=1}}^{{10^{{9}}}} \frac{{{i + 1}}}{{k}}}}" for i in range(40)]
    with MathVerifier(timeout=3.0, batch_timeout=6.0) as verifier:
        verifier.start()
        started = time.monotonic()
        grades = verifier.grade(completions, ["3"] * 40)
        assert time.monotonic() - started < 3 * 6.0
        assert {grade.reason for grade in grades} == {"timeout"}
        assert all(grade.correct for grade in verifier.grade(*easy(4)))


def test_a_worker_killed_mid_batch_loses_no_answer() -> None:
    completions, answers = easy(200)  # many, so that they are not done when the workers are killed
    with MathVerifier(timeout=60) as verifier:
        verifier.start()
        victims = list(verifier.worker_pids)
        killer = threading.Timer(0.05, lambda: [os.kill(pid, signal.SIGKILL) for pid in victims])
        killer.start()
        grades = verifier.grade(completions, answers)
        killer.join()
        assert all(grade.correct for grade in grades)
        assert not set(victims) & set(verifier.worker_pids)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_idle_worker_that_died_is_replaced(workers: int) -> None:
    with MathVerifier(workers=workers, timeout=60) as verifier:
        verifier.start()
        victim = verifier.worker_pids[0]
        os.kill(victim, signal.SIGKILL)
        wait_until_gone([victim])
        assert verifier.grade([EASY[0]], [EASY[1]])[0].correct


def test_a_large_parent_does_not_make_its_workers_look_large() -> None:
    """Linux hands the peak memory of a process on to what it starts; a trainer's is far above a worker's limit."""
    ballast = b"x" * (400 * 2**20)
    with MathVerifier(workers=1, memory_limit=256) as verifier:
        verifier.start()
        before = verifier.worker_pids
        assert all(grade.correct for grade in verifier.grade(*easy(3)))
        assert verifier.worker_pids == before
    del ballast


@pytest.mark.parametrize("waits", ["a batch", "a start"])
def test_a_worker_that_nothing_has_waited_for_is_not_late(waits: str) -> None:
    """A batch that one worker finishes alone, or a start without waiting, leaves a greeting unread."""
    with MathVerifier(workers=2) as verifier:
        verifier.start(wait=False)
        begun = verifier.worker_pids
        assert len(begun) == 2
        for worker in verifier._pool._workers:
            worker.deadline = 0.0  # as if it were long ago
        if waits == "a start":
            verifier.start()
        assert [grade.reason for grade in verifier.grade(*easy(4))] == ["correct"] * 4
        assert verifier.worker_pids == begun


@pytest.mark.slow
def test_memory_is_limited() -> None:
    """An expansion that takes 700 MiB where it may stays below 256 here, and its worker is replaced."""
    hungry = r"\boxed{(x+y+z+w+u+v)^{64}}"
    peaks = [0]
    with MathVerifier(workers=1, memory_limit=256, timeout=60.0) as verifier:
        verifier.start()
        pid = verifier.worker_pids[0]

        def watch() -> None:
            while alive(pid):
                with contextlib.suppress(OSError, IndexError):
                    status = Path(f"/proc/{pid}/status").read_text()
                    peaks.append(int(status.split("VmPeak:")[1].split()[0]) // 1024)
                time.sleep(0.02)

        watcher = threading.Thread(target=watch)
        watcher.start()
        grade = verifier.grade([hungry], ["3"])[0]
        watcher.join(timeout=10)
        assert grade.correct is not True
        assert 200 < max(peaks) <= 256
        assert pid not in verifier.worker_pids
        wait_until_gone([pid])
        assert verifier.grade([EASY[0]], [EASY[1]])[0].correct


def test_close_ends_the_workers_and_further_use_says_so() -> None:
    verifier = MathVerifier()
    verifier.start()
    pids = verifier.worker_pids
    verifier.close()
    verifier.close()
    wait_until_gone(pids, 1)
    with pytest.raises(FuraError, match="closed"):
        verifier.grade([r"\boxed{1}"], ["1"])


def test_threads_share_one_verifier() -> None:
    results: dict[int, bool] = {}
    with MathVerifier() as verifier:

        def work(i: int) -> None:
            completions = [rf"\boxed{{(x+{i})(x+{j})}}" for j in range(5)]
            answers = [f"x^2+{i + j}x+{i * j}" for j in range(5)]
            results[i] = all(grade.correct for grade in verifier.grade(completions, answers))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(1, 7)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == dict.fromkeys(range(1, 7), True)


def _grade_in_child(verifier: MathVerifier, queue: multiprocessing.Queue) -> None:
    completions, answers = easy(20)  # more than the parent's cache knows
    grades = verifier.grade(completions[10:], answers[10:])
    queue.put((verifier.worker_pids, [grade.correct for grade in grades]))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_children_get_workers_of_their_own(method: str) -> None:
    context = multiprocessing.get_context(method)
    with MathVerifier() as verifier:
        verifier.start()
        queue = context.Queue()
        child = context.Process(target=_grade_in_child, args=(verifier, queue))
        child.start()
        pids, verdicts = queue.get(timeout=600)
        child.join()
        assert child.exitcode == 0
        assert verdicts == [True] * 10
        assert pids and not set(pids) & set(verifier.worker_pids)
        wait_until_gone(pids)
        assert all(grade.correct for grade in verifier.grade(*easy(30)))  # the parent's own are untouched


def test_a_pickled_verifier_keeps_its_settings() -> None:
    with MathVerifier(workers=1, timeout=2.5, fallback="number", float_rounding=3) as verifier:
        copy = pickle.loads(pickle.dumps(verifier))
        assert (copy.workers, copy.timeout, copy.fallback, copy.float_rounding) == (1, 2.5, "number", 3)
        copy.close()


SCRIPT = (
    PRELUDE
    + """
import sys, time
from fura_rl.rewards import MathVerifier
verifier = MathVerifier(timeout=60.0)
grades = verifier.grade([r"\\boxed{(x+1)(x-1)}", r"\\boxed{(x+2)(x-2)}"], ["x^2-1", "x^2-4"])
assert all(grade.correct for grade in grades)
print(*verifier.worker_pids, flush=True)
if sys.argv[1] == "busy":
    verifier.grade([r"\\boxed{\\sum_{k=1}^{10^{12}} \\frac{1}{k}}"], ["3"])
elif sys.argv[1] == "idle":
    time.sleep(60)
"""
)


@pytest.mark.parametrize("state", ["leave", "idle", "busy"])
def test_no_process_outlives_its_parent(state: str) -> None:
    """However the parent ends: by itself without `close()`, or by Ctrl-C while it grades or does something else."""
    parent = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, state], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    if state != "leave":
        assert all(alive(pid) for pid in pids)
        time.sleep(0.5)
        parent.send_signal(signal.SIGINT)
    parent.wait(timeout=30)
    wait_until_gone(pids)


def test_an_idle_worker_notices_that_its_parent_was_killed() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, "idle"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2 and all(alive(pid) for pid in pids)
    parent.kill()
    parent.wait()
    wait_until_gone(pids)


def test_workers_import_neither_torch_nor_this_package() -> None:
    with MathVerifier(workers=1) as verifier:
        verifier.start()
        pid = verifier.worker_pids[0]
        mapped = Path(f"/proc/{pid}/maps").read_text()
        environment = Path(f"/proc/{pid}/environ").read_text().split("\0")
        assert "torch" not in mapped and "libcuda" not in mapped
        assert "CUDA_VISIBLE_DEVICES=" in environment


def test_the_package_does_not_import_torch() -> None:
    """`rewards` itself needs no torch: only `fura_rl`'s own initialisation brings it."""
    code = PRELUDE + (
        "import fura_rl.rewards.audit\n"
        "print(*[name for name in ('torch', 'transformers', 'trl', 'sympy') if name in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == ""


@pytest.mark.parametrize(
    "settings",
    [{"workers": 0}, {"timeout": 0}, {"batch_timeout": -1}, {"memory_limit": 10}, {"fallback": "guess"}],
    ids=str,
)
def test_settings_out_of_range(settings: dict) -> None:
    with pytest.raises(FuraError):
        MathVerifier(**settings)
