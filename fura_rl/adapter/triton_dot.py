"""The matrix product of all kernels."""

import triton
import triton.language as tl


@triton.jit
def dot(a, c, INTERPRETED: tl.constexpr):
    """`a @ c` summed in float32. The interpreter multiplies the bit patterns of bf16, so it gets float32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), c.to(tl.float32))
    return tl.dot(a, c, input_precision="tf32x3")
