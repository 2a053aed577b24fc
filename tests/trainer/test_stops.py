"""What ends a run from outside in the middle of something: a signal during an evaluation, a server that goes away."""

import json
import re
import signal
import sys
from pathlib import Path

import pytest

RESUMING = {"resume_from_checkpoint": "latest"}


def stopped_in_evaluation(run, step):
    """Stops the process (SIGSTOP) between the log entry of a step and that of the evaluation after it."""
    run.until_step(step)
    run.signal(signal.SIGSTOP)
    lines = [line for line in run.metrics(whole=False) if line["step"] >= step]
    assert [line["step"] for line in lines] == [step] and "loss" in lines[0], "the evaluation was over at once"
    assert step not in run.checkpoints()


@pytest.mark.slow
def test_a_signal_during_an_evaluation(start, recipe, tmp_path):
    """The evaluation is finished, a checkpoint written, and the resumed run equals one that nothing interrupted."""
    recipe = {
        **recipe, "max_steps": 6, "steps_per_generation": 1, "num_iterations": 1, "gradient_accumulation_steps": 1,
        "benchmark_steps": 2, "logging_steps": 1, "save_steps": 100, "benchmark_samples": 8,
        "benchmark_temperature": 1.0,
    }  # fmt: skip
    whole = start({**recipe, "output_dir": str(tmp_path / "whole")})
    assert whole.wait() == 0, whole.output()[-3000:]

    run = start(recipe)
    stopped_in_evaluation(run, 2)
    run.signal(signal.SIGTERM)
    run.signal(signal.SIGCONT)
    assert run.wait() == 0, run.output()[-3000:]
    assert "SIGTERM: this step is finished and a checkpoint written" in run.output()
    assert "Stopped by SIGTERM after step 2" in run.output()
    assert run.checkpoints() == [2]
    assert any("eval_test_accuracy" in line for line in run.metrics() if line["step"] == 2)

    run = start(recipe, **RESUMING)
    assert run.wait() == 0, run.output()[-3000:]
    assert run.metrics() == whole.metrics()
    adapter = "adapter_model.safetensors"
    assert (run.directory / adapter).read_bytes() == (whole.directory / adapter).read_bytes()


@pytest.mark.soak
@pytest.mark.vllm
def test_a_server_that_is_lost_in_the_middle_of_a_run(start, recipe, tmp_path, tiny_model, monkeypatch):
    """Bounded tries, one sentence that says how to go on, and a resumed run that ends where it should."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "rollout"))
    from servers import Server

    def serve(port=None):
        return Server(tiny_model, tmp_path / "server.log", "--for-training", port=port)

    server = serve().wait()
    recipe = {
        **recipe, "use_vllm": True, "vllm_mode": "server", "vllm_transport": "adapter", "max_steps": 10,
        "vllm_server_base_url": server.url, "vllm_server_timeout": 3, "benchmarks": [], "benchmark_steps": None,
        "steps_per_generation": 1, "num_iterations": 1, "gradient_accumulation_steps": 1, "logging_steps": 1,
        "max_logp_gap": 1e-3,
    }  # fmt: skip
    try:
        run = start(recipe)
        run.until(lambda: run.checkpoints() == [3])
        server.kill()
        assert run.wait() == 2, run.output()[-3000:]
        errors = re.findall("error: .*", run.output())
        print(*errors)
        assert len(errors) == 1 and "Traceback" not in run.output()
        assert f"The server at {server.url} " in errors[0] and "--resume_from_checkpoint latest" in errors[0]
        assert max(line["step"] for line in run.metrics()) < 10

        server = serve(server.port).wait()
        run = start(recipe, **RESUMING)
        assert run.wait() == 0, run.output()[-3000:]
        lines = [line for line in run.metrics() if "loss" in line]
        assert [line["step"] for line in lines] == list(range(1, 11))
        assert all(line["sync/logp_gap_max"] < 1e-3 and line["sync/probe_gap_max"] < 1e-3 for line in lines)
        assert json.loads((run.directory / "summary.json").read_text())["steps"] == 10
    finally:
        server.stop()
        sys.modules.pop("servers", None)
