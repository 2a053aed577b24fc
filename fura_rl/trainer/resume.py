"""What a resumed run needs to know beside what transformers keeps in a checkpoint.

transformers restores the adapter, the optimiser, the scheduler, the position in the data and the random generators. TRL
and this project add: the position inside a generation batch and the rest of that batch, sums that are logged later, the
evaluations so far, and how far `metrics.jsonl` and `layers.jsonl` had come. Every rank writes its own two files; they
hold no pickle.

A run may go on with another number of processes, or other micro-batches, as long as a step and a generation hold as
many rollouts as before. It then takes up the next problems with the same adapter, optimiser and schedule. Random
generators and half-used rollouts belong to a rank and cannot be carried over: rollouts are drawn again for the same
problems.
"""

from __future__ import annotations

import json
import logging
import math
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

logger = logging.getLogger(__name__)

JOURNALS = ("metrics.jsonl", "layers.jsonl")  # grow by lines while a run goes on

# A step means something else if one of these changes, or the number of rollouts of a step or of a generation, to which
# the layout and the number of processes multiply.
FIXED = ("num_iterations", "num_generations", "seed")
LAYOUT = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation")


def progress_path(checkpoint: Path, rank: int) -> Path:
    """Counters and sums of a rank."""
    return checkpoint / f"progress_{rank}.json"


def rollouts_path(checkpoint: Path, rank: int) -> Path:
    """What a rank has not used yet of its generation batch."""
    return checkpoint / f"rollouts_{rank}.safetensors"


def run_shape(trainer: ResumableGRPOTrainer) -> dict[str, Any]:
    """What says what a step is, and how it is spread over processes."""
    return {
        **{name: getattr(trainer.args, name) for name in (*LAYOUT, *FIXED)},
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
    rank = trainer.accelerator.process_index
    resized = is_resized(trainer, folder)
    progress = _for_other_processes(trainer, folder) if resized else read_progress(folder, rank)
    trainer._step = progress["micro_step"]
    trainer._tr_loss += progress["loss_sum"]
    trainer._total_loss_scalar = progress["loss_total"]
    trainer._globalstep_last_logged = progress["last_logged"]
    trainer._metrics["train"].update(progress["pending_metrics"])
    trainer.restore_progress(progress["own"])
    rollouts = rollouts_path(folder, rank)
    if rollouts.exists() and not resized:
        trainer._buffered_inputs = load_rollouts(rollouts, trainer.accelerator.device)


def _for_other_processes(trainer: ResumableGRPOTrainer, folder: Path) -> dict[str, Any]:
    """The progress of rank 0 for any rank of another number of processes; sums of losses are the ranks' mean."""
    progress = read_progress(folder)
    written = progress["shape"]
    everyone = [read_progress(folder, rank) for rank in range(written["processes"])]
    for name in ("loss_sum", "loss_total"):
        progress[name] = sum(one[name] for one in everyone) / len(everyone)
    steps = progress["micro_step"] // written["gradient_accumulation_steps"]
    progress["micro_step"] = steps * trainer.args.gradient_accumulation_steps
    if "guards" in progress["own"]:  # what it says of rollouts is void: none are carried over
        progress["own"]["guards"]["bad_rewards"] = (-1, "")
    return progress


def read_progress(checkpoint: Path, rank: int = 0) -> dict[str, Any]:
    """The counters and sums that a rank wrote.

    Raises:
        FuraError: There are none.
    """
    path = progress_path(checkpoint, rank)
    if not path.exists():
        raise FuraError(f"{checkpoint} holds no {path.name}: it was not written by this trainer.")
    return json.loads(path.read_text(encoding="utf-8"))


def is_resized(trainer: ResumableGRPOTrainer, checkpoint: Path) -> bool:
    """Whether a checkpoint's steps were spread otherwise over processes and micro-batches than this run's."""
    written, now = read_progress(checkpoint)["shape"], run_shape(trainer)
    return any(written[name] != now[name] for name in (*LAYOUT, "processes"))


def _rollouts(shape: dict[str, Any], factor: str) -> tuple[int, str]:
    """How many rollouts a step or a generation has, and how they are made up."""
    names = ("processes", "per_device_train_batch_size", factor)
    factors = [shape[name] for name in names]
    return math.prod(factors), " x ".join(f"{name}={value}" for name, value in zip(names, factors, strict=True))


def check_shape(trainer: ResumableGRPOTrainer, checkpoint: Path) -> None:
    """Refuse to go on from a checkpoint with options that give a step another meaning.

    Raises:
        FuraError: One of them differs.
    """
    written, now = read_progress(checkpoint)["shape"], run_shape(trainer)
    for name in (*FIXED, "problems"):
        if written[name] != now[name]:
            raise FuraError(
                f"{checkpoint} was written with {name}={written[name]}, but this run has {name}={now[name]}: set it "
                "back to resume, or start a new run in another output_dir."
            )
    for factor, what in (("gradient_accumulation_steps", "step"), ("steps_per_generation", "generation")):
        (before, made_up), (count, made_now) = _rollouts(written, factor), _rollouts(now, factor)
        if before != count:
            raise FuraError(
                f"{checkpoint} was written with {before} rollouts a {what} ({made_up}), but this run has {count} "
                f"({made_now}): change one of these until the product is {before} again, or start a new run in "
                "another output_dir."
            )
    if is_resized(trainer, checkpoint):
        logger.warning(
            "%s was written with %d processes of %d rollouts: the run goes on with the next problems, but samples with "
            "other random numbers than it would have there.",
            checkpoint,
            written["processes"],
            written["per_device_train_batch_size"],
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
