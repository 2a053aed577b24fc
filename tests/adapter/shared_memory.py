"""Compiles the kernels for a GPU that is not here and prints the shared memory of each program: a process of
`test_launches.py`, since Triton decides while it is imported whether it interprets."""

import json
import sys
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fura_rl.adapter import launches, triton_launch

TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32"}
found: list[tuple[str, int]] = []  # kernel, bytes


def compile_instead(kernel, grid, tensors, size, *rest, num_warps):
    """In place of a launch. Sizes and pointers that are multiples of 16 are compiled as such, as Triton does."""
    signature, constants, attributes = {}, {}, {}
    for index, (parameter, value) in enumerate(zip(kernel.function.params, (*tensors, size, *rest), strict=True)):
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        else:
            is_tensor = isinstance(value, torch.Tensor)
            signature[parameter.name] = TYPES[value.dtype] if is_tensor else "i32"
            if is_tensor or (not parameter.do_not_specialize and value % 16 == 0):
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel.function, signature, constants, attributes)
    target = GPUTarget("cuda", 10 * PROPERTIES.major + PROPERTIES.minor, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": num_warps})
    found.append((f"{kernel.function.__name__}, {[tuple(t.shape) for t in tensors[:2]]}", compiled.metadata.shared))


PROPERTIES = SimpleNamespace(
    multi_processor_count=128, major=8, minor=9, shared_memory_per_block_optin=int(sys.argv[1])
)
launches.device_properties = lambda index: PROPERTIES
triton_launch.Kernel.__call__ = compile_instead


def compile_all(b: int, dtype: torch.dtype) -> None:
    from fura_rl.adapter.delta_kernels import run_delta_gradients, run_deltas
    from fura_rl.adapter.gathered_kernels import run_gathered
    from fura_rl.adapter.gradient_kernels import run_gated_gradient_shares, run_gradient_shares
    from fura_rl.adapter.kernels import run_transform
    from fura_rl.adapter.shared_kernels import run_shared_gradient_shares, run_shared_transform, supports

    n, count = 4, 3
    x, delta = torch.zeros(4096, n * b, dtype=dtype), torch.zeros(n, b, b, dtype=dtype)
    run_transform(x, delta)
    run_transform(x, delta.mT)
    run_gradient_shares(x, x, delta, True)
    run_gradient_shares(x, x, delta, True, other=x)
    run_gated_gradient_shares(x, x, x, delta)
    if supports(b, dtype, x.device):
        deltas = torch.zeros(count, n, b, b, dtype=dtype)
        run_shared_transform(x, deltas)
        run_shared_gradient_shares([x] * count, x, deltas, True)
        run_shared_transform(x, deltas[:2])
        run_shared_gradient_shares([x] * 2, x, deltas[:2], True)
    adapter = torch.zeros(n, b, b), torch.zeros(n, b), torch.zeros(n, b, b), torch.zeros(n, b)
    run_deltas([adapter], False, False, dtype)
    run_delta_gradients(torch.zeros(3, 1, n, b, b), [adapter], False, False)
    if dtype != torch.float32:
        slots = torch.zeros(2, 1, dtype=torch.int32)
        order, starts = torch.zeros(4096, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
        run_gathered(x, torch.zeros(2, 1, n, b, b, dtype=dtype), slots, order, starts)


compile_all(64, torch.bfloat16)
compile_all(128, torch.bfloat16)
compile_all(64, torch.float32)
compile_all(32, torch.float32)
print(json.dumps(found))
