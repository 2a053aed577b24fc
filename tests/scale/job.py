"""The main job on several ranks of this machine, each a process forked from one that has paid for the imports.

Rollouts are a function of the problem and of their place in its group, so that any number of ranks sees the same ones
and a training run can be compared with itself, spread otherwise. All else is the real job.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from unittest.mock import Mock, patch

import numpy as np
import yaml
from forked import begin, forking, free_port

DEADLINE_S = 900  # the first use of DeepSpeed compiles for a minute of a quick machine


def reward(completion_ids, **columns):
    """Anything that differs within a group."""
    return [sum(ids) % 7 / 7 for ids in completion_ids]


def failing_reward(completion_ids, **columns):
    """The second rank fails after its first step."""
    failing_reward.calls += 1
    if os.environ["RANK"] == "1" and failing_reward.calls > 1:
        raise RuntimeError("no reward on this rank")
    return reward(completion_ids)


def killing_reward(completion_ids, **columns):
    """The second rank is killed after its first step, as by the kernel when memory runs out."""
    killing_reward.calls += 1
    if os.environ["RANK"] == "1" and killing_reward.calls > 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return reward(completion_ids)


def infinite_reward(completion_ids, **columns):
    """Infinite in the fourth step."""
    infinite_reward.calls += 1
    return [float("inf")] * len(completion_ids) if infinite_reward.calls == 4 else reward(completion_ids)


def watching_reward(completion_ids, **columns):
    """Prints the dtypes of what is trained and of its gradients as layers see them, and what the ranks' sums are."""
    if not watching_reward.calls:
        import torch
        from torch.optim.optimizer import register_optimizer_step_pre_hook

        from fura_rl.adapter.layer import FuraLayer

        seen = set()

        def watch(layer, inputs):
            if isinstance(layer, FuraLayer | torch.nn.Linear) and torch.is_grad_enabled():
                for parameter in layer.parameters():
                    if parameter.requires_grad:
                        seen.add(f"trained {parameter.dtype}")
                        parameter.register_hook(lambda gradient: seen.add(f"gradient {gradient.dtype}"))

        def report(optimizer, *args):
            sums = [p.grad.to_local() for group in optimizer.param_groups for p in group["params"]]
            rounded = sum(int((s == s.bfloat16()).sum()) for s in sums) / sum(s.numel() for s in sums)
            print(f"seen {sorted(seen)}, {rounded:.0%} of the sums are bf16 numbers")

        torch.nn.modules.module.register_module_forward_pre_hook(watch)
        register_optimizer_step_pre_hook(report)
    watching_reward.calls += 1
    return reward(completion_ids)


def signalling_reward(completion_ids, **columns):
    """A scheduler's SIGTERM reaches the second rank alone, when the last step has been made."""
    from fura_rl.trainer.callbacks import StopCallback

    def end(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        end_before(*args, **kwargs)

    if os.environ["RANK"] == "1" and not signalling_reward.calls:
        end_before, StopCallback.on_train_end = StopCallback.on_train_end, end
    signalling_reward.calls += 1
    return reward(completion_ids)


failing_reward.calls = killing_reward.calls = infinite_reward.calls = watching_reward.calls = 0
signalling_reward.calls = 0


def scripted_rollouts(trainer, prompt_ids, *args, **kwargs):
    """Stands in for the generation: random tokens, the end of the sequence at last."""
    end, group = trainer.processing_class.eos_token_id, trainer.num_generations
    completions = []
    for i, ids in enumerate(prompt_ids):
        rng = np.random.default_rng([*ids, i % group])
        completions.append([*rng.integers(5, 60, size=rng.integers(3, 12)).tolist(), end])
    return completions, None


def poison(guards, args, state, control, **kwargs):
    """After the second step NaN stands in what the second rank holds of the adapter, and nowhere else.

    From the first on it stands in all of ZeRO-3's padding, which is nobody's number.
    """
    from fura_rl.trainer.parts import own_part

    trained = [p for p in guards.trainer.model.parameters() if p.requires_grad]
    for parameter in trained:
        if hasattr(parameter, "ds_tensor"):
            padding = parameter.ds_tensor.data[own_part(parameter).numel() :]
            padding.fill_(float("nan"))
            poison.padding += padding.numel()
    if os.environ["RANK"] == "1" and state.global_step == 1:
        next(part for p in trained if (part := own_part(p)).numel()).view(-1)[0] = float("nan")
        print("poisoned")


poison.padding = 0


def sharded_on_cpu(kind):
    """accelerate starts DeepSpeed and FSDP on accelerators only."""
    import torch
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    torch.distributed.init_process_group("gloo")

    def backend(*args, **kwargs):
        return "gloo", DistributedType.MULTI_GPU if kind == "fsdp" else DistributedType.MULTI_CPU

    patch.object(PartialState, "_prepare_backend", backend).start()
    patch.object(PartialState, "set_device", lambda state: setattr(state, "device", torch.device("cpu"))).start()


def work(rank, world, port, recipe, log, poisoned):
    begin(dict(os.environ), Path(log), Path(log))
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    from trl import GRPOTrainer

    from fura_rl import train_grpo
    from fura_rl.adapter import blocks
    from fura_rl.trainer.grpo import FuraGRPOTrainer
    from fura_rl.trainer.guards import GuardCallback

    options = yaml.safe_load(Path(recipe).read_text())
    if "deepspeed" in options or "fsdp" in options:
        sharded_on_cpu("fsdp" if "fsdp" in options else "deepspeed")
    else:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    if poisoned:
        GuardCallback.on_optimizer_step = poison  # the last event before the one at which it looks
    if "fsdp" in options:
        save = FuraGRPOTrainer._save

        # as the main process is late, which copies all that was gathered
        def save_late(trainer, folder=None, state_dict=None):
            if folder == options["output_dir"]:
                time.sleep(1)
            save(trainer, folder, state_dict)

        FuraGRPOTrainer._save = save_late
    counted = patch.object(blocks, "block_basis", Mock(wraps=blocks.block_basis))
    with patch.object(GRPOTrainer, "_generate_single_turn", scripted_rollouts), counted as block_basis:
        status = train_grpo.main(["--config", recipe])
    if poisoned:
        print(f"padded {poison.padding}")
    print(f"computed {block_basis.call_count} bases")
    print(f"adapter written: {(Path(options['output_dir']) / 'adapter_model.safetensors').exists()}")
    sys.exit(status)


class Ranks:
    """Starts the job in a folder, on any number of ranks; `close` kills what still runs."""

    def __init__(self, folder, **recipe):
        self.folder, self.recipe = folder, recipe
        self.context = forking()
        self.processes = []

    def start(self, world, name, poisoned=False, **options):
        """Starts the ranks; returns their processes and logs.

        Args:
            world: Number of ranks.
            name: Of the run's directory and the logs.
            poisoned: The adapter gets a NaN, see `poison`.
            **options: Of the recipe, beside this object's.
        """
        recipe = self.folder / f"{name}.yaml"
        recipe.write_text(yaml.safe_dump({**self.recipe, "output_dir": str(self.folder / name), **options}))
        port = free_port()
        logs = [self.folder / f"{name}_{rank}.log" for rank in range(world)]
        processes = [
            self.context.Process(target=work, args=(rank, world, port, str(recipe), str(log), poisoned))
            for rank, log in enumerate(logs)
        ]
        self.processes += processes
        for process in processes:
            process.start()
        return processes, logs

    def run(self, world, name, status=0, **options):
        """Runs the job to its end, which every rank must reach with exit status `status`; returns its directory."""
        processes, logs = self.start(world, name, **options)
        for process in processes:
            process.join(DEADLINE_S)
        # all of them: the rank that reports a lost connection is seldom the one that failed
        others = [(p.exitcode, log.read_text()[-3000:]) for p, log in zip(processes, logs, strict=True)]
        assert all(code == status for code, _ in others), "\n".join(
            f"rank {rank} ended with {code}: {text}" for rank, (code, text) in enumerate(others) if code != status
        )
        return self.folder / name

    def close(self):
        for process in self.processes:
            process.kill()
            process.join()


def steps(run):
    """What each step's log entry says that no clock and no machine decides."""
    names = ("step", "loss", "reward", "grad_norm", "learning_rate", "num_tokens", "completions/mean_length")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in names} for line in lines if "reward" in line]
