"""A run that was saved by two ranks goes on with one and with four, as if nothing had changed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from job import steps
from peft import get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fura_rl import FuraConfig

# 16 rollouts a step, however many ranks share them
SPREAD = {
    1: dict(per_device_train_batch_size=8, gradient_accumulation_steps=2),
    2: dict(per_device_train_batch_size=8, gradient_accumulation_steps=1),
    4: dict(per_device_train_batch_size=4, gradient_accumulation_steps=1),
}
CONFIGS = Path(__file__).parents[2] / "configs" / "deepspeed"


@pytest.fixture(scope="module")
def whole(ranks):
    """Six steps by two ranks, with a checkpoint after the third."""
    return ranks.run(2, "whole", **SPREAD[2])


def deepspeed(ranks, stage):
    """The shipped configuration, with every parameter split under ZeRO-3, which leaves small ones whole."""
    options = json.loads((CONFIGS / f"{stage}.json").read_text())
    if stage == "zero3":
        options["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path = ranks.folder / f"{stage}.json"
    path.write_text(json.dumps(options))
    return {"deepspeed": str(path)}


def resume(ranks, run, world, name, **options):
    """What a copy of `run`, cut to its checkpoint, makes of the rest with `world` ranks."""
    output = ranks.folder / name
    shutil.copytree(run, output)
    shutil.rmtree(output / "checkpoint-6")
    return ranks.run(world, name, **SPREAD[world], resume_from_checkpoint="latest", **options)


def check_same(run, whole):
    """Every step's numbers and the final adapter, within the noise of float32 sums in another order."""
    assert [line["step"] for line in steps(run)] == [1, 2, 3, 4, 5, 6]
    for line, expected in zip(steps(run), steps(whole), strict=True):
        assert line == pytest.approx(expected, rel=1e-4, abs=1e-6)
    check_same_adapter(run, whole)


def check_same_adapter(run, whole):
    adapter, expected = (load_file(folder / "adapter_model.safetensors") for folder in (run, whole))
    for name, tensor in expected.items():
        assert (adapter[name] - tensor).abs().max() < 1e-5, name
    moved = max(float(tensor.abs().max()) for name, tensor in expected.items() if name.endswith("core"))
    assert moved > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 4])
def test_ddp(ranks, whole, world):
    check_same(resume(ranks, whole, world, f"ddp_{world}"), whole)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_deepspeed(ranks, whole, stage):
    pytest.importorskip("deepspeed", reason="the extra 'deepspeed' is not installed")
    config = deepspeed(ranks, stage)
    own = ranks.run(2, stage, **SPREAD[2], **config)
    check_same(own, whole)
    for world in (1, 4) if stage == "zero2" else (4,):
        check_same(resume(ranks, own, world, f"{stage}_{world}", **config), whole)


@pytest.mark.slow
def test_fsdp2(ranks, whole):
    own = ranks.run(2, "fsdp2", **SPREAD[2], fsdp=True)
    # the other rank takes part until the main process is done: with NCCL that would wait for one that has ended
    assert "adapter written: True" in (ranks.folder / "fsdp2_1.log").read_text()
    check_same(own, whole)
    check_same(resume(ranks, own, 4, "fsdp2_4", fsdp=True), whole)
    check_same(resume(ranks, own, 1, "fsdp2_without"), whole)


@pytest.mark.slow
def test_fsdp2_rolls_back(ranks):
    """To the checkpoint of step 3, adapter and optimiser, as DDP does."""
    guarded = dict(**SPREAD[2], rewards=["job:infinite_reward"], guards={"nonfinite": {"action": "rollback"}})
    rolled, expected = ranks.run(2, "rolled", **guarded, fsdp=True), ranks.run(2, "rolled_ddp", **guarded)
    for run in (rolled, expected):
        log = (ranks.folder / f"{run.name}_0.log").read_text()
        assert f"Rolled back to {run / 'checkpoint-3'}" in log
    check_same_adapter(rolled, expected)


@pytest.mark.slow
def test_fsdp2_cannot_take_up_a_checkpoint_of_ddp(ranks, whole):
    shutil.copytree(whole, ranks.folder / "mixed")
    ranks.run(2, "mixed", status=2, **SPREAD[2], resume_from_checkpoint="latest", fsdp=True)
    lines = (ranks.folder / "mixed_0.log").read_text().splitlines()
    (sentence,) = [line for line in lines if line.startswith("error: ")]
    assert "checkpoint-6 was not written under FSDP: go on with the configuration that wrote it." in sentence


@pytest.mark.slow
def test_half_used_rollouts_are_drawn_again_for_the_same_problems(ranks):
    """A generation of 32 rollouts serves two steps; the checkpoint lies between its steps 3 and 4."""
    twice = ranks.run(2, "twice", **SPREAD[2], steps_per_generation=2)
    resumed = resume(ranks, twice, 1, "twice_1", steps_per_generation=4)

    def problems(run, step):
        lines = (run / "completions" / f"step_{step:06d}.jsonl").read_text().splitlines()
        return [json.loads(line)["prompt"] for line in lines]

    assert [path.name for path in sorted((twice / "completions").iterdir())] == [
        f"step_{step:06d}.jsonl" for step in (1, 3, 5)
    ]
    assert problems(resumed, 4) == problems(twice, 3)
    assert problems(resumed, 5) == problems(twice, 5) != problems(twice, 3)
    later, expected = steps(resumed)[4:], steps(twice)[4:]  # both steps of the next generation
    assert sum(line["reward"] for line in later) == pytest.approx(sum(line["reward"] for line in expected))


@pytest.mark.slow
def test_another_number_of_rollouts_a_step_is_refused(ranks, whole):
    shutil.copytree(whole, ranks.folder / "fewer")
    ranks.run(1, "fewer", status=2, **SPREAD[2], resume_from_checkpoint="latest")
    lines = (ranks.folder / "fewer_0.log").read_text().splitlines()
    (sentence,) = [line for line in lines if line.startswith("error: ")]
    assert "written with 16 rollouts a step (processes=2 x per_device_train_batch_size=8 x " in sentence
    assert "but this run has 8 (processes=1 x per_device_train_batch_size=8 x " in sentence


@pytest.mark.slow
def test_each_rank_computes_its_share_of_the_bases(ranks, whole, tiny_model):
    """21 layers over two ranks, and what is saved is what one process computes."""
    logs = [(ranks.folder / f"whole_{rank}.log").read_text().splitlines() for rank in range(2)]
    shares = [[line for line in log if line.startswith("computed ")] for log in logs]
    assert shares == [["computed 11 bases"], ["computed 10 bases"]]
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), FuraConfig(target_modules="all-linear"))
    expected = get_peft_model_state_dict(model)
    saved = load_file(whole / "adapter_model.safetensors")
    names = [name for name in expected if name.endswith(("basis", "sigma"))]
    assert len(names) == 42 and all(torch.equal(saved[name], expected[name]) for name in names)
