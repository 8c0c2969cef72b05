r"""How wide must the per-layer vector be?

Run:  python -m experiments.launch --config=configs/ple_dim.py --workdir=runs/ple_dim
Time: about 25 minutes on two CPU cores. Baseline: no PLE. The toy's width is 64, so its 8 to 64 stand to it as 192 to 1536
to E2B's 1536; `configs/ple.py:study` has 32 to 256 at larger widths.
"""

from configs import base


def get_config(arg='e2b-toy'):
  return base.get_config(arg)


def sweep(add):
  for seed in range(3):
    add({'seed': seed, 'arm': 'none', 'model.embedding': 'none'})
    for dim in (8, 16, 32, 64):
      add({'seed': seed, 'arm': f'ple {dim}', 'model.embedding': 'ple', 'model.ple_dim': dim})


def metrics():
  return ['eval/bits_per_byte', 'eval/nats_per_token', 'eval/frequency_q4/nats_per_token']
