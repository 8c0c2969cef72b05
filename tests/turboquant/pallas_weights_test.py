"""The fused matmul against the plain one, and lowered for devices that are not here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_jax import hardware, sharding
from gemma4_jax.turboquant import pallas_weights, weights
from tests import quick

PACKED = [name for name in weights.FORMATS if name != 'int8']


def draw(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize('format', quick.only(['turboquant3', 'turboquant4', 'nf4'], PACKED))
def test_the_kernel_is_the_plain_product(format):
  w, x = weights.encode(draw(96, 512), format), draw(3, 512, seed=1)
  expected = w.dot(x)
  for dtype, most in (('float32', 1e-5), ('bfloat16', 6e-3)):     # which rounds numbers with their scale here, and levels alone there
    found = jax.jit(functools.partial(w.dot, implementation='interpret'))(jnp.asarray(x, dtype))
    reference = expected if dtype == 'float32' else w.dot(jnp.asarray(x, dtype))
    assert float(jnp.linalg.norm(found - reference) / jnp.linalg.norm(reference)) < most


@pytest.mark.parametrize('rows, outputs, inputs', [(1, 16, 704), (65, 128, 256)])
def test_rows_outputs_and_groups_may_be_many(rows, outputs, inputs):
  w, x = weights.encode(draw(outputs, inputs), 'turboquant4'), draw(rows, inputs, seed=1)
  found = jax.jit(functools.partial(w.dot, implementation='interpret'))(x)
  np.testing.assert_allclose(found, w.dot(x), atol=1e-5 * inputs)


def test_the_kernel_of_the_device_runs_unasked_but_on_a_mesh(monkeypatch):
  monkeypatch.setattr(hardware, 'kernels', lambda: 'interpret')
  w, x = weights.encode(draw(96, 512), 'turboquant4'), draw(3, 512, seed=1)
  traced = lambda: str(jax.make_jaxpr(w.dot)(x))
  assert 'pallas_call' in traced() and w.chosen(x) == ('interpret', '')
  with jax.set_mesh(sharding.make_mesh({})):
    assert 'pallas_call' in traced()
  with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((2,), ('tensor',), axis_types=(jax.sharding.AxisType.Auto,))):
    assert 'pallas_call' not in traced() and w.chosen(x) == ('xla', 'a kernel is not split over a mesh')
  assert weights.encode(draw(24, 64), 'nf4').chosen(x[:, :64]) == ('xla', '24 outputs are no multiple of 16')


def test_weights_of_one_shape_are_traced_once():
  ws = [weights.encode(draw(16, 128, seed=seed), 'turboquant4') for seed in range(3)]
  text = jax.jit(lambda x: [w.dot(x, 'interpret') for w in ws]).lower(draw(2, 128)).as_text()
  assert text.count('func.func private @_dot(') == 1 and text.count('call @_dot(') == 3


def test_gradients_of_inputs_are_those_of_the_plain_product():
  w, x = weights.encode(draw(16, 128), 'turboquant4'), draw(2, 128, seed=1)
  gradient = lambda how: jax.grad(lambda x: jnp.square(w.dot(x, how)).sum())(x)
  np.testing.assert_allclose(gradient('interpret'), gradient('xla'), atol=1e-3)


def test_what_the_kernel_cannot_take_is_refused_with_the_reason():
  x = draw(2, 64)
  for format, shape, message in (
      ('int8', (16, 64), 'int8 needs none'), ('turboquant3', (16, 64), 'pieces of 8'), ('nf4', (24, 64), '24 outputs')):
    with pytest.raises(NotImplementedError, match=message):
      weights.encode(draw(*shape), format).dot(x, 'interpret')
  with pytest.raises(NotImplementedError, match='inputs of float16'):
    weights.encode(draw(16, 64), 'nf4').dot(x.astype(np.float16), 'interpret')


@pytest.mark.filterwarnings('ignore:.*[Tt]riton.*:DeprecationWarning')
@pytest.mark.parametrize(('backend', 'platform', 'kind'), [('tpu', 'tpu', 'TPU v5 lite'), ('gpu', 'cuda', 'NVIDIA H200')])
def test_the_kernel_lowers_for_devices_that_are_not_here(backend, platform, kind):
  device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform=backend)
  mark = {'tpu': 'tpu_custom_call', 'gpu': '__gpu$xla.gpu.triton'}[backend]
  cases = [(name, (1536, 4096), 'bfloat16', 1) for name in PACKED] + [('turboquant4', (2816, 704), 'bfloat16', 8)]
  if backend == 'tpu':      # what it cannot lower it says
    for format, shape, *_ in [case for case in cases if case[0] in ('int4', 'nf4') or case[1][1] == 704]:
      made = weights.layout(shape, format)
      w = weights.Weight(made['codes'], made['scale'], format, shape)
      assert 'at least 128 are needed' in pallas_weights.unsupported(w, jax.ShapeDtypeStruct((1, shape[1]), 'bfloat16'), backend)
    cases = [case for case in cases if case[0] in weights.TURBOQUANT and case[1][1] != 704]
  for format, shape, dtype, rows in (*cases, ('turboquant4', (5376, 21504), 'float32', 300)):
    made = weights.layout(shape, format)
    w = weights.Weight(made['codes'], made['scale'], format, shape)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
      traced = jax.jit(lambda w, x: pallas_weights.dot(w, x, backend)).trace(w, jax.ShapeDtypeStruct((rows, shape[1]), dtype))
      assert mark in traced.lower(lowering_platforms=(platform,)).as_text()
