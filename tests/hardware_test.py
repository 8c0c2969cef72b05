"""What a launcher asks about the machine."""

import ctypes
import os
from pathlib import Path
import subprocess
import sys
import types

import jax
import pytest

from gemma4_jax import hardware
from gemma4_jax.turboquant import ops

PAGES = Path('/sys/kernel/mm/transparent_hugepage/enabled')


@pytest.fixture
def linux(monkeypatch):
  monkeypatch.setattr(sys, 'platform', 'linux')
  monkeypatch.setattr(hardware.glob, 'glob', lambda pattern: [])
  for name in ('JAX_PLATFORMS', 'GLIBC_TUNABLES'):
    monkeypatch.delenv(name, raising=False)
  return monkeypatch


def test_a_cpu_under_linux_gets_huge_pages(linux):
  (name, value), = hardware.cpu_environment().items()
  assert name == 'GLIBC_TUNABLES' and 'glibc.malloc.hugetlb=1' in value.split(':')


@pytest.mark.skipif(not PAGES.exists() or '[never]' in PAGES.read_text(), reason='no transparent huge pages on this system')
def test_arrays_of_a_megabyte_then_have_them(linux):
  code = ('import jax.numpy as np, pathlib, re; kept = [np.ones((1 << 18,)) + i for i in range(64)]; [x.block_until_ready() for x in kept];'
          'print(sum(map(int, re.findall(r"AnonHugePages: *(\\d+)", pathlib.Path("/proc/self/smaps").read_text()))))')
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', **hardware.cpu_environment()}
  done = subprocess.run([sys.executable, '-c', code], env=environment, text=True, capture_output=True, check=True)
  assert int(done.stdout) > 56 * 1024   # KiB


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), 'mallopt'), reason='no glibc')
@pytest.mark.skipif(PAGES.exists() and '[always]' in PAGES.read_text(), reason='huge pages for all: faults are few in any case')
def test_a_program_run_again_gets_the_memory_of_its_temporaries_back(linux):
  code = ('import resource, sys, gemma4_jax.hardware as hardware; hardware.keep_memory() if sys.argv[1:] else None;'
          'import jax, jax.numpy as jnp; f = jax.jit(lambda x: jnp.cumsum(2 * x)[-1]); x = jnp.ones(1 << 24);'   # two arrays of 64 MiB
          'faults = lambda: (f(x).block_until_ready(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt)[1];'
          'counts = [faults() for _ in range(10)]; print(counts[-1] - counts[-2])')
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
  faults = [int(subprocess.run([sys.executable, '-c', code, *args], env=environment, text=True, capture_output=True, check=True).stdout)
            for args in ([], ['keep'])]
  assert faults[0] > 10_000 > 1000 > faults[1]


def test_accelerators_other_systems_and_users_with_tunables_of_their_own_get_nothing(linux):
  with linux.context() as patch:
    patch.setattr(sys, 'platform', 'darwin')
    assert hardware.cpu_environment() == {}
  with linux.context() as patch:
    patch.setenv('GLIBC_TUNABLES', '')
    assert hardware.cpu_environment() == {}
  linux.setattr(hardware.glob, 'glob', lambda pattern: ['/dev/nvidia0'] if 'nvidia' in pattern else [])
  assert hardware.has_accelerator() and hardware.cpu_environment() == {}
  linux.setenv('JAX_PLATFORMS', 'cpu')
  assert not hardware.has_accelerator() and hardware.cpu_environment()


def test_the_record_holds_what_was_set(linux):
  linux.setenv('GLIBC_TUNABLES', 'glibc.malloc.hugetlb=1')
  assert hardware.environment()['GLIBC_TUNABLES'] == 'glibc.malloc.hugetlb=1'


def test_a_matmul_has_a_rate_and_a_process_a_peak():
  assert hardware.measure_matmul(size=64, repeats=1) > 0
  assert hardware.measure_bandwidth(size=2**16, repeats=1) > 0
  assert hardware.peak_process_bytes() > 1 << 20


def test_a_launcher_can_ask_without_jax():
  code = 'import sys, gemma4_jax.hardware as h; h.cpu_environment(); h.cores(); sys.exit("jax" in sys.modules)'
  assert subprocess.run([sys.executable, '-c', code]).returncode == 0


@pytest.mark.parametrize('platform, capability, kernels', [
    ('gpu', '7.5', ''), ('gpu', '8.9', 'gpu'), ('gpu', '12.0', 'gpu'), ('rocm', 'gfx942', 'gpu'), ('tpu', None, 'tpu'), ('cpu', None, '')])
def test_kernels_are_of_tpus_and_of_gpus_that_triton_knows(monkeypatch, platform, capability, kernels):
  monkeypatch.setattr(jax, 'devices', lambda: [types.SimpleNamespace(**{'compute_capability': capability} if capability else {})])
  monkeypatch.setattr(jax, 'default_backend', lambda: platform)
  assert hardware.kernels() == kernels
  if capability == '7.5':
    with pytest.raises(NotImplementedError, match='needs a GPU; the default device is a GPU older than compute capability 8.0'):
      ops.check('pallas_gpu')
