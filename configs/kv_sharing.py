r"""How many of the last layers can borrow their keys and values before quality drops?

Run:  python -m experiments.launch --config=configs/kv_sharing.py --workdir=runs/kv_sharing
Time: about 15 minutes on two CPU cores. The first arm, no sharing, is the baseline; borrowing layers are as wide as E2B
makes them (`double_wide_mlp`), and the last arm shows the sharing without that width.
"""

from configs import base


def get_config(arg='e2b-toy'):
  return base.get_config(arg)


def sweep(add):
  for seed in range(3):
    add({'seed': seed, 'arm': 'share 0', 'model.num_kv_shared_layers': 0})
    add({'seed': seed, 'arm': 'share 5', 'model.num_kv_shared_layers': 5})
    add({'seed': seed, 'arm': 'share 5, not wider', 'model.num_kv_shared_layers': 5, 'model.double_wide_mlp': False})


def metrics():
  return ['eval/bits_per_byte', 'eval/nats_per_token']
