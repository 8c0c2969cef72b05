r"""What a trained model does with its per-layer embeddings: interventions in each layer, in those that lend and borrow K/V, in all.

Run:  python -m experiments.launch --config=configs/ple_probe.py --workdir=runs/probe
Time: some minutes on two CPU cores, of which one trains the model, the `ple` arm of configs/ple.py.
Outcome: experiments/ple_probe/README.md

Of any checkpoint, here with the windows that suit a released one:
  python -m experiments.launch --config=configs/ple_probe.py --workdir=runs/probe_e2b --config.probe.checkpoint=gemma-4-E2B \
    --config.probe.window=1024 --config.probe.stride=512 --config.probe.tokens=1024
The text is what a run kept back of its own corpus; for a checkpoint that is no run's, the validation split of `data`, which is no
secret to a released model.
"""

import ml_collections

from configs import base


def get_config(arg='e2b-toy'):
  c = base.get_config(arg)
  c.model.embedding = 'ple'
  c.arm = 'ple'
  c.runner = 'experiments.probe'
  c.probe = ml_collections.ConfigDict(dict(
      checkpoint='',            # a directory as `load.load` reads it; '': train the model of this config first
      param_dtype='',           # float32 or bfloat16; '': as stored
      documents=48,             # of each kind of text (code, english), from the validation split
      min_tokens=64,            # documents of fewer are left out: every document counts the same, and theirs is mostly noise
      tokens=512,               # of a document, from its start, BOS included; 0: all
      window=128,               # tokens that run at once, BOS included
      stride=127,               # tokens that a window after the first predicts
      batch_tokens=8192))       # about so many tokens run as a batch
  return c
