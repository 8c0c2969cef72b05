"""Directories of safetensors files: read without trust and memory-mapped, written tensor by tensor.

Source of the format: github.com/huggingface/safetensors, README.md; of the index: transformers' sharded checkpoints.
"""

from collections.abc import Callable, Mapping
import dataclasses
import json
import math
import os
from pathlib import Path

import numpy as np
import safetensors

from gemma4_jax.checkpoint import source

INDEX = 'model.safetensors.index.json'
_NAMES = {'F64': 'float64', 'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16'}
_PICKLES = ('.bin', '.pt', '.pth', '.ckpt', '.pkl')


@dataclasses.dataclass(frozen=True)
class Stored:
  """One tensor in a file: dtype as the file calls it, `begin` the byte at which it starts."""
  file: Path
  dtype: str
  shape: tuple[int, ...]
  begin: int

  def map(self, name: str) -> np.ndarray:
    """The tensor, memory-mapped; a ValueError names it if its dtype is no float."""
    return np.memmap(self.file, self.float_dtype(name), 'r', self.begin, self.shape)

  def float_dtype(self, name: str) -> np.dtype:
    return source.float_dtype(f'{self.file}: {name}', _NAMES.get(self.dtype, self.dtype))


def find(folder: Path) -> dict[str, Stored]:
  """Every tensor of a directory, by name. Nothing is read but the headers.

  Raises:
    ValueError: the index names a file outside of the directory or one that is missing, or disagrees with the files; a file
      is no whole safetensors file; there are none; one line each.
  """
  partial = [*folder.glob('*.incomplete'), *folder.glob('.cache/huggingface/download/**/*.incomplete')]
  if partial:
    raise ValueError(f'{folder}: half downloaded ({partial[0].name}); finish the download')
  index = {}
  if (folder / INDEX).exists():
    index = source.read_json(source.inside(folder, INDEX)).get('weight_map')
    if not (isinstance(index, dict) and index and all(isinstance(name, str) for name in index.values())):
      raise ValueError(f'{folder / INDEX}: weight_map is no object of tensor and file names')
  names = sorted(set(index.values()) or (file.name for file in folder.glob('*.safetensors')))
  pickles = [name for name in names or sorted(file.name for file in folder.iterdir()) if name.endswith(_PICKLES)]
  if pickles:
    raise ValueError(f'{folder}: {pickles[0]} is a pickle, which is not read: it can hold code; get the *.safetensors files')
  files = [source.inside(folder, name) for name in names]
  missing = [file.name for file in files if not file.is_file()]
  if missing or not files:
    raise ValueError(f'{folder}: half downloaded: {len(missing)} of {len(files)} files of the index are missing, {missing[0]} first'
                     if missing else f'{folder}: holds no *.safetensors files')
  found = {}
  for file in files:
    for name, tensor in _read_header(file).items():
      if name in found:
        raise ValueError(f'{file}: {name} is also in {found[name].file.name}')
      found[name] = tensor
  wrong = [name for name, file in index.items() if name not in found or found[name].file.name != Path(file).name]
  if wrong:
    raise ValueError(f'{folder / INDEX}: {wrong[0]} is not in {index[wrong[0]]}' + f' (and {len(wrong) - 1} more)' * (len(wrong) > 1))
  return found


def _read_header(file: Path) -> dict[str, Stored]:
  try:
    with safetensors.safe_open(file, framework='np'):   # checks lengths, and that tensors tile the file without gap or overlap
      pass
    with file.open('rb') as f:
      length = int.from_bytes(f.read(8), 'little')
      header = source.parse_json(f.read(length))
  except (safetensors.SafetensorError, OSError, ValueError) as error:
    raise ValueError(f'{file}: not a whole safetensors file ({error}); download it again') from None
  return {name: Stored(file, tensor['dtype'], tuple(tensor['shape']), 8 + length + tensor['data_offsets'][0])
          for name, tensor in header.items() if name != '__metadata__'}


def write(folder: Path, tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]], read: Callable[[str], np.ndarray],
          max_shard_bytes: int, wrote: Callable[[int], None] = lambda nbytes: None) -> None:
  """Writes one file, or several and their index, holding one tensor at a time.

  Args:
    tensors: name -> dtype, shape.
    read: name -> the tensor.
    wrote: is told the bytes of every tensor written.
  """
  size = lambda name: math.prod(tensors[name][1]) * tensors[name][0].itemsize
  shards, filled = [[]], 0
  for name in tensors:
    if shards[-1] and filled + size(name) > max_shard_bytes:
      shards.append([])
      filled = 0
    shards[-1].append(name)
    filled += size(name)
  files = ['model.safetensors'] if len(shards) == 1 else [
      f'model-{i:05}-of-{len(shards):05}.safetensors' for i in range(1, len(shards) + 1)]
  for file, names in zip(files, shards):
    names.sort(key=lambda name: -tensors[name][0].itemsize)   # so that every tensor starts at a multiple of its itemsize
    _write_file(folder / file, {name: tensors[name] for name in names}, read, wrote)
  if len(shards) > 1:
    index = {'metadata': {'total_size': sum(map(size, tensors))},
             'weight_map': {name: file for file, names in zip(files, shards) for name in names}}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + '\n')


def _write_file(file: Path, tensors, read, wrote):
  words = {dtype: word for word, dtype in _NAMES.items()}
  header, end = {'__metadata__': {'format': 'pt'}}, 0   # transformers asks for the format
  for name, (dtype, shape) in tensors.items():
    begin, end = end, end + math.prod(shape) * dtype.itemsize
    header[name] = {'dtype': words[dtype.name], 'shape': shape, 'data_offsets': [begin, end]}
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-(8 + len(text)) % 64)
  with file.open('wb') as f:
    f.write(len(text).to_bytes(8, 'little') + text)
    for name, (dtype, shape) in tensors.items():
      array = np.ascontiguousarray(read(name), dtype)
      if array.shape != tuple(shape):
        raise ValueError(f'{name}: {array.shape} instead of {shape}')
      f.write(array.reshape(-1).view(np.uint8).data)
      wrote(array.nbytes)
    f.flush()
    os.fsync(f.fileno())
