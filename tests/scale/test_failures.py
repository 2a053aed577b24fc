"""When one rank fails, no other waits for it: without a launcher's help, which would kill them too."""

import json

import pytest
from test_world_size import SPREAD, deepspeed

DEADLINE_S = 300  # gloo's own is half an hour


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reward", "world", "stage"),
    [("failing", 2, None), ("killing", 4, None), ("failing", 2, "zero3"), ("killing", 2, "fsdp2")],
)
def test_all_ranks_end(ranks, reward, world, stage):
    config = {"fsdp": True} if stage == "fsdp2" else {}
    if stage == "zero3":
        pytest.importorskip("deepspeed", reason="the extra 'deepspeed' is not installed")
        config = deepspeed(ranks, stage)
    name = f"{reward}_{world}_{stage}"
    processes, logs = ranks.start(world, name, rewards=[f"job:{reward}_reward"], **SPREAD[world], **config)
    processes[1].join(900)
    log = logs[1].read_text()
    assert processes[1].exitcode == (1 if reward == "failing" else -9), log[-3000:]
    assert ("no reward on this rank" in log) == (reward == "failing")
    for process, log in zip(processes, logs, strict=True):
        process.join(DEADLINE_S)
        assert process.exitcode, f"exit status {process.exitcode}: {log.read_text()[-3000:]}"


@pytest.mark.slow
def test_a_signal_to_one_rank_after_the_last_step_keeps_no_rank_from_saving(ranks):
    run = ranks.run(2, "late", rewards=["job:signalling_reward"], **SPREAD[2], fsdp=True)
    assert "SIGTERM: this step is finished" in (ranks.folder / "late_1.log").read_text()
    assert (run / "adapter_model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "world"), [("zero3", 3), ("fsdp2", 2)])
def test_all_ranks_see_what_is_wrong_with_one_ranks_part(ranks, stage, world):
    """Three ranks, since two divide every parameter: ZeRO-3 pads none then."""
    config = {"fsdp": True}
    if stage == "zero3":
        pytest.importorskip("deepspeed", reason="the extra 'deepspeed' is not installed")
        config = deepspeed(ranks, stage)
    batch = dict(per_device_train_batch_size=4, gradient_accumulation_steps=1)
    name = f"poisoned_{stage}"
    run = ranks.run(world, name, status=2, poisoned=True, guards={"nonfinite": {"action": "stop"}}, **batch, **config)
    logs = [(ranks.folder / f"{name}_{rank}.log").read_text() for rank in range(world)]
    assert ["poisoned" in log.splitlines() for log in logs] == [rank == 1 for rank in range(world)]
    for log in logs:
        assert "NaN or infinite values in the adapter after step 2." in log
    padded = [int(log.split("padded ")[1].split()[0]) for log in logs]
    assert (sum(padded) > 0) == (stage == "zero3")
    whole = json.loads((run / "run.json").read_text())["trainable_parameters"]
    assert whole == json.loads((run / "summary.json").read_text())["trainable_parameters"] > 0
    assert f"trainable parameters: {whole:,} of" in logs[0]
