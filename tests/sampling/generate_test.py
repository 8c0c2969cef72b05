"""Generation: greedy tokens against a loop that recomputes everything, ragged batches, streams, stops, continued conversations."""

import functools
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma4_jax import config
from gemma4_jax.checkpoint import hf
from gemma4_jax.model import transformer
from gemma4_jax.sampling import generate
from gemma4_jax.sampling.sampler import GREEDY, Sampling
from tests import hf_models, quick

CFG = config.shrink(config.E2B, pattern='LG', width=32, mlp_dim=48)
RNG = np.random.RandomState(0)
PROMPTS = [RNG.randint(1, 128, n).tolist() for n in (11, 3, 7)]
greedy = functools.partial(generate.generate, max_new_tokens=12, sampling=GREEDY, stop_ids=())


@functools.cache
def params():
  return transformer.init(CFG, 0)


@functools.cache
def batched():
  return greedy(CFG, params(), PROMPTS)


@pytest.mark.slow
def test_greedy_tokens_are_those_of_a_full_pass_over_each_prefix():
  for prompt, out in zip(PROMPTS, batched()):
    whole = np.array([*prompt, *out.tokens])[None]
    logits, _ = quick.apply(transformer.Transformer(CFG), params(), whole)
    expected = np.asarray(jax.nn.log_softmax(logits[0, len(prompt) - 1:-1]))
    np.testing.assert_array_equal(out.tokens, expected.argmax(-1))
    np.testing.assert_allclose(out.logprobs, expected.max(-1), atol=1e-4)
    assert not out.stopped


@pytest.mark.parametrize('name', quick.only(['dense_ple_kvshare'], list(hf_models.configs())))
def test_greedy_tokens_equal_those_of_transformers_alone_and_batched(name):
  torch = pytest.importorskip('torch')
  pytest.importorskip('transformers')
  cfg = hf_models.configs()[name]
  state = hf_models.random_state(cfg)
  weights = jax.tree.map(jnp.asarray, hf.params_from_hf(cfg, state))
  prompts = [np.random.RandomState(1).randint(3, 128, n).tolist() for n in (9, 4)]
  settings = dict(max_new_tokens=64, sampling=GREEDY, stop_ids=())
  together = generate.generate(cfg, weights, prompts, **settings)
  alone = generate.generate(cfg, weights, prompts[:1], **settings)
  model = hf_models.build(cfg, state)
  for prompt, outs in zip(prompts, [(together[0], alone[0]), (together[1],)]):
    theirs = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
                            max_new_tokens=64, min_new_tokens=64, eos_token_id=None, pad_token_id=0)[0, len(prompt):]
    for out in outs:
      np.testing.assert_array_equal(out.tokens, theirs.numpy())


@pytest.mark.parametrize('sampling', [
    GREEDY, Sampling(temperature=1.5, top_k=20, repetition_penalty=1.3)], ids=['greedy', 'sampled'])
@pytest.mark.slow
def test_a_row_does_not_depend_on_its_batch(sampling):
  settings = dict(max_new_tokens=12, sampling=sampling, stop_ids=())
  together = generate.generate(CFG, params(), PROMPTS, seed=[5, 6, 7], **settings)
  for prompt, seed, row in zip(PROMPTS, [5, 6, 7], together):
    alone, = generate.generate(CFG, params(), [prompt], seed=[seed], **settings)
    np.testing.assert_array_equal(row.tokens, alone.tokens)


@pytest.mark.parametrize('every', quick.only([5, 100], [1, 5, 100]))
def test_a_stream_yields_the_same_tokens(every):
  parts = list(generate.stream(CFG, params(), PROMPTS, max_new_tokens=12, sampling=GREEDY, stop_ids=(), every=every))
  assert [len(part[0]) for part in parts] == [min(every, 12 - i) for i in range(0, 12, every)]
  for row, out in enumerate(batched()):
    np.testing.assert_array_equal(np.concatenate([part[row] for part in parts]), out.tokens)


@pytest.mark.parametrize('every', quick.only([2], [2, 12]))
def test_a_row_ends_with_its_stop_id_and_the_others_go_on(every):
  stop = int(batched()[0].tokens[4])
  first = [out.tokens.tolist().index(stop) if stop in out.tokens else None for out in batched()]
  session = generate.Session(CFG, params(), 3, 40)
  session.append(PROMPTS)
  rows = [[], [], []]
  for part in session.generate(12, sampling=GREEDY, stop_ids=[stop], every=every):
    for row, (tokens, _) in zip(rows, part):
      row.extend(tokens)
  for row, out, at in zip(rows, batched(), first):
    assert row == out.tokens.tolist()[:None if at is None else at + 1]
  assert session.stopped.tolist() == [at is not None for at in first]


def test_a_conversation_goes_on_as_if_recomputed():
  more = [RNG.randint(1, 128, n).tolist() for n in (2, 6, 1)]
  session = generate.Session(CFG, params(), 3, 60)
  session.append(PROMPTS)
  said = [np.concatenate(tokens) for tokens in zip(*([t for t, _ in part] for part in session.generate(5, sampling=GREEDY, stop_ids=())))]
  session.append(more)
  again = [np.concatenate(tokens) for tokens in zip(*([t for t, _ in part] for part in session.generate(6, sampling=GREEDY, stop_ids=())))]
  whole = generate.generate(CFG, params(), [[*p, *s, *m] for p, s, m in zip(PROMPTS, said, more)], max_new_tokens=6,
                            sampling=GREEDY, stop_ids=())
  for row, out in zip(again, whole):
    np.testing.assert_array_equal(row, out.tokens)


@pytest.mark.slow
def test_ctrl_c_in_a_step_comes_when_the_step_is_over(monkeypatch):
  whole = greedy(CFG, params(), [[1, 2, 3]])[0].tokens
  session = generate.Session(CFG, params(), 1, 40)
  session.append([[1, 2, 3]])
  decode = generate._decode

  def pressed(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGINT)
    return decode(*args, **kwargs)

  monkeypatch.setattr(generate, '_decode', pressed)
  before = signal.signal(signal.SIGINT, signal.default_int_handler)   # where tests run in the background it is ignored
  try:
    with pytest.raises(KeyboardInterrupt):
      next(session.generate(8, sampling=GREEDY, stop_ids=(), every=4))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
  finally:
    signal.signal(signal.SIGINT, before)
  monkeypatch.undo()
  session.append([[5]])
  after = np.concatenate([part[0][0] for part in session.generate(4, sampling=GREEDY, stop_ids=())])
  np.testing.assert_array_equal(after, greedy(CFG, params(), [[1, 2, 3, *whole[:4], 5]])[0].tokens[:4])


@pytest.mark.slow
def test_long_prompts_run_in_chunks(monkeypatch):
  prompts = [RNG.randint(1, 128, n).tolist() for n in (50, 17)]
  whole = greedy(CFG, params(), prompts)
  monkeypatch.setattr(generate, 'PREFILL_CHUNK', 16)
  sizes = []
  monkeypatch.setattr(generate, '_prefill', lambda *args, run=generate._prefill: sizes.append(args[5].shape[1]) or run(*args))
  for out, expected in zip(greedy(CFG, params(), prompts), whole):
    np.testing.assert_array_equal(out.tokens, expected.tokens)
  assert sizes == [16] * 4


def test_other_prompts_seeds_settings_and_stops_are_no_other_program():
  settings = [(PROMPTS, Sampling(), 0, [3]), ([p[::-1] for p in PROMPTS], Sampling(temperature=0.3, top_k=5, min_p=0.1), 8, [4, 5, 6]),
              ([[*p, 5, 5, 5] for p in PROMPTS], GREEDY, 9, [])]
  programs = lambda: (generate._prefill._cache_size(), generate._first._cache_size(), generate._decode._cache_size())
  counts = []
  for prompts, sampling, seed, stops in settings:
    generate.generate(CFG, params(), prompts, max_new_tokens=12, sampling=sampling, seed=seed, stop_ids=stops)
    counts.append(programs())
  assert counts[0] == counts[1] == counts[2]


@pytest.mark.slow
def test_samples_of_a_prompt_differ_and_begin_where_it_ends():
  outs = generate.generate(CFG, params(), PROMPTS[:2], max_new_tokens=8, sampling=Sampling(top_k=0, top_p=1.0), samples=3, stop_ids=())
  assert len(outs) == 6 and len({tuple(out.tokens) for out in outs}) == 6
  for i, out in enumerate(outs):
    found, = generate.score(CFG, params(), [PROMPTS[i // 3]], [out.tokens])
    np.testing.assert_allclose(out.logprobs, found, atol=1e-4)


def test_scores_are_log_probabilities_of_the_continuation():
  prompts, continuations = [[5, 6, 7], [9]], [[8, 9], [1, 2, 3, 4]]
  for prompt, continuation, found in zip(prompts, continuations, generate.score(CFG, params(), prompts, continuations)):
    logits, _ = quick.apply(transformer.Transformer(CFG), params(), np.array([prompt + continuation]))
    expected = jax.nn.log_softmax(logits[0])[np.arange(len(prompt) - 1, len(prompt + continuation) - 1), continuation]
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize('change, named', [
    ({'prompts': []}, 'no prompts'),
    ({'prompts': [[1], []]}, 'prompt 1: no tokens'),
    ({'prompts': [[1, 128]]}, 'id 128 is outside the vocabulary of 128'),
    ({'prompts': [[-1]]}, 'id -1 is outside'),
    ({'prompts': [[1.5]]}, 'no tokens'),
    ({'prompts': [1, 2, 3]}, 'prompt 0: no tokens'),
    ({'prompts': [[1] * 300]}, 'context_length = 256'),
    ({'max_new_tokens': 0}, 'max_new_tokens: 0'),
    ({'max_new_tokens': 4.5}, 'max_new_tokens: 4.5 is no whole number'),
    ({'max_new_tokens': 255}, 'context_length = 256'),
    ({'sampling': Sampling(temperature=-1.0)}, 'temperature: -1.0 is negative'),
    ({'sampling': Sampling(temperature=float('nan'))}, 'temperature: nan'),
    ({'sampling': Sampling(top_k=129)}, 'top_k: 129'),
    ({'sampling': Sampling(top_p=0.0)}, 'top_p: 0.0'),
    ({'sampling': Sampling(min_p=2.0)}, 'min_p: 2.0'),
    ({'sampling': Sampling(repetition_penalty=0.0)}, 'repetition_penalty: 0.0'),
    ({'sampling': [GREEDY, GREEDY]}, 'for a batch of 1'),
    ({'seed': [1, 2]}, 'for a batch of 1'),
    ({'seed': 1.5}, 'seed: 1.5 is no whole number'),
    ({'seed': [1.5]}, 'seed: 1.5 is no whole number'),
    ({'sampling': Sampling(temperature=1e-40)}, 'temperature: 1e-40'),
    ({'sampling': Sampling(temperature=1e300)}, 'temperature: 1e\\+300'),
    ({'sampling': Sampling(top_p=1e-50)}, 'top_p: 1e-50'),
    ({'sampling': Sampling(repetition_penalty=1e-38)}, 'repetition_penalty: 1e-38'),
    ({'samples': 0}, 'samples: 0'),
    ({'kv': 'turbo'}, "kv: 'turbo'"),
    ({'stop_ids': [2**40]}, 'stop_ids: .1099511627776. holds what is no id of the vocabulary, 0 to 127'),
    ({'stop_ids': [1.5]}, 'stop_ids'),
], ids=lambda value: str(value)[:50])
def test_what_cannot_be_is_refused_by_name(change, named, monkeypatch):
  monkeypatch.setattr(generate, '_prefill', lambda *_, **__: pytest.fail('something ran'))
  with pytest.raises(ValueError, match=named):
    generate.generate(CFG, params(), **{'prompts': [[1, 2, 3]], 'max_new_tokens': 4, **change})


def test_scanned_models_say_how_to_sample_them():
  with pytest.raises(ValueError, match='unstack'):
    greedy(CFG.replace(scan=True), params(), PROMPTS)
  with pytest.raises(ValueError, match='unstack'):
    generate.score(CFG.replace(scan=True), params(), [[1]], [[2]])
