"""In which precision FSDP2 gathers an adapter and sums its gradients."""

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import MixedPrecisionPolicy


def keep_adapter_whole(accelerator: Accelerator) -> None:
    """FSDP2 leaves an adapter in float32 while it computes and in sums of its gradients; autocast serves the rest.

    accelerate's own policy would cast it to bf16 for both; a policy that a caller has set stays.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    plugin = accelerator.state.fsdp_plugin
    if plugin.mixed_precision_policy == MixedPrecisionPolicy(dtype, dtype, dtype):
        plugin.mixed_precision_policy = MixedPrecisionPolicy()
