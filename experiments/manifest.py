"""A sweep written down before it runs: one JSON line a point, with its folder, arm, seed and whole config.

A config file holds `get_config(arg)`, and may hold `sweep(add)` (or `sweep(add, arg)`), which calls `add(overrides)` once a point, and
`metrics()`, the names to report. Overrides are {'dotted.field': value}; the command line's come first, the sweep's after.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import hashlib
import inspect
import json
import pathlib
import signal

import ml_collections

from gemma4_jax import config as model_config, match, metrics as metrics_lib
from gemma4_jax.config_file import Error, call, check_field, flatten, one_line

FILE = 'manifest.jsonl'
LABELS = ('seed', 'arm', 'group')     # fields that name a point; the others make it

# Fields of a model that say how it is computed, not what: equal logits are what one expects of them.
_IMPLEMENTATION = ('attention_implementation', 'moe_implementation', 'remat', 'scan')


@dataclasses.dataclass(frozen=True)
class Point:
  """One run of a sweep."""
  index: int
  folder: str             # inside the workdir: <hash of the config without its seed>-s<seed>
  group: str              # arms are compared within a group (one backbone size, say)
  arm: str
  seed: int
  overrides: dict         # what the sweep set, flat
  match: dict | None      # of a matched baseline: what match.resolve reports, and treatment: the arm it is matched to, '' if not here
  metrics: list           # names to report; the first is the primary one
  config: dict            # the whole config, matched baselines solved

  @property
  def label(self) -> str:
    return f'{self.group}/{self.arm}' if self.group else self.arm

  @property
  def name(self) -> str:
    return f'{self.label} s{self.seed}'


def get_sweep(module, arg: str | None) -> list[dict]:
  """The overrides of every point; one empty dict if the file has no sweep."""
  if not hasattr(module, 'sweep'):
    return [{}]
  points = []
  add = lambda overrides: points.append(dict(overrides))
  takes_arg = len(inspect.signature(module.sweep).parameters) > 1 and arg is not None
  call(module.__file__, lambda: module.sweep(add, arg) if takes_arg else module.sweep(add))
  if not points:
    raise Error(f'{module.__file__}: sweep() added no point')
  return points


def get_metrics(module) -> list[str]:
  return list(call(module.__file__, module.metrics)) if hasattr(module, 'metrics') else []


def expand(config: ml_collections.ConfigDict, sweep: Sequence[Mapping], metrics: Sequence[str] = (),
           fixed: Iterable[str] = ()) -> list[Point]:
  """Applies a sweep to a config, solves the matched baselines and checks every point.

  Args:
    config: the base of all points, command-line overrides applied.
    sweep: overrides, one mapping a point; {'model': {'width': 1}} is {'model.width': 1}.
    metrics: names to report beside `config.primary_metric`.
    fixed: fields the command line set, which the sweep must leave alone.
  Raises:
    Error: a point has an unknown field, a wrong value or a twin, or its model contradicts itself.
  """
  sweep = [flatten(overrides) for overrides in sweep]
  for path in fixed:
    if any(_overlap(path, field) for overrides in sweep for field in overrides):
      raise Error(f'--config.{path}: the sweep sets this field itself and would undo it; change the sweep in the config file instead')
  given = [_apply(config, overrides, i) for i, overrides in enumerate(sweep)]
  plain_arms = {_sameness(c): c.arm for c in reversed(given) if not c.match.metric}
  solved = {}
  points = []
  for i, c in enumerate(given):
    key = canonical(c.to_dict(), 'seed')
    if key not in solved:
      try:
        solved[key] = _solve(c, plain_arms)
        model_config.from_dict(solved[key][0].model)
      except ValueError as e:
        raise Error(f'point {i} ({c.arm}): {one_line(e)}') from e
    resolved, matched = solved[key]
    whole = json.loads(canonical(resolved.to_dict())) | {'seed': c.seed}
    digest = hashlib.sha256(canonical(whole, 'seed').encode()).hexdigest()[:10]
    points.append(Point(
        index=i, folder=f'{digest}-s{c.seed}', group=c.get('group', ''), arm=c.arm, seed=c.seed, overrides=sweep[i],
        match=matched, metrics=list(dict.fromkeys([c.primary_metric, *metrics])), config=whole))
  seen = {}
  for point in points:
    if point.folder in seen:
      raise Error(f'points {seen[point.folder]} and {point.index} ({point.name}) of the sweep are the same; remove one')
    seen[point.folder] = point.index
  check_arms(points)
  return points


def check_arms(points: Sequence[Point]) -> None:
  """Raises Error if points of one arm differ in more than the seed: their mean would be of nothing in particular."""
  first = {}
  for point in points:
    other = first.setdefault((point.group, point.arm), point)
    if canonical(point.config, 'seed') != canonical(other.config, 'seed'):
      a, b = flatten(other.config), flatten(point.config)
      fields = [k for k in sorted(a.keys() | b.keys()) if k != 'seed' and a.get(k) != b.get(k)]
      raise Error(f'points {other.index} and {point.index} are both arm {point.arm!r} but differ in {some(fields)}; '
                  'give each its own arm in sweep()')


def check_arm(arm: str, arms: Sequence[str], flag: str) -> None:
  """Raises Error with the nearest name if a flag names no arm of the sweep."""
  if arm not in arms:
    raise Error(f'{flag}={arm}: no such arm; did you mean {model_config.nearest(arm, arms)!r}? There are {", ".join(arms)}')


def tell_match(point: Point) -> str:
  """How well a matched baseline is matched, in one line."""
  return f'{point.label} is matched to {point.match["treatment"] or "an arm that this sweep lacks"}: {match.tell(point.match)}.'


def read(workdir: pathlib.Path) -> list[Point]:
  """Raises Error if the workdir holds no manifest, or one that cannot be read."""
  path = workdir / FILE
  try:
    points = [Point(**json.loads(line)) for line in path.read_bytes().splitlines()]
  except FileNotFoundError:
    raise Error(f'{workdir}: no {FILE} there; start a sweep with python -m experiments.launch --config=FILE --workdir={workdir}') from None
  except NotADirectoryError:
    raise Error(f'{workdir}: no folder') from None
  except (TypeError, ValueError) as e:
    raise Error(f'{path}: no manifest of this version ({one_line(e)}); use another folder') from e
  if not points:
    raise Error(f'{path}: holds no point; remove it, and start the sweep with --config')
  return points


def write(points: Sequence[Point], workdir: pathlib.Path) -> None:
  metrics_lib.write_text(workdir / FILE, ''.join(json.dumps(dataclasses.asdict(point)) + '\n' for point in points))


def done(point: Point, workdir: pathlib.Path) -> dict | None:
  """What a finished point left in DONE; None if it is not finished."""
  path = workdir / point.folder / 'DONE'
  result = metrics_lib.read_json(path, f'remove it to run {point.name} again')
  if result is not None and not all(isinstance(result.get(name), dict) for name in ('metrics', 'costs')):
    raise Error(f"{path}: without 'metrics' and 'costs'; remove it to run {point.name} again")
  return result


def failure(point: Point, workdir: pathlib.Path, returncode: int = 1) -> str:
  """Why a point failed, in one line: of its ERROR file, of the signal that killed it, or the last of its log."""
  folder = workdir / point.folder
  if (folder / 'ERROR').exists():
    return next((line for line in _lines(folder / 'ERROR')), 'its ERROR file is empty')
  if returncode < 0:
    name = signal.Signals(-returncode).name
    return f'killed by {name}' + (' (out of memory?)' if name == 'SIGKILL' else '')
  lines = _lines(folder / 'log.txt')
  return f'{lines[-1]} (last line of {folder / "log.txt"})' if lines else f'exit status {returncode}, and nothing in {folder / "log.txt"}'


def difference(there: Sequence[Point], now: Sequence[Point]) -> str:
  """What tells two sweeps apart, in a few words; '' if nothing does."""
  key = lambda point: (point.group, point.arm, point.seed)
  a, b = {key(p): p for p in there}, {key(p): p for p in now}
  told = []
  for name, points in (('no longer in the sweep', [a[k] for k in a if k not in b]), ('new in the sweep', [b[k] for k in b if k not in a])):
    if points:
      told.append(f'{name}: {some([p.name for p in points])}')
  fields = {}
  for k in (k for k in a if k in b):
    old, new = flatten(a[k].config), flatten(b[k].config)
    for field in sorted(old.keys() | new.keys()):
      if old.get(field) != new.get(field):
        fields.setdefault(field, f'{field} ({old.get(field)!r} there, {new.get(field)!r} now)')
    if a[k].metrics != b[k].metrics:
      fields.setdefault('metrics()', 'metrics()')
  if fields:
    told.append(some(list(fields.values())))
  return '; '.join(told)


def twins(points: Sequence[Point]) -> list[tuple[str, str]]:
  """Pairs of arms whose configs, and so runs, are equal but for the label."""
  first, pairs = {}, {}
  for point in points:
    other = first.setdefault(canonical(point.config, 'arm', 'group', 'match'), point)
    if other.label != point.label:
      pairs[other.label, point.label] = None
  return list(pairs)


def clash(a: Point, done_a: Mapping, b: Point, done_b: Mapping) -> str:
  """Says so if two arms that should differ have equal logits after one step on one batch; '' otherwise.

  Compared are points of one seed and data set whose models differ. Where only the optimizer or schedule differs, equal logits
  after one step prove nothing (Adam's first step does not depend on its decay rates).
  """
  model = lambda point: {k: v for k, v in point.config['model'].items() if k not in _IMPLEMENTATION}
  comparable = a.seed == b.seed and a.config['data'] == b.config['data'] and model(a) != model(b)
  if not comparable or done_a.get('fingerprint') is None or done_a['fingerprint'] != done_b.get('fingerprint'):
    return ''
  fields = [k for k, v in model(a).items() if v != model(b).get(k)]
  return (f'{a.name} ({a.folder}) and {b.name} ({b.folder}) have bit-identical logits after one step: '
          f"model.{', model.'.join(fields)} had no effect, so this is no ablation. When it has, remove the arm's folder to run it again")


def canonical(config: Mapping, *without: str) -> str:
  """The JSON text of a config with sorted keys, top-level fields in `without` left out."""
  return json.dumps({k: v for k, v in config.items() if k not in without}, sort_keys=True, separators=(',', ':'))


def some(items: Sequence[str], most: int = 4) -> str:
  return ', '.join(items[:most]) + (f' and {len(items) - most} more' if len(items) > most else '')


def _lines(path: pathlib.Path) -> list[str]:
  return [line.strip() for line in path.read_text(errors='replace').splitlines() if line.strip()] if path.exists() else []


def _apply(config: ml_collections.ConfigDict, overrides: Mapping, index: int) -> ml_collections.ConfigDict:
  c = config.copy_and_resolve_references()
  for path, value in overrides.items():
    check_field(c, path, f'point {index} of the sweep: ')
    *sections, field = path.split('.')
    node = c
    for section in sections:
      node = node[section]
    try:
      node[field] = tuple(value) if isinstance(node[field], tuple) and isinstance(value, list) else value
    except TypeError:
      kind = 'value: it is a section' if isinstance(node[field], ml_collections.ConfigDict) else type(node[field]).__name__
      raise Error(f'point {index} of the sweep: {path}: {value!r} is no {kind}') from None
  if not c.arm:
    c.arm = ', '.join(f'{path.rpartition(".")[2]}={value}' for path, value in overrides.items() if path not in LABELS) or 'default'
  return c


def _solve(c: ml_collections.ConfigDict, plain_arms: Mapping[str, str]):
  """Returns the config with a matched baseline solved, and what the manifest says of the match."""
  if not c.match.metric:
    return c, None
  resolved, report = match.resolve(c)
  treatment = c.copy_and_resolve_references()
  treatment.model.embedding = c.match.arm
  return resolved, json.loads(json.dumps(report)) | {'treatment': plain_arms.get(_sameness(treatment), '')}


def _sameness(c: ml_collections.ConfigDict) -> str:
  return canonical(c.to_dict(), 'seed', 'arm', 'match')


def _overlap(a: str, b: str) -> bool:
  return a == b or a.startswith(b + '.') or b.startswith(a + '.')
