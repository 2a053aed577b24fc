"""Merging the policy straight into the weights of an engine in the same process.

vLLM's own loader takes a checkpoint's tensors by name: for each one it looks the model's parameters up again, which on
a GPU takes longer than the merge. So after the first push, which goes through the loader, `W M` is written to where the
loader has put it: the rows of a fused matrix (q, k, v; gate, up). That each matrix is where it is thought to be is
checked once against what the loader wrote, up to one rounding; a layer for which it is not so stays with the loader.

Storage is written in place and never replaced, so CUDA graphs go on reading it; on a CUDA device the writes themselves
become a graph, since 200 matrices take longer to launch than to merge. vLLM's CPU build has repacked the weights:
there, and with tensor parallelism, vLLM's loader gets the parts of a fused layer, one layer at a time.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.tensor import DTensor

from fura_rl.adapter import FuraLayer
from fura_rl.adapter.base_weight import is_transposed
from fura_rl.adapter.blocks import FuraBlocks
from fura_rl.adapter.transform import HAVE_KERNELS
from fura_rl.rollout import vllm_names
from fura_rl.rollout.merged import cast, checkpoint_name

logger = logging.getLogger(__name__)

if HAVE_KERNELS:
    from fura_rl.adapter.delta_kernels import run_delta
    from fura_rl.rollout import merge_kernel


@dataclass
class Part:
    """One matrix of the checkpoint in a layer of the engine."""

    name: str
    source: Any  # a FuraLayer, or the plain layer of a part that is not adapted
    rows: slice  # of the engine's weight, if it has them as they are

    @property
    def base(self) -> Any:
        return self.source.get_base_layer() if isinstance(self.source, FuraLayer) else self.source


@dataclass
class FusedLayer:
    """A layer of the engine, and what the policy has for it."""

    module: Any  # vLLM's
    parts: list[Part]
    in_rows: bool = False  # whether the parts are rows of `module.weight`

    def __post_init__(self) -> None:
        self.adapted = [part for part in self.parts if isinstance(part.source, FuraLayer)]


class InPlaceMerge:
    """Where each adapted layer of a policy lies in an engine that holds the policy's current merged weights.

    Args:
        policy: The model, with whole parameters on this rank.
        engine_model: vLLM's model, to which every merged weight has just been loaded.

    Attributes:
        names: Checkpoint names of the layers that `write` takes care of.
        complete: Whether training can change nothing else: every adapter is one of theirs, and nothing more is trained.
    """

    def __init__(self, policy: nn.Module, engine_model: nn.Module) -> None:
        self.layers, others = _find_layers(policy, engine_model)
        self.names = {part.name for layer in self.layers for part in layer.adapted}
        adapted: dict[str, Any] = {
            checkpoint_name(name): m for name, m in policy.named_modules() if isinstance(m, BaseTunerLayer)
        }
        written = {id(p) for name in self.names for p in adapted[name].parameters()}
        trained = [p for p in policy.parameters() if p.requires_grad]
        self.complete = adapted.keys() == self.names and all(id(p) in written for p in trained)
        if others:
            logger.info("vLLM's loader goes on loading %s: they are not laid out as expected.", ", ".join(others))
        self._on_device = bool(self.layers) and all(
            layer.in_rows and layer.module.weight.is_cuda for layer in self.layers
        )
        self._graph: torch.cuda.CUDAGraph | None = None
        self._addresses: list[int] | None = None

    @torch.no_grad()
    def write(self, rounding: torch.Generator | None = None) -> None:
        """Makes the engine's layers those of the policy as it is now.

        Args:
            rounding: Random bits for stochastic rounding, on the weights' device; to the nearest if None.
        """
        addresses = self._all_addresses() if rounding is None and self._on_device else None
        if addresses is None or addresses != self._addresses:  # the first time, or something was exchanged
            self._addresses, self._graph = addresses, None
            self._write_all(rounding)  # compiles kernels, which a capture must not
        else:
            if self._graph is None:
                self._graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                    self._write_all(None)
            self._graph.replay()
        if any(layer.module.weight.is_cuda for layer in self.layers):
            torch.cuda.synchronize()  # the engine may read on another stream

    def _all_addresses(self) -> list[int] | None:
        """Of every tensor that a merge reads or writes, which a graph holds on to; None if they do not stay."""
        addresses = []
        for layer in self.layers:
            addresses.append(layer.module.weight.data_ptr())
            for part in layer.adapted:
                if not _is_simple(part.source):
                    return None
                (blocks,) = part.source.named_blocks(None)
                # straight from the module's dictionaries: this runs before each merge, which takes milliseconds
                tensors = [*blocks._parameters.values(), *blocks._buffers.values(), *part.base._parameters.values()]
                addresses += [tensor.data_ptr() for tensor in tensors if tensor is not None]
        return addresses

    def _write_all(self, rounding: torch.Generator | None) -> None:
        for layer in self.layers:
            if not layer.in_rows:
                dtype = layer.module.weight.dtype
                vllm_names.store_weight(layer.module, [_merged(part.source, dtype, rounding) for part in layer.parts])
            else:
                for part in layer.adapted:
                    _write_rows(part.source, layer.module.weight.data[part.rows], rounding)
            # of any adapter: the one that was active before may have trained it
            if any(block.bias is not None for part in layer.adapted for block in part.source.fura_blocks.values()):
                biases = [_merged_bias(part.source) for part in layer.parts]
                vllm_names.store_bias(layer.module, biases)


def _find_layers(policy: nn.Module, engine_model: nn.Module) -> tuple[list[FusedLayer], list[str]]:
    """The engine's layers that can be written to, and the paths of the others."""
    sources = {checkpoint_name(name): module for name, module in policy.named_modules()}
    fused_layers = getattr(engine_model, "packed_modules_mapping", {})
    found: dict[str, FusedLayer | None] = {}
    for name in [name for name, module in sources.items() if isinstance(module, FuraLayer)]:
        parent, _, leaf = name.rpartition(".")
        path, names = name, [name]
        for fused, leaves in fused_layers.items():
            if leaf in leaves:
                path, names = f"{parent}.{fused}", [f"{parent}.{part}" for part in leaves]
        if path not in found:
            found[path] = _find_layer(engine_model, path, [(part, sources.get(part)) for part in names])
    return [layer for layer in found.values() if layer], [path for path, layer in found.items() if layer is None]


def _find_layer(engine_model: nn.Module, path: str, sources: list[tuple[str, Any]]) -> FusedLayer | None:
    try:
        module: Any = engine_model.get_submodule(path)
    except AttributeError:
        return None
    if not vllm_names.is_plain_linear(module) or any(not _is_whole(source) for _, source in sources):
        return None
    parts, start = [], 0
    for name, source in sources:
        stop = start + source.out_features
        parts.append(Part(name, source, slice(start, stop)))
        start = stop
    layer = FusedLayer(module, parts)
    if module.weight.numel() and not vllm_names.is_split(module):
        layer.in_rows = True
        if module.weight.shape[0] != start or not all(
            _holds(module.weight.data[p.rows], p.source) for p in layer.adapted
        ):
            return None
    return layer


def _is_whole(source: Any) -> bool:
    """Whether this rank has all of a layer: not spread by ZeRO-3 or FSDP2, and in the layout of `nn.Linear`."""
    if isinstance(source, FuraLayer):
        base = source.get_base_layer()
    elif isinstance(source, nn.Linear) and source.weight.is_floating_point():
        base = source
    else:
        return False
    spread = any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in source.parameters())
    return not spread and not is_transposed(base)


@torch.no_grad()
def _holds(rows: torch.Tensor, source: FuraLayer) -> bool:
    """Whether the engine's rows are the merged weight, up to one rounding."""
    merged = _merged(source, rows.dtype, None)
    if merged.shape != rows.shape:
        return False
    spacing = torch.finfo(rows.dtype).eps * merged.abs()
    return bool(((merged - rows).abs() <= spacing).all())


def _merged(source: Any, dtype: torch.dtype, rounding: torch.Generator | None) -> torch.Tensor:
    if isinstance(source, FuraLayer):
        return cast(source.merged_weight(), dtype, rounding)
    return source.weight.detach().to(dtype)


def _merged_bias(source: Any) -> Any:
    return source.merged_bias() if isinstance(source, FuraLayer) else source.bias.detach()


def _is_simple(source: Any) -> bool:
    """Whether a layer's merged weight is a function of tensors that stay where they are."""
    return source.quantization_backend is None and not source.merged and len(source.named_blocks(None)) == 1


def _write_rows(source: FuraLayer, out: torch.Tensor, rounding: torch.Generator | None) -> None:
    blocks = source.named_blocks(None)
    if rounding is None and _is_simple(source) and blocks[0].side == "input" and HAVE_KERNELS:
        base: Any = source.get_base_layer()
        weight = base.weight.detach()
        if merge_kernel.supports(weight, blocks[0].block_size, out):
            return merge_kernel.merge_into(weight, _delta(blocks[0]), out)
    out.copy_(_merged(source, out.dtype, rounding))


def _delta(blocks: FuraBlocks) -> torch.Tensor:
    """`D` (n, b, b) in float32, in one launch where there is a kernel for it."""
    if blocks.basis is None or blocks.fold is not None or blocks.core.dtype != torch.float32:
        return blocks()
    tensors = (blocks.basis, blocks.sigma, blocks.core, blocks.scale)
    return run_delta(tensors, blocks.singular_values == "merged", False)
