"""Formats of keys and values as flags and configs name them, and what they come to in bytes."""

import ml_collections
import pytest

from gemma4_jax import config, kv_format, size


def test_a_preset_with_changed_fields_reads_back_as_it_is_written():
  found = kv_format.make('turboquant,unified_v=6,exact_last=False,grid=lloyd_max')
  assert (found.unified_v, found.unified_k, found.exact_last, found.grid) == (6, 8, False, 'lloyd_max')
  assert kv_format.make(str(found)) == found and str(found).startswith('turboquant,')
  assert [str(kv_format.make(name)) for name in kv_format.PRESETS] == list(kv_format.PRESETS)
  assert kv_format.make(ml_collections.ConfigDict({'preset': 'turboquant', 'unified_v': 6})) == kv_format.make('turboquant,unified_v=6')


@pytest.mark.parametrize('kv, error', [
    ('turbo', "kv: 'turbo' is none of exact, separate, quality, turboquant, extreme"),
    ('exact,sink=3', 'kv.sink: no such field; did you mean kv.sinks?'),
    ('exact,sinks=few', "kv.sinks: 'few' is no int"),
    ('exact,unify=0', "kv.unify: '0' is no bool: True or False"),
    ('exact,local_k=7,local_v=7', 'kv.local_k: 7 bits; it takes 2, 3, 4, 5, 6, 8, or 16 for exact'),
    ('exact,local_k=4', 'kv.local_k: 4 and kv.local_v: 16: both in few bits, or both 16'),
    ('quality,recent=0', 'kv.recent: 0, kv.sinks: 4: at least 1 and at least 0'),
    ('quality,grid=table', "kv.grid: 'table' is none of uniform, lloyd_max"),
    ({'preset': 'quality', 'sinks': '4'}, "kv.sinks: '4' is no int")])
def test_what_is_wrong_with_a_format_is_said_in_one_line(kv, error):
  with pytest.raises(ValueError) as found:
    kv_format.make(kv)
  assert str(found.value) == error


# Bytes of a token in one layer, by hand: heads * (codes, and 2 bytes a scale, 4 at 8 bits).
@pytest.mark.parametrize('name, preset, local, growing', [
    ('e2b', 'turboquant', 2 * 2 * 256, 2 * (512 * 6 // 8 + 2)), ('e2b', 'quality', 2 * 2 * 256, 2 * (512 + 4)),
    ('e4b', 'extreme', 2 * (256 * 5 // 8 + 2 + 256 * 4 // 8 + 2), 2 * 2 * (512 * 4 // 8 + 2)),
    ('31b', 'turboquant', 16 * 2 * 2 * 256, 4 * (512 * 4 // 8 + 4 * 2 + 128 + 4)),
    ('31b', 'quality', 16 * 2 * 2 * 256, 4 * (512 + 4 * 4 + 128 + 4)),
    ('12b', 'extreme', 8 * (256 * 5 // 8 + 2 + 256 * 4 // 8 + 2), 512 * 4 // 8 + 4 * 2 + 64 + 2)])
def test_presets_cost_the_bytes_of_their_codes_and_scales(name, preset, local, growing):
  cfg, kv = config.VARIANTS[name], kv_format.make(preset)
  layers = kv.layers(cfg)
  assert {layer.slot_bytes(2) for layer in layers.values() if layer.spec.window} == {local}
  owners = [layer for layer in layers.values() if not layer.spec.window]
  assert [layer.exact for layer in owners] == [False] * (len(owners) - 1) + [kv.exact_last]
  assert owners[0].slot_bytes(2) == growing
  more = size.kv_bytes(cfg, 32_768, kv) - size.kv_bytes(cfg, 16_384, kv)
  assert more == 16_384 * sum(layer.slot_bytes(2) for layer in owners)


def test_k_v_layers_that_cannot_be_one_are_quantized_as_two():
  for cfg, kv in ((config.B12, 'turboquant,unify=False'), (config.B12.replace(embedding='value'), 'turboquant'),
                  (config.B12.replace(global_rope_fraction=0.0), 'turboquant')):
    kinds = {str(layer) for layer in kv_format.make(kv).layers(cfg).values() if not layer.exact}
    assert kinds == {'K6 V6'}


def test_slots_of_codes_come_in_pages_and_end_with_the_window():
  codes, exact = (next(iter(kv_format.make(kv).layers(cfg).values())) for kv, cfg in (
      ('extreme', config.E2B.replace(pattern='G')), ('exact', config.E2B.replace(pattern='G'))))
  local = next(iter(kv_format.make('extreme').layers(config.E2B).values()))
  assert [codes.slots(n) for n in (1, 128, 1000)] == [128, 128, 1024] and exact.slots(1000) == 1000
  assert [local.slots(n) for n in (1, 500, 9000)] == [128, 512, 512]
