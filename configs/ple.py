r"""Per-layer embeddings (PLE) against standard embeddings, with matched controls.

Run:  python -m experiments.launch --config=configs/ple.py --workdir=runs/ple
Time: under 15 minutes on two CPU cores, report included. Outcome: experiments/ple/README.md
"""

from configs import base


def get_config(arg='e2b-toy'):
  return base.get_config(arg)


def sweep(add):
  for seed in range(3):
    add({'seed': seed, 'arm': 'none', 'model.embedding': 'none'})
    add({'seed': seed, 'arm': 'ple', 'model.embedding': 'ple'})
    add({'seed': seed, 'arm': 'projection_only', 'model.embedding': 'projection_only'})
    add({'seed': seed, 'arm': 'none =params', 'model.embedding': 'none', 'match.metric': 'total_params'})
    add({'seed': seed, 'arm': 'none =flops', 'model.embedding': 'none', 'match.metric': 'flops'})


def metrics():
  return ['eval/bits_per_byte', 'eval/code/bits_per_byte', 'eval/english/bits_per_byte']
