"""A training run in another process, seen from outside: its files, its exit status, signals to it."""

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

DEADLINE_S = 400
# What a run says about this machine and this process: it differs from run to run.
OF_THE_MACHINE = ("time", "seconds", "per_second", "memory", "cache_hits")


def train(arguments, log):
    """Runs `train_grpo` in a forked process, with stdout and stderr in a file."""
    with open(log, "w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    from fura_rl import train_grpo

    sys.exit(train_grpo.main(arguments))


class Run:
    def __init__(self, processes, arguments, directory, log):
        self.directory = Path(directory)
        self.log = log
        self.process = processes.Process(target=train, args=(arguments, str(log)))
        self.process.start()

    def wait(self):
        """The exit status."""
        self.process.join(DEADLINE_S)
        assert self.process.exitcode is not None, self.output()[-3000:]
        return self.process.exitcode

    def output(self):
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def until(self, condition):
        """Waits for a condition on the run's directory while the run goes on."""
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert self.process.is_alive() and time.monotonic() < deadline, self.output()[-3000:]
            time.sleep(0.0005)

    def until_step(self, step):
        self.until(lambda: any(line["step"] >= step for line in self.metrics(whole=False)))

    def signal(self, number):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def kill(self):
        self.signal(signal.SIGKILL)
        self.process.join()

    def kill_in_checkpoint(self, step):
        """Kills while a checkpoint after `step` is written: stopped first, so that it is known to be half-written."""

        def half_written():
            return any(
                int(path.name.split("-")[1].split(".")[0]) > step for path in self.directory.glob(".checkpoint-*")
            )

        while True:
            self.until(half_written)
            self.signal(signal.SIGSTOP)
            if half_written():
                self.kill()
                return
            self.signal(signal.SIGCONT)

    def metrics(self, whole=True):
        """The lines of `metrics.jsonl`, without what differs from run to run."""
        file = self.directory / "metrics.jsonl"
        text = file.read_text() if file.exists() else ""
        lines = text.splitlines() if whole else text.split("\n")[:-1]
        return [
            {key: value for key, value in json.loads(line).items() if not any(word in key for word in OF_THE_MACHINE)}
            for line in lines
        ]

    def checkpoints(self):
        return sorted(int(path.name.split("-")[1]) for path in self.directory.glob("checkpoint-*"))
