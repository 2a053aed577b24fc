"""GRPO with FuRA from a recipe.

    accelerate launch fura_rl/train_grpo.py --config configs/<recipe>.yaml [--option value ...]

Options are flat (TRL's convention): a YAML file through `--config`, and the command line wins. Everything goes to
`output_dir`: the adapter and tokenizer, `summary.json`, `metrics.jsonl`, `completions/`, `config.yaml`, `curves.png`.
"""

from __future__ import annotations

import sys
from pathlib import Path

if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path.pop(0)  # run as a script: the package's own modules must not shadow top-level names

import errno
import os
import shutil
import time
from dataclasses import asdict
from typing import Any

import yaml
from peft import PeftConfig
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PrinterCallback
from transformers import ProgressCallback as TransformersProgressCallback
from trl import TrlParser

from fura_rl.adapter import FuraConfig
from fura_rl.data import load_problems, to_prompts
from fura_rl.errors import FuraError
from fura_rl.prompts import load_prompt
from fura_rl.trainer import FuraGRPOConfig, FuraGRPOTrainer
from fura_rl.trainer.arguments import AdapterArguments, DataArguments, ModelArguments
from fura_rl.trainer.callbacks import MetricsFileCallback, ProgressCallback
from fura_rl.trainer.observe import ObserverCallback
from fura_rl.trainer.report import (
    adapter_table,
    changed_options,
    plot_curves,
    score_table,
    versions,
    write_summary,
)
from fura_rl.trainer.report_page import write_report

MIN_FREE_BYTES = 200 * 2**20  # an adapter, its optimiser state and the logs of a small run


def parse(argv: list[str] | None = None) -> tuple[DataArguments, FuraGRPOConfig, ModelArguments, AdapterArguments]:
    """The resolved options; what is missing or contradictory is one sentence.

    Raises:
        FuraError: An option is unknown, has a wrong value, or a required one is missing.
    """
    parser = TrlParser((DataArguments, FuraGRPOConfig, ModelArguments, AdapterArguments))
    try:
        data, training, model, adapter = parser.parse_args_and_config(args=argv)
    except (ValueError, FileNotFoundError, yaml.YAMLError) as error:
        raise FuraError(f"Configuration: {error}") from error
    for value, option in ((data.dataset_name, "dataset_name"), (model.model_name_or_path, "model_name_or_path")):
        if value is None:
            raise FuraError(f"--{option} is missing: set it in the recipe or on the command line.")
    return data, training, model, adapter


def load_model(arguments: ModelArguments, training: FuraGRPOConfig) -> tuple[PreTrainedModel, Any]:
    """Base model and tokenizer.

    Raises:
        FuraError: There is no such model, locally or on the hub.
    """
    name = arguments.model_name_or_path
    if name is not None and name.startswith(("/", "./", "../")) and not Path(name).is_dir():
        raise FuraError(f"The model directory {name} does not exist.")
    dtype = arguments.dtype
    if dtype == "auto":
        dtype = "bfloat16" if training.device.type == "cuda" else "float32"
    common: dict[str, Any] = {"revision": arguments.model_revision, "trust_remote_code": training.trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **common)
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, attn_implementation=arguments.attn_implementation, **common
        )
    except (OSError, ValueError) as error:
        raise FuraError(f"Cannot load the model {name!r}: {str(error).splitlines()[0]}") from error
    if training.deepspeed_plugin is None and not training.fsdp:
        model.to(training.device)  # the basis is computed where the weights are
    return model, tokenizer


def adapter_config(arguments: AdapterArguments) -> PeftConfig:
    """`FuraConfig` from flat options."""
    options: dict[str, Any] = asdict(arguments)
    if arguments.target_modules == ["all-linear"]:
        options["target_modules"] = "all-linear"
    if arguments.block_size.isdigit():
        options["block_size"] = int(arguments.block_size)
    return FuraConfig(task_type="CAUSAL_LM", **options)


def prepare_output(training: FuraGRPOConfig) -> Path:
    """The run's directory, checked to be writable and to have room.

    Raises:
        FuraError: It cannot be written, or the disk is nearly full.
    """
    output = Path(training.output_dir)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FuraError(f"Cannot write to output_dir {output}: {error.strerror}.") from error
    if not os.access(output, os.W_OK):
        raise FuraError(f"Cannot write to output_dir {output}: no permission.")
    free = shutil.disk_usage(output).free
    if free < MIN_FREE_BYTES:
        raise FuraError(
            f"Only {free // 2**20} MiB are free at output_dir {output}: at least {MIN_FREE_BYTES // 2**20} are needed."
        )
    return output


def run(argv: list[str] | None = None) -> dict[str, Any]:
    """Train as the options say and return the summary."""
    started = time.time()
    data, training, model_arguments, adapter_arguments = parse(argv)
    output = prepare_output(training)
    options = changed_options(data, model_arguments, adapter_arguments, training)
    main_process = training.process_index == 0
    if main_process:
        text = yaml.safe_dump(options, sort_keys=True, allow_unicode=True)
        (output / "config.yaml").write_text(text, encoding="utf-8")
        print(f"--- configuration (what differs from the defaults)\n{text}", flush=True)

    assert data.dataset_name is not None  # checked by parse
    problems = load_problems(data.dataset_name, split=data.dataset_train_split, config=data.dataset_config)
    prompt = load_prompt(training.prompt)
    model, tokenizer = load_model(model_arguments, training)
    trainer = FuraGRPOTrainer(
        model,
        args=training,
        train_dataset=to_prompts(problems, prompt, tokenizer),
        processing_class=tokenizer,
        peft_config=adapter_config(adapter_arguments),
    )
    trainer.remove_callback(TransformersProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ProgressCallback(trainer))
    ObserverCallback(trainer, output, options).attach()
    metrics_file = output / "metrics.jsonl"
    if not training.resume_from_checkpoint:
        metrics_file.write_text("", encoding="utf-8")
    trainer.add_callback(MetricsFileCallback(metrics_file))
    if main_process:
        print(f"--- adapter\n{adapter_table(trainer.model)}", flush=True)

    try:
        if trainer.benchmarks:
            trainer.evaluate()
        trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
        trainer.save_model(str(output))
        if trainer.benchmarks:
            trainer.evaluate()
    finally:
        trainer.close()
        summary = {
            "config": options,
            "versions": versions(),
            "seed": training.seed,
            "steps": trainer.state.global_step,
            "evaluations": trainer.evaluations,
            "generated_tokens": trainer.generated_tokens,
            "seconds": {"total": time.time() - started, **trainer.clock.snapshot()},
            "engine": "vllm" if trainer.use_vllm else "transformers",
            "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        }
        if main_process:
            write_summary(output / "summary.json", **summary)
            write_report(output)
    if main_process:
        plot_curves(metrics_file, trainer.evaluations, output / "curves.png")
        print_summary(summary, output)
    return summary


def print_summary(summary: dict[str, Any], output: Path) -> None:
    """Before and after, where the time went, and where the files lie."""
    seconds = summary["seconds"]
    phases = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items() if name != "total")
    print(f"--- result\n{score_table(summary['evaluations'])}")
    print(f"seconds: total {seconds['total']:.1f} ({phases})")
    print(f"adapter and report: {output} (report.html, summary.json, metrics.jsonl, completions/)", flush=True)


def out_of_space(error: BaseException) -> bool:
    """Whether an error says that the disk is full (safetensors has its own exception for it)."""
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 a mistake that the user can mend (one sentence on stderr)."""
    try:
        run(argv)
    except FuraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, SafetensorError) as error:
        if not out_of_space(error):
            raise
        print(f"error: The disk is full: {error}. What was written before is kept.", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
