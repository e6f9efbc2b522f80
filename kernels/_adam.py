"""Device functions of the optimisers: step-wise scalars in fp64, lanes in the state's own precision.

Formulas and their order are torch.optim's single-tensor ones; divisions and roots of lanes are IEEE.
"""

import numpy as np
import triton
import triton.language as tl

from dwm_fast.kernels._math import narrow


@triton.jit
def double(parts, index: tl.constexpr):
    """fp64 number `index` of a tuple in which each takes three fp32 parts; exact, see `split`."""
    return tl.full([], 0.0, tl.float64) + parts[3 * index] + parts[3 * index + 1] + parts[3 * index + 2]


@triton.jit
def power(base, exponent):
    """base ** exponent for a whole exponent >= 0, by squaring, fp64."""
    result = base * 0.0 + 1.0
    while exponent > 0:
        result = tl.where(exponent % 2 == 1, result * base, result)
        base = base * base
        exponent = exponent // 2
    return result


@triton.jit
def divide(x, y):
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y


@triton.jit
def square_root(x):
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def adam_scalars(step_ptr, lr_ptr, parts, STATE: tl.constexpr):
    """Scalars of one tensor's step: -lr / (1 - b1^t), sqrt(1 - b2^t), 1 - lr * decay, 1 - b1, b2, 1 - b2, eps, decay.

    `parts` holds b1, b2, eps and weight decay.
    """
    lr = tl.load(lr_ptr).to(tl.float64)
    step = tl.load(step_ptr).to(tl.int32)
    beta1, beta2, eps, decay = double(parts, 0), double(parts, 1), double(parts, 2), double(parts, 3)
    step_size = -lr / (1.0 - power(beta1, step))
    root = tl.sqrt(1.0 - power(beta2, step))
    return (
        step_size.to(STATE), root.to(STATE), (1.0 - lr * decay).to(STATE), (1.0 - beta1).to(STATE), beta2.to(STATE),
        (1.0 - beta2).to(STATE), eps.to(STATE), decay.to(STATE),
    )  # fmt: skip


@triton.jit
def sgd_scalars(lr_ptr, parts, STATE: tl.constexpr):
    """Scalars of a step: -lr, 1 - lr * decay, momentum, 1 - dampening, decay; parts: momentum, dampening, decay."""
    lr = tl.load(lr_ptr).to(tl.float64)
    momentum, dampening, decay = double(parts, 0), double(parts, 1), double(parts, 2)
    return (
        (-lr).to(STATE),
        (1.0 - lr * decay).to(STATE),
        momentum.to(STATE),
        (1.0 - dampening).to(STATE),
        decay.to(STATE),
    )


@triton.jit
def decayed(weight, grad, shrink, decay, DECAY: tl.constexpr, DECOUPLED: tl.constexpr):
    """Weight and gradient after weight decay: w * (1 - lr * decay), or g + decay * w."""
    if DECAY and DECOUPLED:
        weight = weight * shrink
    elif DECAY:
        grad = grad + decay * weight
    return weight, grad


@triton.jit
def store_free(pointers, value, old, mask, free):
    """Write the lanes of `mask`: `value` where `free`, else what was there; without `free`, `value`."""
    if free is None:
        tl.store(pointers, value, mask=mask)
    else:
        tl.store(pointers, tl.where(free, value, old), mask=mask)


@triton.jit
def adam_values(w, grad, m, v, scalars, near, DECAY: tl.constexpr, DECOUPLED: tl.constexpr):
    """Weight and moments after a step of Adam(W); `near`: 1 - b1 < 1/2.

    m = m + (1 - b1) (g - m);  v = b2 v + (1 - b2) g g;  w = w - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps).
    """
    step_size, root, shrink, rate, beta2, rate2, eps, decay = scalars
    w, g = decayed(w, grad, shrink, decay, DECAY, DECOUPLED)
    # torch.lerp's two formulas, each exact at its end
    m = tl.where(near, m + rate * (g - m), g - (g - m) * (1.0 - rate))
    v = v * beta2 + rate2 * g * g
    return w + divide(step_size * m, divide(square_root(v), root) + eps), m, v


@triton.jit
def adam_lanes(
    weights, w, grad, exp_avg, exp_avg_sq, mask, free, scalars, DECAY: tl.constexpr, DECOUPLED: tl.constexpr
):
    """Adam(W) on the lanes of `mask`, w their values; lanes outside it are not written, and see `store_free`."""
    m0 = tl.load(exp_avg, mask=mask, other=0.0)
    v0 = tl.load(exp_avg_sq, mask=mask, other=0.0)
    w1, m, v = adam_values(w, grad, m0, v0, scalars, scalars[3] < 0.5, DECAY, DECOUPLED)
    store_free(weights, narrow(w1, weights.dtype.element_ty), narrow(w, weights.dtype.element_ty), mask, free)
    store_free(exp_avg, m, m0, mask, free)
    store_free(exp_avg_sq, v, v0, mask, free)


@triton.jit
def sgd_lanes(
    weights, w, grad, momentum_buffers, mask, free, first, scalars, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr,
    DECAY: tl.constexpr, DECOUPLED: tl.constexpr,
):  # fmt: skip
    """SGD on the lanes of `mask`, w their values; at the first step the momentum buffer becomes the gradient."""
    step_size, shrink, momentum, rate, decay = scalars
    w1, g = decayed(w, grad, shrink, decay, DECAY, DECOUPLED)
    if MOMENTUM:
        before = tl.load(momentum_buffers, mask=mask, other=0.0)
        buffer = tl.where(first, g, before * momentum + rate * g)
        store_free(momentum_buffers, buffer, before, mask, free)
        g = g + momentum * buffer if NESTEROV else buffer
    dtype: tl.constexpr = weights.dtype.element_ty
    store_free(weights, narrow(w1 + step_size * g, dtype), narrow(w, dtype), mask, free)


def split(*values: float) -> tuple[float, ...]:
    """Each fp64 number as three fp32 parts: Triton passes Python floats as fp32."""
    parts = []
    for value in values:
        rest = float(value)
        for _ in range(3):
            parts.append(float(np.float32(rest)))
            rest -= parts[-1]
    return tuple(parts)
