"""A model for lm-evaluation-harness, in this process: its tasks by name, or from files.

  results = harness.run(directory, ['arc_easy', 'wikitext'])
  lm = harness.Adapter(model); lm_eval.simple_evaluate(lm, tasks=[...])      # or with all of the harness's own arguments

Every request begins with exactly one BOS. Text never becomes a control token: what a chat template rendered is remembered with its ids, and
all other strings are text, whatever they spell.
"""

from collections.abc import Mapping, Sequence
import difflib
import importlib.metadata
import json
import os
from pathlib import Path
import tempfile

import numpy as np

from gemma4_jax.data import chat
from gemma4_jax.evaluation import score
from gemma4_jax.sampling import text
from gemma4_jax.sampling.sampler import Sampling

try:
  import lm_eval
  from lm_eval import tasks as lm_tasks, utils
  from lm_eval.api import model as lm_model
except ImportError as error:
  raise ImportError(f"lm_eval needs lm-evaluation-harness ({error}): pip install 'gemma4_jax[lm_eval]'") from error

_LENGTHS = ('max_gen_toks', 'max_new_tokens', 'max_tokens')
_SAMPLING = ('temperature', 'top_k', 'top_p', 'min_p', 'repetition_penalty')


class Adapter(lm_model.TemplateLM):
  """`model` as the harness asks of one: loglikelihood, loglikelihood_rolling, generate_until, chat templates.

  A text that is too long loses tokens from the left, but for BOS. Where the whole fits, scores are those of the harness's
  own class for Hugging Face models with `add_bos_token=True`; but that one gives rolling requests a second BOS.
  """

  def __init__(self, model: text.Model, *, batch_tokens: int = 8192, max_length: int = 0):
    """
    Args:
      batch_tokens: about so many tokens run as a batch.
      max_length: of a request, and of the windows of a rolling one; 0: the model's context.
    """
    super().__init__()
    if not 0 <= max_length <= model.cfg.context_length or max_length == 1:
      raise ValueError(f'max_length={max_length}: 2 to model.context_length = {model.cfg.context_length}, or 0 for that')
    self.max_length = max_length or model.cfg.context_length
    self.max_gen_toks = 256     # the harness's own default
    self._model, self._batch_tokens = model, batch_tokens
    self._rendered = {}         # what `apply_chat_template` gave -> its ids

  @property
  def eot_token_id(self) -> int:
    return self._model.tokenizer.eos_id

  @property
  def prefix_token_id(self) -> int:
    return self._model.tokenizer.bos_id

  @property
  def tokenizer_name(self) -> str:
    return self._model.tokenizer.hash

  def chat_template(self, chat_template: bool | str = False) -> str | None:
    """The source of the one that a checkpoint carries, or the name of ours."""
    return (self._model.template or 'gemma4_jax.data.chat') if chat_template else None

  def apply_chat_template(self, chat_history: Sequence[Mapping], add_generation_prompt: bool = True) -> str:
    """Args: add_generation_prompt: False where the last message is the beginning of the answer (a task's gen_prefix), which then
    follows the opened turn."""
    begun = '' if add_generation_prompt else chat_history[-1]['content']
    ids = chat.encode(self._model.tokenizer, chat_history if add_generation_prompt else chat_history[:-1], template=self._model.template,
                      empty_thought_channel=self._model.empty_thought_channel).tolist()
    ids += self._model.tokenizer.encode(begun).tolist()
    rendered = self._model.tokenizer.decode(ids, control=True)
    if self._rendered.setdefault(rendered, ids) != ids:   # a text that spells what another renders
      raise ValueError(f'chat template: two conversations look alike, as one spells control tokens: {rendered[:200]!r}')
    return rendered

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
    """The ids of a rendered chat, or BOS and a text; without BOS if `add_special_tokens` is False.

    Raises:
      ValueError: what looks like a rendered chat and is none of this process, such as one of the harness's cache of requests.
    """
    if string in self._rendered:
      return list(self._rendered[string])
    if self._rendered and string.startswith('<bos>'):
      raise ValueError(f'a chat that was not rendered here, or was changed since: {string[:200]!r}; run without cached requests')
    return ([] if add_special_tokens is False else [self.prefix_token_id]) + self._model.tokenizer.encode(string).tolist()

  def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
    if context in self._rendered:   # a line break at its end belongs to the template, not to the answer
      return self.tok_encode(context), self.tok_encode(continuation, add_special_tokens=False)
    return super()._encode_pair(context, continuation)

  def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
    pairs = [(self._fit(context, self.max_length + 1 - len(continuation)), continuation) for _, context, continuation in requests]
    scored = score.continuations(self._model.cfg, self._model.params, pairs, batch_tokens=self._batch_tokens)
    found = [(float(scores.astype(np.float64).sum()), greedy) for scores, greedy in scored]
    for (strings, _, _), one in zip(requests, found):
      if strings is not None:
        self.cache_hook.add_partial('loglikelihood', strings, one)
    return found

  def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
    """Every token of a text once: windows that begin with BOS, or with the token before what they predict."""
    windows, owner = [], []
    for i, (string,) in enumerate(request.args for request in requests):
      for context, continuation in map(utils.make_disjoint_window, utils.get_rolling_token_windows(
          token_list=self.tok_encode(string, add_special_tokens=False), prefix_token=self.prefix_token_id, max_seq_len=self.max_length,
          context_len=1)):
        windows.append((None, context, continuation))
        owner.append(i)
    found = [0.0] * len(requests)
    for i, (nats, _) in zip(owner, self._loglikelihood_tokens(windows)):
      found[i] += nats
    for request, one in zip(requests, found):
      self.cache_hook.add_partial('loglikelihood_rolling', request.args, one)
    return found

  def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
    """Raises ValueError: a setting that there is not here."""
    groups = {}
    for i, (context, settings) in enumerate(request.args for request in requests):
      groups.setdefault(self._settings(settings), []).append((i, self.tok_encode(context)))
    found = [''] * len(requests)
    for (stops, length, sampling), rows in groups.items():
      rows = sorted(((i, self._fit(ids, self.max_length - length)) for i, ids in rows), key=lambda row: -len(row[1]))
      size = max(1, self._batch_tokens // (len(rows[0][1]) + length))
      for start in range(0, len(rows), size):
        batch = rows[start:start + size]
        run = self._model.start([np.array(ids, np.int32) for _, ids in batch], max_new_tokens=length, sampling=sampling, stop_strings=stops)
        for (i, _), done in zip(batch, run.finish()):
          found[i] = done.text
    for request, one in zip(requests, found):
      self.cache_hook.add_partial('generate_until', request.args, one)
    return found

  def _settings(self, given: Mapping) -> tuple[tuple[str, ...], int, Sampling]:
    given = dict(given)
    until = given.pop('until', None) or []
    stops = tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop)
    lengths = [given.pop(name) for name in _LENGTHS if name in given]
    draws = given.pop('do_sample', False)
    chosen = {name: given.pop(name) for name in _SAMPLING if name in given}
    if unknown := [name for name, value in given.items() if (name, value) != ('num_beams', 1)]:
      raise ValueError(f'generation_kwargs: {unknown[0]!r} is none of until, do_sample, {", ".join((*_LENGTHS, *_SAMPLING))}')
    if not draws:
      chosen = {'temperature': 0.0}
    return stops, int(lengths[0]) if lengths else self.max_gen_toks, Sampling(**{'top_k': 0, 'top_p': 1.0} | chosen)

  def _fit(self, context: Sequence[int], room: int) -> list[int]:
    """A context of at most `room` tokens: without its oldest, but for the first."""
    if room < 1:
      raise ValueError(f'max_length={self.max_length} leaves no room for a context before what is to be scored or generated')
    return list(context) if len(context) <= room else [context[0], *context[len(context) - room + 1:]]


class _Tasks(lm_tasks.TaskManager):
  """Whatever ends the loading of a task, which runs code of its own, downloads and asks for packages, is a ValueError."""

  def load(self, task_list):
    try:
      return super().load(task_list)
    except Exception as error:
      raise ValueError(f'lm_eval: cannot load {", ".join(task_list)} ({type(error).__name__}: {error}); tasks by name download their data, '
                       "and some need packages: pip install 'gemma4_jax[lm_eval]' has those of IFEval and RULER") from error


def run(directory: str | os.PathLike, tasks: Sequence[str], *, tasks_path: str | os.PathLike | None = None, num_fewshot: int | None = None,
        limit: int = 0, chat_template: bool = False, lengths: Sequence[int] = (), batch_tokens: int = 8192, max_length: int = 0,
        param_dtype: str | None = None, tokenizer: str | None = None, progress: bool = False) -> dict:
  """{'metrics': {task: {name: value}}, 'protocol': {name: value}, 'documents': []}, as `perplexity_task.run`.

  Args:
    tasks: names, or patterns of names such as 'mmlu_*'.
    tasks_path: a folder of task files, in the place of the harness's own.
    num_fewshot: examples before each question; None: as the task says.
    limit: the first so many documents of each task; 0: all.
    chat_template: questions as a user's messages.
    lengths: tokens of a prompt, for tasks that make theirs as long as is asked (RULER); none: as the task says.
    batch_tokens, max_length: see `Adapter`.
  Raises:
    ValueError: in one line.
  """
  if tasks_path is not None and not Path(tasks_path).is_dir():
    raise ValueError(f'--tasks_path={tasks_path}: no such directory')
  if (num_fewshot or 0) < 0 or any(n < 1 for n in lengths):
    raise ValueError(f'--num_fewshot={num_fewshot}, --lengths={",".join(map(str, lengths))}: at least 0 examples, and 1 token each')
  with tempfile.TemporaryDirectory() as folder:   # where tasks that count tokens find the tokenizer, in the form of transformers
    manager = _Tasks(include_path=None if tasks_path is None else str(tasks_path), include_defaults=tasks_path is None,
                     metadata={'tokenizer': folder} | ({'max_seq_lengths': list(lengths)} if lengths else {}))
    if missing := [name for name in tasks if not manager.match_tasks([name])]:
      near = difflib.get_close_matches(missing[0], manager.all_tasks, 8, 0.3) or manager.all_tasks[:8]
      raise ValueError(f'--task=lm_eval:{missing[0]}: no such task; near it are {", ".join(near)}')
    names = list(dict.fromkeys(name for pattern in tasks for name in manager.match_tasks([pattern])))
    model = text.load(directory, param_dtype=param_dtype, tokenizer=tokenizer, progress=progress)
    (Path(folder) / 'tokenizer.json').write_text(model.tokenizer.serialized, encoding='utf-8')
    (Path(folder) / 'tokenizer_config.json').write_text(json.dumps({'tokenizer_class': 'PreTrainedTokenizerFast'}))
    found = lm_eval.simple_evaluate(
        Adapter(model, batch_tokens=batch_tokens, max_length=max_length), tasks=names, task_manager=manager,
        num_fewshot=num_fewshot, limit=limit or None, apply_chat_template=chat_template, fewshot_as_multiturn=chat_template,
        log_samples=False, bootstrap_iters=1000)
  numbers = lambda row: {name.removesuffix(',none'): float(value) for name, value in row.items()
                         if isinstance(value, int | float) and not isinstance(value, bool) and ',' in name}
  return {
      'task': 'lm_eval', 'metrics': {task: numbers(row) for task, row in found['results'].items()}, 'documents': [],
      'protocol': {
          'checkpoint': str(directory), 'lm_eval': importlib.metadata.version('lm_eval'),
          'versions': ', '.join(f'{task} {version}' for task, version in found['versions'].items()),
          'examples': ', '.join(f'{task} {count}' for task, count in found['n-shot'].items()), 'documents': limit or 'all',
          'BOS': 'begins every request, once',
          'chat template': 'none' if not chat_template else 'of the checkpoint' if model.template else 'ours',
          'tokenizer': model.tokenizer.hash, 'dtype': model.cfg.dtype} | ({'lengths': ', '.join(map(str, lengths))} if lengths else {})}
