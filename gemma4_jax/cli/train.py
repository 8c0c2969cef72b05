"""Trains one model.

  python -m gemma4_jax.cli.train --config=configs/base.py:e2b-toy --workdir=runs/one --config.train.steps=500

A second call on the same workdir goes on from its last checkpoint. For several arms and seeds: python -m experiments.launch.
"""

from pathlib import Path
import sys

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file('config', None, 'A config file, FILE.py or FILE.py:ARGUMENT.', lock_config=True)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder that gets rows, checkpoints and the summary.')


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown argument {argv[1]!r}')
  from gemma4_jax import match
  from gemma4_jax.training import trainer   # late: JAX need not load for --help
  logging.set_verbosity(logging.INFO)
  try:
    config, report = match.resolve(_CONFIG.value)
    if report:
      print(f'matched {report}')
    done = trainer.run(config, Path(_WORKDIR.value))
  except (ValueError, ImportError, trainer.NonFiniteLoss) as error:
    sys.exit(f'error: {error}')
  for name, value in sorted(done['metrics'].items()):
    print(f'{name:40} {value:.5g}')


if __name__ == '__main__':
  flags.mark_flags_as_required(['config', 'workdir'])
  app.run(main)
