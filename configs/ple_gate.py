r"""Does the gate of PLE earn its place? `ungated` adds the same vectors with the gate forced to 1.

Run:  python -m experiments.launch --config=configs/ple_gate.py --workdir=runs/ple_gate
Time: about ten minutes on two CPU cores. Baseline: PLE as released. Outcome: experiments/ple/gate/README.md

The question came up in `configs/ple.py:arms`, where fourteen arms share one adjustment and three seeds; so here are seeds that were
not in it, twice as many, and two comparisons.
"""

from configs import base


def get_config(arg='e2b-toy'):
  return base.get_config(arg)


def sweep(add):
  for seed in range(3, 9):
    for arm in ('ple', 'ungated', 'none'):
      add({'seed': seed, 'arm': arm, 'model.embedding': arm})


def metrics():
  return ['eval/bits_per_byte', 'eval/code/bits_per_byte', 'eval/english/bits_per_byte']
