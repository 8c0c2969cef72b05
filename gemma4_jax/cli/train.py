"""Trains one model.

  python -m gemma4_jax.cli.train --config=configs/base.py:e2b-toy --workdir=runs/one --config.train.steps=500

A second call on the same workdir goes on from its last checkpoint. For several arms and seeds: python -m experiments.launch.
"""

from pathlib import Path
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from gemma4_jax import config_file


def _fail(message: object, status: int = 2) -> None:
  print(f'error: {config_file.one_line(str(message))}', file=sys.stderr)
  sys.exit(status)


def main(argv):
  if len(argv) > 1:
    _fail(f'{argv[1]}: unexpected; flags are written --name=value')
  config, workdir = flags.FLAGS.config, flags.FLAGS.workdir
  for name, value in (('config', config), ('workdir', workdir)):
    if not value:
      _fail(f'--{name} is missing; see --help')
  import jax  # late: it need not load for --help

  from gemma4_jax import hardware, match
  from gemma4_jax.training import trainer
  hardware.keep_memory()
  hardware.take_gpu_memory()
  logging.set_verbosity(logging.INFO)
  trainer.quiet_orbax()
  try:
    if flags.FLAGS.distributed:
      jax.distributed.initialize()
    config, report = match.resolve(config)
    if report:
      print(f'matched to {report["arm"]}: {match.tell(report)}')
    done = trainer.run(config, Path(workdir))
  except (ValueError, ImportError) as error:
    _fail(error)
  except (OSError, trainer.NonFiniteLoss) as error:
    _fail(error, 1)
  except RuntimeError as error:   # XLA's
    if not hardware.is_out_of_memory(error):
      raise
    _fail('out of memory; --config.model.remat=full, --config.model.scan, more --config.optimizer.accumulate, less '
          f'--config.data.batch_size or a --config.mesh take less of a device ({config_file.one_line(error)[:200]})', 1)
  except KeyboardInterrupt:
    print(f'stopped; the same command goes on from the last checkpoint in {workdir}', file=sys.stderr)
    sys.exit(130)
  for name, value in sorted(done.get('metrics', {}).items()):   # of the first process alone
    print(f'{name:40} {value:.5g}')


if __name__ == '__main__':
  config_flags.DEFINE_config_file('config', None, 'A config file, FILE.py or FILE.py:ARGUMENT; --config.section.field=value sets a field.',
                                  lock_config=True)
  flags.DEFINE_string('workdir', None, 'Folder that gets rows, checkpoints and the summary.')
  flags.DEFINE_boolean('distributed', False, 'One of several processes of one run, which Slurm, Open MPI, Kubernetes or a TPU pod started.')
  app.run(main, flags_parser=config_file.parse)
