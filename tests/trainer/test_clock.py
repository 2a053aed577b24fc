"""Nested phases share the wall time without counting any of it twice."""

import fura_rl.trainer.clock as clock_module
from fura_rl.trainer.clock import PhaseClock


def test_inner_time_is_not_the_outer_phase(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(clock_module.time, "perf_counter", lambda: next(now))
    clock = PhaseClock()
    with clock.phase("train"):  # 0
        with clock.phase("generate"):  # 1
            pass  # 2
        with clock.phase("generate"):  # 3
            pass  # 4
    # 5
    assert clock.snapshot() == {"train": 3, "generate": 2}
