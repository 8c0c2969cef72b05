"""Text to token ids and back: a byte-fallback BPE like Gemma's, trained here or read from a tokenizer.json."""

import codecs
import collections
from collections.abc import Iterable, Sequence
import hashlib
import inspect
import json
import os
import pathlib
import re
import textwrap

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

# Ids 0..4, as released; in a tokenizer trained here, ids 5..260 are the byte tokens.
CONTROL_TOKENS = ('<pad>', '<eos>', '<bos>', '<unk>', '<mask>')
# Gemma 4's control tokens by id, as released. Ids between them are `<unusedN>`, bytes, line breaks or text.
GEMMA4_TOKENS = {
    **dict(enumerate(CONTROL_TOKENS)), 5: '[multimodal]', 46: '<|tool>', 47: '<tool|>', 48: '<|tool_call>', 49: '<tool_call|>',
    50: '<|tool_response>', 51: '<tool_response|>', 52: '<|"|>', 98: '<|think|>', 100: '<|channel>', 101: '<channel|>',
    105: '<|turn>', 106: '<turn|>', 255999: '<|image>', 256000: '<|audio>', 258880: '<|image|>', 258881: '<|audio|>',
    258882: '<image|>', 258883: '<audio|>', 258884: '<|video|>',
}
_UNUSED = re.compile(r'<unused\d+>')
_NEWLINES = range(107, 138)    # runs of 1..31 line breaks
_BYTES = range(238, 494)
_BYTE_TOKENS = tuple(f'<0x{byte:02X}>' for byte in range(256))
_BYTE_TOKEN = re.compile('<0x[0-9A-F]{2}>')
_SPACE = '\u2581'
_LARGEST = 2**22    # ids; Gemma 4 has 2**18

# Gemma merges across words. Training without word borders takes 53 s instead of 1.5 s on 10 MB (every document is one
# word), so text is cut into: line breaks with their indentation; words (identifiers) led by at most one space or sign;
# single digits, as in Gemma; signs. The cut stays in the tokenizer: text is encoded as it was counted.
_WORDS = (r'[\n▁]+(?=▁[^▁\n])|[^\n\p{L}\p{M}\p{N}_]?[\p{L}\p{M}_]+|\p{N}|▁?[^▁\n\p{L}\p{M}\p{N}_]+|[\n▁]+'
          .replace('▁', _SPACE))

# What other families call Gemma's control tokens.
_NAMES = {
    'bos': ('<bos>', '<s>', '<|begin_of_text|>', '<|endoftext|>'),
    'eos': ('<eos>', '</s>', '<|end_of_text|>', '<|endoftext|>'),
    'pad': ('<pad>', '<|endoftext|>', '<|end_of_text|>', '</s>'),
}


class Tokenizer:
  """A tokenizer that gives any text exactly: decode(encode(text)) == text, sum(token_bytes[ids]) == bytes of text.

  Text never becomes a control token: what spells one travels as byte tokens, and so does U+2581, which stands for the
  space inside tokens. Byte-level tokenizers (GPT-2, Llama 3) are read too; they need neither.

  Control tokens are those the file calls special, and Gemma 4's and `<unusedN>` whatever the file calls them. Added tokens
  that are text (runs of line breaks) stay text.

  Attributes:
    serialized: content of tokenizer.json.
    hash: sha256 of `serialized`, hexadecimal.
    vocab_size: V, the largest id plus one.
    bos_id, eos_id, pad_id: control ids (2, 1, 0 in Gemma).
    special_ids: {control token: id}.
    token_bytes: int32 [V], UTF-8 bytes of text each id stands for; 0 for control tokens.
  """

  def __init__(self, serialized: str):
    """Raises ValueError: no tokenizer, no beginning-of-text token, or text exists that has no tokens or comes back changed."""
    try:
      spec = json.loads(serialized)
      self._tokenizer = tokenizers.Tokenizer.from_str(serialized)
      added_tokens, decoder, model = spec['added_tokens'], spec['decoder'] or {}, spec['model']
    except (KeyboardInterrupt, SystemExit):
      raise
    except BaseException as e:  # tokenizers raises bare Exception, and Rust's panics
      raise ValueError(f'not a tokenizer.json: {" ".join(str(e).split())}') from e
    self.serialized = serialized
    self.hash = hashlib.sha256(serialized.encode()).hexdigest()
    self._tokenizer.encode_special_tokens = True  # what spells a control token is text

    vocab = self._tokenizer.get_vocab(with_added_tokens=True)
    self.vocab_size = max(vocab.values(), default=0) + 1
    if self.vocab_size > _LARGEST:
      raise ValueError(f'an id of {self.vocab_size - 1} is over the {_LARGEST:,} that are read')
    added = {token['content']: token['special'] for token in added_tokens if token['content'] in vocab}
    ids = {kind: next((vocab[n] for n in names if n in vocab), None) for kind, names in _NAMES.items()}
    if ids['bos'] is None or ids['eos'] is None:
      raise ValueError(f'no token begins or ends a text; looked for {_NAMES["bos"]} and {_NAMES["eos"]}')
    self.bos_id, self.eos_id = ids['bos'], ids['eos']
    self.pad_id = self.eos_id if ids['pad'] is None else ids['pad']

    byte_level = any(d.get('type') == 'ByteLevel' for d in [decoder, *decoder.get('decoders', ())])
    # A converter may have put the tab itself in the place of its byte token.
    self._byte_ids = [] if byte_level else [
        vocab.get(name, vocab.get(chr(byte)) if byte < 128 else None) for byte, name in enumerate(_BYTE_TOKENS)]
    if not byte_level and (None in self._byte_ids or not model.get('byte_fallback')):
      raise ValueError('neither byte fallback nor byte-level: some texts would have no tokens')

    control = {token for token, special in added.items() if special}
    # Captures, so that `split` puts what is reserved at odd places. A byte-level tokenizer reserves nothing.
    self._reserved = re.compile('((?!))')
    if not byte_level:
      unused = {token for token in vocab if _UNUSED.fullmatch(token)}
      named = control | (set(GEMMA4_TOKENS.values()) & vocab.keys())
      control = named | unused
      reserved = [*map(re.escape, sorted(named - unused, key=len, reverse=True)), _BYTE_TOKEN.pattern, _SPACE]
      reserved += [_UNUSED.pattern] if unused else []  # 6,227 names, as released, would slow every text down
      self._reserved = re.compile(f'({"|".join(reserved)})')
    self.special_ids = {token: vocab[token] for token in sorted(control, key=vocab.get)}
    self._spelled = {i: token.encode() for token, i in self.special_ids.items()}

    self._text = [b''] * self.vocab_size  # the bytes each id stands for
    letters = _byte_letters() if byte_level else {}
    for token, i in vocab.items():
      if token in control:
        continue
      if byte_level:  # one letter a byte, save for tokens added as plain text
        self._text[i] = token.encode() if token in added else bytes(letters[letter] for letter in token)
      else:
        byte = _BYTE_TOKEN.fullmatch(token)
        self._text[i] = bytes([int(token[3:5], 16)]) if byte else token.replace(_SPACE, ' ').encode()
    self.token_bytes = np.array([len(text) for text in self._text], np.int32)

    probe = 'a  B\n\n\n\te\u0301 \u4e2d\U0001f600'
    back = self.decode(self.encode(probe))
    if back != probe:
      raise ValueError(f'text does not come back as it was: {probe!r} returns as {back!r}')

  @classmethod
  def train(cls, texts: Sequence[str], vocab_size: int) -> 'Tokenizer':
    """Trains a BPE with Gemma's layout: control tokens, 256 byte tokens, characters, merges.

    Equal texts give an equal hash, whatever their order.

    Raises:
      ValueError: `vocab_size` has no room for merges, or the texts have too few different words to fill it.
    """
    room = vocab_size - len(CONTROL_TOKENS) - len(_BYTE_TOKENS)
    if room < 2:
      raise ValueError(f'data.vocab_size={vocab_size} is too small: '
                       f'{vocab_size - room} entries are control and byte tokens')
    # The trainer breaks ties between rare characters at random, so the alphabet is chosen here.
    alphabet = _frequent_characters(texts, limit=room // 2)
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token='<unk>', fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(' ', _SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(_WORDS), behavior='isolated')
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, ' '), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[*CONTROL_TOKENS, *_BYTE_TOKENS], initial_alphabet=alphabet,
        limit_alphabet=len(alphabet), show_progress=False))
    spec = json.loads(tokenizer.to_str())
    # The trainer gives byte tokens their ids by calling them special, which would hide them when decoding.
    spec['added_tokens'] = [token for token in spec['added_tokens'] if token['content'] in CONTROL_TOKENS]
    found = len(spec['model']['vocab'])
    if found != vocab_size:
      raise ValueError(f'the train split fills only {found} of data.vocab_size={vocab_size} entries; '
                       f'set data.vocab_size and model.vocab_size to {found} or less, or add text')
    return cls(json.dumps(spec, ensure_ascii=False))

  @classmethod
  def stand_in(cls, texts: Iterable[str] | None = None, vocab_size: int = 1024) -> 'Tokenizer':
    """A small tokenizer in the released one's form, for tests and notebooks: the same control, byte and line break ids.

    Characters and merges learnt from `texts` (default: two modules of the standard library) take the other ids below
    238 and those from 494 on; places that stay empty are `<unusedN>`. Media tokens exist if `vocab_size` reaches theirs.
    Equal texts give an equal hash.

    Raises:
      ValueError: `vocab_size` has no room for text.
    """
    if vocab_size < _BYTES.stop + 2:
      raise ValueError(f'vocab_size={vocab_size} is too small for a stand-in: give at least {_BYTES.stop + 2}')
    texts = [inspect.getsource(textwrap), inspect.getsource(json.decoder)] if texts is None else list(texts)
    vocab = {token: i for i, token in GEMMA4_TOKENS.items() if i < vocab_size}
    runs = ['\n' * n for n in range(1, len(_NEWLINES) + 1)]
    vocab.update(zip(runs, _NEWLINES))
    vocab.update(zip(_BYTE_TOKENS, _BYTES))
    # Every way to put a run together, shorter runs first: any run becomes one token.
    merges = [(runs[i], runs[n - 1 - i]) for n in range(1, len(runs)) for i in range(n)]

    free = [i for i in (*range(_NEWLINES.stop, _BYTES.start), *range(_BYTES.stop, vocab_size)) if i not in GEMMA4_TOKENS]
    lines = [line for text in texts for line in text.split('\n')]
    alphabet = _frequent_characters(lines, limit=len(free) // 2)
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token='<unk>', fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(' ', _SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(_WORDS), behavior='isolated')
    tokenizer.train_from_iterator(lines, trainers.BpeTrainer(
        vocab_size=len(free), initial_alphabet=alphabet, limit_alphabet=len(alphabet), show_progress=False))
    learnt = json.loads(tokenizer.to_str())['model']
    vocab.update(zip(learnt['vocab'], free))
    taken = set(vocab.values())
    vocab.update((f'<unused{i - 6}>', i) for i in range(vocab_size) if i not in taken)

    tokenizer.model = models.BPE(vocab, [*merges, *map(tuple, learnt['merges'])], unk_token='<unk>', fuse_unk=True, byte_fallback=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(' ', 'merged_with_previous')  # as released: cuts nothing, spaces are gone by then
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, ' '), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False)
                                  for i, token in GEMMA4_TOKENS.items() if i < vocab_size])
    return cls(tokenizer.to_str())

  @classmethod
  def load(cls, path: str | os.PathLike) -> 'Tokenizer':
    """Reads a tokenizer.json. Raises ValueError naming the file."""
    try:
      return cls(pathlib.Path(path).expanduser().read_text(encoding='utf-8'))
    except (OSError, ValueError) as e:
      raise ValueError(f'data.tokenizer: cannot use {path}: {e}') from e

  def encode(self, text: str) -> np.ndarray:
    """int32 [T] ids of `text`, without BOS."""
    return self.encode_batch([text])[0]

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """One int32 array of ids a text, without BOS; uses all cores. Raises ValueError: half a surrogate pair, which UTF-8 has not."""
    split = [self._reserved.split(text) for text in texts]
    try:
      encoded = iter(self._tokenizer.encode_batch_fast(
          [piece for pieces in split for piece in pieces[::2]], add_special_tokens=False))
    except TypeError as e:
      raise ValueError('text: holds half a surrogate pair, so it was not read as UTF-8') from e
    ids = []
    for pieces in split:
      own = next(encoded).ids
      for spelled in pieces[1::2]:
        own = own + [self._byte_ids[byte] for byte in spelled.encode()] + next(encoded).ids
      ids.append(np.array(own, np.int32))
    return ids

  def decode(self, ids: Sequence[int], control: bool = False) -> str:
    """Text of `ids`; broken UTF-8 gives U+FFFD, control tokens their name if `control`, else nothing.

    Raises ValueError: an id outside [0, V).
    """
    return b''.join(self._bytes(i, control) for i in ids).decode(errors='replace')

  def stream(self, control: bool = False) -> 'StreamDecoder':
    """A decoder that takes ids one at a time."""
    return StreamDecoder(self, control)

  def _bytes(self, i: int, control: bool) -> bytes:
    if not 0 <= i < self.vocab_size:
      raise ValueError(f'token id {i} is outside the vocabulary of {self.vocab_size}')
    return self._spelled[i] if control and i in self._spelled else self._text[i]


class StreamDecoder:
  """Text of ids that come one at a time: all that `push` and the last `flush` give, together, is `decode` of all ids.

  A character comes out with the token that completes it; bytes that can no longer become one come out as U+FFFD at once.
  """

  def __init__(self, tokenizer: Tokenizer, control: bool = False):
    self._tokenizer, self._control = tokenizer, control
    self._utf8 = codecs.getincrementaldecoder('utf-8')(errors='replace')

  def push(self, token_id: int) -> str:
    """Text that `token_id` makes certain; may be empty. Raises ValueError: an id outside the vocabulary."""
    return self._utf8.decode(self._tokenizer._bytes(token_id, self._control))

  def flush(self) -> str:
    """What an unfinished character leaves: U+FFFD or nothing. The next `push` begins anew."""
    text = self._utf8.decode(b'', final=True)
    return text


def _byte_letters() -> dict[str, int]:
  """The letter a byte-level tokenizer writes for each byte: itself if printable, else the next one from U+0100 on.

  Source: openai/gpt-2 `src/encoder.py`, bytes_to_unicode.
  """
  printable = [*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)]
  others = [byte for byte in range(256) if byte not in printable]
  return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _frequent_characters(texts: Sequence[str], limit: int) -> list[str]:
  """Characters that cover 99.95 % of the texts (SentencePiece's default), the rest being left to byte tokens."""
  counts = collections.Counter()
  for text in texts:
    counts.update(text.replace(' ', _SPACE))
  chosen, covered = [], 0
  for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
    if len(chosen) == limit or covered >= 0.9995 * counts.total():
      break
    chosen.append(character)
    covered += count
  return chosen
