"""The main job, with a line from each rank after each sync: what its engine is, and what it says of fixed tokens.

Run by torchrun: `tensor_parallel_job.py RECIPE FOLDER`.
"""

import json
import os
import sys
from pathlib import Path

from fura_rl import train_grpo
from fura_rl.availability import hide_broken_vllm

hide_broken_vllm()

from fura_rl.rollout import vllm_names  # noqa: E402
from fura_rl.rollout.engine import FuraVLLMGeneration  # noqa: E402

TOKENS = [[5, 6, 7, 8, 9, 10, 11, 12]]
recipe, folder = sys.argv[1:]
sync = FuraVLLMGeneration.sync_weights


def sync_and_tell(self) -> None:
    sync(self)
    weight = vllm_names.model_of(self.llm).get_submodule("model.layers.0.mlp.down_proj")
    line = {"version": self.version, "ranks": weight.tp_size, "rank": weight.tp_rank, "scores": self.score(TOKENS)[0]}
    with (Path(folder) / f"rank{os.environ['RANK']}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


FuraVLLMGeneration.sync_weights = sync_and_tell  # type: ignore[method-assign]
sys.exit(train_grpo.main(["--config", recipe]))
