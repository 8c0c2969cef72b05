"""Weights to a directory that other programs, or another mesh, can read; written beside and renamed when whole."""

from collections.abc import Callable, Iterable, Mapping
import contextlib
import fcntl
import glob
import hashlib
import json
import os
from pathlib import Path
import shutil
import tempfile

from absl import logging
import jax
import numpy as np

from gemma4_jax.checkpoint import hf, load, orbax, shards, source
from gemma4_jax.config import ModelConfig
from gemma4_jax.model import transformer

COPIED = ('tokenizer.json', 'tokenizer_config.json', 'generation_config.json', 'chat_template.jinja')


def save_hf(cfg: ModelConfig, params: Mapping, dst: str | Path, *, dtype: str | None = None, source: str | Path | None = None,
            max_shard_bytes: int = 5 * 10**9) -> None:
  """Writes what `transformers` reads: config.json and safetensors, one tensor in host memory at a time.

  Args:
    params: of `transformer.init`, on any devices or in host memory.
    dst: must not exist.
    dtype: what all weights are stored as; None: as they are.
    source: a directory whose tokenizer and generation files (`COPIED`) are to come along, where it has them.
  Raises:
    ValueError: Hugging Face has no such model, `params` are not those of `cfg`, or `dst` exists or cannot be written. Then
      nothing is left at `dst`.
  """
  with beside(dst) as folder:
    write_hf(folder, cfg, flat_params(cfg, params), dtype=dtype, tokenizer=source, max_shard_bytes=max_shard_bytes)
  if told := hf.caveat(cfg):
    logging.warning('%s: %s', dst, told)


def save_orbax(cfg: ModelConfig, params: Mapping, dst: str | Path, *, dtype: str | None = None, source: str | Path | None = None) -> None:
  """Writes our own form, config inside: any arm, restorable onto any mesh. Arguments and errors as `save_hf`."""
  with beside(dst) as folder:
    write_orbax(folder, cfg, flat_params(cfg, params), dtype=dtype, tokenizer=source)


def write_hf(folder: Path, cfg: ModelConfig, flat: Mapping[str, jax.Array | np.ndarray], *, dtype: str | None = None,
             tokenizer: str | Path | None = None, max_shard_bytes: int = 5 * 10**9,
             wrote: Callable[[int], None] = lambda nbytes: None) -> None:
  """`save_hf` into a new directory, of path -> weight; `wrote` is told the bytes of every tensor written."""
  config, tensors = hf.config_to_hf(cfg), hf.tensors(cfg)
  widest = lambda tensor: max((np.dtype(flat[path].dtype) for path in tensor.parts), key=lambda dtype: dtype.itemsize)
  stored = {name: (source.DTYPES[dtype] if dtype else widest(tensor), tensor.shape) for name, tensor in tensors.items()}
  read = lambda name: tensors[name].join({path: _to_host(flat[path]) for path in tensors[name].parts})
  folder.mkdir()
  shards.write(folder, stored, read, max_shard_bytes, wrote)
  config['dtype'] = stored[next(iter(stored))][0].name
  (folder / 'config.json').write_text(json.dumps(config, indent=2, sort_keys=True) + '\n')
  copy_tokenizer(tokenizer, folder)


def write_orbax(folder: Path, cfg: ModelConfig, flat: Mapping[str, jax.Array | np.ndarray], *, dtype: str | None = None,
                tokenizer: str | Path | None = None) -> None:
  """`save_orbax` into a new directory, of path -> weight."""
  stored = cfg.replace(scan=False, **(dict(param_dtype=dtype, dtype=dtype) if dtype else {}))
  orbax.save_params(folder, stored, load.unflatten(flat), source.DTYPES[dtype] if dtype else None)
  copy_tokenizer(tokenizer, folder)


def copy_tokenizer(src: str | Path | None, folder: Path) -> None:
  """Files of `COPIED` that `src` has."""
  for name in COPIED if src else ():
    if os.path.lexists(Path(src) / name):   # a link that leads nowhere is half a download
      (folder / name).write_bytes(source.read_bytes(source.inside(Path(src), name)))


def flat_params(cfg: ModelConfig, params: Mapping) -> dict[str, jax.Array | np.ndarray]:
  """Path -> weight of a tree, stacked or canonical; a ValueError says where it is not that of `cfg`."""
  if cfg.scan:
    params = transformer.unstack(cfg, params)
  flat = load.flatten(params)
  source.compare({name: box.value.shape for name, box in load.flatten(transformer.abstract(cfg)).items()},
                 {name: weight.shape for name, weight in flat.items()})
  return flat


def digest(weights: Iterable[tuple[str, np.ndarray]], dtype: str | None = None) -> str:
  """sha256 over path, dtype, shape and bytes of every weight, in whatever order and format they come."""
  lines = []
  for name, weight in weights:
    weight = np.ascontiguousarray(weight, source.DTYPES[dtype] if dtype else None)
    lines.append(f'{name} {weight.dtype.name} {weight.shape} {hashlib.sha256(weight.reshape(-1).view(np.uint8)).hexdigest()}\n')
  return hashlib.sha256(''.join(sorted(lines)).encode()).hexdigest()


def check_free(dst: str | Path) -> None:
  """Raises ValueError if something is there already."""
  if os.path.lexists(Path(dst)):   # of '', this very folder
    raise ValueError(f'{Path(dst)}: exists already; choose another destination')


@contextlib.contextmanager
def beside(dst: str | Path):
  """Yields the name of a new directory, which becomes `dst` if the block ends well and is removed if not.

  What writers to the same `dst` left that were killed is removed first.

  Raises:
    ValueError: `dst` exists, or the disk is full or not to be written.
  """
  check_free(dst)
  dst = Path(dst).absolute()
  scratch = None
  try:
    dst.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(dst)
    scratch = Path(tempfile.mkdtemp(prefix=f'.{dst.name}.new-', dir=dst.parent))
    with (scratch / 'lock').open('w') as lock:
      with contextlib.suppress(OSError):   # a file system without locks: a name by which nobody removes it
        fcntl.flock(lock, fcntl.LOCK_EX)   # the system lets go of it when this process ends, however it ends
        scratch = scratch.rename(dst.with_name(scratch.name.replace(f'.{dst.name}.new', f'.{dst.name}.part', 1)))   # seen when locked
      yield scratch / 'whole'
      os.rename(scratch / 'whole', dst)
  except OSError as error:
    raise ValueError(f'{dst}: cannot be written ({error.strerror or error}); nothing is left there') from error
  finally:
    if scratch:
      shutil.rmtree(scratch, ignore_errors=True)


def _remove_abandoned(dst):
  for part in dst.parent.glob(f'.{glob.escape(dst.name)}.part-*'):
    with contextlib.suppress(OSError):
      if (part / 'lock').exists():   # if not, a thread wrote on while the part was removed
        with (part / 'lock').open('r+') as lock:
          fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)   # a writer holds it
      shutil.rmtree(part, ignore_errors=True)


def _to_host(weight) -> np.ndarray:
  """Shard by shard: as a whole, a jax.Array would keep its host copy, and the model would add up in host memory."""
  if not isinstance(weight, jax.Array):
    return weight
  host = np.empty(weight.shape, weight.dtype)
  for shard in weight.addressable_shards:
    host[shard.index] = shard.data
  return host
