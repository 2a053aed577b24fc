"""A guard's rollback under FSDP2, to a checkpoint that the ranks wrote in pieces."""

import pytest
from test_world_size import SPREAD, check_same_adapter


@pytest.mark.slow
def test_sharded_checkpoints_roll_back(ranks):
    """To step 3, adapter and optimiser, as a run without FSDP does."""
    guarded = dict(**SPREAD[2], rewards=["job:infinite_reward"], guards={"nonfinite": {"action": "rollback"}})
    sharded = dict(fsdp=True, fsdp_config={"state_dict_type": "SHARDED_STATE_DICT"})
    rolled, expected = ranks.run(2, "rolled", **guarded, **sharded), ranks.run(2, "rolled_ddp", **guarded)
    assert (rolled / "checkpoint-3" / "optimizer_0").is_dir()
    assert (rolled / "checkpoint-3" / "adapter_model.safetensors").is_file()
    for run in (rolled, expected):
        log = (ranks.folder / f"{run.name}_0.log").read_text()
        assert f"Rolled back to {run / 'checkpoint-3'}" in log
    check_same_adapter(rolled, expected)
