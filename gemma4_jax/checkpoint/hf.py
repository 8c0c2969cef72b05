"""Hugging Face's Gemma 4, text decoder: its config and its tensors, both ways. Plain Python and numpy.

A tensor of theirs is one or two weights of ours with axes merged: no transposes, as both store [out, in]. `tensors` is the
whole map; with it a loader can go through a file tensor by tensor (`Tensor.split`), and a writer through the model
(`Tensor.join`). Paths of ours are those of the canonical per-layer tree, joined by '/'.

Source of the names: `transformers` 5.23, `models/gemma4/modeling_gemma4.py`; of the old config fields, the first release.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import math

from flax import traverse_util
import numpy as np

from gemma4_jax import config
from gemma4_jax.checkpoint import source
from gemma4_jax.config import ModelConfig

# Hugging Face's name, our path(s), our axes (those in one word are merged in the file), what a model or layer must have.
# Letters as in `gemma4_jax/__init__.py`, and M for the width of an expert. Two paths are stacked along the last axis but one.
_MODEL = (
    ('embed_tokens.weight', 'embedder/table', 'V D', ''),
    ('lm_head.weight', 'unembedder/w', 'V D', 'untied'),
    ('norm.weight', 'final_norm/scale', 'D', ''),
    ('embed_tokens_per_layer.weight', 'arm/lookup/table', 'V LP', 'ple'),
    ('per_layer_model_projection.weight', 'arm/project/w', 'LP D', 'ple'),
    ('per_layer_projection_norm.weight', 'arm/norm/scale', 'P', 'ple'),
)
_LAYER = (
    ('input_layernorm.weight', 'pre_attention_norm/scale', 'D', ''),
    ('self_attn.q_proj.weight', 'attention/q/w', 'NH D', ''),
    ('self_attn.q_norm.weight', 'attention/q_norm/scale', 'H', ''),
    ('self_attn.k_proj.weight', 'attention/k/w', 'KH D', 'own_k'),
    ('self_attn.k_norm.weight', 'attention/k_norm/scale', 'H', 'own_k'),
    ('self_attn.v_proj.weight', 'attention/v/w', 'KH D', 'own_v'),
    ('self_attn.o_proj.weight', 'attention/o/w', 'D NH', ''),
    ('post_attention_layernorm.weight', 'post_attention_norm/scale', 'D', ''),
    ('pre_feedforward_layernorm.weight', 'pre_mlp_norm/scale', 'D', ''),
    ('mlp.gate_proj.weight', 'mlp/gate/w', 'F D', ''),
    ('mlp.up_proj.weight', 'mlp/up/w', 'F D', ''),
    ('mlp.down_proj.weight', 'mlp/down/w', 'D F', ''),
    ('post_feedforward_layernorm_1.weight', 'post_dense_norm/scale', 'D', 'moe'),
    ('pre_feedforward_layernorm_2.weight', 'pre_moe_norm/scale', 'D', 'moe'),
    ('router.proj.weight', 'moe/router/w', 'E D', 'moe'),
    ('router.scale', 'moe/router_scale', 'D', 'moe'),
    ('router.per_expert_scale', 'moe/per_expert_scale', 'E', 'moe'),
    ('experts.gate_up_proj', 'moe/gate moe/up', 'E M D', 'moe'),
    ('experts.down_proj', 'moe/down', 'E D M', 'moe'),
    ('post_feedforward_layernorm_2.weight', 'post_moe_norm/scale', 'D', 'moe'),
    ('post_feedforward_layernorm.weight', 'post_mlp_norm/scale', 'D', ''),
    ('per_layer_input_gate.weight', 'ple_gate/w', 'P D', 'ple'),
    ('per_layer_projection.weight', 'ple_project/w', 'D P', 'ple'),
    ('post_per_layer_input_norm.weight', 'post_ple_norm/scale', 'D', 'ple'),
    ('layer_scalar', 'scalar', '1', ''),
)

TEXT_PREFIX = 'model.'                          # of text-only checkpoints
MULTIMODAL_PREFIX = 'model.language_model.'     # of the released ones
TOWERS = tuple(f'model.{tower}.' for tower in (
    'vision_tower', 'audio_tower', 'embed_vision', 'embed_audio', 'vision_embedder'))


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One tensor of a Hugging Face checkpoint.

  Attributes:
    name, shape: as in the file.
    parts: our path -> our shape, in the order in which the file stacks them.
  """
  name: str
  shape: tuple[int, ...]
  parts: Mapping[str, tuple[int, ...]]

  def split(self, array: np.ndarray) -> dict[str, np.ndarray]:
    """Our path -> weight: views of `array`, in its dtype."""
    pieces = np.split(array, len(self.parts), axis=-2) if len(self.parts) > 1 else [array]
    return {path: piece.reshape(shape) for (path, shape), piece in zip(self.parts.items(), pieces, strict=True)}

  def join(self, weights: Mapping[str, np.ndarray]) -> np.ndarray:
    """The inverse of `split`; `weights` may hold more paths than its own."""
    pieces = [np.asarray(weights[path]) for path in self.parts]
    return (np.concatenate(pieces, axis=-2) if len(pieces) > 1 else pieces[0]).reshape(self.shape)


def tensors(cfg: ModelConfig, prefix: str = TEXT_PREFIX) -> dict[str, Tensor]:
  """Every tensor that a checkpoint of `cfg` must hold, by its Hugging Face name.

  Raises:
    ValueError: Hugging Face has no such model.
  """
  check_expressible(cfg)
  has = {'': True, 'ple': cfg.embedding == 'ple', 'moe': cfg.num_experts > 0, 'untied': not cfg.tied_embeddings}
  sizes = {'V': cfg.vocab_size, 'D': cfg.width, 'L': cfg.num_layers, 'P': cfg.ple_dim, 'N': cfg.num_heads,
           'E': cfg.num_experts, 'M': cfg.expert_dim, '1': 1}
  found = [_tensor(name if name == 'lm_head.weight' else prefix + name, '', paths, axes, sizes)
           for name, paths, axes, needs in _MODEL if has[needs]]
  for i, spec in enumerate(cfg.layers):
    own_k = spec.kv_from is None
    has |= {'own_k': own_k, 'own_v': own_k and not spec.k_eq_v}
    sizes |= {'K': spec.num_kv_heads, 'H': spec.head_dim, 'F': spec.mlp_dim}
    found += [_tensor(f'{prefix}layers.{i}.{name}', f'layer_{i}/', paths, axes, sizes)
              for name, paths, axes, needs in _LAYER if has[needs]]
  return {tensor.name: tensor for tensor in found}


def unused(cfg: ModelConfig, prefix: str = TEXT_PREFIX) -> set[str]:
  """Names that a checkpoint may hold though nothing reads them: keys and values of layers that borrow theirs, a tied head."""
  names = {f'{prefix}layers.{i}.self_attn.{part}.weight' for i, spec in enumerate(cfg.layers) if spec.kv_from is not None
           for part in ('k_proj', 'k_norm', 'v_proj')}
  return names | ({'lm_head.weight'} if cfg.tied_embeddings else set())


def find_prefix(names: Iterable[str]) -> str:
  return MULTIMODAL_PREFIX if any(name.startswith(MULTIMODAL_PREFIX) for name in names) else TEXT_PREFIX


def check(cfg: ModelConfig, shapes: Mapping[str, tuple[int, ...]], prefix: str = TEXT_PREFIX) -> None:
  """Compares what a checkpoint holds (name -> shape) with what `cfg` needs.

  Raises:
    ValueError: tensors are unknown, missing or of another shape; one line with names and shapes.
  """
  source.compare({name: tensor.shape for name, tensor in tensors(cfg, prefix).items()}, shapes, unused(cfg, prefix))


def params_from_hf(cfg: ModelConfig, state: Mapping[str, np.ndarray]) -> dict:
  """Hugging Face's state dict -> our canonical per-layer tree, dtypes kept.

  Raises:
    ValueError: as `check`.
  """
  prefix = find_prefix(state)
  check(cfg, {name: array.shape for name, array in state.items()}, prefix)
  flat = {}
  for name, tensor in tensors(cfg, prefix).items():
    flat |= tensor.split(state[name])
  return traverse_util.unflatten_dict(flat, sep='/')


def params_to_hf(cfg: ModelConfig, params: Mapping, prefix: str = TEXT_PREFIX) -> dict[str, np.ndarray]:
  """The inverse of `params_from_hf`."""
  flat = traverse_util.flatten_dict(params, sep='/')
  return {name: tensor.join(flat) for name, tensor in tensors(cfg, prefix).items()}


def _tensor(name, root, paths, axes, sizes):
  words = axes.split()
  ours = tuple(sizes[letter] for word in words for letter in word)
  theirs = [math.prod(sizes[letter] for letter in word) for word in words]
  paths = paths.split()
  if len(paths) > 1:
    theirs[-2] *= len(paths)
  return Tensor(name, tuple(theirs), {root + path: ours for path in paths})


# Configs.

# Our field, Hugging Face's, its older name, its default where a file may leave it out.
_REQUIRED = object()
_FIELDS = (
    ('vocab_size', 'vocab_size', None, _REQUIRED),
    ('width', 'hidden_size', None, _REQUIRED),
    ('num_layers', 'num_hidden_layers', None, _REQUIRED),
    ('mlp_dim', 'intermediate_size', None, _REQUIRED),
    ('num_heads', 'num_attention_heads', None, _REQUIRED),
    ('num_kv_heads', 'num_key_value_heads', None, _REQUIRED),
    ('head_dim', 'head_dim', None, 256),
    ('global_head_dim', 'global_head_dim', None, 512),
    ('window', 'sliding_window', None, 512),
    ('double_wide_mlp', 'use_double_wide_mlp', None, False),
    ('num_kv_shared_layers', 'num_kv_shared_layers', None, 0),
    ('k_eq_v', 'attention_k_eq_v', None, False),
    ('context_length', 'max_position_embeddings', None, 131_072),
    ('final_softcap', 'final_logit_softcapping', None, None),
    ('tied_embeddings', 'tie_word_embeddings', None, True),
    ('norm_eps', 'rms_norm_eps', None, 1e-6),
    ('activation', 'hidden_activation', None, 'gelu_pytorch_tanh'),
    ('num_experts', 'num_experts', None, None),
    ('num_experts_per_token', 'top_k_experts', None, None),
    ('expert_dim', 'moe_intermediate_size', 'expert_intermediate_size', None),
)
_ACTIVATIONS = {'gelu': 'gelu_pytorch_tanh', 'silu': 'silu'}
_KINDS = {'L': 'sliding_attention', 'G': 'full_attention'}
_ROPE = {   # of files that say nothing
    'sliding_attention': {'rope_type': 'default', 'rope_theta': 1e4},
    'full_attention': {'rope_type': 'proportional', 'rope_theta': 1e6, 'partial_rotary_factor': 0.25}}
# What every Hugging Face model is; an ablation of these has no place in its config.
_ALWAYS = dict(gated_mlp=True, attention_scale=1.0, qk_norm=True, v_norm=True, moe_dense_branch=True, router_norm=True,
               per_expert_scale=True, post_norms=True, layer_scalar=True, ple_every=1, ple_layers=())


def config_from_hf(hf: Mapping) -> ModelConfig:
  """A Hugging Face config (its `text_config`, where it has one) -> ModelConfig of the text decoder.

  Raises:
    ValueError: a field is missing, or says what this model has no field for; its name is in the message.
  """
  hf = hf.get('text_config', hf)

  def refuse(field, why):
    raise ValueError(f'config.json: {field} = {hf.get(field)!r} {why}')

  ours = {}
  for field, name, old, default in _FIELDS:
    ours[field] = next((hf[key] for key in (name, old) if hf.get(key) is not None), default)
    if ours[field] is _REQUIRED:
      raise ValueError(f'config.json: no field {name}')
  activations = {theirs: name for name, theirs in _ACTIVATIONS.items()}
  if ours['activation'] not in activations:
    refuse('hidden_activation', f'is none of {", ".join(activations)}')
  ours['activation'] = activations[ours['activation']]
  ours['final_softcap'] = ours['final_softcap'] or 0.0
  if hf.get('attention_bias'):
    refuse('attention_bias', 'is not supported: no Gemma 4 has biases')
  if hf.get('use_bidirectional_attention') == 'all':
    refuse('use_bidirectional_attention', 'is an encoder, and this is a decoder')

  kinds = _kinds(hf, ours['num_layers'], refuse)
  ours['pattern'] = _shortest_period(kinds)
  _add_global_heads(ours, hf, kinds, refuse)
  for kind, prefix in (('L', ''), ('G', 'global_')):
    rope = (hf.get('rope_parameters') or _ROPE).get(_KINDS[kind], _ROPE[_KINDS[kind]])
    if rope['rope_type'] not in ('default', 'proportional'):
      refuse('rope_parameters', 'has a rope_type that is neither default nor proportional')
    ours[prefix + 'rope_base'] = rope['rope_theta']
    ours[prefix + 'rope_fraction'] = rope.get('partial_rotary_factor', 1.0) if rope['rope_type'] == 'proportional' else 1.0

  if not hf.get('enable_moe_block', False):
    ours |= dict(num_experts=0, num_experts_per_token=0, expert_dim=0)
  ple_dim = hf.get('hidden_size_per_layer_input', 0 if hf.get('model_type') == 'gemma4_unified_text' else 256)
  if ple_dim:
    if hf.get('vocab_size_per_layer_input', ours['vocab_size']) != ours['vocab_size']:
      refuse('vocab_size_per_layer_input', f'is not vocab_size = {ours["vocab_size"]}')
    ours |= dict(embedding='ple', ple_dim=ple_dim)
  return config.from_dict(ours)


def config_to_hf(cfg: ModelConfig) -> dict:
  """ModelConfig -> a Hugging Face text config, in the fields of the release, which all versions read.

  Raises:
    ValueError: Hugging Face has no such model; the field is in the message.
  """
  check_expressible(cfg)
  hf = {name: getattr(cfg, field) for field, name, _, _ in _FIELDS}
  kinds = _cfg_kinds(cfg)
  rope = {_KINDS['L']: (cfg.rope_base, cfg.rope_fraction), _KINDS['G']: (cfg.global_rope_base, cfg.global_rope_fraction)}
  moe = {name: hf[name] or None for name in ('num_experts', 'top_k_experts', 'moe_intermediate_size')}
  return hf | moe | dict(
      model_type='gemma4_text', architectures=['Gemma4ForCausalLM'],
      hidden_activation=_ACTIVATIONS[cfg.activation], final_logit_softcapping=cfg.final_softcap or None,
      layer_types=[_KINDS[kind] for kind in kinds], enable_moe_block=cfg.num_experts > 0,
      num_global_key_value_heads=cfg.global_num_kv_heads if cfg.k_eq_v else None,
      vocab_size_per_layer_input=cfg.vocab_size, hidden_size_per_layer_input=cfg.ple_dim if cfg.embedding == 'ple' else 0,
      rope_parameters={kind: {'rope_type': 'default', 'rope_theta': base} if fraction == 1 else {
          'rope_type': 'proportional', 'rope_theta': base, 'partial_rotary_factor': fraction}
          for kind, (base, fraction) in rope.items()})


def check_expressible(cfg: ModelConfig) -> None:
  """Raises ValueError with the field in which `cfg` is a model that no Hugging Face config describes."""
  def refuse(field, why='has no counterpart in Hugging Face models'):
    raise ValueError(f'model.{field}: {getattr(cfg, field)!r} {why}')

  for field, value in _ALWAYS.items():
    if getattr(cfg, field) != value:
      refuse(field)
  if cfg.embedding not in ('none', 'ple'):
    refuse('embedding')
  if _cfg_kinds(cfg)[-1] != 'G':
    refuse('pattern', 'ends in a local layer, and Hugging Face makes the last layer global')
  if cfg.global_num_kv_heads != cfg.num_kv_heads and not cfg.k_eq_v:
    refuse('global_num_kv_heads', f'is not model.num_kv_heads = {cfg.num_kv_heads}: in Hugging Face models that takes model.k_eq_v')


def caveat(cfg: ModelConfig) -> str:
  """What `transformers` (5.23) cannot do with a model that it does read; '' of most."""
  if cfg.num_kv_shared_layers and cfg.embedding == 'none':   # it slices the per-layer vectors that there are not
    return ('transformers runs a model that shares K/V and has no PLE only when it is asked for logits by position '
            '(logits_to_keep=torch.arange(T)); its generate() fails')
  return ''


def _cfg_kinds(cfg):
  return ''.join('G' if spec.window is None else 'L' for spec in cfg.layers)


def _kinds(hf, num_layers, refuse):
  letters = {theirs: kind for kind, theirs in _KINDS.items()}
  types = hf.get('layer_types') or [_KINDS['L' if (i + 1) % 6 else 'G'] for i in range(num_layers)]
  if len(types) != num_layers:
    refuse('layer_types', f'has {len(types)} entries for num_hidden_layers = {num_layers}')
  if not set(types) <= set(letters):
    refuse('layer_types', f'holds other kinds than {", ".join(letters)}')
  return ''.join(letters[kind] for kind in types[:-1]) + 'G'   # transformers makes the last layer global


def _shortest_period(kinds):
  return next(kinds[:n] for n in range(1, len(kinds) + 1) if (kinds[:n] * len(kinds))[:len(kinds)] == kinds)


def _add_global_heads(ours, hf, kinds, refuse):
  """Head dim and kv heads of the global layers: fields of their own, or since transformers 5.23 overrides by layer."""
  if 'per_layer_config' not in hf:
    ours['global_num_kv_heads'] = (hf.get('num_global_key_value_heads') if ours['k_eq_v'] else None) or ours['num_kv_heads']
    return
  overrides = {int(i): fields for i, fields in hf['per_layer_config'].items() if fields}
  shared = overrides.get(len(kinds) - 1, {})
  if overrides != {i: shared for i, kind in enumerate(kinds) if kind == 'G' and shared} or not set(shared) <= {
      'head_dim', 'num_key_value_heads'}:
    refuse('per_layer_config', 'is more than a head_dim and num_key_value_heads of all full_attention layers')
  ours['global_head_dim'] = shared.get('head_dim', ours['head_dim'])
  ours['global_num_kv_heads'] = shared.get('num_key_value_heads', ours['num_kv_heads'])
