"""Tokens that come one at a time to the text they make certain."""

from collections.abc import Sequence

from gemma4_jax.data.tokenizer import StreamDecoder, Tokenizer


class Decoder(StreamDecoder):
  """Where a model's vocabulary is padded beyond its tokenizer's, ids of the padding have no text."""

  def push(self, token_id: int) -> str:
    return super().push(token_id) if token_id < self._tokenizer.vocab_size else ''


class StopStrings:
  """Lets text through up to the stop string that is complete first, however it is cut into pieces.

  Attributes:
    found: whether one came.
  """

  def __init__(self, stops: str | Sequence[str]):
    """Raises ValueError: they are no texts, or empty ones."""
    stops = (stops,) if isinstance(stops, str) else tuple(stops)
    if not all(isinstance(stop, str) and stop for stop in stops):
      raise ValueError(f'stop_strings: {stops!r}: give texts that are not empty')
    self.found, self._stops, self._held = False, stops, ''

  def push(self, text: str) -> str:
    text = self._held + text
    found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
    if found:
      self.found, self._held = True, ''
      return text[:min(found)[1]]
    held = max((n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
    self._held = text[len(text) - held:]
    return text[:len(text) - held]

  def flush(self) -> str:
    held, self._held = self._held, ''
    return held


class Plain:
  """Generated tokens -> pieces of their text, in the form of `Sections`."""

  def __init__(self, tokenizer: Tokenizer):
    self._decoder = Decoder(tokenizer)

  def push(self, token: int) -> list[tuple[str, str]]:
    return [('content', self._decoder.push(token))]

  def end(self) -> list[tuple[str, str]]:
    return [('content', self._decoder.flush())]


class Sections:
  """Generated tokens -> pieces of thoughts and of the answer, trimmed: `chat.parse` for tokens that come one at a time."""

  def __init__(self, tokenizer: Tokenizer):
    self._controls = {i: token for token, i in tokenizer.special_ids.items()}
    self._decoder = Decoder(tokenizer)
    self._mode = 'content'      # or 'header' (of a channel), 'reasoning', 'call', 'over'
    self._header = ''
    self._blank = {'content': '', 'reasoning': ''}    # held back: it is trimmed where nothing follows
    self._begun = {'content': False, 'reasoning': False}
    self._before_thought = ''

  def push(self, token: int) -> list[tuple[str, str]]:
    control = self._controls.get(token)
    if control is None:
      return self._text(self._decoder.push(token))
    out = self.end()
    change = (self._mode, control)
    if control in ('<turn|>', '<eos>', '<|tool_response>'):
      self._mode = 'over'
    elif change == ('content', '<|channel>'):
      self._mode, self._header = 'header', ''
    elif change == ('reasoning', '<channel|>'):
      self._mode = 'content'
      self._blank['reasoning'], self._begun['reasoning'] = '', False
    elif change == ('content', '<|tool_call>'):
      self._mode = 'call'
    elif change == ('call', '<tool_call|>'):
      self._mode = 'content'
    else:
      out += self._text(control)
    return out

  def end(self) -> list[tuple[str, str]]:
    """What is certain now that no more text comes, or a control token."""
    out = self._text(self._decoder.flush())
    return out + self._name_channel() if self._mode == 'header' else out

  def _name_channel(self):
    """The header is read: thoughts, or no channel that we know, which is text."""
    thought = self._header.startswith('thought')
    self._mode = 'reasoning' if thought else 'content'
    return self._text(self._header[7:].removeprefix('\n') if thought else '<|channel>' + self._header)

  def _text(self, text: str) -> list[tuple[str, str]]:
    if self._mode == 'header':
      self._header += text
      return [] if 'thought\n'.startswith(self._header) else self._name_channel()
    if self._mode not in self._begun or not text:
      return []
    kind = self._mode
    text = self._blank[kind] + text
    text = text if self._begun[kind] else text.lstrip()
    kept = text.rstrip()
    self._blank[kind] = text[len(kept):]
    if kept and not self._begun[kind]:
      self._begun[kind] = True
      if kind == 'reasoning':
        kept, self._before_thought = self._before_thought + kept, '\n'
    return [(kind, kept)] if kept else []
