"""Transport `merged`: TRL's own path to a server with our stream. Without NCCL, the tensors take a file."""

from pathlib import Path

import pytest
from accelerate import Accelerator
from servers import ForkedServer
from syncs import SYNCS, check_twenty_syncs, make_policy
from transformers import AutoTokenizer
from trl.generation import vllm_generation

from fura_rl.rollout.engine import FuraVLLMGeneration

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def test_twenty_syncs(tmp_path, tiny_model, monkeypatch):
    from file_transfer import FileClient

    monkeypatch.setattr(vllm_generation, "VLLMClient", FileClient)
    monkeypatch.setattr(FileClient, "folder", tmp_path)
    options = ["--worker-extension-cls", "file_transfer.Extension", "--weight-transfer-config", '{"backend": "file"}']
    environment = {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": str(Path(__file__).parent)}
    server = ForkedServer(tiny_model, tmp_path / "log", "--for-training", *options, **environment)
    try:
        server.wait()
        policy = make_policy(tiny_model)
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        engine = FuraVLLMGeneration(
            policy, Accelerator(cpu=True), tokenizer, mode="server", server_base_url=server.url, server_timeout=60
        )
        check_twenty_syncs(policy, engine.sync_weights, engine.score)
        assert engine.version == SYNCS
        completions = engine.generate([[5, 6, 7]] * 4, None, num_generations=4)[1]
        assert len(completions) == 4
    finally:
        server.stop()
