"""Stores what `transformers` computes of the tiny models, so that parity is tested where it is not installed.

  python -m tests.goldens.make

To be renewed when `hf_models.TINY`, `random_state` or `batch` changes, never because a test is red: then the model is.
Weights and tokens are drawn anew by every test, from a generator whose stream numpy has frozen; only results are stored.
"""

import pathlib

import numpy as np

from gemma4_jax.checkpoint import hf
from tests import hf_models

LAYOUT = 'left'   # the first row full, the second padded on the left


def path(name: str) -> pathlib.Path:
  return pathlib.Path(__file__).parent / f'{name}.npz'


def main():
  for name, fields in hf_models.TINY.items():
    cfg = hf.config_from_hf(fields)
    model = hf_models.build(cfg, hf_models.random_state(cfg))
    logits, loss, grads = hf_models.loss_and_grads(model, *hf_models.batch(LAYOUT))
    names = sorted(grads)
    np.savez_compressed(path(name), logits=logits, loss=loss, names=names,
                        gradient_norms=np.array([np.linalg.norm(grads[n]) for n in names], np.float32))
    print(f'{path(name)}: {path(name).stat().st_size} bytes')


if __name__ == '__main__':
  main()
