"""Matrices in few bits: what is kept of them, what is lost, and that products with the codes are products with what they mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_jax import config
from gemma4_jax.turboquant import codebook, packing, weights

PACKED = [name for name in weights.FORMATS if name != 'int8']


def draw(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def error(w, format, **kwargs):
  """Relative squared error."""
  return float(np.square(np.asarray(weights.encode(w, format, **kwargs).decode()) - w).sum() / np.square(w).sum())


def test_the_config_names_the_formats_that_there_are():
  assert config.WEIGHTS == ('as_is', *weights.FORMATS)


@pytest.mark.parametrize('format, expected', [
    ('turboquant2', 0.1200), ('turboquant3', 0.0343), ('turboquant4', 0.0094), ('turboquant5', 0.00246), ('turboquant6', 0.00099),
    ('turboquant8', 0.0000415), ('int4', 0.0074), ('nf4', 0.0084), ('int8', 0.0000627)])
def test_the_error_on_a_normal_matrix_is_that_of_the_quantizer(format, expected):
  w = draw(128, 1024)
  assert error(w, format) == pytest.approx(expected, rel=0.03)


def test_a_rotation_makes_the_error_independent_of_outliers():
  w = draw(64, 256)
  w[:, [3, 50, 121, 200]] *= 15
  assert error(w, 'turboquant4') < 0.0125 and error(w, 'int4') > 0.025 and error(w, 'nf4') > 0.025


@pytest.mark.parametrize('format, bits', [('turboquant2', 2.125), ('turboquant3', 3.125), ('turboquant4', 4.125), ('turboquant5', 5.125),
                                          ('turboquant6', 6.125), ('turboquant8', 8.125), ('int4', 4.5), ('nf4', 4.25)])
def test_a_weight_takes_its_bits_and_a_16_bit_scale_a_group(format, bits):
  w = weights.encode(draw(16, 2, 128), format, inputs=2)
  assert 8 * w.nbytes / (16 * 256) == bits and w.shape == (16, 2, 128) and w.columns == 256
  made = weights.layout((16, 2, 128), format, inputs=2)
  for name, x in made.items():
    assert (x.shape, x.dtype) == (getattr(w, name).shape, getattr(w, name).dtype)


@pytest.mark.parametrize('format', PACKED)
def test_levels_are_looked_up_without_a_table_to_read(format):
  levels = weights.levels(format)
  assert len(levels) == 2**weights.bits(format) and (np.diff(levels) > 0).all()
  np.testing.assert_allclose(weights.lookup(jnp.arange(len(levels), dtype=jnp.uint8), levels), levels, rtol=1e-6, atol=1e-6)


def test_four_bits_are_lloyd_max():
  np.testing.assert_allclose(weights.levels('turboquant4'), codebook.gaussian(4).levels, rtol=1e-6)


@pytest.mark.parametrize('format', ['int8', 'nf4', 'turboquant3', 'turboquant6'])
def test_a_product_with_the_codes_is_one_with_the_decoded_weight_and_so_is_its_gradient(format, monkeypatch):
  monkeypatch.setattr(weights, '_TILE', 12 * 192)   # 24 rows: two tiles
  w, x = weights.encode(draw(24, 192), format), draw(3, 192, seed=1)     # groups of 64 inputs
  np.testing.assert_allclose(jax.jit(lambda x: w.dot(x))(x), x @ np.asarray(w.decode()).T, atol=2e-4)
  gradient = jax.grad(lambda x: jnp.sum(jnp.sin(w.dot(x))))(x)
  np.testing.assert_allclose(gradient, np.cos(np.asarray(w.dot(x))) @ np.asarray(w.decode()), atol=1e-4)


def test_no_more_than_a_tile_is_ever_decoded():
  w = weights.encode(draw(4096, 1024), 'turboquant4')
  for function in (lambda x, w: w.dot(x), jax.grad(lambda x, w: jnp.square(w.dot(x)).sum())):
    program = jax.jit(function).lower(jax.ShapeDtypeStruct((16, 1024), jnp.float32), w).compile()
    assert program.memory_analysis().temp_size_in_bytes < 4 * 4096 * 1024 * 4 / 5    # float32, and copies of a tile of a quarter


def test_inputs_are_rotated_once_for_all_weights_that_read_them():
  a, b = (weights.encode(draw(32, 256, seed=seed), 'turboquant4') for seed in (0, 1))
  dots = lambda *ws: jax.jit(lambda x: [w.dot(x) for w in ws]).lower(draw(2, 256)).compile().as_text().count(' dot(')
  assert dots(a, b) == dots(a) + 1      # that of b's codes


def test_rows_and_experts_are_cut_out_of_the_codes():
  w = weights.encode(draw(5, 16, 64), 'turboquant3')
  np.testing.assert_array_equal(jax.jit(lambda i: w.part(i).decode())(3), np.asarray(w.decode())[3])
  table = weights.encode(draw(50, 64), 'int4')
  np.testing.assert_array_equal(table.take(jnp.array([[4, 49], [0, 4]]), jnp.float32), np.asarray(table.decode())[[[4, 49], [0, 4]]])


def test_zeros_stay_zeros_and_a_weight_of_no_whole_bytes_is_refused():
  assert not np.asarray(weights.encode(np.zeros((8, 128), np.float32), 'turboquant2').decode()).any()
  with pytest.raises(ValueError, match=r"'turboquant4' takes multiples of 8 inputs, and a weight \[4, 12\] has 12"):
    weights.encode(draw(4, 12), 'turboquant4')
  with pytest.raises(ValueError, match="'int7' is none of int8"):
    weights.encode(draw(4, 12), 'int7')


def test_runs_of_codes_at_one_shift_reach_over_groups():
  w = weights.encode(draw(1, 512), 'turboquant4')
  codes = packing.unpack(w.codes, 4)[0]
  np.testing.assert_array_equal(w.codes[0] & 15, codes[:256])
