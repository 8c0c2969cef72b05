"""A chat of many turns, in one cache."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from gemma4_jax import kv_format
from gemma4_jax.sampling import generate
from gemma4_jax.sampling.run import Reply, Run
from gemma4_jax.sampling.sampler import Sampling

if TYPE_CHECKING:
  from gemma4_jax.sampling.text import Model


class Conversation:
  """A chat in one cache of `context` tokens: of a prompt, only what the cache does not hold is run, by the same programs each turn.

  A turn that does not go on where the last one ended (its thoughts were taken out, it was left early, messages were changed)
  is run from its start.
  """

  def __init__(self, model: 'Model', context: int, *, kv: kv_format.KV | None = None):
    """Raises ValueError: more than the model's context, or no such cache."""
    self.context = context
    self._model, self._kv = model, model.kv if kv is None else kv
    self._session, self._prompt, self._run = self._empty(), [], None

  def reply(self, messages: Sequence[Mapping], tools: Sequence[Mapping] | None = None, *, thinking: bool = False,
            max_new_tokens: int = 1024, sampling: Sampling | None = None, seed: int = 0, stop_strings: Sequence[str] = ()) -> Reply:
    """The answer, of at most `max_new_tokens` or what the context has room for. Raises ValueError: it has no room at all."""
    ids = self._model.encode_chat(messages, tools, thinking=thinking).tolist()
    if len(ids) >= self.context:
      raise ValueError(f'the conversation: its {len(ids)} tokens leave no room for an answer in a context of {self.context}')
    held = [*self._prompt, *self._run.rows[0].tokens] if self._run is not None and self._run.finished else []
    goes_on = self._session is not None and self._run is None or bool(held) and held == ids[:len(held)] != ids

    def open_session():
      if not goes_on:
        self._run = self._session = None   # two caches would not always fit
        self._session = self._empty()
      return self._session

    new = np.array(ids[len(held):] if goes_on else ids, np.int32)
    self._run = Run(self._model, [new], open_session, kv=self._kv, max_new_tokens=min(max_new_tokens, self.context - len(ids)),
                    sampling=sampling, seed=seed, stop_strings=stop_strings, every=1, chat=True)
    self._prompt = ids
    return Reply(self._run)

  def _empty(self):
    return generate.Session(self._model.cfg, self._model.params, 1, self.context, kv=self._kv)
