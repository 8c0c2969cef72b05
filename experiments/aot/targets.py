"""Machines that need not be here, as their compilers know them.

`devices(target)` are described devices: programs compile for them and do not run. TPUs need `libtpu`, which pip installs anywhere, GPUs
the CUDA plugin of this JAX version, without driver or CUDA libraries: both are the extra `aot`.
"""

import dataclasses
import functools
import os
import re

# Before libtpu is loaded: it would ask a cloud's metadata server, and lock a device that is not there.
_ENVIRONMENT = {'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1', 'TPU_WORKER_HOSTNAMES': 'localhost',
                'TPU_ACCELERATOR_TYPE': 'v5litepod-1'}
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One device, from its vendor's data sheet.

  Attributes:
    memory: bytes.
    bandwidth: bytes/s.
    flops: bfloat16 FLOP/s, dense.
    cores: that the name of a slice counts for one chip; 0: of a GPU.
    target: of a GPU, what XLA's `GpuTargetConfigProto` says of it; '': a CPU, as the one that compiles.
  """
  memory: int
  bandwidth: float
  flops: float
  cores: int = 0
  target: str = ''


def _gpu(name, major, minor, processors, lanes, memory, bandwidth, l2, shared, clock):
  """Limits of blocks and registers are those of all generations here."""
  return f'''gpu_device_info {{ core_count: {processors} fpus_per_core: {lanes} threads_per_warp: 32 threads_per_block_limit: 1024
    threads_per_core_limit: {2048 if major == 9 else 1536} block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
    registers_per_core_limit: 65536 registers_per_block_limit: 65536 shared_memory_per_block: 49152
    shared_memory_per_core: {shared} shared_memory_per_block_optin: {shared - 1024} l2_cache_size: {l2}
    memory_bandwidth: {int(bandwidth)} device_memory_size: {memory} clock_rate_ghz: {clock}
    cuda_compute_capability {{ major: {major} minor: {minor} }} }}
    platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 12 }} runtime_version {{ major: 13 }} device_description_str: "{name}"'''


CHIPS = {
    'v5e': Chip(16 * GIB, 819e9, 197e12, cores=1),
    'v5p': Chip(95 * GIB, 2765e9, 459e12, cores=2),
    'v6e': Chip(32 * GIB, 1640e9, 918e12, cores=1),
    'h100': Chip(80 * GIB, 3350e9, 989e12,
                 target=_gpu('NVIDIA H100 80GB HBM3', 9, 0, 132, 128, 80 * GIB, 3350e9, 50 * 2**20, 233472, 1.98)),
    'h200': Chip(141 * 10**9, 4800e9, 989e12,
                 target=_gpu('NVIDIA H200', 9, 0, 132, 128, 141 * 10**9, 4800e9, 50 * 2**20, 233472, 1.98)),
    'rtx4090': Chip(24 * GIB, 1008e9, 165e12,
                    target=_gpu('NVIDIA GeForce RTX 4090', 8, 9, 128, 128, 24 * GIB, 1008e9, 72 * 2**20, 102400, 2.52)),
}
CHIPS['cpu'] = Chip(16 * GIB, 35e9, 0.2e12)   # two cores of a laptop or a virtual machine
_SQUARES = {1: '1x1', 4: '2x2', 8: '2x4', 16: '4x4', 32: '4x8', 64: '8x8', 128: '8x16', 256: '16x16'}
_CUBES = {4: '2x2x1', 8: '2x2x2', 16: '2x2x4', 32: '2x4x4', 64: '4x4x4', 128: '4x4x8', 256: '4x8x8'}


@dataclasses.dataclass(frozen=True)
class Target:
  name: str
  chip: Chip
  kind: str       # of CHIPS
  count: int      # devices

  @property
  def platform(self) -> str:
    return 'tpu' if self.chip.cores else 'gpu' if self.chip.target else 'cpu'


def find(name: str) -> Target:
  """'v5e-64', 'v5p-16' (slices as their vendor names them: v5p counts two cores a chip, and a chip is one device), 'h100x8'.

  Raises:
    ValueError: no such machine, with those that there are.
  """
  match = re.fullmatch(r'(\w+?)(-|x)(\d+)', name)
  kind, between, number = match.groups() if match else ('', '', 0)
  chip = CHIPS.get(kind)
  if chip is None or between != ('-' if chip.cores else 'x'):
    raise ValueError(f'target {name!r}: give one of {", ".join(k + ("-N" if c.cores else "xN") for k, c in CHIPS.items())}')
  slices = _CUBES if kind == 'v5p' else _SQUARES
  count = int(number) // max(chip.cores, 1)
  if chip.cores and (int(number) % chip.cores or count not in slices):
    raise ValueError(f'target {name!r}: slices of {kind} are {", ".join(f"{kind}-{n * chip.cores}" for n in slices)}')
  if count < 1:
    raise ValueError(f'target {name!r}: at least one device')
  return Target(name, chip, kind, count)


@functools.cache
def devices(target: Target) -> list:
  """Described devices of a target.

  Raises:
    ImportError: the compiler for it is not installed.
  """
  import jax
  from jax.experimental import topologies
  if target.platform == 'cpu':
    return jax.devices('cpu')[:target.count]
  for name, value in _ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  try:
    if target.platform == 'gpu':
      return topologies.get_topology_desc(platform='cuda', target_config=target.chip.target, topology=f'1x1x{target.count}').devices
    shape = (_CUBES if target.kind == 'v5p' else _SQUARES)[target.count]
    one = dict(chips_per_host_bounds=(1, 1, 1)) if target.count == 1 else {}
    return topologies.get_topology_desc(platform='tpu', topology_name=f'{target.kind}:{shape}', **one).devices
  except Exception as error:   # whatever JAX raises where a plugin is missing
    if 'not installed' in str(error) or 'not implemented' in str(error):
      what = {'tpu': 'libtpu', 'gpu': 'the CUDA plugin'}[target.platform]
      raise ImportError(f"target {target.name}: {what} is not installed: pip install 'gemma4_jax[aot]'") from None
    raise
