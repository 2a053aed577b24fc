"""The Slurm scripts, with a stand-in for Slurm that writes down what it is asked to start."""

import os
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

from fura_rl.train_grpo import parse

ROOT = Path(__file__).parents[2]
SRUN = """#!/bin/bash
n=$(mktemp)
printf '%s\\0' "$VLLM_API_KEY" "$@" > "$n"
mv "$n" "$CALLS"
case "$*" in *" serve "*) exec sleep 30;; esac
until [ "$(ls "$CALLS" | wc -l)" -eq "$EXPECTED" ]; do sleep 0.05; done
"""


@pytest.fixture
def sbatch(tmp_path):
    """Runs a script as on `nodes` nodes of eight GPUs; returns the calls of srun and the finished process."""
    (tmp_path / "calls").mkdir()
    for name, text in {"srun": SRUN, "scontrol": "#!/bin/bash\nfor n in $NODES; do echo $n; done\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run(script, nodes, *arguments):
        slurm = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "n[0-9]", "SLURM_NNODES": str(nodes)}
        environment = {
            **os.environ, **slurm, "SLURM_GPUS_ON_NODE": "8", "CALLS": str(tmp_path / "calls"),
            "EXPECTED": "2" if "server" in script else "1",
            "NODES": " ".join(f"n{i}" for i in range(nodes)), "PATH": f"{tmp_path}:{os.environ['PATH']}",
        }  # fmt: skip
        process = subprocess.run(
            ["bash", ROOT / "configs" / "slurm" / script, *arguments],
            capture_output=True, text=True, cwd=ROOT, env=environment, timeout=60,
        )  # fmt: skip
        calls = [path.read_text().split("\0")[:-1] for path in (tmp_path / "calls").iterdir()]
        return sorted(calls, key=lambda call: "serve" not in call), process

    return run


def launched(call):
    """What accelerate and then the trainer make of a call, for the node that has number 0."""
    start = call.index("accelerate") + 1
    options = launch_command_parser().parse_args(["--machine_rank", "0", *call[start:]])
    assert options.training_script == "fura_rl/train_grpo.py"
    return options, parse(options.training_script_args)


def test_trainers_alone(sbatch, tmp_path):
    (call,), process = sbatch("train.sbatch", 2, "configs/qwen3-1.7b-math.yaml", "--output_dir", str(tmp_path / "run"))
    assert process.returncode == 0, process.stderr
    options, (_, training, model, _) = launched(call)
    assert (options.num_machines, options.num_processes) == (2, 16)
    assert (options.main_process_ip, options.main_process_port) == ("n0", 23456)
    assert training.resume_from_checkpoint == "latest" and training.output_dir == str(tmp_path / "run")
    assert model.model_name_or_path == "Qwen/Qwen3-1.7B"
    assert "--kill-on-bad-exit=1" in call


def test_trainers_beside_a_server(sbatch):
    (server, trainers), process = sbatch(
        "train_with_server.sbatch", 3, "configs/qwen3-1.7b-math.yaml", "Qwen/Qwen3-1.7B"
    )
    assert process.returncode == 0, process.stderr
    assert "--relative=0" in server and server[server.index("serve") + 1] == "Qwen/Qwen3-1.7B"
    options, (_, training, _, _) = launched(trainers)
    assert (options.num_machines, options.num_processes, options.main_process_ip) == (2, 16, "n1")
    assert training.vllm_server_base_url == "http://n0:8000" and training.vllm_transport == "adapter"
    assert server[0] == trainers[0] and len(server[0]) == 32  # one key for both


def test_one_node_is_too_few_for_a_server(sbatch):
    calls, process = sbatch("train_with_server.sbatch", 1, "recipe.yaml", "model")
    assert process.returncode == 2 and not calls and "need two nodes" in process.stderr
