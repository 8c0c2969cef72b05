"""Text to token ids and back: a byte-fallback BPE like Gemma's, trained here or read from a tokenizer.json."""

import collections
from collections.abc import Sequence
import hashlib
import json
import os
import pathlib
import re

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

# Ids 0..4, as released; ids 5..260 are the byte tokens.
CONTROL_TOKENS = ('<pad>', '<eos>', '<bos>', '<unk>', '<mask>')
_BYTE_TOKENS = tuple(f'<0x{byte:02X}>' for byte in range(256))
_BYTE_TOKEN = re.compile('<0x[0-9A-F]{2}>')
_SPACE = '\u2581'

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

  Attributes:
    serialized: content of tokenizer.json.
    hash: sha256 of `serialized`, hexadecimal.
    vocab_size: V, the largest id plus one.
    bos_id, eos_id, pad_id: control ids (2, 1, 0 in Gemma).
    token_bytes: int32 [V], UTF-8 bytes of text each id stands for; 0 for control tokens.
  """

  def __init__(self, serialized: str):
    """Raises ValueError: no tokenizer, no beginning-of-text token, or text exists that has no tokens."""
    try:
      spec = json.loads(serialized)
      self._tokenizer = tokenizers.Tokenizer.from_str(serialized)
    except Exception as e:  # tokenizers raises bare Exception
      raise ValueError(f'not a tokenizer.json: {e}') from e
    self.serialized = serialized
    self.hash = hashlib.sha256(serialized.encode()).hexdigest()
    self._tokenizer.encode_special_tokens = True  # what spells a control token is text

    vocab = self._tokenizer.get_vocab(with_added_tokens=True)
    self.vocab_size = max(vocab.values()) + 1
    added = {token['content']: token['special'] for token in spec['added_tokens']}
    control = {token for token, special in added.items() if special}
    ids = {kind: next((vocab[n] for n in names if n in vocab), None) for kind, names in _NAMES.items()}
    if ids['bos'] is None or ids['eos'] is None:
      raise ValueError(f'no token begins or ends a text; looked for {_NAMES["bos"]} and {_NAMES["eos"]}')
    self.bos_id, self.eos_id = ids['bos'], ids['eos']
    self.pad_id = self.eos_id if ids['pad'] is None else ids['pad']

    decoder = spec['decoder'] or {}
    byte_level = any(d.get('type') == 'ByteLevel' for d in [decoder, *decoder.get('decoders', ())])
    byte_fallback = bool(spec['model'].get('byte_fallback')) and all(token in vocab for token in _BYTE_TOKENS)
    if not byte_level and not byte_fallback:
      raise ValueError('neither byte fallback nor byte-level: some texts would have no tokens')
    self._byte_ids = [] if byte_level else [vocab[token] for token in _BYTE_TOKENS]
    # Captures, so that `split` puts what is reserved at odd places. A byte-level tokenizer reserves nothing.
    reserved = [*map(re.escape, sorted(control, key=len, reverse=True)), _BYTE_TOKEN.pattern, _SPACE]
    self._reserved = re.compile('((?!))' if byte_level else f'({"|".join(reserved)})')

    self.token_bytes = np.zeros(self.vocab_size, np.int32)
    for token, i in vocab.items():
      if token in control:
        continue
      if byte_level:  # one letter a byte, save for tokens added as plain text
        self.token_bytes[i] = len(token.encode()) if token in added else len(token)
      else:
        self.token_bytes[i] = 1 if _BYTE_TOKEN.fullmatch(token) else len(token.replace(_SPACE, ' ').encode())

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
    """One int32 array of ids a text, without BOS; uses all cores."""
    split = [self._reserved.split(text) for text in texts]
    encoded = iter(self._tokenizer.encode_batch_fast(
        [piece for pieces in split for piece in pieces[::2]], add_special_tokens=False))
    ids = []
    for pieces in split:
      own = next(encoded).ids
      for spelled in pieces[1::2]:
        own = own + [self._byte_ids[byte] for byte in spelled.encode()] + next(encoded).ids
      ids.append(np.array(own, np.int32))
    return ids

  def decode(self, ids: Sequence[int]) -> str:
    """Text of `ids`; control tokens give nothing, broken UTF-8 gives U+FFFD."""
    return self._tokenizer.decode(list(map(int, ids)), skip_special_tokens=True)


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
