"""Orthogonal matrices whose entries are all (nearly) of one size, applied without ever being written out.

A rotation of n channels is R = diag(s) (F1 x F2 x ...), signs s drawn from a seed, the factors normalised Hadamard
matrices joined by Kronecker products: powers of two by Sylvester's construction, what is left by Paley's (orders q + 1
for primes q = 3 mod 4, 2 (q + 1) for primes q = 1 mod 4), so 576 = 36 x 16. Where neither has the order that is needed,
the odd part is a discrete Hartley matrix, cas(2 pi j k / m) / sqrt(m): orthogonal for every m, entries at most sqrt(2)
times those of a Hadamard matrix. Sources: Paley (J. Math. Phys. 12, 1933), Bracewell (JOSA 73, 1983), QuaRot (arXiv
2404.00456) for the use. Everything is float64 and follows from (n, seed) alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

LARGEST = 64  # a power of two above this becomes several factors
LARGEST_PALEY = 1024


@dataclass(frozen=True, eq=False)
class Rotation:
    """R [size, size] as signs float64 [size] and factors, orthogonal float64 matrices."""

    size: int
    signs: torch.Tensor
    factors: tuple[torch.Tensor, ...]

    def turn(self, x: torch.Tensor) -> torch.Tensor:
        """x R for x float64 [T, m * size], each run of `size` columns by itself."""
        turned = x.reshape(-1, self.size) * self.signs
        for factor in reversed(self.factors):  # each acts on the last axis, which then becomes the first
            rows = turned.reshape(len(turned), -1, len(factor)) @ factor
            turned = rows.transpose(1, 2).reshape(len(turned), -1)
        return turned.reshape(x.shape)

    def __str__(self) -> str:
        """Such as hadamard 36 x 16."""
        flat = all(torch.allclose(factor.abs(), factor[0, 0].abs()) for factor in self.factors)
        return f"{'hadamard' if flat else 'hartley'} {' x '.join(str(len(factor)) for factor in self.factors)}"


def rotation(size: int, seed: int) -> Rotation:
    """The randomised rotation of `size` channels; the same on every machine."""
    signs = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
    odd = size // (size & -size)
    orders = [odd << shift for shift in range(size.bit_length()) if size % (odd << shift) == 0]
    order = next((one for one in orders if 1 < one <= LARGEST_PALEY and _paley_prime(one)), odd)
    factors = [] if odd == 1 else [hartley(odd) if order == odd else paley(order)]
    left = size if odd == 1 else size // order
    while left > 1 or not factors:
        factors.append(sylvester(min(left, LARGEST)))
        left //= len(factors[-1])
    return Rotation(size, signs.double(), tuple(factors))


def sylvester(order: int) -> torch.Tensor:
    """The normalised Hadamard matrix of an order that is a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < order:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix / math.sqrt(order)


def paley(order: int) -> torch.Tensor:
    """A normalised Hadamard matrix of order q + 1 (prime q = 3 mod 4) or 2 (q + 1) (prime q = 1 mod 4)."""
    prime = _paley_prime(order)
    squares = {value * value % prime for value in range(1, prime)}
    character = torch.tensor([0.0] + [1.0 if value in squares else -1.0 for value in range(1, prime)])
    index = torch.arange(prime)
    conference = torch.ones(prime + 1, prime + 1, dtype=torch.float64)
    conference[0, 0] = 0
    conference[1:, 1:] = character[(index[:, None] - index) % prime]
    unit = torch.eye(prime + 1, dtype=torch.float64)
    if prime % 4 == 3:
        conference[1:, 0] = -1
        return (conference + unit) / math.sqrt(order)
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    twist = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return (torch.kron(conference, pair) + torch.kron(unit, twist)) / math.sqrt(order)


def hartley(order: int) -> torch.Tensor:
    """The discrete Hartley matrix, (cos + sin)(2 pi j k / order) / sqrt(order): symmetric and orthogonal."""
    index = torch.arange(order)
    angle = (index[:, None] * index % order).double() * (2 * math.pi / order)
    return (angle.cos() + angle.sin()) / math.sqrt(order)


def _paley_prime(order: int) -> int:
    """The prime that Paley's construction of this order starts from; 0 where there is none."""
    for prime, remainder in ((order - 1, 3), (order // 2 - 1, 1)):
        if order % 4 == 0 and prime % 4 == remainder and _is_prime(prime):
            return prime
    return 0


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))
