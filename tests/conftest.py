"""Fixtures that every test folder may use."""

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings


def pytest_configure() -> None:
    """A shell's background jobs ignore Ctrl-C, and so would every process that a test starts and interrupts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    settings.register_profile("fura", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("fura")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Quick files first; then those with the most slow tests, so that no worker ends with a long file alone."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: (slow[item.path] > 0, -slow[item.path]))


@pytest.fixture(scope="module", autouse=True)
def own_environment() -> Iterator[None]:
    """Each module leaves `os.environ` as it found it: engines and trainers in this process set RANK, MASTER_PORT and
    more, and a process started later would take them for its own."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def own_random_numbers() -> None:
    """What a test draws from torch's global generator does not depend on what ran before in its process."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of benchmark data next to the checkout; the data is not part of the repository."""
    path = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"benchmark data not found: put the JSONL files into {path} to run this test")
    return path


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """The checkpoint that ships with the repository."""
    return Path(__file__).parents[1] / "examples" / "tiny" / "model"


@pytest.fixture(scope="session")
def tiny_problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `train.jsonl` and `test.jsonl` of the kind that the tiny model was pretrained on."""
    folder = tmp_path_factory.mktemp("problems")
    script = Path(__file__).parents[1] / "examples" / "tiny" / "problems.py"
    subprocess.run([sys.executable, script, "--out", folder, "--train", "64", "--test", "16"], check=True)
    return folder


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_problems: Path) -> Path:
    """The directory of a real run: two steps of the tiny model, with the engine that this machine has."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    run = base / "tiny_run"
    options = dict(
        model_name_or_path=tiny_model, dataset_name=tiny_problems / "train.jsonl", output_dir=run, prompt="plain",
        benchmarks=tiny_problems / "test.jsonl", benchmark_steps=1, benchmark_max_tokens=64, max_steps=2,
        per_device_train_batch_size=32, num_generations=8, max_completion_length=64, learning_rate=1e-3, beta=0.01,
        vllm_max_model_length=256, save_strategy="no",
    )  # fmt: skip
    arguments = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    with FileLock(base / "tiny_run.lock"):  # once for all workers
        if not (run / "summary.json").exists():
            process = subprocess.run(
                [sys.executable, "-m", "fura_rl.cli", "train", *arguments],
                capture_output=True, text=True, timeout=1500, env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )  # fmt: skip
            assert process.returncode == 0, process.stderr[-3000:]
    return run
