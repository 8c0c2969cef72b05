"""Scalar codebooks for one coordinate of a randomly rotated vector, in units where that coordinate has variance 1.

A coordinate of a uniformly random direction in d dimensions, times sqrt(d), has density ~ (1 - y^2/d)^((d-3)/2) on |y| < sqrt(d),
which tends to the standard normal. Nothing here looks at data. Everything is float64 numpy, solved once and kept.

Source: arXiv 2504.19874 (TurboQuant), algorithm 1; Max 1960 and Lloyd 1982 for the conditions.
"""

from collections.abc import Callable
import dataclasses
import functools
import math

import numpy as np
import scipy.optimize
import scipy.special


@dataclasses.dataclass(frozen=True, eq=False)
class Codebook:
  """A symmetric scalar quantizer: y becomes levels[i], i = number of thresholds below y.

  levels: float64 [J], ascending, levels[i] = -levels[J-1-i].
  thresholds: float64 [J - 1], midpoints of neighbouring levels.
  distortion: E (y - level)^2 under the density it was made for, whose variance is 1.
  """
  levels: np.ndarray
  thresholds: np.ndarray
  distortion: float


@dataclasses.dataclass(frozen=True)
class _Density:
  """A symmetric density on the positive half [0, end]: itself, and mass and first moment of the cells between edges."""
  pdf: Callable[[np.ndarray], np.ndarray]
  cells: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]   # edges [n + 1] -> mass [n], moment [n]
  end: float
  variance: float = 1.0


@functools.lru_cache
def gaussian(bits: int) -> Codebook:
  """Least squared error for the standard normal, the limit of large dimensions; bits in 1..8."""
  check_bits(bits)
  return _lloyd_max(_normal(), math.sqrt(3) * scipy.special.ndtri(0.5 + 0.5 * _middles(bits)))   # Panter and Dite's rule as a start


@functools.lru_cache
def exact(bits: int, dim: int) -> Codebook:
  """Least squared error for a coordinate of a random direction in `dim` >= 2 dimensions, times sqrt(dim); bits in 1..8."""
  check_bits(bits)
  if dim < 2:
    raise ValueError(f'dim={dim}: a random direction needs 2 dimensions or more')
  tail, half = (dim - 1) / 2, 0.5
  constant = 1 / (math.sqrt(dim) * scipy.special.beta(half, tail))
  rest = lambda y: np.maximum(1 - y * y / dim, 0)
  def cells(edges):
    beyond = scipy.special.betainc(tail, half, rest(edges)) / 2
    return -np.diff(beyond), -np.diff(constant * dim / (dim - 1) * rest(edges)**tail)
  density = _Density(lambda y: constant * rest(y)**(tail - 1), cells, math.sqrt(dim))
  # The cube root of the density has the same form with another exponent, hence closed quantiles.
  start = math.sqrt(dim) * np.sqrt(scipy.special.betaincinv(half, (dim + 3) / 6, _middles(bits)))
  return _lloyd_max(density, start)


@functools.lru_cache
def uniform(bits: int) -> Codebook:
  """2**bits levels step * (i - (2**bits - 1) / 2) with the best step for the standard normal: decoded without a table."""
  check_bits(bits)
  return _best_step(np.arange(2**(bits - 1)) + 0.5)


@functools.lru_cache
def int8_grid(bits: int) -> Codebook:
  """Lloyd-Max levels moved to integers in -127..127 times a common step, so that dot products may run in int8; bits in 1..6.

  The integers are np.rint(127 * levels / levels[-1]).
  """
  if bits not in range(1, 7):
    raise ValueError(f'bits={bits}: the int8 grid is for 1 to 6 bits; more levels would collide, take grid="uniform"')
  half = gaussian(bits).levels[2**(bits - 1):]
  return _best_step(np.rint(127 * half / half[-1]))


@functools.lru_cache
def polar_angle(bits: int, level: int) -> Codebook:
  """Least squared error for PolarQuant's angle of `level` >= 2, in radians from pi/4.

  Of a random vector, the angle between the lengths of two halves of 2**(level-1) coordinates has density ~ sin(2 psi)^(2^(level-1)-1).
  `distortion` is in square radians. Source: arXiv 2502.02617.
  """
  check_bits(bits)
  power, end = 2**(level - 1) - 1, math.pi / 4
  nodes, weights = np.polynomial.legendre.leggauss(64)
  def cells(edges, pdf=lambda y: np.cos(2 * y)**power):
    half = np.diff(edges)[:, None] / 2
    y = edges[:-1, None] + half * (1 + nodes)
    return (half * weights * pdf(y)).sum(1), (half * weights * pdf(y) * y).sum(1)
  whole = 2 * cells(np.array([0, end]))[0].item()
  pdf = lambda y: np.cos(2 * y)**power / whole
  variance = 2 * cells(np.array([0, end]), lambda y: pdf(y) * y)[1].item()
  return _lloyd_max(_Density(pdf, lambda edges: cells(edges, pdf), end, variance), end * 0.9 * _middles(bits))


def check_bits(bits: int) -> None:
  if bits not in range(1, 9):
    raise ValueError(f'bits={bits}: must be 1 to 8')


def _normal() -> _Density:
  pdf = lambda y: np.exp(-y * y / 2) / math.sqrt(2 * math.pi)
  return _Density(pdf, lambda edges: (-np.diff(scipy.special.ndtr(-edges)), -np.diff(pdf(edges))), np.inf)


def _middles(bits: int) -> np.ndarray:
  n = 2**(bits - 1)
  return (np.arange(n) + 0.5) / n


def _edges(levels: np.ndarray, end: float) -> np.ndarray:
  return np.concatenate([[0], (levels[1:] + levels[:-1]) / 2, [end]])


def _lloyd_max(density: _Density, levels: np.ndarray) -> Codebook:
  """Solves level = mean of its cell for the positive half: Lloyd's steps, then Newton's, as Lloyd's alone slow down from 6 bits on."""
  def means(levels):
    mass, moment = density.cells(_edges(levels, density.end))
    return moment / mass, mass
  for _ in range(300):
    levels, _ = means(levels)
  for _ in range(20):
    mean, mass = means(levels)
    residual = levels - mean
    if np.abs(residual).max() < 1e-13:
      break
    inner = _edges(levels, density.end)[1:-1]
    up = density.pdf(inner) * (inner - mean[:-1]) / mass[:-1] / 2      # by half of what a threshold moves, its left cell's mean moves
    down = density.pdf(inner) * (mean[1:] - inner) / mass[1:] / 2
    pull = np.diag(up, 1) + np.diag(down, -1) + np.diag(np.append(up, 0) + np.insert(down, 0, 0))
    levels = levels - np.linalg.solve(np.eye(len(levels)) - pull, residual)
  if not np.abs(residual).max() < 1e-12:
    raise ArithmeticError(f'Lloyd-Max did not converge: {len(levels)} levels, residual {np.abs(residual).max():.1e}')
  return _mirrored(levels, density)


def _best_step(points: np.ndarray) -> Codebook:
  """The positive `points` times the step of least squared error for the standard normal."""
  density = _normal()
  def slope(step):     # of the error, halved; the thresholds' own movement does not change it
    mass, moment = density.cells(_edges(step * points, np.inf))
    return points @ (step * points * mass - moment)
  return _mirrored(points * scipy.optimize.brentq(slope, 1e-6, 4 / points[0], xtol=1e-14), density)


def _mirrored(half: np.ndarray, density: _Density) -> Codebook:
  mass, moment = density.cells(_edges(half, density.end))
  levels = np.concatenate([-half[::-1], half])
  thresholds = (levels[1:] + levels[:-1]) / 2
  levels.setflags(write=False)
  thresholds.setflags(write=False)
  return Codebook(levels, thresholds, float(density.variance - 2 * (2 * half * moment - half**2 * mass).sum()))
