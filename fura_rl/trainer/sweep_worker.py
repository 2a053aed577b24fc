"""A process that makes one training run after the other, with one vLLM engine (`fura-rl sweep --share-engine`).

Importing vLLM and starting an engine take as long as a short run. `RunWorker` is the sweep's side: it starts the
process, tells it a recipe at a time, and reads the exit status that a process of that run alone would have had.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import subprocess
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

OTHER_ENGINE = 75  # status of a run that needs an engine with other arguments: it has to start in a new process
INTERRUPTED = 128 + signal.SIGINT  # status of a run that was not begun
EXIT_S = 60  # that an idle process may take to end
OF_THE_ENGINE = ("VLLM_", "TORCHINDUCTOR_", "TRITON_")  # what an engine's start puts into the environment stays
OF_THE_PROCESS = ("full_determinism", "tf32", "torch_compile")  # switch what the next run would compute with, too


def can_share(options: dict[str, Any]) -> bool:
    """Whether a run's options are those of one process with a colocated engine that does not sleep."""
    return (
        options.get("use_vllm", True)
        and options.get("vllm_mode", "colocate") == "colocate"
        and not any(options.get(name) for name in ("vllm_enable_sleep_mode", "deepspeed", "fsdp", *OF_THE_PROCESS))
    )


class RunWorker:
    """A worker process, started when it is first needed and again after a run that failed.

    Args:
        environment: Of the process.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment
        self.process: subprocess.Popen[bytes] | None = None
        self.interrupted = False

    def make(self, recipe: Path, log: Path) -> int:
        """Make the run of a recipe's file, its output appended to `log`; returns its exit status."""
        status = self._make(recipe, log)
        if status == OTHER_ENGINE:
            self.close()
            status = self._make(recipe, log)
        if status:
            self.close()
        return status

    def _make(self, recipe: Path, log: Path) -> int:
        if self.process is not None and self.process.poll() is not None:
            self.close()
        if self.process is None and not self.interrupted:
            command = [sys.executable, "-m", "fura_rl.trainer.sweep_worker"]
            with log.open("ab") as stderr:  # of what goes wrong before the first run
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    env=self.environment,
                    bufsize=0,
                )
        if self.interrupted or self.process is None:  # maybe since the process was started
            return INTERRUPTED
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([str(recipe), str(log)]).encode() + b"\n")
        while not select.select([self.process.stdout], [], [], 0.2)[0]:
            if self.process.poll() is not None:  # a child of it may hold the other end of the pipe
                return self.process.returncode or 1
        answer = self.process.stdout.readline()
        return int(answer) if answer else self.process.wait() or 1

    def interrupt(self) -> None:
        """Have the run write a checkpoint and end, as Ctrl-C does; none is begun from now on."""
        self.interrupted = True
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)

    def close(self) -> None:
        """End the process, once its run has ended; another one is started when it is needed."""
        if self.process is not None:
            assert self.process.stdin is not None and self.process.stdout is not None
            self.process.stdin.close()
            try:
                self.process.wait(EXIT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process.stdout.close()
            self.process = None


def serve() -> None:
    """Read `[recipe, log]` from stdin, a line a run, and answer with the run's exit status, until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    requests = os.fdopen(os.dup(0))
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)  # a run that asks something must not wait for, or take, the next request
    first = requests.readline()  # before the imports: their warnings belong into the first run's log
    if not first:
        return
    send_output(json.loads(first)[1])
    from accelerate.state import AcceleratorState, GradientState

    from fura_rl.availability import vllm_problem
    from fura_rl.rollout.shared import ProcessState, engines_are_kept

    vllm_problem()  # imports vLLM, which sets variables
    before, environment = ProcessState.capture(), dict(os.environ)
    with engines_are_kept():
        line = first
        while line:
            recipe, log = json.loads(line)
            send_output(log)
            before.restore()
            status = make_run(recipe)
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
            restore_environment(environment)
            release_memory()
            answers.write(f"{status}\n")
            line = requests.readline()


def make_run(recipe: str) -> int:
    """Train as a recipe's file says, in this process; returns the exit status."""
    from fura_rl import train_grpo
    from fura_rl.rollout.shared import OtherEngineError

    try:
        return train_grpo.main(["--config", recipe])
    except OtherEngineError as reason:
        print(f"--- {reason} The run starts again in a new one.", flush=True)
        return OTHER_ENGINE
    except Exception:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def send_output(log: str) -> None:
    """Append what this process and its children print to a file from now on."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


def restore_environment(before: dict[str, str]) -> None:
    """Take back what a run has set (its rendezvous, its precision, its folders), but not what the engine reads."""
    for name in set(os.environ) | set(before):
        if name.startswith(OF_THE_ENGINE):
            continue
        if name in before:
            os.environ[name] = before[name]
        else:
            del os.environ[name]


def release_memory() -> None:
    """Free the trainer of the run that has ended, whose parts refer to each other, and forget how much it held."""
    import torch

    gc.unfreeze()  # the engine's start has exempted what there was from collection, and so the first run's trainer
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):  # not Linux, or a container that does not allow it
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to what is resident now


if __name__ == "__main__":
    try:
        serve()
    except KeyboardInterrupt:  # between two runs
        sys.exit(130)
