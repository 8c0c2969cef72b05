"""What keeps the tests short: programs that are not optimised, and more of the same marked `slow`."""

import functools
import os
import pathlib

import jax
import jax.numpy as jnp
import pytest

from gemma4_jax.model import transformer

# For programs that run once or twice: half of XLA's time would go into optimising what is never repeated.
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def virtual_devices(count, flags=''):
  """Environment of a Python process that sees this repository and one CPU as `count` devices.

  XLA sizes its pools of threads by NPROC, or the machine's cores: with two threads, devices that wait for each other in collectives
  may hold both, and the rest never comes ("Termination timeout for all reduce", now and then on a busy machine).
  """
  flags = f'{os.environ["XLA_FLAGS"]} --xla_force_host_platform_device_count={count} {flags}'
  return os.environ | {'XLA_FLAGS': flags, 'NPROC': '16', 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(pathlib.Path(__file__).parents[1])}


def only(kept, values):
  """Parameters of a test: of `values` those in `kept`, and the others marked `slow`: more of the same, which `-m slow` runs."""
  assert all(value in values for value in kept), (kept, values)
  params = [value if isinstance(value, tuple) else (value,) for value in values]
  return [pytest.param(*param, marks=[] if value in kept else pytest.mark.slow) for value, param in zip(values, params)]


@functools.partial(jit, static_argnums=0)
def apply(module, params, *args):
  return module.apply({'params': params}, *args)


@functools.partial(jit, static_argnums=0)
def loss_and_grads(cfg, params, ids_BT, mask_BT, pos_BT):
  """Mean cross entropy of the next real token: (logits [B, T, V], loss, gradients); mask is 0 at padding."""
  def loss_fn(params):
    logits_BTV, _ = transformer.Transformer(cfg).apply({'params': params}, ids_BT, pos_BT, mask_BT)
    log_probs_BT = jnp.take_along_axis(jax.nn.log_softmax(logits_BTV)[:, :-1], ids_BT[:, 1:, None], axis=-1)[..., 0]
    real_BT = mask_BT[:, 1:] * mask_BT[:, :-1]
    return -(log_probs_BT * real_BT).sum() / real_BT.sum(), logits_BTV
  (loss, logits_BTV), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
  return logits_BTV, loss, grads
