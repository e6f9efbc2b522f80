"""Kernels run on a GPU where there is one, else under Triton's interpreter."""

import math
import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports dwm_fast.kernels

import pytest

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Bounded:
    """An fp64 value, and a bound of the error with which a GPU may compute it in fp32.

    Running error analysis to first order (Higham, Accuracy and Stability of Numerical Algorithms, section 3.3): a sum,
    difference or product adds UNIT of its own size to the errors that its operands bring. Elementary functions are
    the hardware's, and add what the PTX manual (ISA 9.1, section 9.7.3) and CUDA's mathematics (erff) allow:

        ex2.approx   2 ulp beyond the correctly rounded result      5 UNIT of the result
        lg2.approx   2^-22 between 1/2 and 2, else 2^-22 relative   4 UNIT of max(1, |result|)
        rcp.approx   1 ulp                                          2 UNIT of the result
        div.full     2 ulp                                          4 UNIT of the result
        erff         2 ulp                                          4 UNIT of the result

    exp(x) is ex2(x log2 e) and log(x) is lg2(x) ln 2: the product and its constant round once each.
    """

    UNIT = 2.0**-24  # half the distance of neighbouring fp32 numbers at 1

    def __init__(self, value, error=0.0):
        self.value = torch.as_tensor(value, dtype=torch.float64).cpu()
        self.error = torch.as_tensor(error, dtype=torch.float64).cpu().expand(self.value.shape)

    @staticmethod
    def of(x):
        return x if isinstance(x, Bounded) else Bounded(x)

    @staticmethod
    def made(value, inherited, units=1):
        return Bounded(value, inherited + units * Bounded.UNIT * value.abs())

    def __add__(self, other):
        other = Bounded.of(other)
        return Bounded.made(self.value + other.value, self.error + other.error)

    def __sub__(self, other):
        return self + -Bounded.of(other)

    def __rsub__(self, other):
        return -self + other

    def view(self, shape):
        return Bounded(self.value.view(shape), self.error.reshape(shape))

    def __neg__(self):
        return Bounded(-self.value, self.error)

    def __mul__(self, other):
        other = Bounded.of(other)
        inherited = self.value.abs() * other.error + other.value.abs() * self.error
        return Bounded.made(self.value * other.value, inherited)

    def reciprocal(self, units=2):
        return Bounded.made(1 / self.value, self.error / self.value**2, units)

    def exp(self):
        value = self.value.exp()
        return Bounded.made(value, value * (self.error + 2 * Bounded.UNIT * self.value.abs()), 5)

    def log(self):
        value = self.value.log()
        hardware = 4 * Bounded.UNIT * (value / math.log(2)).abs().clamp(min=1) * math.log(2)
        return Bounded.made(value, self.error / self.value + hardware, 2)

    def sigmoid(self):
        return (1 + (-self).exp()).reciprocal()

    def slope(self):
        """sigmoid'(x) = e^-|x| / (1 + e^-|x|)^2."""
        tail = Bounded(-self.value.abs(), self.error).exp()
        inverse = (1 + tail).reciprocal()
        return tail * inverse * inverse

    def erf(self):
        steepest = 2 / math.sqrt(math.pi) * (-(self.value**2)).exp()
        return Bounded.made(self.value.erf(), steepest * self.error, 4)

    @staticmethod
    def matmul(a, b):
        """a @ b summed in fp32 in any order; a matrix unit may truncate each sum: two units."""
        a, b = a.double().cpu(), b.double().cpu()
        return Bounded(a @ b, 2 * Bounded.UNIT * a.shape[-1] * (a.abs() @ b.abs()))

    @staticmethod
    def gumbel(logit, u, tau):
        """(l + log u - log(1 - u)) / tau."""
        logit, u = Bounded.of(logit), Bounded.of(u)
        return (logit + u.log() - (1 - u).log()) * Bounded.inverse(tau)

    @staticmethod
    def inverse(number):
        """1 / number by div.full, `number` itself rounded to fp32."""
        return Bounded(number, Bounded.UNIT * number).reciprocal(4)

    __radd__, __rmul__ = __add__, __mul__
    __array_ufunc__ = None

    def assert_holds(self, actual):
        """`actual` is within the bound, and half a unit of its own dtype where that is coarser than fp32."""
        assert actual.isfinite().all()
        coarse = torch.finfo(actual.dtype).eps / 2 if actual.dtype in (torch.bfloat16, torch.float16) else 0.0
        error = (actual.double().cpu() - self.value.view(actual.shape)).abs().flatten()
        allowed = (self.error + coarse * self.value.abs()).flatten()
        above = (error > allowed).nonzero().flatten().tolist()
        assert not above, f"{len(above)} elements, first {above[0]}: {error[above[0]]:.2e} > {allowed[above[0]]:.2e}"


@pytest.fixture
def bounded() -> type[Bounded]:
    return Bounded


@pytest.fixture
def device() -> torch.device:
    return torch.device(DEVICE)


@pytest.fixture(autouse=True)
def _poisoned(poison: None) -> None:
    """An element that a kernel did not write shows."""
