"""What is made of the times of two caches."""

import pytest

from experiments import speed_kv


def test_a_speed_up_is_told_beside_what_the_bytes_allow():
  row = lambda attention, step, size: {'context': 1024, 'attention_seconds': attention, 'step_seconds': step, 'attention_bytes': size,
                                       'bandwidth': 1000.0}
  found, = speed_kv.compare([row(2.0, 5.0, 500)], [row(3.0, 6.0, 1000)])
  assert found == pytest.approx({
      'context': 1024, 'attention_times_as_fast': 1.5, 'attention_ceiling': 2.0, 'attention_share_of_ceiling': 0.75,
      'attention_share_of_bandwidth': 0.25, 'step_times_as_fast': 1.2})


def test_formats_that_quantize_no_global_layer_are_not_compared():
  with pytest.raises(ValueError, match='neither exact nor separate quantizes a global layer of e2b-toy'):
    speed_kv.measure('e2b-toy', 'exact', 'separate', 'float32', 1, (8,), 1, 'as_is')
