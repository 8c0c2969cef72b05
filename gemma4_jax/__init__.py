"""Gemma 4 in JAX: functional Flax modules, composed by configs, for ablations from a laptop's CPU to a pod.

Array names end in the letters of their axes, which are also the letters of the einsums:

  B batch · T query tokens · S key/value slots · D width · F feed-forward · N query heads · K kv heads
  G queries per kv head · H head dim · V vocabulary · L layers · P per-layer vector · E experts · X experts per token
  C chunk of tokens · R rows of a grouped matmul

so `q_BTNH = einsum('BTD,NHD->BTNH', x_BTD, w_NHD)`. Weights are stored [out, in], as in the released checkpoints.
"""

__version__ = '0.1.0'
