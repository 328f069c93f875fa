"""How close a compiled result must be to eager's, by dtype. The one table; no test carries its own numbers.

The backend runs the ops that eager runs, without decompositions, so most results are equal to the bit. What may
differ is the order of a reduction (another thread count on the worker) and the portable attention op.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Tolerance:
    """`|actual - expected| <= atol + rtol * |expected|`, element by element."""

    rtol: float
    atol: float


EXACT = Tolerance(rtol=0.0, atol=0.0)

TOLERANCES: dict[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(rtol=1e-10, atol=1e-10),
    torch.float32: Tolerance(rtol=1e-5, atol=1e-5),
    torch.float16: Tolerance(rtol=1e-3, atol=1e-3),
    torch.bfloat16: Tolerance(rtol=1.6e-2, atol=1e-2),
    torch.float8_e4m3fn: Tolerance(rtol=0.125, atol=2e-3),
    torch.float8_e5m2: Tolerance(rtol=0.25, atol=2e-3),
    torch.complex128: Tolerance(rtol=1e-10, atol=1e-10),
    torch.complex64: Tolerance(rtol=1e-5, atol=1e-5),
    torch.complex32: Tolerance(rtol=1e-3, atol=1e-3),
}


def tolerance_for(dtype: torch.dtype) -> Tolerance:
    """The tolerance of a dtype. Integers, bool and quantised types must be equal."""
    return TOLERANCES.get(dtype, EXACT)
