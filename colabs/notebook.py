"""What the notebooks share: the machine they are on, a model to work with, and their last line.

  run = notebook.begin(SIZE, RUNTIME, SEED, SMOKE, CHECKPOINT)
  model = run.model()
  run.end()
"""

import dataclasses
import importlib.metadata
import os
from pathlib import Path
import subprocess
import sys
import time

import jax

from configs import base
from gemma4_jax import compilation, config as model_config, hardware
from gemma4_jax.sampling import text
from gemma4_jax.training import trainer

# Runtime -> (JAX's name of the backend, how released weights fit it: E2B in 4.6 GB, E4B in 9.3 GB, the PLE table in host memory).
RUNTIMES = {
    'cpu': ('cpu', dict(param_dtype='bfloat16')),
    't4': ('gpu', dict(param_dtype='bfloat16', ple_placement='host')),
    'v5e': ('tpu', dict(param_dtype='bfloat16', ple_placement='host')),
}
SIZES = ('toy', 'e2b', 'e4b')

# Fields of `configs/base.py` for SMOKE: every cell runs, and its numbers mean nothing.
SMOKE = {
    'model.vocab_size': 512, 'model.width': 32, 'model.mlp_dim': 48, 'model.pattern': 'G', 'model.num_layers': 2,
    'model.num_kv_shared_layers': 1, 'model.ple_dim': 8, 'data.vocab_size': 512, 'data.sequence_length': 32, 'data.batch_size': 2,
    'data.max_bytes': 400_000, 'train.steps': 2, 'train.checkpoint_every': 2, 'optimizer.warmup_steps': 1, 'eval.max_batches': 1}


@dataclasses.dataclass(frozen=True)
class Run:
  """The form's settings, checked.

  Attributes:
    size: 'toy', trained here on Python's own modules, or the released variant that `checkpoint` holds.
    smoke: the least that runs every cell, for tests.
    started: of `time.perf_counter`.
  """
  size: str
  runtime: str
  seed: int
  smoke: bool
  checkpoint: str
  started: float

  @property
  def fields(self) -> dict:
    """Fields of `configs/base.py` that this run sets."""
    return dict(SMOKE) if self.smoke else {}

  def folder(self, name: str) -> Path:
    """Where this run keeps what can be made again; it need not exist."""
    return Path(os.environ.get('COLABS_RUNS', 'runs/colabs')) / f'{name}{"-smoke" if self.smoke else ""}-s{self.seed}'

  def train(self) -> Path:
    """The folder of a run of `configs/base.py:e2b-toy`, by which E2B's pattern learns at toy size: a minute or two, once."""
    config = base.get_config('e2b-toy')
    config.seed = self.seed
    config.update_from_flattened_dict(self.fields)
    folder = self.folder('toy')
    if not (folder / 'DONE').exists():
      trainer.run(config, folder)
    return folder

  def directory(self) -> Path:
    """Of the checkpoint that the form names, or of the toy, which is trained now if it was not."""
    return Path(self.checkpoint).expanduser() if self.checkpoint else self.train()

  def model(self, **how) -> text.Model:
    """That checkpoint, to sample from. Args: how: of `text.load`, over what the runtime wants.

    Raises:
      ValueError: the checkpoint holds another model than the form says.
    """
    model = text.load(self.directory(), **(RUNTIMES[self.runtime][1] if self.checkpoint else {}) | how)
    held = model_config.released(model.cfg)
    if self.checkpoint and held != self.size:
      raise ValueError(f'CHECKPOINT={self.checkpoint!r} holds {held or "no released model"}, SIZE is {self.size!r}')
    return model

  def end(self) -> None:
    """Prints the last line of a notebook: device, versions, peak memory, seconds."""
    versions = ', '.join(f'{name} {importlib.metadata.version(name)}' for name in ('jax', 'jaxlib', 'flax', 'numpy'))
    print(f'{device()}; {versions}; peak {hardware.peak_memory_bytes():,} bytes; {time.perf_counter() - self.started:.0f} s')


def begin(size: str, runtime: str, seed: int, smoke: bool, checkpoint: str = '') -> Run:
  """Checks the form and prints the device. The environment variable SMOKE=1 is as good as the box.

  Raises:
    ValueError: a form that cannot be, or a runtime that is not this machine.
  """
  for field, value, known in (('SIZE', size, SIZES), ('RUNTIME', runtime, tuple(RUNTIMES))):
    if value not in known:
      raise ValueError(f'{field}={value!r}: none of {", ".join(known)}')
  if (size == 'toy') == bool(checkpoint):
    raise ValueError(f'SIZE={size!r}: ' + ('is trained here; leave CHECKPOINT empty, or say what it holds' if checkpoint else
                                         'needs CHECKPOINT, the directory of its weights (Hugging Face or Google format)'))
  os.environ.setdefault('XLA_PYTHON_CLIENT_MEM_FRACTION', '.9')   # of a T4's 16 GB: E4B takes 12 with a float32 copy of its embedding
  if RUNTIMES[runtime][0] != jax.default_backend():
    raise ValueError(f'RUNTIME={runtime!r}: JAX finds {device()} here; choose another RUNTIME, or change the runtime type of the notebook')
  compilation.keep()
  run = Run(size, runtime, seed, smoke or os.environ.get('SMOKE') == '1', checkpoint, time.perf_counter())
  print(f'{device()}, jax {jax.__version__}{", SMOKE: numbers mean nothing" if run.smoke else ""}')
  return run


def device() -> str:
  """What JAX computes on."""
  kind, count = jax.devices()[0].device_kind, jax.device_count()
  return f'{count} x {kind} ({hardware.cores()} cores)' if kind == 'cpu' else f'{count} x {kind}'


def command(module: str, *flags: str) -> None:
  """Runs `python -m MODULE FLAGS`, as a terminal would, and prints what it says. On the CPU: an accelerator is this process's alone.

  Raises:
    RuntimeError: it ended with another exit status than 0, or 2, by which a command says what is wrong with its flags.
  """
  print('$', *([] if jax.default_backend() == 'cpu' else ['JAX_PLATFORMS=cpu']), 'python -m', module, *flags)
  environment = {name: value for name, value in os.environ.items() if name != 'FORCE_COLOR'}   # a kernel's own; here it would draw bars
  environment['JAX_PLATFORMS'] = 'cpu'
  environment['PYTHONPATH'] = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get('PYTHONPATH')]))
  with subprocess.Popen([sys.executable, '-m', module, *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                        env=environment) as process:
    for line in process.stdout:
      print(line, end='')
  if process.returncode not in (0, 2):
    raise RuntimeError(f'{module} ended with exit status {process.returncode}')
