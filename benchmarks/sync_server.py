"""A server on the same device, and what pushing an adapter to it costs: the other half of `benchmarks/sync.py`."""

from __future__ import annotations

import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from fura_rl.rollout.probe import score_on_server

# what belongs to this process alone, whose engine shares it
OWN = ("VLLM_ENABLE_V1_MULTIPROCESSING", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PATIENCE_S = 120.0


class SyncServer:
    """`fura-rl serve PATH --for-training`, started at once and ended with the `with` block."""

    def __init__(self, path: str, log: Path, dtype: str) -> None:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        command = [sys.executable, "-m", "fura_rl.cli", "serve", path, "--for-training", "--port", str(port)]
        command += ["--dtype", dtype, "--max-model-len", "512", "--max-num-seqs", "8", "--keep", "device"]
        command += ["--enforce-eager", "--gpu-memory-utilization", "0.1", "--kv-cache-memory-bytes", str(2**30)]
        environment = {key: value for key, value in os.environ.items() if key not in OWN}
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command, env=environment, stdout=file, stderr=file, start_new_session=True
            )  # fmt: skip

    def __enter__(self) -> SyncServer:
        return self

    def __exit__(self, *error: object) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)  # its engine too: they are a session of their own
        self.process.wait()

    def measure(
        self,
        model: PeftModel,
        ids_bt: torch.Tensor,
        policy_logprobs: Callable[[PeftModel, torch.Tensor], torch.Tensor],
        rounds: int,
    ) -> dict[str, Any]:
        """Seconds and bytes of the first push and of later ones, and how far the two are apart afterwards."""
        from fura_rl.rollout.transport import AdapterVLLMClient, adapter_of

        try:
            client = AdapterVLLMClient(self.url, connection_timeout=PATIENCE_S)
        except Exception as error:
            raise SystemExit(f"No server at {self.url} ({error}):\n{self.log.read_text()[-4000:]}") from error
        seconds, sizes = [], []
        for _ in range(rounds + 2):
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(torch.randn_like(parameter), alpha=1e-3)
            started = time.perf_counter()
            client.push(adapter_of(model, lambda parameters: nullcontext()))
            seconds.append(time.perf_counter() - started)
            sizes.append(client.sent_bytes)
        engine = torch.tensor(score_on_server(client, ids_bt.tolist()))
        return {
            "first_seconds": seconds[0],
            "first_bytes": sizes[0],
            "seconds": statistics.median(seconds[2:]),
            "bytes": sizes[-1],
            "gap": float((policy_logprobs(model, ids_bt) - engine).abs().mean()),
        }
