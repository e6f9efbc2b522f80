"""Elementary functions of these kernels: the hardware's own approximations, and NumPy's under the interpreter.

Triton's exp, log and division handle subnormal numbers and, for the logarithm, the last bits by polynomials: 9 to 24
instructions each where one or two do. Errors of the short forms (PTX manual): ex2, rcp 2**-22 relative, lg2 2**-22
absolute near 1. They move a mask's threshold by less than 2**-21, inside the contract's 2**-20.
"""

import os

import triton
import triton.language as tl

INTERPRETED: tl.constexpr = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
_LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def bound(x):
    """A scalar as the bound of a loop: itself, and a Python integer under the interpreter.

    Triton 3.6's interpreter leaves the conversion to NumPy, whose newest releases take no array of one element for it.
    """
    if INTERPRETED:
        return x.handle.data.item()
    else:
        return x


@triton.jit
def exp(x):
    """e**x, 0 below -87.3, infinite above 88.7."""
    if INTERPRETED:
        return tl.exp(x)
    else:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * _LOG2_E], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def log(x):
    """Natural logarithm of a normal x > 0."""
    if INTERPRETED:
        return tl.log(x)
    else:
        y = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
        return y * _LN_2


@triton.jit
def reciprocal(x):
    """1 / x, 0 above 2**126."""
    if INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def sigmoid(x):
    """1 / (1 + e**-x)."""
    return reciprocal(1.0 + exp(-x))


@triton.jit
def sigmoid_slope(x):
    """sigmoid(x) * (1 - sigmoid(x)) with full relative accuracy at both ends."""
    tail = exp(-tl.abs(x))
    inverse = reciprocal(1.0 + tail)
    return tail * inverse * inverse


@triton.jit
def narrow(value, dtype: tl.constexpr):
    """fp32 or fp64 to `dtype`, rounded to nearest even; by integers in the interpreter, which truncates bfloat16."""
    if INTERPRETED and dtype == tl.bfloat16:
        word = value.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = ((word + 0x7FFF + ((word >> 16) & 1)) >> 16).to(tl.uint16)
        return tl.where(value == value, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(dtype)
