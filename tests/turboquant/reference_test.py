"""Attention over packed codes against attention over what they decode to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_jax.turboquant import ops, reference
from gemma4_jax.turboquant.quantizer import Quantizer
from tests import quick

B, K, G, S = 3, 2, 4, 700     # more slots than a chunk, and no multiple of it
START, END = jnp.int32([0, 650, 3]), jnp.int32([700, 651, 560])


def draw(*shape, seed=0):
  return jnp.float32(np.random.default_rng(seed).standard_normal(shape))


def plain(q, k, v, start=START, end=END):
  """Softmax attention, [B, K, G, D]."""
  slots = jnp.arange(k.shape[2])
  seen = (slots >= start[:, None]) & (slots < end[:, None])
  score = jnp.where(seen[:, None, None], jnp.einsum('bkgd,bksd->bkgs', q, k, precision='highest'), -jnp.inf)
  return jnp.einsum('bkgs,bksd->bkgd', jax.nn.softmax(score), v, precision='highest')


def encode(part, x):
  """Rotates block by block, and encodes."""
  blocks = x.reshape(*x.shape[:-1], part.blocks, part.quantizer.dim)
  return part.encode_rotated(part.quantizer.rotate(blocks).reshape(x.shape))


@pytest.mark.parametrize('bits', [2, 3, 4, 6, 8])
def test_separate_keys_and_values_mean_attention_over_the_decoded(bits):
  parts = ops.separate(Quantizer(64, bits), Quantizer(64, bits, seed=1))
  (key, value), q = parts, draw(B, K, G, 64, seed=2) / 4
  stored = encode(key, draw(B, K, S, 64)), encode(value, draw(B, K, S, 64, seed=1))
  k, v = (part.quantizer.unrotate(part.decode_rotated(x)) for part, x in zip(parts, stored))
  found = value.quantizer.unrotate(ops.normalize(ops.attend(parts, stored, key.quantizer.rotate(q), START, END)))
  np.testing.assert_allclose(found, plain(q, k, v), atol=1e-5)


@pytest.mark.parametrize('bits', quick.only([6], [4, 6, 8]))
def test_unified_blocks_are_keys_and_values_at_once(bits):
  parts = ops.unified(Quantizer(32, bits), Quantizer(32, 8))
  (value, rotary), q = parts, draw(B, K, G, 4 * 32, seed=2) / 4
  stored = encode(value, draw(B, K, S, 4 * 32)), encode(rotary, draw(B, K, S, 32, seed=1))
  v, kr = (part.decode_rotated(x) for part, x in zip(parts, stored))
  expected = plain(q, jnp.concatenate([v[..., :96], kr], -1), v)
  np.testing.assert_allclose(ops.normalize(ops.attend(parts, stored, q, START, END)), expected, atol=1e-5)


def test_parts_of_several_blocks_keep_what_each_block_alone_would():
  quantizer, x = Quantizer(32, 4), draw(B, K, S, 4 * 32)
  alone = quantizer.decode_rotated(quantizer.encode_rotated(x.reshape(B, K, S, 4, 32)))
  part = reference.Part(quantizer, blocks=4, keys=4)
  np.testing.assert_array_equal(part.decode_rotated(part.encode_rotated(x)), alone.reshape(x.shape))


def test_a_recent_window_of_exact_tokens_merges_in():
  quantizer = Quantizer(64, 8)
  parts, recent = ops.separate(quantizer, quantizer), 600
  q, k, v = draw(B, K, G, 64, seed=2) / 4, draw(B, K, S, 64), draw(B, K, S, 64, seed=1)
  stored = tuple(encode(part, x) for part, x in zip(parts, (k, v)))
  old = ops.attend(parts, stored, quantizer.rotate(q), START, jnp.minimum(END, recent))
  slots = jnp.arange(S)
  seen_BS = (slots >= jnp.maximum(START, recent)[:, None]) & (slots < END[:, None])
  scores = jnp.einsum('BKGD,BKSD->BKGS', q, k, precision='highest')
  new = ops.exact(scores, quantizer.rotate(v), seen_BS[:, None, None])
  decoded = lambda part, x, exact: jnp.where(slots[:, None] < recent, quantizer.unrotate(part.decode_rotated(x)), exact)
  expected = plain(q, decoded(parts[0], stored[0], k), decoded(parts[1], stored[1], v))
  np.testing.assert_allclose(quantizer.unrotate(ops.normalize(ops.merge(old, new))), expected, atol=1e-5)


def test_rows_that_see_nothing_give_zeros():
  parts = ops.separate(Quantizer(64, 4), Quantizer(64, 4))
  stored = tuple(encode(part, draw(B, K, S, 64)) for part in parts)
  nothing = ops.attend(parts, stored, draw(B, K, G, 64), jnp.int32([0, 5, 5]), jnp.int32([0, 5, 9]))
  assert not ops.normalize(nothing)[:2].any()
  assert ops.normalize(nothing)[2].any()


def test_arrays_and_parts_must_belong_together():
  parts = ops.separate(Quantizer(64, 4), Quantizer(64, 4))
  stored = tuple(encode(part, draw(B, K, S, 64)) for part in parts)
  with pytest.raises(ValueError, match='queries of 32 numbers where the parts have 64 for keys'):
    ops.attend(parts, stored, draw(B, K, G, 32), START, END)
  with pytest.raises(ValueError, match=r'codes \(3, 2, 700, 32\) .* where \(3, 2, 700, 64\)'):
    ops.attend(ops.separate(Quantizer(64, 4), Quantizer(64, 8)), stored, draw(B, K, G, 64), START, END)
  with pytest.raises(ValueError, match='keys=2: a part of 1 blocks has 0 to 1'):
    reference.Part(Quantizer(64, 4), keys=2)


def test_an_implementation_that_cannot_run_says_why():
  parts = ops.separate(Quantizer(64, 4), Quantizer(64, 4))
  args = parts, tuple(encode(part, draw(B, K, S, 64)) for part in parts), draw(B, K, G, 64), START, END
  assert ops.choose(*args[:3]) == 'xla'
  for name, device in (('pallas_tpu', 'TPU'), ('pallas_gpu', 'GPU')):
    with pytest.raises(NotImplementedError, match=f'needs a {device}; the default device is a CPU'):
      ops.attend(*args, implementation=name)
  with pytest.raises(NotImplementedError, match='is a table'):
    ops.attend(*args, implementation='interpret')
  with pytest.raises(ValueError, match="implementation='cuda': must be one of xla, pallas_tpu"):
    ops.attend(*args, implementation='cuda')
