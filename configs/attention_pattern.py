r"""Local against global attention: how rare may a global layer be, and how short the window?

Run:  python -m experiments.launch --config=configs/attention_pattern.py --workdir=runs/attention_pattern
Time: about 20 minutes on two CPU cores. The baseline attends globally in every layer. No layer borrows K/V, so that the
patterns differ in nothing else; heads stay as wide as their kind of layer makes them.
"""

from configs import base


def get_config(arg='e2b-toy'):
  c = base.get_config(arg)
  c.model.num_kv_shared_layers = 0
  c.model.double_wide_mlp = False
  return c


def sweep(add):
  for seed in range(3):
    add({'seed': seed, 'arm': 'all global', 'model.pattern': 'G'})
    add({'seed': seed, 'arm': '1:1', 'model.pattern': 'LG'})
    add({'seed': seed, 'arm': '4:1', 'model.pattern': 'LLLLG'})
    add({'seed': seed, 'arm': '4:1, half the window', 'model.pattern': 'LLLLG', 'model.window': 16})


def metrics():
  return ['eval/bits_per_byte', 'eval/nats_per_token']
