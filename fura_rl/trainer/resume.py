"""What a resumed run needs to know beside what transformers keeps in a checkpoint.

transformers restores the adapter, the optimiser, the scheduler, the position in the data and the random generators. TRL
and this project add: the position inside a generation batch and the rest of that batch, sums that are logged later, the
evaluations so far, and how far `metrics.jsonl` and `layers.jsonl` had come. Every rank writes its own two files; they
hold no pickle.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fura_rl.errors import FuraError
from fura_rl.trainer.checkpoints import remove_partial, step_of

if TYPE_CHECKING:
    from fura_rl.trainer.resumable import ResumableGRPOTrainer

JOURNALS = ("metrics.jsonl", "layers.jsonl")  # grow by lines while a run goes on

# A step means something else if one of these changes.
SHAPE = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "steps_per_generation",
    "num_iterations",
    "num_generations",
    "seed",
)


def progress_path(checkpoint: Path, rank: int) -> Path:
    """Counters and sums of a rank."""
    return checkpoint / f"progress_{rank}.json"


def rollouts_path(checkpoint: Path, rank: int) -> Path:
    """What a rank has not used yet of its generation batch."""
    return checkpoint / f"rollouts_{rank}.safetensors"


def run_shape(trainer: ResumableGRPOTrainer) -> dict[str, Any]:
    """What must be equal for a step to be the same step."""
    return {
        **{name: getattr(trainer.args, name) for name in SHAPE},
        "processes": trainer.accelerator.num_processes,
        "problems": len(trainer.train_dataset),
    }


def save_progress(trainer: ResumableGRPOTrainer, folder: Path) -> None:
    """Write this rank's progress, and its rollouts if it is in the midst of a generation batch."""
    rank = trainer.accelerator.process_index
    run = Path(trainer.args.output_dir)
    progress = {
        "shape": run_shape(trainer),
        "micro_step": trainer._step,
        "loss_sum": trainer._tr_loss.item(),
        "loss_total": trainer._total_loss_scalar,
        "last_logged": trainer._globalstep_last_logged,
        "pending_metrics": dict(trainer._metrics["train"]),
        "journals": {name: (run / name).stat().st_size for name in JOURNALS if (run / name).exists()},
        "own": trainer.progress(),
    }
    progress_path(folder, rank).write_text(json.dumps(progress) + "\n", encoding="utf-8")
    every = trainer.args.steps_per_generation * trainer.num_iterations
    if trainer._buffered_inputs is not None and trainer._step % every:
        save_rollouts(trainer._buffered_inputs, rollouts_path(folder, rank))


def load_progress(trainer: ResumableGRPOTrainer, folder: Path) -> None:
    """Put this rank where it was; to be called when training begins, after transformers has reset its sums."""
    progress = read_progress(folder, trainer.accelerator.process_index)
    trainer._step = progress["micro_step"]
    trainer._tr_loss += progress["loss_sum"]
    trainer._total_loss_scalar = progress["loss_total"]
    trainer._globalstep_last_logged = progress["last_logged"]
    trainer._metrics["train"].update(progress["pending_metrics"])
    trainer.restore_progress(progress["own"])
    rollouts = rollouts_path(folder, trainer.accelerator.process_index)
    if rollouts.exists():
        trainer._buffered_inputs = load_rollouts(rollouts, trainer.accelerator.device)


def read_progress(checkpoint: Path, rank: int = 0) -> dict[str, Any]:
    """The counters and sums that a rank wrote.

    Raises:
        FuraError: There are none.
    """
    path = progress_path(checkpoint, rank)
    if not path.exists():
        raise FuraError(
            f"{checkpoint} holds no {path.name}: it was not written by this trainer with as many processes."
        )
    return json.loads(path.read_text(encoding="utf-8"))


def check_shape(trainer: ResumableGRPOTrainer, checkpoint: Path) -> None:
    """Refuse to go on from a checkpoint with options that give a step another meaning.

    Raises:
        FuraError: One of them differs.
    """
    written, now = read_progress(checkpoint)["shape"], run_shape(trainer)
    for name, value in now.items():
        if written[name] != value:
            raise FuraError(
                f"{checkpoint} was written with {name}={written[name]}, but this run has {name}={value}: set it back "
                "to resume, or start a new run in another output_dir."
            )


def save_rollouts(batches: list[dict[str, Any]], path: Path) -> None:
    """Write the slices of a generation batch (TRL's `_buffered_inputs`): tensors as they are, the rest as JSON."""
    tensors: dict[str, torch.Tensor] = {}
    others: list[dict[str, Any]] = []
    for i, batch in enumerate(batches):
        others.append({key: value for key, value in batch.items() if not isinstance(value, torch.Tensor)})
        for key, value in batch.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{i}.{key}"] = value.detach().cpu().clone()  # slices share storage, a file may not
    save_file(tensors, path, metadata={"others": json.dumps(others)})


def load_rollouts(path: Path, device: torch.device) -> list[dict[str, Any]]:
    """The slices that `save_rollouts` wrote, on `device`."""
    with safe_open(path, "pt") as file:
        batches: list[dict[str, Any]] = json.loads(file.metadata()["others"])
        for name in file.keys():  # noqa: SIM118 (not a dict)
            i, key = name.split(".", 1)
            batches[int(i)][key] = file.get_tensor(name).to(device)
    return batches


def restore_journals(checkpoint: Path, run: Path) -> None:
    """Give a run's `metrics.jsonl` and `layers.jsonl` the lines from before the checkpoint, and no others.

    Args:
        checkpoint: Its folder; the files are read beside it.
        run: The directory of the resumed run; usually the same.

    Raises:
        FuraError: A file is shorter than it was when the checkpoint was written.
    """
    for name, length in read_progress(checkpoint)["journals"].items():
        source = checkpoint.parent / name
        content = source.read_bytes() if source.exists() else b""
        if len(content) < length:
            raise FuraError(
                f"{source} has {len(content)} bytes, but had {length} when {checkpoint.name} was written: put it back, "
                "or start a new run in another output_dir."
            )
        temporary = run / f"{name}.tmp"
        temporary.write_bytes(content[:length])
        temporary.replace(run / name)


def remove_later_completions(run: Path, step: int) -> None:
    """Delete rollouts of steps after `step`: they are drawn again."""
    for path in (run / "completions").glob("step_*.jsonl"):
        if int(path.stem.removeprefix("step_")) > step:
            path.unlink()


def prepare_files(output: Path, checkpoint: Path | None) -> None:
    """The directory as it was at the checkpoint, or empty journals."""
    output.mkdir(parents=True, exist_ok=True)
    remove_partial(output)
    for name in JOURNALS:
        if checkpoint is None or checkpoint.parent != output:
            (output / name).unlink(missing_ok=True)
    (output / JOURNALS[0]).touch()
    if checkpoint is not None:
        restore_journals(checkpoint, output)
        remove_later_completions(output, step_of(checkpoint))


@contextmanager
def seeded(*numbers: int, device: torch.device) -> Iterator[None]:
    """Random generators that depend only on `numbers` inside the block, and go on as if nothing had been in between.

    A colocated engine and `generate` of transformers draw from the process's generators, so rollouts become a function
    of the weights, the prompts and these numbers: neither an evaluation nor an interruption changes them.
    """
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        yield
    random.setstate(python)
    np.random.set_state(numpy)
