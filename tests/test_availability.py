"""What an engine of this process needs from the environment, and vLLM's absence in words."""

import os
import subprocess
import sys

import pytest

from fura_rl.availability import CPU_ENVIRONMENT, set_engine_environment, vllm_problem

torch = pytest.importorskip("torch")


@pytest.mark.skipif(torch.cuda.is_available(), reason="sets nothing of a CPU engine where there is a GPU")
def test_the_environment_is_set_again_where_it_was_lost(monkeypatch):
    """An engine that did not find it would reserve 90% of the machine's memory, or start a process of its own."""
    vllm_problem()  # remembers its answer
    for name in CPU_ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    set_engine_environment()
    assert {name: os.environ[name] for name in CPU_ENVIRONMENT} == {**CPU_ENVIRONMENT, "VLLM_CPU_KVCACHE_SPACE": "3"}


def test_a_broken_vllm_is_said_in_one_line(tmp_path):
    (tmp_path / "vllm.py").write_text("raise ImportError('libnothing.so: not found\\nmore')")
    code = "from fura_rl.availability import vllm_problem; print(vllm_problem())"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    answer = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert answer.stdout == "ImportError: libnothing.so: not found\n"
