"""`FuraModel`: puts FuRA layers into a model, as PEFT's tuners do."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import get_quantization_kwargs, resolve_quantization_backend
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from .combination import check_combinable, combine
from .config import FuraConfig
from .errors import AdapterError
from .layer import FuraLayer, FuraLinear
from .loading import prepare_tensors
from .shared_input import link_shared_inputs
from .split_bases import share_bases

# Where target_modules is None: all projections of the usual decoders, elsewhere what PEFT takes for LoRA.
DECODERS = ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3", "smollm3")
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DEFAULT_TARGETS: dict[str, list[str]] = {
    **{model: list(targets) for model, targets in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.items()},
    **dict.fromkeys(DECODERS, PROJECTIONS),
}

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
    target_module_mapping = DEFAULT_TARGETS

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's, with a progress bar where reading the bases takes more than two seconds."""
        with tqdm(desc="FuRA: reading block bases", unit=" layers", delay=2, disable=None) as self._progress:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            share_bases()
        del self._progress
        link_shared_inputs(self.model, FuraLayer)

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        fura_config = cast(FuraConfig, peft_config)
        head_dim = _head_dim(fura_config.side, parent, target_name)
        block_rule = fura_config.block_size
        if isinstance(block_rule, dict):
            block_rule = block_rule.get(get_pattern_key(list(block_rule), current_key), "closest")
        if isinstance(target, FuraLayer):
            target.update_layer(adapter_name, fura_config, block_rule=block_rule, head_dim=head_dim)
        else:
            quantization_kwargs = get_quantization_kwargs(self)
            _check_supported(target, current_key, quantization_kwargs)
            new_module = FuraLinear(
                target,
                adapter_name,
                fura_config,
                block_rule=block_rule,
                head_dim=head_dim,
                name=current_key,
                **quantization_kwargs,
            )
            if adapter_name not in self.active_adapters:
                new_module.requires_grad_(False)  # an additional adapter is not trained until it is activated
            self._replace_module(parent, target_name, new_module, target)
        self._progress.update()

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """PEFT's also moves the adapter to the device of the weight, which for an offloaded one is "meta"."""
        setattr(parent, child_name, new_module)

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        super()._check_new_adapter_config(config)
        if cast(FuraConfig, config).saved_form == "delta" and not config.inference_mode:
            raise AdapterError(
                "this adapter was saved as its multiplier alone, without the basis it was trained in: it can be served "
                "and merged, not trained further. Load the full form to go on training."
            )

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        checked = prepare_tensors(model, adapter_name, state_dict)
        if cast(FuraConfig, config).saved_form == "compact":
            config.saved_form = "full"  # in memory, and where it is saved next
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, checked)

    def fura_layers(self) -> list[FuraLayer]:
        """All adapted layers, in the model's order."""
        return [module for module in self.model.modules() if isinstance(module, FuraLayer)]

    def refresh_basis(self, adapter_name: str | None = None) -> list[nn.Parameter]:
        """Folds an adapter into a new basis: that of the blocks of its merged weight. The model computes the same.

        The answer to a basis that training has left behind. Trained tensors start from zero again.

        Args:
            adapter_name: the active adapter if None.

        Returns:
            The parameters that were reset: an optimiser's state of these is void (`optimizer.state.pop(p, None)`).

        Raises:
            AdapterError: if the adapter's basis does not depend on the weight, or several are active.
        """
        if adapter_name is None:
            if len(self.active_adapters) != 1:
                raise AdapterError(f"refresh_basis: name one of the active adapters {self.active_adapters}.")
            (adapter_name,) = self.active_adapters
        reset: list[nn.Parameter] = []
        for layer in self.fura_layers():
            layer.refresh_basis(adapter_name)
            for blocks in layer.named_blocks([adapter_name]):
                reset += [blocks.core] if blocks.scale is None else [blocks.core, blocks.scale]
        return reset

    def add_weighted_adapter(self, adapters: list[str], weights: list[float], adapter_name: str) -> None:
        """Adds the linear combination of adapters: `W' - W` of the new one is the weighted sum of theirs.

        It starts from that sum in a basis of its own merged weight, and can be trained further.

        Args:
            adapters: names of adapters with the same side, blocks and layers.
            weights: one factor each, of any sign.
            adapter_name: of the new adapter, which is not activated.

        Raises:
            AdapterError: if the adapters differ in side, block size, basis or layers, or a name is unknown or taken.
        """
        unknown = [name for name in adapters if name not in self.peft_config]
        if unknown or adapter_name in self.peft_config or not adapters or len(adapters) != len(weights):
            raise AdapterError(
                f"add_weighted_adapter: cannot make {adapter_name!r} of {adapters} with weights {weights}: names must "
                "be of existing adapters (the new one unused), one weight each."
            )
        check_combinable(self.fura_layers(), adapters)
        config = copy.deepcopy(cast(FuraConfig, self.peft_config[adapters[0]]))
        config.init_weights = True
        self.peft_config[adapter_name] = config
        self.inject_adapter(self.model, adapter_name)
        for layer in self.fura_layers():
            combine(layer, adapters, weights, adapter_name)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hands the argument `adapter_names` of the model's forward to its layers, one adapter a row of the batch."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        known = {"__base__"}.union(*(layer.fura_blocks.keys() for layer in self.fura_layers()))
        unknown = sorted(set(adapter_names) - known)
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        num_beams = kwargs.get("num_beams")
        if isinstance(num_beams, int) and num_beams > 1:  # beam search repeats each row
            expanded = [name for name in adapter_names for _ in range(num_beams)]
            encoder = self.model.get_encoder() if hasattr(self.model, "get_encoder") else None
            encoded = set() if encoder is None or encoder is self.model else set(encoder.modules())  # before the repeat
        else:
            expanded, encoded = list(adapter_names), set()
        handles = [
            module.register_forward_pre_hook(
                partial(_pass_adapter_names, adapter_names=list(adapter_names) if module in encoded else expanded),
                with_kwargs=True,
            )
            for module in self.modules()
            if isinstance(module, FuraLayer | AuxiliaryTrainingWrapper)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _check_supported(target: nn.Module, key: str, quantization_kwargs: dict[str, Any]) -> None:
    """Raises TypeError, as PEFT's own methods do, unless `target` is a linear layer whose forward is called."""
    if isinstance(target, NonDynamicallyQuantizableLinear):
        raise TypeError(
            f"Target module {key} belongs to `torch.nn.MultiheadAttention`, which reads its weight without calling it: "
            "an adapter on it would do nothing. Leave it out with `exclude_modules`."
        )
    if isinstance(target, nn.Embedding):
        raise TypeError(
            f"Target module {key} is an embedding: FuRA multiplies linear layers. Train embeddings in full with "
            "`modules_to_save` instead."
        )
    if (
        not isinstance(target, nn.Linear | Conv1D)
        and resolve_quantization_backend(target, **quantization_kwargs) is None
    ):
        raise TypeError(
            f"Target module {target} ({key}) is not supported. FuRA multiplies linear layers: `torch.nn.Linear`, "
            "`transformers.pytorch_utils.Conv1D` or a quantised linear layer."
        )


def _pass_adapter_names(module: nn.Module, args: tuple, kwargs: dict, adapter_names: list[str]) -> tuple[tuple, dict]:
    return args, {**kwargs, "adapter_names": adapter_names}


def _head_dim(side: str, parent: nn.Module, target_name: str) -> int | None:
    """The size of a head if the adapted side of `parent.target_name` consists of attention heads."""
    if target_name not in (HEADS_IN if side == "input" else HEADS_OUT):
        return None
    return getattr(parent, "head_dim", None) or getattr(parent, "key_value_proj_dim", None)
