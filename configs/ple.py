r"""Per-layer embeddings (PLE) against standard embeddings, with matched controls.

Run:  python -m experiments.launch --config=configs/ple.py --workdir=runs/ple
Time: 8 to 15 minutes on two CPU cores, report included. Outcome: experiments/ple/README.md

Every arm at that size, 45 runs:  python -m experiments.launch --config=configs/ple.py:arms --workdir=runs/ple_arms
Time: about three times as long. Outcome: experiments/ple/arms/README.md

The study, for a GPU: every arm at four sizes and three seeds, each arm at the learning rate that was best for it in a trial of
equal size for all (another seed, a quarter of the steps):
  python -m experiments.launch --config=configs/ple.py:study-lr --workdir=runs/ple_lr
  python -m experiments.best_learning_rates runs/ple_lr best.json
  python -m experiments.launch --config=configs/ple.py:study@best.json --workdir=runs/ple_study
Any other argument is a model of configs/base.py (`configs/ple.py:e2b`) under the default sweep.
"""

from pathlib import Path

from configs import base
from gemma4_jax import metrics as metrics_lib

MATCHED = {'none =params': 'total_params', 'none =flops': 'flops', 'none =resident': 'resident_bytes'}
ARMS = {
    'none': {'model.embedding': 'none'},
    'ple': {'model.embedding': 'ple'},
    **{name: {'model.embedding': 'none', 'match.metric': metric} for name, metric in MATCHED.items()},
    **{f'ple {dim}': {'model.embedding': 'ple', 'model.ple_dim': dim} for dim in (64, 128, 256)},
    'ple, every 2nd layer': {'model.embedding': 'ple', 'model.ple_every': 2},
    **{arm: {'model.embedding': arm} for arm in (
        'table_only', 'projection_only', 'shared_table', 'frozen_table', 'permuted_table', 'ungated', 'value', 'bigram', 'stem')},
}
DEFAULT = ('none', 'ple', 'projection_only', 'none =params', 'none =flops')
EVERY = tuple(arm for arm in ARMS if 'model.ple_dim' not in ARMS[arm])   # widths of PLE are the question of ple_dim.py

# Name -> E2B's pattern at another width; PLE has 32 channels a layer where the arm does not say otherwise.
SIZES = {f'width {width}': {
    'model.width': width, 'model.mlp_dim': 4 * width, 'model.num_heads': 8, 'model.head_dim': 64, 'model.global_head_dim': 128,
    'model.ple_dim': 32, 'model.window': 128, 'model.num_layers': 20, 'model.num_kv_shared_layers': 10,
    'train.steps': steps} for width, steps in ((128, 5000), (256, 10_000), (384, 15_000), (640, 20_000))}
TRIAL = (5e-4, 1e-3, 2e-3, 4e-3)
PRESETS = ('arms', 'study', 'study-lr')


def get_config(arg='e2b-toy'):
  if arg == 'arms' or arg in base.models():
    return base.get_config('e2b-toy' if arg == 'arms' else arg)
  if arg not in PRESETS and not arg.startswith('study@'):
    raise ValueError(f'no model {arg!r}, and no such preset; presets {", ".join(PRESETS)}, models {", ".join(base.models())}')
  c = base.get_config('e2b-toy')
  c.model.vocab_size = c.data.vocab_size = 8192
  c.data.update({'sequence_length': 512, 'batch_size': 64})
  c.optimizer.warmup_steps = 200
  c.train.update({'checkpoint_every': 1000, 'loss_chunk': 8192})
  c.model.update({'dtype': 'bfloat16'})
  return c


def sweep(add, arg='e2b-toy'):
  if arg == 'study-lr':
    for group, size in SIZES.items():
      for arm, fields in ARMS.items():
        for rate in TRIAL:
          add({**size, **fields, 'seed': 100, 'group': group, 'arm': f'{arm} @ {rate:g}', 'train.steps': size['train.steps'] // 4,
               'optimizer.learning_rate': rate, 'optimizer.embedding_learning_rate': rate})
  elif arg.startswith('study'):
    rates = _learning_rates(arg.partition('@')[2])
    for group, size in SIZES.items():
      for seed in range(3):
        for arm, fields in ARMS.items():
          rate = rates[group][arm]
          add({**size, **fields, 'seed': seed, 'group': group, 'arm': arm,
               'optimizer.learning_rate': rate, 'optimizer.embedding_learning_rate': rate})
  else:
    for seed in range(3):
      for arm in EVERY if arg == 'arms' else DEFAULT:
        add({**ARMS[arm], 'seed': seed, 'arm': arm})


def _learning_rates(path):
  """{group: {arm: rate}} as `experiments.best_learning_rates` wrote it."""
  if not path or not Path(path).is_file():
    raise ValueError(f'configs/ple.py:study@FILE needs the file that experiments.best_learning_rates writes; {path or "none"} is no file')
  rates = metrics_lib.read_json(Path(path), 'make it again with experiments.best_learning_rates')
  missing = [f'{group}: {arm}' for group in SIZES for arm in ARMS if arm not in (rates.get(group) or {})]
  if missing:
    raise ValueError(f'{path} has no learning rate for {"; ".join(missing[:5])}')
  return rates


def metrics():
  return ['eval/bits_per_byte', 'eval/code/bits_per_byte', 'eval/english/bits_per_byte']
