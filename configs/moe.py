r"""Experts against dense layers at equal active compute: 26B-A4B's block, taken apart.

Run:  python -m experiments.launch --config=configs/moe.py --workdir=runs/moe
Time: about 20 minutes on two CPU cores (where every expert sees every token, so the clock says nothing about an accelerator).
The baseline is the toy with experts; the other arms lose the dense branch, the router's norm, or all experts.
"""

from configs import base

DENSE = {'model.num_experts': 0, 'model.num_experts_per_token': 0, 'model.expert_dim': 0}


def get_config(arg='26b-a4b-toy'):
  return base.get_config(arg)


def sweep(add):
  for seed in range(3):
    add({'seed': seed, 'arm': 'moe'})
    add({'seed': seed, 'arm': 'no dense branch', 'model.moe_dense_branch': False})
    add({'seed': seed, 'arm': 'no router norm', 'model.router_norm': False})
    add({'seed': seed, 'arm': 'dense', **DENSE})


def metrics():
  return ['eval/bits_per_byte', 'eval/nats_per_token']
