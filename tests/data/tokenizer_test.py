"""Text goes through a tokenizer unchanged, byte for byte, and never turns into a control token."""

import json
import random

from hypothesis import given, settings, strategies as st
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from gemma4_jax.data.tokenizer import CONTROL_TOKENS, GEMMA4_TOKENS, StreamDecoder, Tokenizer

WORDS = 'def return self the window of a layer attends to tokens <bos> <0x41> import numpy as np'.split()
TEXTS = ['\n    '.join(' '.join(random.Random(i * 100 + j).choices(WORDS, k=9)) for j in range(9)) for i in range(30)]

AWKWARD = [
    '', ' ', '  two  spaces ', '\n\n\n', '\r\n\ttab\x0b\x0c', 'naïve façade', 'e\u0301 is not \u00e9', '\u2581', ' \u2581\u2581 x\u2581',
    '\U0001f468\u200d\U0001f469\u200d\U0001f467', 'हिन्दी और 中文', '\x00\x01\x7f\x80', '\ufeff\uffff\U0010ffff', '12345',
    '\u00a0\u2003\u3000', '<bos>', '<|endoftext|>', 'a<pad><eos>b<unk> <mask>', '<0x41><0xFF>', '<<bos>>', '<bos',
]


def byte_level():
  """A tokenizer of the other family: GPT-2's."""
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(
      vocab_size=300, special_tokens=['<|endoftext|>'], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
  return Tokenizer(tokenizer.to_str())


def whole_word():
  """Gemma's form: no words before the merges, and merges that would spell <bos> and <0x41>; ids unlike ours."""
  merges = [(spelled[:i], spelled[i]) for spelled in ('<bos>', '<0x41>') for i in range(1, len(spelled))]
  names = [*(f'<0x{b:02X}>' for b in range(256)), *CONTROL_TOKENS, *'<bos>0x41\u2581', *(a + b for a, b in merges)]
  vocab = {name: i for i, name in enumerate(dict.fromkeys(names))}
  tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token='<unk>'))
  tokenizer.normalizer = normalizers.Replace(' ', '\u2581')
  tokenizer.decoder = decoders.Sequence([decoders.Replace('\u2581', ' '), decoders.ByteFallback(), decoders.Fuse()])
  tokenizer.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in CONTROL_TOKENS])
  return Tokenizer(tokenizer.to_str())


def as_hugging_face_writes_it():
  """The released form with every token that is no plain piece in `added_tokens`, most of them not called special."""
  spec = json.loads(Tokenizer.stand_in(TEXTS).serialized)
  text_runs = ['\n' * n for n in range(1, 32)]
  unused = [name for name in spec['model']['vocab'] if name.startswith('<unused')]
  named = [token for i, token in GEMMA4_TOKENS.items() if i < 1024]
  spec['added_tokens'] = [
      {'id': spec['model']['vocab'][token], 'content': token, 'single_word': False, 'lstrip': False, 'rstrip': False,
       'normalized': False, 'special': token in CONTROL_TOKENS[:4]}
      for token in sorted([*named, *unused, *text_runs], key=spec['model']['vocab'].get)]
  return Tokenizer(json.dumps(spec, ensure_ascii=False))


def lossy():
  tokenizer = tokenizers.Tokenizer.from_str(Tokenizer.stand_in(TEXTS).serialized)
  tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(' ', '\u2581')])
  return tokenizer.to_str()


FAMILIES = {'trained': Tokenizer.train(TEXTS, 350), 'byte-level': byte_level(), 'whole-word': whole_word(),
            'stand-in': Tokenizer.stand_in(TEXTS), 'hugging-face': as_hugging_face_writes_it()}
GEMMA4 = ('stand-in', 'hugging-face')


def test_the_first_ids_are_gemmas_control_tokens_and_then_the_bytes():
  vocab = json.loads(FAMILIES['trained'].serialized)['model']['vocab']
  assert [vocab[t] for t in CONTROL_TOKENS] == [0, 1, 2, 3, 4]
  assert [vocab[f'<0x{b:02X}>'] for b in range(256)] == list(range(5, 261))
  assert len(vocab) == FAMILIES['trained'].vocab_size == 350


@pytest.mark.parametrize('family, bos, eos, pad', [
    ('trained', 2, 1, 0), ('byte-level', 0, 0, 0), ('whole-word', 258, 257, 256), ('stand-in', 2, 1, 0)])
def test_control_ids_are_found_by_name(family, bos, eos, pad):
  tokenizer = FAMILIES[family]
  assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (bos, eos, pad)


def random_texts():
  rng = random.Random(0)
  points = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
  return [''.join(map(chr, rng.choices(points[:0x300], k=50) + rng.choices(points, k=50))) for _ in range(20)]


@pytest.mark.parametrize('family', FAMILIES)
def test_any_text_comes_back_exactly_and_its_bytes_are_counted_exactly(family):
  tokenizer = FAMILIES[family]
  control = list(tokenizer.special_ids.values())
  texts = [*tokenizer.special_ids, ''.join(tokenizer.special_ids)] + AWKWARD + random_texts() + TEXTS
  for text, ids in zip(texts, tokenizer.encode_batch(texts)):
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode()), repr(text)
    assert not np.isin(ids, control).any(), repr(text)
    np.testing.assert_array_equal(ids, tokenizer.encode(text))


@pytest.mark.parametrize('family', FAMILIES)
def test_control_tokens_count_no_bytes_and_decode_to_nothing(family):
  tokenizer = FAMILIES[family]
  assert tokenizer.token_bytes[[tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id]].sum() == 0
  assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode('a b'), tokenizer.eos_id]) == 'a b'


def test_spaces_travel_as_u2581_without_a_prefix():
  vocab = json.loads(FAMILIES['trained'].serialized)['model']['vocab']
  names = {i: t for t, i in vocab.items()}
  assert ''.join(names[i] for i in FAMILIES['trained'].encode('the  self')) == 'the\u2581\u2581self'


def test_training_learns_words_line_breaks_with_indentation_and_single_digits():
  tokenizer = FAMILIES['trained']
  assert len(tokenizer.encode(' tokens')) == 1
  assert len(tokenizer.encode('\n   ')) == 1
  assert len(Tokenizer.train(['1234 1234 ab'] * 50 + TEXTS, 350).encode('1234')) == 4


def test_training_does_not_depend_on_the_order_of_texts():
  assert Tokenizer.train(TEXTS[::-1], 350).hash == FAMILIES['trained'].hash
  assert Tokenizer.train(TEXTS[1:], 350).hash != FAMILIES['trained'].hash


def test_rare_characters_are_left_to_bytes():
  tokenizer = Tokenizer.train(['the window ' * 1000 + '\u4e2d'] + TEXTS, 350)
  assert len(tokenizer.encode('\u4e2d')) == 3


def test_characters_take_at_most_half_of_a_small_vocabulary():
  texts = [''.join(map(chr, range(0x4e00, 0x4e40))) * 3] + TEXTS
  vocab = json.loads(Tokenizer.train(texts, 261 + 40).serialized)['model']['vocab']
  assert sum(len(token) == 1 for token in vocab) == 20


@pytest.mark.parametrize('family', GEMMA4)
def test_a_stand_in_has_the_released_control_ids(family):
  ids = FAMILIES[family].special_ids
  assert {i: token for token, i in ids.items() if not token.startswith('<unused')} == {
      0: '<pad>', 1: '<eos>', 2: '<bos>', 3: '<unk>', 4: '<mask>', 5: '[multimodal]', 46: '<|tool>', 47: '<tool|>',
      48: '<|tool_call>', 49: '<tool_call|>', 50: '<|tool_response>', 51: '<tool_response|>', 52: '<|"|>', 98: '<|think|>',
      100: '<|channel>', 101: '<channel|>', 105: '<|turn>', 106: '<turn|>'}
  assert [i for token, i in ids.items() if token.startswith('<unused') and i < 107] == [
      *range(6, 46), *range(53, 98), 99, *range(102, 105)]


@pytest.mark.parametrize('family', GEMMA4)
def test_a_stand_in_has_the_released_byte_and_line_break_ids(family):
  tokenizer = FAMILIES[family]
  assert list(tokenizer.encode('\u4e2d')) == [238 + byte for byte in '\u4e2d'.encode()]
  for n in range(1, 32):
    assert list(tokenizer.encode('\n' * n)) == [106 + n]
    assert tokenizer.token_bytes[106 + n] == n
  assert 109 in tokenizer.encode('a\n\n\nb')


def test_a_stand_in_learns_words_and_depends_on_its_texts_alone():
  assert len(Tokenizer.stand_in(TEXTS).encode(' tokens')) == 1
  assert Tokenizer.stand_in(TEXTS[::-1]).hash == FAMILIES['stand-in'].hash != Tokenizer.stand_in().hash
  assert Tokenizer.stand_in().vocab_size == 1024


def test_a_stand_in_of_full_size_has_the_media_tokens_and_no_holes():
  tokenizer = Tokenizer.stand_in(TEXTS, vocab_size=262_144)
  assert {i: t for t, i in tokenizer.special_ids.items() if i > 1024 and not t.startswith('<unused')} == {
      255999: '<|image>', 256000: '<|audio>', 258880: '<|image|>', 258881: '<|audio|>', 258882: '<image|>', 258883: '<audio|>',
      258884: '<|video|>'}
  assert tokenizer.vocab_size == 262_144 == len(json.loads(tokenizer.serialized)['model']['vocab'])


def test_a_stand_in_without_room_for_text_is_refused():
  with pytest.raises(ValueError, match='vocab_size=300 is too small for a stand-in'):
    Tokenizer.stand_in(TEXTS, vocab_size=300)


@pytest.mark.parametrize('family', GEMMA4)
def test_plain_text_gets_the_ids_the_tokenizers_library_gives(family):
  stock = tokenizers.Tokenizer.from_str(FAMILIES[family].serialized)
  plain = [text.replace('<bos>', '').replace('<0x41>', '') for text in TEXTS]
  for text in [*plain, ' two  spaces ', '\n\n x\n\n\n', 'naïve 中文', '12345 <a> [b]']:
    assert list(FAMILIES[family].encode(text)) == stock.encode(text, add_special_tokens=False).ids


def test_a_tab_in_the_place_of_its_byte_token_is_read():
  tokenizer = Tokenizer(FAMILIES['stand-in'].serialized.replace('"<0x09>"', '"\\t"'))
  assert list(tokenizer.encode('\t<0x09>'))[0] == 238 + 9
  assert tokenizer.decode(tokenizer.encode('\t<0x09>')) == '\t<0x09>'


def test_decoding_can_show_control_tokens():
  tokenizer = FAMILIES['hugging-face']
  ids = [2, 105, *tokenizer.encode('user\nhi'), 106, 30]
  assert tokenizer.decode(ids, control=True) == '<bos><|turn>user\nhi<turn|><unused24>'
  assert tokenizer.decode(ids) == 'user\nhi'


@pytest.mark.parametrize('token_id', [-1, 350])
def test_an_id_outside_the_vocabulary_is_refused(token_id):
  with pytest.raises(ValueError, match=f'token id {token_id} is outside the vocabulary of 350'):
    FAMILIES['trained'].decode([7, token_id])


@settings(deadline=None, max_examples=200)
@given(st.data(), st.sampled_from(sorted(FAMILIES)), st.booleans())
def test_streamed_text_is_the_decoded_text(data, family, control):
  tokenizer = FAMILIES[family]
  bytes_and_all = st.sampled_from(tokenizer._byte_ids or [0]) | st.integers(0, tokenizer.vocab_size - 1)
  text = data.draw(st.text(max_size=8))
  ids = [*data.draw(st.lists(bytes_and_all)), *tokenizer.encode(text), *data.draw(st.lists(bytes_and_all, max_size=3))]
  stream = tokenizer.stream(control)
  assert ''.join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids, control)
  assert ''.join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids, control)


def test_a_character_is_streamed_with_the_token_that_completes_it():
  tokenizer = FAMILIES['stand-in']
  stream = StreamDecoder(tokenizer)
  ids = [*tokenizer.encode('the '), *(238 + byte for byte in '\U0001f600'.encode()), 106, *tokenizer.encode('a')]
  assert [stream.push(i) for i in ids[-6:]] == ['', '', '', '\U0001f600', '', 'a']
  assert stream.flush() == ''


def test_bytes_that_can_become_no_character_are_streamed_at_once():
  stream = FAMILIES['stand-in'].stream()
  assert [stream.push(238 + byte) for byte in (0xff, 0xe4, 0xb8, 0x41)] == ['\ufffd', '', '', '\ufffdA']
  assert [stream.push(238 + 0xe4), stream.flush(), stream.flush()] == ['', '\ufffd', '']


def test_a_saved_tokenizer_loads_to_the_same_ids_and_hash(tmp_path):
  path = tmp_path / 'tokenizer.json'
  path.write_text(FAMILIES['trained'].serialized, encoding='utf-8')
  loaded = Tokenizer.load(path)
  assert loaded.hash == FAMILIES['trained'].hash
  np.testing.assert_array_equal(loaded.encode(TEXTS[0]), FAMILIES['trained'].encode(TEXTS[0]))


@pytest.mark.parametrize('vocab_size, message', [
    (262, 'data.vocab_size=262 is too small: 261 entries'),
    (5000, r'fills only \d+ of data.vocab_size=5000 entries; set data.vocab_size and model.vocab_size to \d+ or less'),
])
def test_a_vocabulary_that_cannot_be_trained_is_refused(vocab_size, message):
  with pytest.raises(ValueError, match=message):
    Tokenizer.train(TEXTS, vocab_size)


def test_the_size_named_when_the_text_is_too_short_works():
  with pytest.raises(ValueError) as e:
    Tokenizer.train(TEXTS, 5000)
  size = int(str(e.value).split('fills only ')[1].split()[0])
  assert Tokenizer.train(TEXTS, size).vocab_size == size


def without(part):
  spec = json.loads(FAMILIES['stand-in'].serialized)
  del spec[part]
  return json.dumps(spec)


@pytest.mark.parametrize('content, message', [
    (None, 'No such file'),
    ('{', 'not a tokenizer.json'),
    ('[]', 'not a tokenizer.json'),
    (without('added_tokens'), "not a tokenizer.json: 'added_tokens'"),
    (without('decoder'), "not a tokenizer.json: 'decoder'"),
    (FAMILIES['stand-in'].serialized.replace('"<mask>":4', '"<mask>":4294967295'), 'an id of 4294967295 is over'),
    (FAMILIES['stand-in'].serialized.replace('"vocab":{', '"vocab":{},"x":{'), 'not a tokenizer.json: Token'),   # told in two lines
    (tokenizers.Tokenizer(models.WordLevel({'<bos>': 0, '<eos>': 1}, '<bos>')).to_str(), 'neither byte fallback nor byte-level'),
    (tokenizers.Tokenizer(models.BPE({'a': 0}, [])).to_str(), 'no token begins or ends a text'),
    (FAMILIES['stand-in'].serialized.replace('"byte_fallback":true', '"byte_fallback":false'), 'neither byte fallback nor byte-level'),
    (lossy(), 'text does not come back as it was'),
])
def test_a_file_that_is_no_usable_tokenizer_is_named_in_one_line(content, message, tmp_path):
  path = tmp_path / 'tokenizer.json'
  if content is not None:
    path.write_text(content)
  with pytest.raises(ValueError, match=f'data.tokenizer: cannot use .*tokenizer.json: .*{message}') as e:
    Tokenizer.load(path)
  assert '\n' not in str(e.value)
