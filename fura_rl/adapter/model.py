"""`FuraModel`: puts FuRA layers into a model, as PEFT's tuners do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils import get_quantization_kwargs, resolve_quantization_backend
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from torch import nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from .config import FuraConfig
from .layer import FuraLayer

# Projections of an attention block by which side of them consists of heads.
HEADS_IN = {"o_proj", "out_proj", "c_proj", "dense", "wo", "o"}
HEADS_OUT = {"q_proj", "k_proj", "v_proj", "q", "k", "v", "query", "key", "value", "wq", "wk", "wv"}


class FuraModel(BaseTuner):
    """A model whose linear layers carry FuRA adapters.

    Args:
        model (`torch.nn.Module`): the model to adapt; its own weights are frozen and never written to.
        config ([`FuraConfig`]): which layers, which blocks.
        adapter_name (`str`): defaults to "default".
        low_cpu_mem_usage (`bool`): build the adapter on the meta device, for loading. It also saves computing a basis
            that the loaded one would replace.

    Example:
        ```py
        >>> import fura_rl
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForCausalLM

        >>> model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-1.7B-Base")
        >>> model = get_peft_model(model, fura_rl.FuraConfig(target_modules="all-linear"))
        >>> model.print_trainable_parameters()
        ```
    """

    prefix: str = "fura_"
    tuner_layer_cls = FuraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's, with a progress bar where reading the bases takes more than two seconds."""
        with tqdm(desc="FuRA: reading block bases", unit=" layers", delay=2, leave=False) as self._progress:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        del self._progress

    def _create_and_replace(
        self,
        fura_config: FuraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        head_dim = _head_dim(fura_config.side, parent, target_name)
        block_rule = fura_config.block_size
        if isinstance(block_rule, dict):
            block_rule = block_rule.get(get_pattern_key(block_rule, current_key), "closest")
        if isinstance(target, FuraLayer):
            target.update_layer(adapter_name, fura_config, block_rule=block_rule, head_dim=head_dim)
        else:
            if not isinstance(target, nn.Linear | Conv1D) and resolve_quantization_backend(target) is None:
                raise TypeError(
                    f"Target module {target} ({current_key}) is not supported. FuRA multiplies linear layers: "
                    "`torch.nn.Linear`, `transformers.pytorch_utils.Conv1D` or a quantised linear layer."
                )
            new_module = FuraLayer(
                target,
                adapter_name,
                fura_config,
                block_rule=block_rule,
                head_dim=head_dim,
                name=current_key,
                **get_quantization_kwargs(self),
            )
            if adapter_name not in self.active_adapters:
                new_module.requires_grad_(False)  # an additional adapter is not trained until it is activated
            self._replace_module(parent, target_name, new_module, target)
        self._progress.update()

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hands the argument `adapter_names` of the model's forward to its layers, one adapter a row of the batch."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        layers = [module for module in self.modules() if isinstance(module, FuraLayer)]
        known = {"__base__"}.union(*(layer.fura_blocks.keys() for layer in layers))
        unknown = sorted(set(adapter_names) - known)
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        num_beams = kwargs.get("num_beams")
        if isinstance(num_beams, int) and num_beams > 1:  # beam search repeats each row
            adapter_names = [name for name in adapter_names for _ in range(num_beams)]
        hook = partial(_pass_adapter_names, adapter_names=list(adapter_names))
        handles = [
            module.register_forward_pre_hook(hook, with_kwargs=True)
            for module in self.modules()
            if isinstance(module, FuraLayer | AuxiliaryTrainingWrapper)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _pass_adapter_names(module: nn.Module, args: tuple, kwargs: dict, adapter_names: list[str]) -> tuple[tuple, dict]:
    return args, {**kwargs, "adapter_names": adapter_names}


def _head_dim(side: str, parent: nn.Module, target_name: str) -> int | None:
    """The size of a head if the adapted side of `parent.target_name` consists of attention heads."""
    if target_name not in (HEADS_IN if side == "input" else HEADS_OUT):
        return None
    return getattr(parent, "head_dim", None) or getattr(parent, "key_value_proj_dim", None)
