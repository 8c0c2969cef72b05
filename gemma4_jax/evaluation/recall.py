"""Does a model find in its context what it was told? Two tasks of our own, small enough for toys and for any context.

  associative    k1 v1 k2 v2 .. kn vn ki -> vi: pairs of random tokens, and a key again
  needle         a sentence with a number somewhere in real text, and its beginning again at the end

An answer counts as right if it is the likeliest of those that the text offers: the values of all keys, or numbers that were not told. So
chance is known, a model that ignores its context is at chance, and a base model needs no instruction. (Associative recall as in
arXiv 2312.04927, though of random tokens of the model's own vocabulary; the needle after gkamradt/LLMTest_NeedleInAHaystack.)
"""

from collections.abc import Sequence
import math
import os

import jax
import numpy as np

from gemma4_jax.config import ModelConfig
from gemma4_jax.evaluation import documents, score
from gemma4_jax.sampling import text

_CODES = 8                       # numbers to choose from
_DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_PAIRS = (4, 16, 64)
_TELL, _ASK = 'The code of the day is {}.', 'The code of the day is'


def run(directory: str | os.PathLike, task: str, *, data: str | None = None, text_field: str = 'text', lengths: Sequence[int] = (),
        trials: int = 32, seed: int = 0, batch_tokens: int = 8192, param_dtype: str | None = None, tokenizer: str | None = None,
        progress: bool = False) -> dict:
  """{'metrics': {what: {name: value}}, 'protocol': {name: value}, 'documents': []}, as `perplexity_task.run`.

  Args:
    task: 'associative' or 'needle'.
    data, text_field: text for the needle, as `documents.from_files` takes it.
    lengths: numbers of pairs, or tokens of context; none: 4, 16 and 64, or 128 and on, doubled, to 8192, the model's context or the text.
    trials: of each length (and depth).
  Raises:
    ValueError: in one line.
  """
  if trials < 1 or any(n < 2 for n in lengths):
    raise ValueError(f'--trials={trials}, --lengths={",".join(map(str, lengths))}: at least one trial, and at least 2 each')
  if (task == 'needle') == (data is None):
    raise ValueError(f'--data: {"--task=needle hides its sentence in text; name some" if data is None else f"--task={task} has none"}')
  model = text.load(directory, param_dtype=param_dtype, tokenizer=tokenizer, progress=progress)
  how = dict(trials=trials, seed=seed, batch_tokens=batch_tokens)
  if task == 'associative':
    ask, points = associative, [(f'{n} pairs', (n,)) for n in sorted(lengths or _PAIRS)]
  else:
    hay = np.concatenate([document.ids[1:] for document in documents.from_files(model.tokenizer, data, text_field=text_field)])
    longest = min(model.cfg.context_length - 1, len(hay))   # the answer comes on top
    lengths = lengths or [2**i for i in range(7, 14) if 2**i <= longest] or [128]
    ask, points = needle, [(f'{n} tokens, depth {depth:.0%}', (hay, n, depth)) for n in sorted(lengths) for depth in _DEPTHS]
  done = [(name, ask(model, *point, **how)) for name, point in reversed(points)]   # the longest first: what has no room fails at once
  metrics = dict(reversed(done))
  return {'task': task, 'metrics': metrics, 'documents': [], 'protocol': {
      'checkpoint': str(directory), 'trials': trials, 'seed': seed, 'BOS': 'begins every context',
      'right': 'the likeliest of the answers offered', 'data': data, 'tokenizer': model.tokenizer.hash, 'dtype': model.cfg.dtype,
      'device': jax.devices()[0].device_kind}}


def associative(model: text.Model, pairs: int, *, trials: int = 32, seed: int = 0, batch_tokens: int = 8192) -> dict[str, float]:
  """Accuracy and the answer's nats beside their chance; keys and values are all different tokens of text.

  Raises:
    ValueError: the vocabulary, or the context, has no room for so many pairs.
  """
  pool = np.flatnonzero(model.tokenizer.token_bytes[:model.cfg.vocab_size] > 0)
  if len(pool) < 2 * pairs:
    raise ValueError(f'{pairs} pairs: the tokenizer has {len(pool)} tokens of text, and each is used once')
  rng, contexts, offered, right = np.random.default_rng([seed, pairs]), [], [], []
  for _ in range(trials):
    keys, values = rng.choice(pool, (2, pairs), replace=False)
    asked = int(rng.integers(pairs))
    contexts.append([model.tokenizer.bos_id, *np.stack([keys, values], 1).ravel().tolist(), int(keys[asked])])
    offered.append([[int(value)] for value in values])
    right.append(asked)
  return _choose(model.cfg, model.params, contexts, offered, right, batch_tokens)


def needle(model: text.Model, hay: np.ndarray, length: int, depth: float, *, trials: int = 32, seed: int = 0,
           batch_tokens: int = 8192) -> dict[str, float]:
  """As `associative`, for contexts of `length` tokens, BOS included, with the sentence at `depth` of the text (0: at its beginning).

  Args:
    hay: int32 ids of text, without BOS; every trial takes another piece of it.
  Raises:
    ValueError: no room for the sentence, or too little text.
  """
  encode = lambda words: model.tokenizer.encode(words).tolist()
  rng, contexts, offered, right = np.random.default_rng([seed, length, round(1000 * depth)]), [], [], []
  for _ in range(trials):
    codes = [str(code) for code in rng.choice(np.arange(1000, 10_000), _CODES, replace=False)]
    told = encode(f'\n{_TELL.format(codes[0])}\n')
    ask = encode(f'\n{_ASK}')
    room = length - 1 - len(told) - len(ask)
    if room < 1 or room > len(hay):
      raise ValueError(f'{length} tokens: the sentence and its question take {len(told) + len(ask) + 1}, and the text has {len(hay)}')
    start, at = int(rng.integers(len(hay) - room + 1)), round(depth * room)
    around = hay[start:start + room].tolist()
    contexts.append([model.tokenizer.bos_id, *around[:at], *told, *around[at:], *ask])
    offered.append([encode(f' {code}') for code in codes])
    right.append(0)
  return _choose(model.cfg, model.params, contexts, offered, right, batch_tokens)


def _choose(cfg: ModelConfig, params: dict, contexts, offered, right, batch_tokens) -> dict[str, float]:
  requests = [(context, answer) for context, answers in zip(contexts, offered) for answer in answers]
  scored = iter(score.continuations(cfg, params, requests, batch_tokens=batch_tokens))
  hits, nats = [], []
  for answers, i in zip(offered, right):
    scores = np.array([next(scored)[0].sum() for _ in answers])
    hits.append(scores.argmax() == i)
    nats.append(-scores[i])
  accuracy = float(np.mean(hits))
  return {'accuracy': accuracy, 'stderr': math.sqrt(accuracy * (1 - accuracy) / len(hits)), 'chance': 1 / len(offered[0]),
          'nats_per_answer': float(np.mean(nats))}
