"""`fura-rl <command>`: each command lives in the room that does the work; this file only names them."""

from __future__ import annotations

import sys

import typer

from fura_rl.adapter.inspect import info_command
from fura_rl.errors import FuraError
from fura_rl.eval.commands import compare_command, eval_command, overlap_command
from fura_rl.rewards.audit import audit_command
from fura_rl.rollout.client import swap_command
from fura_rl.rollout.serve import serve_command

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="FuRA for reinforcement learning on math: train, evaluate, compare, inspect.",
)

app.command("eval")(eval_command)
app.command("compare")(compare_command)
app.command("overlap")(overlap_command)
app.command("info")(info_command)
app.command("audit")(audit_command)
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


def main() -> None:
    """Entry point: errors for users are one sentence and exit status 2."""
    try:
        app()
    except FuraError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
