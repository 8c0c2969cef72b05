"""What XLA is asked for."""

import jax
import jax.numpy as jnp

from gemma4_jax import compilation


def test_lean_programs_do_not_bring_all_bfloat16_weights_to_float32_first():
  def layers(x, ws):
    for w in ws:
      x = jnp.tanh(x @ w)
    return x
  w = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16)
  args = jax.ShapeDtypeStruct((16, 256), jnp.bfloat16), [w] * 16
  temporary = lambda jitted: jitted.lower(*args).compile().memory_analysis().temp_size_in_bytes
  assert temporary(compilation.Jitted(layers, compilation.lean_options)) < 4 * w.size * 4   # of 16
