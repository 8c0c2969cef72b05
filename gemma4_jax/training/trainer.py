"""One training run: from a config to a folder with rows, checkpoints and a summary; killed at any moment, it goes on exactly."""

import contextlib
import dataclasses
import itertools
import json
import logging as stdlib_logging
import math
from pathlib import Path
import signal
import sys
import threading
import time
from typing import NamedTuple

from absl import logging
from flax import linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import rich.console
import rich.progress as rich_progress

from gemma4_jax import compilation, config as model_config, config_file, hardware, metrics, sharding, size
from gemma4_jax.checkpoint import load, orbax
from gemma4_jax.data import batching, corpus, sources, tokenizer
from gemma4_jax.evaluation import perplexity
from gemma4_jax.model import flash, transformer
from gemma4_jax.training import identity, losses, optimizer


class NonFiniteLoss(RuntimeError):
  """Loss or gradient is no longer a number."""


class State(NamedTuple):
  """step: int32 []; params: the tree of `transformer.init`; opt_state: of `optimizer.make`."""
  step: jax.Array
  params: dict
  opt_state: optax.OptState


def head_table(cfg: model_config.ModelConfig, params: dict) -> jax.Array:
  """[V, D], the weight of the output head."""
  return params['embedder']['table'] if cfg.tied_embeddings else params['unembedder']['w']


def last_stream(cfg: model_config.ModelConfig, params: dict, batch: dict) -> jax.Array:
  """[B * T, D], normed, before the head."""
  x_BTD, _ = transformer.Transformer(cfg).apply(
      {'params': params}, batch['tokens'], batch['positions'], batch['segments'], head=False)
  return x_BTD.reshape(-1, cfg.width)


def make_step(cfg: model_config.ModelConfig, tx: optax.GradientTransformation, *, accumulate: int, loss_chunk: int):
  """Returns (State, batch) -> (State, row of float32 scalars: loss, grad_norm). Not jitted.

  The loss is the mean over the predicted tokens of the whole batch in nats; microbatches add sums, not means.
  """
  def share(params, batch):   # of the loss; the weights of a batch sum to 1
    return losses.nll_sum(last_stream(cfg, params, batch), head_table(cfg, params), batch['targets'].reshape(-1),
                          batch['weights'].reshape(-1), cfg.final_softcap, loss_chunk)

  def add_microbatch(params, carry, batch):
    return jax.tree.map(jnp.add, carry, jax.value_and_grad(share)(params, batch)), None

  def step(state: State, batch: dict) -> tuple[State, dict]:
    batch = batch | {'weights': batch['weights'] / jnp.maximum(batch['weights'].sum(), 1)}
    if accumulate == 1:
      loss, grads = jax.value_and_grad(share)(state.params, batch)
    else:   # row i goes to microbatch i % accumulate, so that a batch split over devices stays where it is
      parts = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)
      zero = jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params)
      (loss, grads), _ = jax.lax.scan(lambda carry, part: add_microbatch(state.params, carry, part), zero, parts)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    row = {'loss': loss, 'grad_norm': optax.tree.norm(grads)}
    return State(state.step + 1, optax.apply_updates(state.params, updates), opt_state), row

  return step


def make_nll(cfg: model_config.ModelConfig, loss_chunk: int):
  """Returns (params, batch) -> -log p(target) in nats, float32 [B, T]."""
  def nll(params, batch):
    return losses.token_nll(last_stream(cfg, params, batch), head_table(cfg, params), batch['targets'].reshape(-1),
                            cap=cfg.final_softcap, chunk=loss_chunk).reshape(batch['targets'].shape)
  return nll


def init_state(cfg: model_config.ModelConfig, tx: optax.GradientTransformation, seed: int, mesh: jax.sharding.Mesh,
               checkpoint: str = '') -> State:
  """The state at step 0, as `abstract_state` says; `checkpoint`: a directory that `checkpoint.load` takes, in place of random weights."""
  where = jax.tree.map(lambda x: x.sharding, abstract_state(cfg, tx, mesh))
  if checkpoint:
    _, params = load.load(checkpoint, param_dtype=cfg.param_dtype, mesh=mesh, progress=jax.process_index() == 0)
    params = transformer.stack(cfg, params) if cfg.scan else params
  else:
    params = transformer.init(cfg, seed, mesh)
  params = jax.device_put(params, where.params)
  return State(jax.device_put(jnp.zeros((), jnp.int32), where.step), params, jax.jit(tx.init, out_shardings=where.opt_state)(params))


def abstract_state(cfg: model_config.ModelConfig, tx: optax.GradientTransformation, mesh: jax.sharding.Mesh) -> State:
  """Shapes of the state, every array sharded as `sharding` says; moments of the optimizer are split as their parameters."""
  shape = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
  boxes = transformer.abstract(cfg)
  where, params = sharding.params(mesh, boxes), nn.meta.unbox(boxes)
  if cfg.scan:
    where = transformer.stack(cfg, where, join=lambda *ws: sharding.stacked(ws[0]))
    params = transformer.stack(cfg, params, join=lambda *ws: jax.ShapeDtypeStruct((len(ws), *ws[0].shape), ws[0].dtype))
  whole = sharding.replicated(mesh)
  by_path = {_names(path): one for path, one in jax.tree_util.tree_leaves_with_path(where)}
  opt_state = jax.tree_util.tree_map_with_path(lambda path, x: shape(x, by_path.get(_names(path), whole)), jax.eval_shape(tx.init, params))
  return State(jax.ShapeDtypeStruct((), jnp.int32, sharding=whole), jax.tree.map(shape, params, where), opt_state)


def _names(path) -> tuple[str, ...]:
  """The dict keys at the end of a path: a parameter's names, in the tree of parameters and in an optimizer's."""
  is_name = lambda key: isinstance(key, jax.tree_util.DictKey)
  return tuple(reversed([key.key for key in itertools.takewhile(is_name, reversed(path))]))


@dataclasses.dataclass
class _Run:
  """What one run has in hand."""
  config: ml_collections.ConfigDict
  workdir: Path
  cfg: model_config.ModelConfig
  data: corpus.Dataset
  mesh: jax.sharding.Mesh


def run(config: ml_collections.ConfigDict, workdir: Path) -> dict:
  """Trains to `config.train.steps` and returns what DONE holds. A second call on a folder goes on from its last checkpoint; on one that is
  done it only reads DONE.

  Leaves in `workdir`: config.json, tokenizer.json, env.json, metrics.jsonl (one row a step), checkpoints/, and at the end DONE:
  a JSON object of final metrics and costs. An interrupted run continued gives the same parameters and rows, bit for bit (on a GPU
  XLA has to be told to be deterministic: XLA_FLAGS=--xla_gpu_deterministic_ops=true), but
  for the clock's and the memory's (tokens_per_s, mfu, peak_memory_bytes).

  Raises:
    ValueError: a config that cannot run, or a folder of another config or other data; nothing in the folder is changed.
    NonFiniteLoss: names the step, the batch's rows and the last checkpoint.
    OSError: rows or checkpoints cannot be written any more; the run goes on from its last checkpoint when they can.
  """
  cfg = check(config)
  workdir = Path(workdir)
  _refuse_other_config(config, workdir)
  done = metrics.read_json(workdir / 'DONE', 'remove it to finish the run again from its last checkpoint')
  if done is not None:
    logging.info('%s: is done', workdir)
    return done
  data = corpus.prepare(config.data)
  identity.check_data(data, workdir)
  if config.train.init:
    _check_tokenizer(config.train.init, data)
  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    flash.choose(cfg.attention_implementation)   # or raises, while nothing is written
  shards = math.prod(mesh.shape[axis] for axis in sharding.BATCH)
  if config.data.batch_size % (config.optimizer.accumulate * shards):
    raise ValueError(f'data.batch_size: {config.data.batch_size} does not divide into optimizer.accumulate = '
                     f'{config.optimizer.accumulate} microbatches over {dict(mesh.shape)} devices')
  if config.eval.batch_size % shards:
    raise ValueError(f'eval.batch_size: {config.eval.batch_size} does not divide over {dict(mesh.shape)} devices')
  if jax.process_index() == 0:
    try:
      workdir.mkdir(parents=True, exist_ok=True)
      metrics.write_json(workdir / 'config.json', json.loads(config.to_json()))
      metrics.write_text(workdir / 'tokenizer.json', data.tokenizer.serialized)
    except OSError as error:
      raise ValueError(f'workdir: {workdir} cannot be written ({error.strerror}); choose another') from None
  with jax.set_mesh(mesh):
    return _train(_Run(config, workdir, cfg, data, mesh))


def check(config: ml_collections.ConfigDict) -> model_config.ModelConfig:
  """The model of a config that could run; a ValueError names the first field that cannot be."""
  cfg = model_config.from_dict(config.model)
  model_config.check_trainable(cfg)
  if config.data.vocab_size != cfg.vocab_size:
    raise ValueError(f'data.vocab_size: {config.data.vocab_size} is not model.vocab_size = {cfg.vocab_size}')
  if config.data.sequence_length > cfg.context_length:
    raise ValueError(f'data.sequence_length: {config.data.sequence_length} is over model.context_length = {cfg.context_length}')
  at_least = {1: ('data.batch_size', 'data.sequence_length', 'optimizer.accumulate', 'eval.batch_size', 'train.steps', 'train.log_every',
                  'train.checkpoint_every', 'train.keep_checkpoints', 'train.loss_chunk'),
              0: ('seed', 'data.max_bytes', 'eval.every', 'eval.max_batches')}
  flat = config_file.flatten(config.to_dict())
  for least, fields in at_least.items():
    for field in fields:
      if flat[field] < least:
        raise ValueError(f'{field}: {flat[field]} is not positive' if least else f'{field}: {flat[field]} is negative')
  if config.data.batch_size % config.optimizer.accumulate:
    raise ValueError(f'data.batch_size: {config.data.batch_size} does not divide into optimizer.accumulate = '
                     f'{config.optimizer.accumulate} microbatches')
  known = ['train/loss', *perplexity.names(sources.DOMAINS)]
  if config.primary_metric not in known:
    raise ValueError(f'primary_metric: a run has no {config.primary_metric!r}; did you mean '
                     f'{model_config.nearest(config.primary_metric, known)!r}?')
  optimizer.make(config.optimizer, config.train.steps)
  metrics.check(config)
  if config.train.init:
    _check_init(config.train.init, cfg)
  return cfg


def _check_init(path, cfg):
  """Raises ValueError unless the checkpoint at `path` has the weights of `cfg`; none is read."""
  found = load.find(path)
  if found.formats:
    raise ValueError(f'train.init: {path} holds quantized weights, which are not trained; take those they were made of')
  theirs = dataclasses.asdict(found.cfg)
  names = [name for name, ours in dataclasses.asdict(cfg).items() if name not in model_config.WAYS and theirs[name] != ours]
  if names:
    raise ValueError(f'train.init: {path} is another model: ' + ', '.join(
        f'model.{name} is {theirs[name]!r} there and {getattr(cfg, name)!r} here' for name in names[:4]))


def _check_tokenizer(path, data):
  """Raises ValueError if the checkpoint at `path` comes with another tokenizer than the data."""
  file = load.find(path).home / 'tokenizer.json'
  if file.is_file() and tokenizer.Tokenizer.load(file).hash != data.tokenizer_hash:
    raise ValueError(f'train.init: {path} has another tokenizer than the data; set data.tokenizer={file}')


def _refuse_other_config(config, workdir):
  there = metrics.read_json(workdir / 'config.json', 'choose another workdir')
  if there is None:
    return
  ours, theirs = config_file.flatten(json.loads(config.to_json())), config_file.flatten(there)
  names = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
  if names:
    raise ValueError(f'{workdir}: holds a run of another config; it differs in {", ".join(names)}. Choose another workdir.')


def _train(r: _Run) -> dict:
  began = time.perf_counter()
  with _checkpoints(r.workdir, r.config.train.keep_checkpoints) as checkpoints:
    compile_seconds = _take_steps(r, checkpoints)
  if jax.process_index():
    return {}
  done = _summary(r, compile_seconds, time.perf_counter() - began)
  metrics.write_json(r.workdir / 'DONE', done)
  return done


def _take_steps(r: _Run, checkpoints: orbax.Checkpoints) -> float | None:
  """From the last checkpoint to the last step; returns the seconds of compiling the step, None if none was left to take."""
  config, cfg, train, lead = r.config, r.cfg, r.config.train, jax.process_index() == 0
  tx = optimizer.make(config.optimizer, train.steps)
  rate = optimizer.schedule(config.optimizer, config.optimizer.learning_rate, train.steps)
  start = checkpoints.latest or 0
  batches = batching.train_iterator(
      r.data.train, sequence_length=config.data.sequence_length, batch_size=config.data.batch_size, seed=config.seed,
      process_index=jax.process_index(), process_count=jax.process_count())
  if not start:
    state = init_state(cfg, tx, config.seed, r.mesh, train.init)
  else:   # nothing is drawn first: two states may not fit
    state, place = checkpoints.restore(start, abstract_state(cfg, tx, r.mesh))
    if not isinstance(place.get('iterator'), str):
      raise ValueError(f'{r.workdir}: the checkpoint of step {start} does not say where in the data it was; '
                       f'remove {r.workdir / orbax.RUN / str(start)} to go back to the one before it')
    batches.set_state(place['iterator'].encode())
    logging.info('%s: goes on from step %d', r.workdir, start)
  if lead:
    attention = flash.choose(cfg.attention_implementation)
    logging.info('%s: attention by %s', r.workdir, attention)
    writer = metrics.Writer(r.workdir, start, config)
    identity.write(identity.environment(r.data, r.mesh) | {'attention': attention}, r.workdir)

  step_fn = jax.jit(make_step(cfg, tx, accumulate=config.optimizer.accumulate, loss_chunk=train.loss_chunk), donate_argnums=0,
                    out_shardings=(jax.tree.map(lambda x: x.sharding, state), sharding.replicated(r.mesh)))
  compile_seconds = None
  evaluate = _evaluator(r)
  flops_per_token = size.training_flops(cfg, config.data.sequence_length)
  peak, _ = hardware.peak_flops()
  tokens = config.data.batch_size * config.data.sequence_length
  since, last_row = None, start
  unread = []     # (step, row, the batch's row ids) since the last row that was written; read together, so that steps need not wait
  with contextlib.closing(batches), _progress(r.workdir.name, train.steps, start, lead) as advance:
    for step in range(start + 1, train.steps + 1):
      batch = next(batches)
      arrays = _arrays(batch, r.mesh)
      if compile_seconds is None:
        clock = time.perf_counter()
        step_fn = step_fn.lower(state, arrays).compile(compilation.train_options())
        compile_seconds = time.perf_counter() - clock
      since = since or time.perf_counter()
      state, row = step_fn(state, arrays)
      unread.append((step, row, batch['rows']))
      last = step == train.steps
      save = last or step % train.checkpoint_every == 0
      evaluated = last or (config.eval.every and step % config.eval.every == 0)
      if not (save or evaluated or step == 1 or step % train.log_every == 0):
        continue
      for earlier in unread:
        row = _finite(*earlier, checkpoints)
      unread.clear()
      speed = tokens * (step - last_row) / (time.perf_counter() - since)
      row = {'step': step, **row, 'learning_rate': float(rate(step - 1)), 'tokens_per_s': speed,
             'mfu': speed * flops_per_token / peak, 'peak_memory_bytes': hardware.peak_memory_bytes()}
      if step == 1:
        row['fingerprint'] = identity.fingerprint(cfg, state.params, arrays, r.mesh)
      if evaluated:
        row |= evaluate(state.params)
      if lead:
        writer.write(row)
      if save:   # after the rows: a checkpoint never stands without the rows before it
        with _saving(r.workdir):
          checkpoints.save(step, state, {'iterator': batches.get_state().decode()}, config)
      advance(step, row)
      since, last_row = time.perf_counter(), step
  if lead:
    writer.close()
  return compile_seconds


def _summary(r: _Run, compile_seconds: float | None, wall_seconds: float) -> dict:
  """What DONE holds; the seconds are those of the last process that worked on the run, None if it had only to finish; peak memory is
  the most of all."""
  rows = metrics.read_rows(r.workdir / 'metrics.jsonl')
  return {
      'metrics': {name: value for name, value in rows[-1].items() if name.startswith('eval/')} | {'train/loss': rows[-1]['loss']},
      'fingerprint': rows[0]['fingerprint'],
      'costs': size.costs(r.cfg, r.config.data.sequence_length) | {
          'tokens_per_s': float(np.median([row['tokens_per_s'] for row in rows])),
          'peak_memory_bytes': max([row['peak_memory_bytes'] for row in rows if 'peak_memory_bytes' in row], default=None),
          'compile_seconds': compile_seconds, 'wall_seconds': wall_seconds}}


def _arrays(batch: dict, mesh: jax.sharding.Mesh) -> dict:
  """This process's share of the batch -> arrays of the whole batch, split over the mesh."""
  where = sharding.batch(mesh)
  return {name: jax.make_array_from_process_local_data(where, batch[name])
          for name in ('tokens', 'targets', 'positions', 'segments', 'weights', 'domains') if name in batch}


def _evaluator(r: _Run):
  """Returns params -> final metrics on the validation split."""
  c, mine = r.config, slice(jax.process_index(), None, jax.process_count())
  sums = perplexity.accumulator(make_nll(r.cfg, c.train.loss_chunk), r.data.tokenizer.token_bytes, r.data.token_counts,
                                len(r.data.validation.domains))
  sums = jax.jit(sums, out_shardings=sharding.replicated(r.mesh))   # so that every process can read them
  def evaluate(params):
    batches = batching.eval_batches(r.data.validation, sequence_length=c.data.sequence_length, batch_size=c.eval.batch_size)
    batches = itertools.islice(batches, c.eval.max_batches or None)
    shares = ({name: rows[mine] for name, rows in batch.items()} for batch in batches)
    return perplexity.evaluate(sums, params, (_arrays(share, r.mesh) for share in shares), r.data.validation.domains)
  return evaluate


def _finite(step: int, row: dict, ids: np.ndarray, checkpoints: orbax.Checkpoints) -> dict:
  """The row as floats, or NonFiniteLoss."""
  row = {name: float(value) for name, value in row.items()}
  bad = [name for name in ('loss', 'grad_norm') if not math.isfinite(row[name])]
  if not bad:
    return row
  checkpoints.wait()
  good = checkpoints.latest
  raise NonFiniteLoss(
      f'step {step}: {" and ".join(bad)} not finite ({row}); the batch is rows {ids.tolist()} of the packed training '
      f'split; last good checkpoint: {"none" if good is None else f"step {good}"}. '
      'Lower optimizer.learning_rate or optimizer.clip_norm.')


@contextlib.contextmanager
def _checkpoints(workdir: Path, keep: int):
  """The run's checkpoints; what is being saved is on disk when the context ends, however it ends."""
  checkpoints = orbax.Checkpoints(workdir / orbax.RUN, keep=keep)
  try:
    yield checkpoints
  finally:
    with _saving(workdir):
      checkpoints.wait()
      checkpoints.close()


@contextlib.contextmanager
def _saving(workdir: Path):
  """Whatever a full disk makes of saving becomes one OSError; Ctrl-C waits until it is done."""
  try:
    with _later(signal.SIGINT, signal.SIGTERM):
      yield
  except (OSError, ValueError) as error:   # ValueError: TensorStore's, also for what the operating system refuses
    raise OSError(f'{workdir}: the checkpoint cannot be written ({str(error).strip().splitlines()[0][:300]}); {metrics.GOES_ON}') from error


@contextlib.contextmanager
def _later(*numbers: int):
  """Calls this process's handlers of signals that come within the context at its end."""
  caught = []
  in_main = threading.current_thread() is threading.main_thread()
  handlers = {number: handler for number in numbers if in_main and callable(handler := signal.getsignal(number))}
  for number in handlers:
    signal.signal(number, lambda *args: caught.append(args))
  try:
    yield
  finally:
    for number, handler in handlers.items():
      signal.signal(number, handler)
    for args in caught:
      handlers[args[0]](*args)


def quiet_orbax() -> None:
  """Leaves what Orbax tells of every save out of the log, and of one that failed, which comes as an exception; its warnings stay."""
  def keep(record):
    return record.levelno == stdlib_logging.WARNING or not ('orbax' in record.pathname or record.name == 'asyncio')
  logging.get_absl_handler().addFilter(keep)


@contextlib.contextmanager
def _progress(name: str, steps: int, start: int, lead: bool):
  """Yields advance(step, row). A bar on a terminal; elsewhere a line now and then."""
  if not lead:
    yield lambda step, row: None
    return
  bar = rich_progress.Progress(
      rich_progress.TextColumn('{task.description}'), rich_progress.BarColumn(), rich_progress.MofNCompleteColumn(),
      rich_progress.TextColumn('{task.fields[note]}'), rich_progress.TimeElapsedColumn(), rich_progress.TimeRemainingColumn(),
      disable=not sys.stderr.isatty(), console=rich.console.Console(stderr=True))
  with bar:
    task = bar.add_task(name, total=steps, completed=start, note='')
    spoke = time.perf_counter()
    def advance(step, row):
      nonlocal spoke
      note = f"loss {row['loss']:.3f}  {row['tokens_per_s']:,.0f} tokens/s"
      bar.update(task, completed=step, note=note)
      if bar.disable and (step == steps or time.perf_counter() - spoke > 30):
        spoke = time.perf_counter()
        logging.info('%s: step %d of %d, %s', name, step, steps, note)
    yield advance
