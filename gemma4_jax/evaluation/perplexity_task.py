"""The perplexity of a checkpoint on documents, with the protocol that makes the number one; or its divergence from another checkpoint."""

from collections.abc import Sequence
import contextlib
import sys

import jax
import numpy as np
from rich import progress as rich_progress
from rich.console import Console

from gemma4_jax.evaluation import checkpoint, documents as documents_lib, score, windows
from gemma4_jax.sampling import text


def run(directory: str, data: str, *, reply_only: bool = False, raw_text_anyway: bool = False, reference: str | None = None,
        text_field: str = 'text', max_documents: int = 0, window: int = 0, stride: int = 0, batch_tokens: int = 8192,
        param_dtype: str | None = None, tokenizer: str | None = None, progress: bool = False) -> dict:
  """{'metrics': {what: {name: value}}, 'protocol': {name: value}, 'documents': [{name: value}]}.

  Args:
    data: as `documents.from_files` takes it, or 'validation' of a run's folder, or 'validation:RUN' of another folder, whose run had the
      same tokenizer (a quantized copy has no corpus of its own); with `reply_only` as `from_conversations`.
    reference: a checkpoint to measure the divergence from, with the same tokenizer.
    window, stride, batch_tokens: see `windows.batches`; window 0 is 1024 or the context length if that is less, stride 0 half a
      window. Replies run whole, up to the context length.
    progress: bars.
  Raises:
    ValueError: in one line; also for raw text under a checkpoint that was taught to chat, without `raw_text_anyway`, and for
      log-probabilities that are not finite.
  """
  is_validation, run_folder = data == 'validation' or data.startswith('validation:'), data.partition(':')[2]
  if reply_only and (window or stride or is_validation):
    raise ValueError('--reply_only: takes conversations as --data, and runs each whole: without --window and --stride')
  sign = checkpoint.why_instruct(directory)
  if sign and not (reply_only or raw_text_anyway or reference):
    raise ValueError(
        f'{directory}: was taught to chat ({sign}), so its perplexity on raw text says little about it; score replies (--reply_only, with '
        'conversations as --data), compare it with another checkpoint (--reference=DIR), or insist (--raw_text_anyway)')
  model = text.load(directory, param_dtype=param_dtype, tokenizer=tokenizer, progress=progress)
  cfg = model.cfg
  if is_validation:
    kept = checkpoint.run_corpus(run_folder or directory, model.tokenizer, progress)
    if kept is None:
      raise ValueError(f'--data={data}: {run_folder or directory} is no folder of a run; name one, --data=validation:RUN, or files')
    found = documents_lib.from_corpus(kept.validation, most=max_documents)
  elif reply_only:
    found = documents_lib.from_conversations(model, data, most=max_documents)
  else:
    found = documents_lib.from_files(model.tokenizer, data, text_field=text_field, most=max_documents)
  window = cfg.context_length if reply_only else window or min(1024, cfg.context_length)
  if window > cfg.context_length:
    raise ValueError(f'--window={window} is more than model.context_length = {cfg.context_length}')
  stride = stride or max(1, window // 2)
  batches = windows.batches(found, window=window, stride=stride, batch_tokens=batch_tokens)
  against = _open_reference(reference, param_dtype, tokenizer, model, progress) if reference else None

  with _bar('scoring', len(batches), progress) as advance:
    def values(batch):
      arrays = batch.ids_BT, batch.seg_BT
      got = (score.token_nll(cfg, model.params, *arrays)[None] if against is None else
             score.token_divergence(cfg, model.params, against.cfg, against.params, *arrays))
      got = np.asarray(got)
      advance()
      return got
    scored = windows.collect(found, batches, values)
  score.check_finite(scored)

  told_perplexity = reply_only or raw_text_anyway or not sign
  protocol = {
      'checkpoint': str(directory), 'taught to chat': f'yes, by {sign}' if sign else 'no sign of it',
      'data': data, 'scored': 'replies in the chat frame, to their stop token' if reply_only else 'raw text, without an end token',
      'documents': len(found), 'tokens': int(sum(len(d.targets) for d in found)),
      'BOS': 'begins every window, and is never predicted',
      'window': window, 'stride': None if reply_only else stride, 'tokenizer': model.tokenizer.hash,
      'dtype': cfg.dtype, 'device': jax.devices()[0].device_kind} | ({'reference': str(reference)} if reference else {})
  groups = {'all': range(len(found))}
  domains = list(dict.fromkeys(d.domain for d in found))
  groups |= {domain: [i for i, d in enumerate(found) if d.domain == domain] for domain in domains} if len(domains) > 1 else {}
  sizes = [int(model.tokenizer.token_bytes[d.targets].sum()) for d in found]
  metrics = {what: _metrics([scored[i] for i in rows], sum(sizes[i] for i in rows), told_perplexity) for what, rows in groups.items()}
  rows = [{'origin': d.origin, 'domain': d.domain, 'tokens': len(d.targets), 'bytes': size} |
          {name: float(x) for name, x in zip(_NAMES[len(one)], one.astype(np.float64).sum(-1))}
          for d, size, one in zip(found, sizes, scored)]
  return {'task': 'perplexity', 'metrics': metrics, 'protocol': protocol, 'documents': rows}


_NAMES = {1: ('nats',), 4: ('kl_nats', 'same_top_token', 'nats', 'reference_nats')}   # sums over a document's tokens


def _metrics(scored: Sequence[np.ndarray], size: int, told_perplexity: bool) -> dict:
  sums = sum(one.astype(np.float64).sum(-1) for one in scored)
  tokens = sum(one.shape[-1] for one in scored)
  found = {'tokens': tokens, 'bytes': size}
  if len(sums) == 4:
    found |= {'kl_nats_per_token': sums[0] / tokens, 'same_top_token': sums[1] / tokens}
  if told_perplexity:
    found |= score.summary(sums[-2 if len(sums) == 4 else 0], tokens, size)
  return {name: value if isinstance(value, int) else float(value) for name, value in found.items()}


def _open_reference(directory, param_dtype, tokenizer, model, progress):
  against = text.load(directory, param_dtype=param_dtype, tokenizer=tokenizer, progress=progress)
  if against.tokenizer.hash != model.tokenizer.hash or against.cfg.vocab_size != model.cfg.vocab_size:
    raise ValueError(f'--reference={directory}: has another tokenizer or vocabulary, so that its probabilities are of other tokens')
  return against


@contextlib.contextmanager
def _bar(title, total, shown):
  """Yields advance(); a progress bar on standard error."""
  with rich_progress.Progress(
      '{task.description}', rich_progress.BarColumn(), rich_progress.MofNCompleteColumn(), rich_progress.TimeElapsedColumn(),
      rich_progress.TimeRemainingColumn(), console=Console(stderr=True), disable=not (shown and sys.stderr.isatty())) as bars:
    task = bars.add_task(title, total=total)
    yield lambda: bars.advance(task)
