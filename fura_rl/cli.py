"""`fura-rl <command>`: each command lives in the room that does the work; this file only names them."""

from __future__ import annotations

import sys

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fura_rl.adapter.inspect import info_command
from fura_rl.errors import FuraError
from fura_rl.eval.commands import compare_command, eval_command, overlap_command
from fura_rl.merge import merge_command
from fura_rl.plan_command import plan_command
from fura_rl.rewards.audit import audit_command
from fura_rl.rollout.client import swap_command
from fura_rl.rollout.serve import serve_command
from fura_rl.trainer.report_page import report_command
from fura_rl.trainer.sweep import sweep_command
from fura_rl.trainer.watch import watch_command

# What `fura-rl` alone shows, in the order in which one needs them.
COMMANDS = {
    "doctor": ("Check the installation", "fura-rl doctor"),
    "plan": ("See whether a recipe fits a GPU", "fura-rl plan --config demo.yaml --gpu-memory 80"),
    "train": ("GRPO from a recipe", "fura-rl train --config demo.yaml"),
    "sweep": ("Compare methods over learning rates and seeds", "fura-rl sweep configs/sweeps/arithmetic.yaml"),
    "watch": ("Follow a run in the terminal", "fura-rl watch runs/demo"),
    "report": ("Write a run's report.html again", "fura-rl report runs/demo"),
    "audit": ("Find rollouts whose grade is doubtful", "fura-rl audit runs/demo"),
    "info": ("Show what an adapter holds and how far it has moved", "fura-rl info runs/demo"),
    "eval": ("Score a model on benchmarks", "fura-rl eval --model Qwen/Qwen3-1.7B -b math500 --out runs/base"),
    "compare": ("Compare evaluations problem by problem", "fura-rl compare runs/base runs/tuned"),
    "overlap": ("Look for benchmark problems in a training set", "fura-rl overlap train.jsonl -b math500"),
    "merge": ("Write base and adapter as one checkpoint", "fura-rl merge runs/demo --out runs/demo-merged"),
    "serve": ("Serve a model whose adapter can be swapped", "fura-rl serve Qwen/Qwen3-1.7B --adapter mine=runs/mine"),
    "swap": ("Change the adapter of a running server", "fura-rl swap http://127.0.0.1:8000 runs/mine"),
}

app = typer.Typer(
    pretty_exceptions_enable=False,
    help="FuRA for reinforcement learning on math: train, watch, evaluate, compare, merge.",
)


@app.callback(invoke_without_command=True)
def overview(context: typer.Context) -> None:
    """FuRA for reinforcement learning on math: train, watch, evaluate, compare, merge."""
    if context.invoked_subcommand is None:
        table = Table.grid(padding=(0, 2))
        for name, (what, example) in COMMANDS.items():
            table.add_row(Text(name, style="bold"), Text.assemble(f"{what}\n", (example, "cyan")))
        console = Console()
        console.print(table)
        console.print("\nOptions of a command: fura-rl COMMAND --help. Shell completion: fura-rl --install-completion.")


app.command("eval")(eval_command)
app.command("compare")(compare_command)
app.command("overlap")(overlap_command)
app.command("info")(info_command)
app.command("audit")(audit_command)
app.command("report")(report_command)
app.command("watch")(watch_command)
app.command("sweep")(sweep_command)
app.command("plan", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(plan_command)
app.command("merge")(merge_command)
app.command("swap")(swap_command)
app.command("serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve_command)


@app.command(
    "train",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def train(context: typer.Context) -> None:
    """GRPO from a recipe, in this process: fura-rl train --config demo.yaml [--option value ...]."""
    from fura_rl.train_grpo import main as train_main

    raise typer.Exit(train_main(context.args))


@app.command("doctor")
def doctor_command() -> None:
    """Versions, devices, what is missing for what, and a short self-test. Exit status 1 if a check fails."""
    from fura_rl.doctor import doctor

    raise typer.Exit(0 if doctor(Console()) else 1)


def main() -> None:
    """Entry point: errors for users are one sentence, what to try next, and exit status 2."""
    try:
        app()
    except FuraError as error:
        print(f"error: {error}", file=sys.stderr)
        name = next((word for word in sys.argv[1:] if word in COMMANDS), None)
        if name is not None:
            print(f"An example: {COMMANDS[name][1]} (options: fura-rl {name} --help)", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
