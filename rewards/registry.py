"""Reward functions by name, as a recipe lists them."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from fura_rl.errors import FuraError

from .accuracy import Accuracy, CosineLength
from .shaping import FormatReward, Repetition, SoftOverlong
from .verifier import MathVerifier

REWARDS: dict[str, Any] = {
    "accuracy": Accuracy,
    "format": FormatReward,
    "soft_overlong": SoftOverlong,
    "repetition": Repetition,
    "cosine_length": CosineLength,
}


def load_rewards(
    specs: Sequence[str], verifier: MathVerifier | None = None, **options: Any
) -> list[Callable[..., list[float | None]]]:
    """Reward functions with TRL's signature, one for each name.

    Args:
        specs: Names (`accuracy`, `format`, `soft_overlong`, `repetition`, `cosine_length`), or import paths of own
            functions (`my_pkg.my_mod:my_reward`), which are used as they are.
        verifier: Shared by all rewards that need one; a default `MathVerifier` if left out.
        options: Arguments of the built-in rewards, by their names: `max_completion_length`, `overlong_buffer`,
            `format_style`, ... Each reward takes those it knows; an option that is None keeps its default.

    Raises:
        FuraError: A name is unknown, a path cannot be imported, or an option is missing or known to no reward.
    """
    known = {name: set(inspect.signature(cls).parameters) - {"verifier"} for name, cls in REWARDS.items()}
    unknown = sorted(set(options) - set().union(*known.values()))
    if unknown:
        raise FuraError(
            f"No reward takes the option {unknown[0]!r}; known: {', '.join(sorted(set().union(*known.values())))}."
        )
    rewards: list[Callable[..., list[float | None]]] = []
    for spec in specs:
        if ":" in spec:
            rewards.append(_imported(spec))
            continue
        if spec not in REWARDS:
            raise FuraError(
                f"Unknown reward {spec!r}: choose from {', '.join(REWARDS)}, "
                "or give an import path `package.module:function`."
            )
        cls = REWARDS[spec]
        arguments = {name: value for name, value in options.items() if name in known[spec] and value is not None}
        parameters = inspect.signature(cls).parameters
        for name, parameter in parameters.items():
            if name != "verifier" and parameter.default is parameter.empty and name not in arguments:
                raise FuraError(f"The reward {spec!r} needs the option {name!r}.")
        if "verifier" in parameters:
            verifier = verifier or MathVerifier()
            arguments["verifier"] = verifier
        rewards.append(cls(**arguments))
    return rewards


def _imported(spec: str) -> Callable[..., list[float | None]]:
    module_name, _, attribute = spec.partition(":")
    if os.getcwd() not in sys.path:  # a console script does not look into the working directory by itself
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise FuraError(f"Cannot import the reward {spec!r}: {error}.") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise FuraError(f"The module {module_name} has no function {attribute!r} (asked for by the reward {spec!r}).")
    return function
