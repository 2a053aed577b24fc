"""When one rank fails, no other waits for it: without a launcher's help, which would kill them too."""

import pytest
from test_world_size import CONFIGS, SPREAD

DEADLINE_S = 60


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reward", "world", "stage"),
    [("failing", 2, None), ("killing", 4, None), ("failing", 2, "zero3"), ("killing", 2, "fsdp2")],
)
def test_all_ranks_end(ranks, reward, world, stage):
    config = {"fsdp": True} if stage == "fsdp2" else {}
    if stage == "zero3":
        pytest.importorskip("deepspeed", reason="the extra 'deepspeed' is not installed")
        config = {"deepspeed": str(CONFIGS / f"{stage}.json")}
    name = f"{reward}_{world}_{stage}"
    processes, logs = ranks.start(world, name, rewards=[f"job:{reward}_reward"], **SPREAD[world], **config)
    processes[1].join(200)
    log = logs[1].read_text()
    assert processes[1].exitcode == (1 if reward == "failing" else -9), log[-3000:]
    assert ("no reward on this rank" in log) == (reward == "failing")
    for process, log in zip(processes, logs, strict=True):
        process.join(DEADLINE_S)
        assert process.exitcode, f"exit status {process.exitcode}: {log.read_text()[-3000:]}"
