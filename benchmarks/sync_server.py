"""A server, and what a push to it costs: the other half of `benchmarks/sync.py`.

It shares the device, or has the second one where there are two: only then is there NCCL between it and the trainer.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import httpx
import torch
from accelerate import Accelerator
from peft import PeftModel

from fura_rl.rollout.engine import FuraVLLMGeneration
from fura_rl.rollout.probe import score_on_server
from fura_rl.rollout.transport import AdapterVLLMClient, adapter_of
from fura_rl.train_grpo import free_port

# what belongs to this process alone, whose engine shares it
OWN = ("VLLM_ENABLE_V1_MULTIPROCESSING", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PATIENCE_S = 120.0


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    """By key, of rows that have the same ones."""
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


class SyncServer:
    """`fura-rl serve PATH --for-training`, started at once and ended with the `with` block.

    Attributes:
        has_nccl: Whether it can be sent merged weights the way TRL does.
    """

    def __init__(self, path: str, log: Path, dtype: str, *options: str) -> None:
        port = free_port()
        self.has_nccl = torch.cuda.device_count() > 1
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        command = [sys.executable, "-m", "fura_rl.cli", "serve", path, "--for-training", "--port", str(port)]
        command += ["--dtype", dtype, "--max-model-len", "512", "--max-num-seqs", "8", "--keep", "device"]
        command += ["--enforce-eager", "--gpu-memory-utilization", "0.1", "--kv-cache-memory-bytes", str(2**30)]
        command += options
        environment = {key: value for key, value in os.environ.items() if key not in OWN}
        if self.has_nccl:
            command += ["--weight-transfer-config", '{"backend": "nccl"}']
            environment |= {"CUDA_VISIBLE_DEVICES": "1", "VLLM_SERVER_DEV_MODE": "1"}
        with log.open("wb") as file:
            self.process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)

    def __enter__(self) -> SyncServer:
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(ProcessLookupError):  # it may have ended
            os.killpg(self.process.pid, signal.SIGKILL)  # its engine too: they are a session of their own
        self.process.wait()

    def measure(
        self,
        model: PeftModel,
        ids_bt: torch.Tensor,
        policy_logprobs: Callable[[PeftModel, torch.Tensor], torch.Tensor],
        rounds: int,
    ) -> dict[str, Any]:
        """Seconds and bytes of the first push and of later ones, and how far the two are apart afterwards.

        `phases` are medians of the later pushes, each of which changes every number by up to 1e-4.
        """
        client = self.connect()
        seconds, sizes, phases = [], [], []
        for _ in range(rounds + 2):
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(2 * torch.rand_like(parameter) - 1, alpha=1e-4)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            started = time.perf_counter()
            adapter = adapter_of(model, lambda parameters: nullcontext())
            collected = time.perf_counter()
            client.push(adapter)
            seconds.append(time.perf_counter() - started)
            sizes.append(client.sent_bytes)
            phases.append({"collect": collected - started, **client.seconds})
        engine = torch.tensor(score_on_server(client, ids_bt.tolist()))
        return {
            "first_seconds": seconds[0],
            "first_bytes": sizes[0],
            "seconds": statistics.median(seconds[2:]),
            "bytes": sizes[-1],
            "phases": medians(phases[2:]),
            "gap": float((policy_logprobs(model, ids_bt) - engine).abs().mean()),
        }

    def connect(self) -> AdapterVLLMClient:
        """A trainer's client, once the server answers; exits with the end of its log if it ends first or takes long."""
        deadline = time.monotonic() + PATIENCE_S
        while (status := self.process.poll()) is None and time.monotonic() < deadline:
            if self.answers():
                return AdapterVLLMClient(self.url, connection_timeout=PATIENCE_S)
            time.sleep(0.5)
        what = f"did not answer for {PATIENCE_S:.0f} s" if status is None else f"ended with status {status}"
        raise SystemExit(f"The server at {self.url} {what}:\n{self.log.read_text()[-4000:]}")

    def answers(self) -> bool:
        """Whether it is up."""
        try:
            return httpx.get(f"{self.url}/health", timeout=5).is_success
        except httpx.TransportError:
            return False

    def measure_swaps(self, folders: list[Path], rounds: int) -> dict[str, Any]:
        """Median seconds of swaps between adapters in folders, after each was swapped in once, and their phases."""
        manager = self.connect().manager
        seconds, phases = [], []
        for folder in folders * (rounds + 1):
            started = time.perf_counter()
            status = manager.swap(folder)
            seconds.append(time.perf_counter() - started)
            phases.append({**status["seconds"], "HTTP": seconds[-1] - sum(status["seconds"].values())})
        later = slice(len(folders), None)
        return {
            "first_seconds": seconds[0],
            "seconds": statistics.median(seconds[later]),
            "phases": medians(phases[later]),
        }

    def measure_merged(self, model: PeftModel, tokenizer: Any, ids_bt: torch.Tensor, rounds: int) -> dict[str, Any]:
        """Seconds of a push of all merged weights over NCCL, and the engine's log-probs afterwards."""
        engine = FuraVLLMGeneration(
            model, Accelerator(), tokenizer, mode="server", server_base_url=self.url, server_timeout=PATIENCE_S,
            group_port=free_port(),
        )  # fmt: skip
        seconds = []
        for _ in range(rounds + 2):
            torch.cuda.synchronize()
            started = time.perf_counter()
            engine.sync_weights()
            seconds.append(time.perf_counter() - started)
        return {"seconds": statistics.median(seconds[2:]), "logprobs": engine.score(ids_bt.tolist())}
