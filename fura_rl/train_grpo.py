"""GRPO with FuRA from a recipe.

    accelerate launch fura_rl/train_grpo.py --config configs/<recipe>.yaml [--option value ...]

Options are flat (TRL's convention): a YAML file through `--config`, and the command line wins. Everything goes to
`output_dir`: the adapter and tokenizer, `summary.json`, `metrics.jsonl`, `completions/`, `config.yaml`, `curves.png`,
and `checkpoint-<step>/`, from which `--resume_from_checkpoint latest` goes on.
"""

from __future__ import annotations

import sys
from pathlib import Path

if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path.pop(0)  # run as a script: the package's own modules must not shadow top-level names

import importlib.util
import os
import socket
import time
from typing import Any, NoReturn

import yaml
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel, PrinterCallback
from transformers import ProgressCallback as TransformersProgressCallback
from trl import TrlParser

from fura_rl.data import load_problems, to_prompts
from fura_rl.errors import FuraError
from fura_rl.plan import check_memory
from fura_rl.prompts import load_prompt
from fura_rl.trainer import FuraGRPOConfig, FuraGRPOTrainer
from fura_rl.trainer.arguments import AdapterArguments, DataArguments, ModelArguments
from fura_rl.trainer.callbacks import MetricsFileCallback, ProgressCallback, StopCallback
from fura_rl.trainer.checkpoints import find_checkpoint, out_of_space
from fura_rl.trainer.checks import (
    check_contradictions,
    check_launch,
    check_option_names,
    check_option_types,
    check_output,
    check_problems,
    check_server,
    check_target_modules,
    check_vllm_version,
)
from fura_rl.trainer.methods import adapter_config
from fura_rl.trainer.observe import ObserverCallback
from fura_rl.trainer.parts import whole_numel
from fura_rl.trainer.report import (
    adapter_table,
    changed_options,
    plot_curves,
    score_table,
    versions,
    write_summary,
)
from fura_rl.trainer.report_page import write_report
from fura_rl.trainer.resume import JOURNALS, prepare_files
from fura_rl.trainer.signals import Interrupted, StopSignals


class Parser(TrlParser):
    """TRL's parser, whose errors are one sentence instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        raise FuraError(f"Option: {message}.")


def parse(argv: list[str] | None = None) -> tuple[DataArguments, FuraGRPOConfig, ModelArguments, AdapterArguments]:
    """The resolved options; what is missing or contradictory is one sentence.

    Raises:
        FuraError: An option is unknown, has a wrong value, or a required one is missing.
    """
    parser = Parser((DataArguments, FuraGRPOConfig, ModelArguments, AdapterArguments))
    check_option_names(parser, sys.argv[1:] if argv is None else argv)
    try:
        data, training, model, adapter = parser.parse_args_and_config(args=argv)
    except (ValueError, TypeError) as error:
        raise FuraError(f"Configuration: {' '.join(str(error).split()).rstrip('.')}.") from error
    for value, option in ((data.dataset_name, "dataset_name"), (model.model_name_or_path, "model_name_or_path")):
        if value is None:
            raise FuraError(f"--{option} is missing: set it in the recipe or on the command line.")
    check_option_types(data, training, model, adapter)
    check_contradictions(training)
    return data, training, model, adapter


def load_model(
    arguments: ModelArguments, training: FuraGRPOConfig, method: str = "fura"
) -> tuple[PreTrainedModel, Any]:
    """Base model and tokenizer.

    Raises:
        FuraError: There is no such model, locally or on the hub.
    """
    name = arguments.model_name_or_path
    if name is not None and name.startswith(("/", "./", "../")) and not Path(name).is_dir():
        raise FuraError(f"The model directory {name} does not exist.")
    dtype = arguments.dtype
    if dtype == "auto":  # weights that are all trained need float32: bfloat16 would drop most of their updates
        dtype = "bfloat16" if training.device.type == "cuda" and method != "full" else "float32"
    common: dict[str, Any] = {"revision": arguments.model_revision, "trust_remote_code": training.trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **common)
        model = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            attn_implementation=arguments.attn_implementation,
            **quantised_loading(arguments, dtype, training),
            **common,
        )
    except (OSError, ValueError) as error:
        raise FuraError(f"Cannot load the model {name!r}: {str(error).splitlines()[0]}") from error
    quantised = arguments.load_in_4bit or arguments.load_in_8bit
    if training.deepspeed_plugin is None and not training.fsdp and not quantised:
        model.to(training.device)  # the basis is computed where the weights are
    return model, tokenizer


def quantised_loading(arguments: ModelArguments, dtype: str, training: FuraGRPOConfig) -> dict[str, Any]:
    """Arguments of `from_pretrained` that quantise the base while it loads, layer by layer; none without the option.

    Raises:
        FuraError: bitsandbytes is missing.
    """
    if not (arguments.load_in_4bit or arguments.load_in_8bit):
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise FuraError("load_in_4bit and load_in_8bit need bitsandbytes: pip install 'fura-rl[quantized]'.")
    config = BitsAndBytesConfig(
        load_in_4bit=arguments.load_in_4bit,
        load_in_8bit=arguments.load_in_8bit,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config, "device_map": {"": training.device}}


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as found:
        found.bind(("", 0))
        return int(found.getsockname()[1])


def run(argv: list[str] | None = None, signals: StopSignals | None = None) -> dict[str, Any]:
    """Train as the options say and return the summary.

    Args:
        argv: Command line; the process's if None.
        signals: Ends training early, with a checkpoint.
    """
    started = time.time()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        # TRL would try 29500 first, so of two runs that start together on a machine one would fail.
        os.environ["MASTER_PORT"] = str(free_port())
    data, training, model_arguments, adapter_arguments = parse(argv)
    check_launch(training, adapter_arguments)
    output = check_output(training)
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(output / "tensorboard"))  # else ./runs until training begins
    if training.use_vllm:
        check_vllm_version()
        if training.vllm_mode == "server" and training.process_index == 0:
            check_server(training)
    wanted = training.resume_from_checkpoint
    checkpoint = find_checkpoint(wanted, output) if wanted else None
    main_process = training.process_index == 0
    changed = changed_options(data, model_arguments, adapter_arguments, training)
    options = {name: "<hidden>" if name.endswith("_token") else value for name, value in changed.items()}
    text = yaml.safe_dump(options, sort_keys=True, allow_unicode=True)
    if main_process:
        print(f"--- configuration (what differs from the defaults)\n{text}", flush=True)
        if wanted:
            print(
                f"--- resuming from {checkpoint}" if checkpoint else "--- no checkpoint yet: from the start", flush=True
            )

    check_memory(training, model_arguments, adapter_arguments)
    assert data.dataset_name is not None  # checked by parse
    problems = load_problems(data.dataset_name, split=data.dataset_train_split, config=data.dataset_config)
    prompt = load_prompt(training.prompt)
    model, tokenizer = load_model(model_arguments, training, adapter_arguments.method)
    check_target_modules(model, adapter_arguments)
    check_problems(problems, prompt, tokenizer, training, getattr(model.config, "max_position_embeddings", None))
    config = adapter_config(adapter_arguments)
    trainer = FuraGRPOTrainer(
        model,
        args=training,
        train_dataset=to_prompts(problems, prompt, tokenizer),
        processing_class=tokenizer,
        peft_config=config,
        full_finetuning=config is None,
    )
    trainer.remove_callback(TransformersProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(ProgressCallback(trainer))
    ObserverCallback(trainer, output, options).attach()
    trainer.add_callback(MetricsFileCallback(output / JOURNALS[0]))
    stop = StopCallback(trainer, signals) if signals is not None else None
    if stop is not None:
        trainer.add_callback(stop)
    if main_process:
        prepare_files(output, checkpoint)
        (output / "config.yaml").write_text(text, encoding="utf-8")
        print(f"--- adapter\n{adapter_table(trainer.model)}", flush=True)

    try:
        if trainer.benchmarks and checkpoint is None:
            trainer.evaluate()
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if stop is None or not stop.stopped:
            trainer.save_model(str(output))
    finally:
        trainer.close()
        best = trainer.best_checkpoint()
        summary = {
            "config": options,
            "versions": versions(),
            "seed": training.seed,
            "steps": trainer.state.global_step,
            "evaluations": trainer.evaluations,
            "generated_tokens": trainer.generated_tokens,
            "seconds": {"total": time.time() - started + trainer.seconds_before, **trainer.clock.snapshot()},
            "engine": "vllm" if trainer.use_vllm else "transformers",
            "error": str(error) if (error := sys.exception()) else None,
            "trainable_parameters": whole_numel(p for p in trainer.model.parameters() if p.requires_grad),
            "best_checkpoint": best.name if best else None,
        }
        if main_process:
            write_summary(output / "summary.json", **summary)
            write_report(output)
    if main_process and stop is not None and stop.stopped:
        print(
            f"Stopped by {stop.signals.received} after step {trainer.state.global_step}; {trainer.last_checkpoint} is "
            "written. --resume_from_checkpoint latest goes on from there.",
            flush=True,
        )
    elif main_process:
        plot_curves(output / JOURNALS[0], trainer.evaluations, output / "curves.png")
        print_summary(summary, output)
    return summary


def print_summary(summary: dict[str, Any], output: Path) -> None:
    """Before and after, where the time went, and where the files lie."""
    seconds = summary["seconds"]
    phases = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items() if name != "total")
    print(f"--- result\n{score_table(summary['evaluations'])}")
    print(f"seconds: total {seconds['total']:.1f} ({phases})")
    print(f"adapter and report: {output} (report.html, summary.json, metrics.jsonl, completions/)", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done or stopped by a signal, 2 a mistake that the user can mend (one sentence on stderr)."""
    try:
        with StopSignals() as signals:
            run(argv, signals)
    except Interrupted as reason:
        print(f"Stopped by {reason} outside of training: nothing was lost, the same command with "
              "--resume_from_checkpoint latest goes on.", file=sys.stderr)  # fmt: skip
        return 0
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
