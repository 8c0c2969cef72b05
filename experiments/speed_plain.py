"""A training step of E2B's layers with nothing but jax.numpy and scans: what compiling them costs, whatever code they come from.

The peer of `experiments.speed compile`. On the stacked tree of `transformer.init`, without modules, config fields, blocks of scores,
chunks of the loss, clipping and groups of learning rates; float32, per-layer embeddings, K/V shared, K and V apart.
"""

from functools import partial

import jax
import jax.numpy as jnp
import optax

from gemma4_jax.config import ModelConfig


def make_step(cfg: ModelConfig):
  """Returns (optimizer, (State, batch) -> (State, loss)), of `trainer`'s State and batch."""
  tx = optax.adamw(1e-3)

  def step(state, batch):
    value, grads = jax.value_and_grad(loss, argnums=1)(cfg, state.params, batch)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    return state._replace(step=state.step + 1, params=optax.apply_updates(state.params, updates), opt_state=opt_state), value
  return tx, step


def loss(cfg: ModelConfig, params: dict, batch: dict) -> jax.Array:
  """Nats a token, over all T x V logits at once."""
  log_p = jax.nn.log_softmax(logits(cfg, params, batch['tokens'], batch['positions'], batch['segments']))
  nll_BT = -jnp.take_along_axis(log_p, batch['targets'][..., None], -1)[..., 0]
  return (nll_BT * batch['weights']).sum() / batch['weights'].sum()


def logits(cfg: ModelConfig, params: dict, ids_BT, pos_BT, seg_BT) -> jax.Array:
  """[B, T, V], as `transformer.Transformer`."""
  table, arm, P, eps = params['embedder']['table'], params['arm'], cfg.ple_dim, cfg.norm_eps
  x = table[ids_BT] * cfg.width**0.5
  projected = norm(jnp.einsum('btd,lpd->btlp', x, arm['project']['w']) * cfg.width**-0.5, arm['norm']['scale'], eps)
  vectors = jnp.moveaxis((arm['lookup']['table'][ids_BT] * P**0.5 + projected) * 2**-0.5, 2, 0)
  behind = pos_BT[:, :, None] - pos_BT[:, None]
  seen = (seg_BT[:, :, None] == seg_BT[:, None]) & (seg_BT > 0)[:, None] & (behind >= 0)
  lent, first = {}, 0
  for g, group in enumerate(cfg.groups):
    count = group.repeats * len(group.period)
    v = vectors[first:first + count].reshape(group.repeats, -1, *vectors.shape[1:])
    x, made = periods(cfg, group, params[f'group_{g}'], x, v, lent, pos_BT, seen, behind)
    lent, first = lent | made, first + count
  out = norm(x, params['final_norm']['scale'], eps) @ table.T
  return cfg.final_softcap * jnp.tanh(out / cfg.final_softcap)


def periods(cfg, group, weights, x, vectors, lent, pos_BT, seen, behind):
  """The stream after a group, and the K/V that its last layers made, by kind of layer."""
  def period(carry, xs):
    x, made = carry
    weights, vectors = xs
    for run, (place, count) in enumerate(group.runs):
      spec = group.period[place]
      see = seen if spec.window is None else seen & (behind < spec.window)
      layer = jax.checkpoint(partial(block, cfg, spec, angles(spec, pos_BT), see, lent.get(kind(spec))))
      (x, kv), _ = jax.lax.scan(lambda carry, wv, layer=layer: (layer(carry[0], *wv), None), (x, made.get(kind(spec))),
                                (weights[f'run_{run}'], vectors[place:place + count]))
      made = made | ({kind(spec): kv} if spec.kv_from is None else {})
    return (x, made), None
  own = [group.period[place] for place, _ in group.runs if group.period[place].kv_from is None]
  empty = {kind(spec): (jnp.zeros((*x.shape[:2], spec.num_kv_heads, spec.head_dim)),) * 2 for spec in own}
  return jax.lax.scan(period, (x, empty), (weights, vectors))[0]


def kind(spec) -> str:
  return 'local' if spec.window else 'global'


def block(cfg, spec, angle, see, kv, x, w, vector):
  """The stream behind a layer, and the K/V it made, or None."""
  eps = cfg.norm_eps
  normed, added = (lambda name, y: norm(y, w[name]['scale'], eps)), w['attention']
  h = normed('pre_attention_norm', x)
  q = rope(norm(jnp.einsum('btd,nhd->btnh', h, added['q']['w']), added['q_norm']['scale'], eps), angle)
  if spec.kv_from is None:
    kv = (rope(norm(jnp.einsum('btd,khd->btkh', h, added['k']['w']), added['k_norm']['scale'], eps), angle),
          norm(jnp.einsum('btd,khd->btkh', h, added['v']['w']), 1.0, eps))
  k, v = (jnp.repeat(y, q.shape[2] // y.shape[2], axis=2) for y in kv)
  p = jax.nn.softmax(jnp.where(see[:, None], jnp.einsum('btnh,bsnh->bnts', q, k) * cfg.attention_scale, -1e30))
  x = x + normed('post_attention_norm', jnp.einsum('bnts,bsnh,dnh->btd', p, v, added['o']['w']))
  h, mlp = normed('pre_mlp_norm', x), w['mlp']
  h = jax.nn.gelu(h @ mlp['gate']['w'].T) * (h @ mlp['up']['w'].T) @ mlp['down']['w'].T
  x = x + normed('post_mlp_norm', h)
  h = jax.nn.gelu(x @ w['ple_gate']['w'].T) * vector @ w['ple_project']['w'].T
  return (x + normed('post_ple_norm', h)) * w['scalar'], kv if spec.kv_from is None else None


def norm(x, scale, eps):
  return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + eps) * scale


def angles(spec, pos_BT):
  """[B, T, 1, H/2]"""
  half = spec.head_dim // 2
  j = jnp.arange(half)
  freq = jnp.where(j < int(spec.rope_fraction * half), spec.rope_base ** (-2.0 * j / spec.head_dim), 0)
  return (pos_BT[..., None] * freq)[:, :, None]


def rope(x, angle):
  a, b = jnp.split(x, 2, axis=-1)
  return jnp.concatenate([a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)], axis=-1)
