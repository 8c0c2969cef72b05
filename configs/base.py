"""Every field of a run with its default; the other files here set a few of them and say which points to run.

  python -m gemma4_jax.cli.train --config=configs/base.py:e2b-toy --workdir=runs/one
"""

import ml_collections

from gemma4_jax import config as model_config

# E2B-shaped, 97.4M parameters: what `experiments/speed.py` measures.
MINI = model_config.shrink(
    model_config.E2B, periods=2, width=384, vocab_size=32_768, mlp_dim=1536, num_heads=8, head_dim=64, global_head_dim=128,
    window=128, ple_dim=32, context_length=4096)
MID = MINI.replace(width=864, mlp_dim=3456)   # 342M: what `experiments/speed_device.py` trains beside it


def _toy(variant: str) -> model_config.ModelConfig:
  """A variant's pattern at a size that two CPU cores train in a minute; as in E2B, the PLE table rivals the rest."""
  cfg = model_config.variant(variant)
  fields = dict(num_experts=8, num_experts_per_token=2, expert_dim=96) if cfg.num_experts else {}
  return model_config.shrink(
      cfg, width=64, vocab_size=4096, mlp_dim=192, head_dim=16, global_head_dim=32, window=32, ple_dim=16,
      context_length=1024, **fields)


def models() -> dict:
  """Name -> ModelConfig: the released variants, `<variant>-toy` of each, `mini` and `mid`."""
  return {**model_config.VARIANTS, **{f'{name}-toy': _toy(name) for name in model_config.VARIANTS}, 'mini': MINI, 'mid': MID}


def get_config(arg: str = 'e2b-toy') -> ml_collections.ConfigDict:
  """Args: arg: a name of `models()`."""
  if arg not in models():
    raise ValueError(f'configs/base.py: no model {arg!r}; there are {", ".join(models())}')
  model = models()[arg]
  if arg in model_config.VARIANTS:   # or compiling takes long, and what the backward pass keeps more than a device has
    model = model.replace(scan=True, remat='full')
  toy = arg.endswith('-toy')
  c = ml_collections.ConfigDict()
  c.seed = 0
  c.arm = ''                          # label of the point in reports; '': named after what the sweep sets
  c.group = ''                        # arms are compared within a group (a backbone size, say), never across
  c.primary_metric = 'eval/bits_per_byte'   # declared before the run; the report's verdicts are on it alone
  c.model = model.to_dict()

  c.match = dict(
      metric='',                      # total_params, flops or resident_bytes: grow the model until it equals ...
      arm='ple',                      # ... this embedding arm's, ...
      by='width',                     # ... by width, depth or experts
      target=0.0)                     # the cost to reach; 0: the arm's, and `match.resolve` writes it here

  c.data = dict(
      source='stdlib',                # stdlib, text, jsonl, parquet or hf
      path='',                        # glob of local files, or a Hugging Face dataset: NAME, or NAME:CONFIGURATION
      text_field='text',
      tokenizer='train',              # train a BPE on the train split, or the path of a tokenizer.json
      vocab_size=model.vocab_size,
      sequence_length=128 if toy else 2048,
      batch_size=8 if toy else 64,   # sequences a step, over all processes
      validation_fraction=0.05,
      max_bytes=0,                    # 0: all
      cache_dir='')                   # '': $GEMMA4_JAX_CACHE or ~/.cache/gemma4_jax

  c.optimizer = dict(
      learning_rate=4e-3 if toy else 1e-3,
      embedding_learning_rate=4e-3 if toy else 1e-3,   # of token tables: the embedding, PLE, value, bigram and STEM tables
      b1=0.9, b2=0.95, eps=1e-8,
      weight_decay=0.1,               # of matrices; never of tables, norms and scalars
      clip_norm=1.0,                  # 0: none
      schedule='cosine',              # cosine or wsd
      warmup_steps=20 if toy else 500,
      decay_fraction=0.2,             # share of the steps that wsd decays over
      end_scale=0.1,                  # last learning rate over the highest
      accumulate=1)                   # microbatches a step

  c.train = dict(
      init='',                        # a checkpoint to begin with, of any kind that `checkpoint.load` takes; '': random weights
      steps=240 if toy else 20_000,
      log_every=1,
      checkpoint_every=120 if toy else 1000,
      keep_checkpoints=2,
      loss_chunk=512,                 # tokens whose logits exist at once
      tensorboard=False, wandb='')    # extras; wandb: a project's name

  c.eval = dict(
      every=0,                        # steps between evaluations; 0: at the end only
      batch_size=16,
      max_batches=0)                  # 0: the whole validation split

  c.mesh = dict(data=-1, fsdp=1, tensor=1, expert=1)   # -1: what is left of the devices
  return c
