"""Real servers for tests: started by `fura-rl serve`, ended with the test."""

import contextlib
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
from forked import begin, forking, free_port
from swapping import max_gap

from fura_rl.rollout.client import VERSION_HEADER

START_SECONDS = 900  # a bound, not a measurement: the machine may be busy


class Server:
    """A process of `fura-rl serve` with a log file."""

    def __init__(self, model: Path, log: Path, *options: str, port: int | None = None, **environment: str) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.model = str(model)
        self.log = log
        words = ["serve", self.model, "--port", str(self.port), "--dtype", "float32"]
        words += ["--max-model-len", "256", *options]
        # not what other tests and trainers have put into this process's environment
        kept = {
            k: v for k, v in os.environ.items() if not k.startswith(("VLLM_", "RANK", "LOCAL_", "WORLD_", "MASTER_"))
        }
        own = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
        self.start(words, {**kept, **own})

    def start(self, words: list[str], environment: dict[str, str]) -> None:
        command = [sys.executable, "-m", "fura_rl.cli", *words]
        with self.log.open("ab") as file:
            self.process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)

    def status(self) -> int | None:
        """Its exit status, if it has ended."""
        return self.process.poll()

    def wait(self) -> "Server":
        """Until it answers."""
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            assert self.status() is None, f"the server ended: {self.log.read_text()[-3000:]}"
            try:
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return self
            except httpx.TransportError:
                time.sleep(0.5)
        raise AssertionError(f"no answer: {self.log.read_text()[-3000:]}")

    def complete(self, prompt: list[int], headers: dict | None = None, **options) -> httpx.Response:
        """Greedy, always 24 tokens, with the log-prob of each."""
        body = {"model": self.model, "prompt": prompt, "max_tokens": 24, "temperature": 0, "logprobs": 0}
        body |= {"ignore_eos": True, **options}
        return httpx.post(f"{self.url}/v1/completions", json=body, headers=headers, timeout=300)

    def join(self, timeout_s: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout_s)

    def kill(self) -> None:
        """At once, with its engine, which would outlive it: they are a session of their own."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.join(60)

    def stop(self) -> None:
        if self.status() is not None:
            return
        self.process.terminate()
        self.join(60)
        if self.status() is None:
            self.kill()


def _serve(words: list[str], environment: dict[str, str], log: Path) -> None:
    """`fura-rl` up to where vLLM's server takes its place, which runs in this process instead of a new one."""

    def take_place(path, command, environment):
        os.environ.clear()
        os.environ.update(environment)
        module, sys.argv = command[2], command[2:]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        sys.exit()

    os.setsid()
    begin(environment, log, log)
    os.execve = take_place
    from fura_rl import cli

    sys.argv = ["fura-rl", *words]
    cli.main()


class ForkedServer(Server):
    """The same server half a minute earlier: its imports are done, and its engine is one process, not two.

    `test_serve` and the tests of two ranks have vLLM's executor of several processes.
    """

    def start(self, words, environment):
        environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", **environment}
        self.process = forking().Process(target=_serve, args=(words, environment, self.log))
        self.process.start()

    def status(self):
        return self.process.exitcode

    def join(self, timeout_s):
        self.process.join(timeout_s)


def logprobs_of(response):
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["logprobs"]["token_logprobs"]


def load(server, answers, sequences, swaps, change, clients=8):
    """`clients` threads generate while `change(i)` is called `swaps` times. Each response must equal, throughout, what
    the adapter of its version answers. Returns how many responses there were of each adapter."""
    done, problems, seen = threading.Event(), [], []
    versions = {}  # version -> adapter's name

    def ask(number):
        turn = number
        while not done.is_set():
            turn += 1
            which = turn % len(sequences)
            response = server.complete(sequences[which])
            if response.status_code != 200:
                problems.append(response.text)
                return
            seen.append((response.headers[VERSION_HEADER], which, logprobs_of(response)))

    status = httpx.get(f"{server.url}/fura/version", timeout=120).json()
    versions[status["version"]] = status["name"]
    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for i in range(swaps):
        goal = len(seen) + clients // 2
        while len(seen) < goal and not problems:  # requests are in flight at each swap
            time.sleep(0.005)
        status = change(i)
        versions[status["version"]] = status["name"]
    done.set()
    for thread in threads:
        thread.join()
    assert not problems
    counts = dict.fromkeys(versions.values(), 0)
    for version, which, logprobs in seen:
        gap = max_gap([logprobs], [answers[versions[version]][which]])
        assert gap < 1e-3, f"a response of {version} ({versions[version]}) is not that adapter's: {gap}"
        counts[versions[version]] += 1
    return counts


def alternate(client):
    names = ["first", "b", None]
    return lambda i: client.off() if names[i % 3] is None else client.swap(names[i % 3])
