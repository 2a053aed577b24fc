"""`FuraConfig`: what to adapt and which member of the FuRA family to use."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from peft.config import PeftConfig

from .errors import AdapterError
from .files import check_adapter_file
from .registration import fura_peft_type

Side = Literal["input", "output"]
SingularValues = Literal["trainable", "frozen", "merged"]
Basis = Literal["svd", "identity", "random"]
BlockRule = Literal["closest", "aligned", "head", "full"]
SavedForm = Literal["full", "delta", "compact"]


@dataclass
class FuraConfig(PeftConfig):
    """Configuration of a FuRA adapter (Full-Rank Adaptation, arXiv 2605.22869).

    A frozen linear layer `W` (out, in) becomes `W blockdiag(M)` with `M = I + D`, `D` made of `n` trained blocks of
    `b x b` (`n * b = in`). The update has full rank and `W` is never written to, so it may be quantised.

    Args:
        target_modules (`list[str] | str | None`): module names (suffixes), a regular expression, or "all-linear": every
            linear layer of a transformers model but its output head. None takes the default of the architecture: all
            projections of Llama-like decoders, elsewhere PEFT's defaults for LoRA.
        exclude_modules (`list[str] | str | None`): names or a regular expression of modules to leave alone.
        side: "input" multiplies the layer's input (`W M`, column blocks), "output" its output (`M W`, row blocks).
        block_size: "closest" (the larger of the two most nearly equal factors of the side's width), "aligned" (the
            power of two nearest to the width's square root, which kernels read faster than 76 or 148), "head" (as
            "closest", but the head dimension where the side's features are attention heads: `o_proj` on the input
            side, `q_proj`, `k_proj`, `v_proj` on the output side), "full" (one block), an int that divides the width,
            or a dict from module name (suffix or regular expression, as in PEFT's `rank_pattern`) to one of these.
            A block larger than the other side of the weight is shrunk to a divisor that fits, with a log line.
        singular_values: "trainable" trains the singular values `s` beside the core `R`, "frozen" keeps them, "merged"
            folds them into the trained core.
        basis: "svd" takes the blocks' right (output side: left) singular vectors. The controls "identity" and
            "random" (orthogonal) drop the spectral preconditioning and need no weight: they also serve bases that
            cannot be dequantised (GPTQ, AWQ).
        train_bias (`bool`): train a difference to the bias of each adapted layer that has one.
        layers_to_transform, layers_pattern: restrict the adaptation to some layer indices, as in `LoraConfig`.
        modules_to_save (`list[str] | None`): further modules trained in full and saved with the adapter.
        init_weights (`bool`): False starts from random differences instead of zero. For tests only.
        saved_form: written by `save_adapter`, not by users: what an adapter's file holds.

    Raises:
        AdapterError: for an unknown or contradictory option.
    """

    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Module names, a regular expression, 'all-linear', or None for the architecture's default."},
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names or a regular expression of modules to leave alone."}
    )
    side: Side = field(default="input", metadata={"help": "Which side of the weight is multiplied: input or output."})
    block_size: int | str | dict[str, int | str] = field(
        default="closest",
        metadata={"help": "'closest', 'aligned', 'head', 'full', an int, or a dict from module name to one."},
    )
    singular_values: SingularValues = field(
        default="trainable", metadata={"help": "'trainable', 'frozen', or 'merged' (folded into the trained core)."}
    )
    basis: Basis = field(default="svd", metadata={"help": "'svd', or the controls 'identity' and 'random'."})
    train_bias: bool = field(default=False, metadata={"help": "Train a difference to the biases of adapted layers."})
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Layer indices to adapt; needs target_modules to be a list."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the nn.ModuleList that holds the layers, if it is not a common one."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules that are trained in full and saved with the adapter."}
    )
    init_weights: bool = field(default=True, metadata={"help": "False: random differences (for tests only)."})
    saved_form: SavedForm = field(default="full", metadata={"help": "Written on saving: what the file holds."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = fura_peft_type()
        for name, choices in {"side": Side, "singular_values": SingularValues, "basis": Basis}.items():
            if getattr(self, name) not in get_args(choices):
                raise AdapterError(
                    f"FuraConfig: {name}={getattr(self, name)!r} is unknown; choose one of {get_args(choices)}."
                )
        if self.saved_form not in get_args(SavedForm):
            raise AdapterError(f"FuraConfig: saved_form={self.saved_form!r} is unknown to this version of fura-rl.")
        for rule in self.block_size.values() if isinstance(self.block_size, dict) else [self.block_size]:
            check_block_rule(rule)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise AdapterError("FuraConfig: layers_to_transform needs target_modules to be a list, not a string.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise AdapterError("FuraConfig: layers_pattern needs layers_to_transform.")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """As PEFT's, after a look at the weights beside the configuration.

        Raises:
            AdapterError: if the weights are pickled, truncated or no safetensors file. PEFT reads an adapter's
                configuration before its weights, so a pickle is refused before it is opened.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if isinstance(config, cls):  # PEFT returns the class that the file asks for
            check_adapter_file(str(pretrained_model_name_or_path), subfolder, kwargs.get("revision"))
        return config


def check_block_rule(rule: int | str) -> None:
    """Raises AdapterError unless `rule` is one of `BlockRule` or a positive int."""
    if isinstance(rule, bool) or not (rule in get_args(BlockRule) or (isinstance(rule, int) and rule > 0)):
        raise AdapterError(
            f"FuraConfig: block_size {rule!r} is neither a positive int nor one of {get_args(BlockRule)}."
        )
