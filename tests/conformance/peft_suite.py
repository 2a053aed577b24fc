"""PEFT's own test-suite, fetched from the sdist of the installed version and pointed at FuRA.

PEFT lists what it tests in module-level lists that the tests' parametrisation refers to, so exchanging the lists'
contents in place after the import is enough: no file of PEFT is edited. Hub checkpoints are replaced by tiny local
ones of the same architectures (`tiny_models.py`).
"""

import importlib.machinery
import importlib.util
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import tiny_models
from filelock import FileLock

from fura_rl.adapter import FuraConfig

PACKAGE = "peft_upstream_tests"
CACHE = Path(os.environ.get("FURA_RL_TEST_CACHE", Path(sys.prefix) / "cache" / "fura-rl-tests"))

# Every option of FuRA on PEFT's custom models: MLP (10 -> 20 -> 2) and embedding + Conv1D (5 -> 1).
CUSTOM_MODEL_CASES: list[tuple[str, str, type, dict[str, Any]]] = [
    ("MLP 1", "MLP", FuraConfig, {"target_modules": "lin0"}),
    ("MLP 2", "MLP", FuraConfig, {"target_modules": ["lin0"]}),
    ("MLP 3", "MLP", FuraConfig, {"target_modules": ["lin1"]}),
    ("MLP 4", "MLP", FuraConfig, {"target_modules": ["lin0", "lin1"]}),
    ("MLP modules_to_save", "MLP", FuraConfig, {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("MLP output side", "MLP", FuraConfig, {"target_modules": ["lin0", "lin1"], "side": "output"}),
    ("MLP frozen", "MLP", FuraConfig, {"target_modules": ["lin0"], "singular_values": "frozen"}),
    ("MLP merged", "MLP", FuraConfig, {"target_modules": ["lin0"], "singular_values": "merged"}),
    ("MLP full", "MLP", FuraConfig, {"target_modules": ["lin0"], "block_size": "full"}),
    ("MLP int", "MLP", FuraConfig, {"target_modules": ["lin0"], "block_size": 2}),
    ("MLP dict", "MLP", FuraConfig, {"target_modules": ["lin0", "lin1"], "block_size": {"lin0": "full", "lin1": 2}}),
    ("MLP identity", "MLP", FuraConfig, {"target_modules": ["lin0"], "basis": "identity"}),
    ("MLP random", "MLP", FuraConfig, {"target_modules": ["lin0"], "basis": "random"}),
    ("MLP bias", "MLP", FuraConfig, {"target_modules": ["lin0", "lin1"], "train_bias": True}),
    ("MLP bias output", "MLP", FuraConfig, {"target_modules": ["lin0"], "train_bias": True, "side": "output"}),
    ("Conv1D", "EmbConv1D", FuraConfig, {"target_modules": ["conv1d"]}),
    ("Conv1D output", "EmbConv1D", FuraConfig, {"target_modules": ["conv1d"], "side": "output"}),
]

_ONE = {"target_modules": ["lin0"], "init_weights": False}
_TWO = {"target_modules": ["lin1"], "init_weights": False}
TWO_ADAPTER_CASES: list[tuple[str, str, type, dict[str, Any], dict[str, Any]]] = [
    ("Same", "fura", FuraConfig, _ONE, _ONE),
    ("Different", "fura", FuraConfig, _ONE, _TWO),
    ("Block sizes", "fura", FuraConfig, _ONE, {**_ONE, "block_size": 2}),
    ("Sides", "fura", FuraConfig, _ONE, {**_ONE, "side": "output"}),
    ("Output side", "fura", FuraConfig, {**_ONE, "side": "output"}, {**_ONE, "side": "output"}),
]


def load(name: str) -> ModuleType:
    """Imports PEFT's test module `name`, or skips the calling module if the sdist cannot be had."""
    if str(CACHE) not in sys.path:
        CACHE.mkdir(parents=True, exist_ok=True)
        with FileLock(CACHE / "unpack.lock"):  # every test process comes here
            unpack()
        sys.path.insert(0, str(CACHE))
        pytest.register_assert_rewrite(PACKAGE)
        if importlib.util.find_spec("diffusers") is None:
            # PEFT's common code imports this one class to tell pipelines from models; no case here uses a pipeline
            diffusers = ModuleType("diffusers")
            diffusers.__spec__ = importlib.machinery.ModuleSpec("diffusers", None)
            diffusers.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})  # type: ignore[attr-defined]
            sys.modules["diffusers"] = diffusers
    return importlib.import_module(f"{PACKAGE}.{name}")


def unpack() -> None:
    """Puts the tests of the installed PEFT's sdist into CACHE / PACKAGE, downloading the sdist if needed."""
    marker = CACHE / PACKAGE / f".version-{peft.__version__}"
    if marker.exists():
        return
    sdist = CACHE / f"peft-{peft.__version__}.tar.gz"
    if not sdist.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
        command += ["--no-binary", "peft", f"peft=={peft.__version__}", "--dest", str(CACHE)]
        download = subprocess.run(command, capture_output=True, text=True)
        if not sdist.exists():
            pytest.skip(
                f"PEFT's sdist {sdist.name} is not in {CACHE} and could not be downloaded: {download.stderr.strip()}",
                allow_module_level=True,
            )
    prefix = f"peft-{peft.__version__}/tests/"
    with tarfile.open(sdist) as archive:
        for member in archive.getmembers():
            if member.isfile() and member.name.startswith(prefix):
                target = CACHE / PACKAGE / member.name.removeprefix(prefix)
                target.parent.mkdir(parents=True, exist_ok=True)
                file = archive.extractfile(member)
                assert file is not None
                target.write_bytes(file.read())
    marker.touch()


def local(*architectures: str) -> list[str]:
    """Paths of tiny random checkpoints of these architectures."""
    return [tiny_models.build(architecture, CACHE / "tiny") for architecture in architectures]


def saved_lora_config() -> str:
    """The path of a saved LoRA configuration."""
    folder = CACHE / "lora"
    peft.LoraConfig().save_pretrained(str(folder))
    return str(folder)


def reparametrise(test_class: type, old: object, new: object) -> None:
    """Exchanges the values `old` of the parametrised tests of a class, where they are no list to change in place."""
    for function in vars(test_class).values():
        marks = getattr(function, "pytestmark", None)
        if marks is not None:
            function.pytestmark = [
                pytest.mark.parametrize(mark.args[0], new, **mark.kwargs).mark
                if mark.name == "parametrize" and mark.args[1] is old
                else mark
                for mark in marks
            ]
