"""What a compiled program's text says: collectives by kind, with how often they run, and kernels."""

import collections
import math
import re

_COLLECTIVES = 'all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|ragged-all-to-all'
_COLLECTIVE = re.compile(rf'= (.*?) ({_COLLECTIVES})(-start)?\(')
_CALLED = re.compile(r'(?:calls|to_apply|body|branch_computations|true_computation|false_computation)=(?:\{([^}]*)\}|%?([\w.-]+))')
_ARRAY = re.compile(r'\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]')
_CONSTANT = re.compile(r's32\[\]\S* constant\((\d+)\)')


def collectives(text: str) -> dict[str, dict[str, float]]:
  """Kind -> {'count': times that it runs, 'bytes': that its results hold on one device}, for one run of the program.

  A body of a loop counts as often as the loop runs. Where that is not known when the program is compiled, as in the loop that chooses
  tokens, it counts once.
  """
  bodies = _computations(text)
  times = collections.Counter()

  def visit(name, factor):
    times[name] += factor
    for line in bodies.get(name, ()):
      trips = _trips(line, bodies) if ' while(' in line else 1
      for several, one in _CALLED.findall(line):
        for called in re.findall(r'[\w.-]+', several or one):
          if called in bodies and called != name:
            visit(called, factor * trips)

  visit(next(name for name in bodies if name.startswith('ENTRY')), 1)
  found = {}
  for name, lines in bodies.items():
    for line in lines:
      if times[name] and (match := _COLLECTIVE.search(line)):
        kind = 'reduce-scatter' if name.startswith('all-reduce-scatter') else match[2]   # as a TPU fuses it
        sizes = [_bytes(dtype, dims) for dtype, dims in _ARRAY.findall(match[1])]
        if match[3] and kind != 'all-reduce':   # the start of an asynchronous one holds its operands first
          sizes = sizes[1:2] if kind == 'collective-permute' else sizes[len(sizes) // 2:]
        entry = found.setdefault(kind, {'count': 0, 'bytes': 0})
        entry['count'] += times[name]
        entry['bytes'] += times[name] * int(sum(sizes))
  return found


def kernels(text: str) -> list[str]:
  """Pallas kernels in the program, by name."""
  names = set()
  for line in text.splitlines():
    if 'custom_call_target="tpu_custom_call"' in line or 'custom_call_target="__gpu$xla.gpu.triton"' in line:
      named = re.search(r'op_name="[^"]*?([\w.-]+)/pallas_call"', line) or re.match(r'\s*%([\w-]+)', line)   # the instruction's own
      names.add(named[1])
  return sorted(names)


def _computations(text):
  """Name -> lines; the entry's name begins with ENTRY."""
  found, name = {}, None
  for line in text.splitlines():
    head = re.match(r'(ENTRY )?%?([\w.-]+) \(.*\{\s*$', line)
    if head and not line.startswith(' '):
      name = f'ENTRY {head[2]}' if head[1] else head[2]
      found[name] = []
    elif name and ' = ' in line:
      found[name].append(line)
  return found


def _trips(line, bodies):
  known = re.search(r'known_trip_count\\?":\{\\?"n\\?":\\?"(\d+)', line)
  if known:
    return int(known[1])
  condition = re.search(r'condition=%?([\w.-]+)', line)   # TPUs: i < N
  constants = {int(n) for of in bodies.get(condition[1], ()) for n in _CONSTANT.findall(of)} if condition else set()
  return constants.pop() if len(constants) == 1 else 1


def _bytes(dtype, dims):
  bits = 8 if dtype == 'pred' else int(re.search(r'\d+', dtype)[0])
  return math.prod(int(d) for d in dims.split(',') if d) * bits / 8
