"""The policy of the expert cache against brute force: never over capacity, never without a pinned key, true LRU."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.errors import InvalidInput
from actors.moe.cache import MARGIN, RATE, CacheSettings, Forecast, LruCache

KEYS = st.integers(0, 7)
CAPACITIES = st.integers(1, 6)


def brute_force_hits(capacity: int, uses: list[int]) -> int:
    """A use is a hit if fewer than `capacity` other keys were used since the last use of the same key."""
    hits = 0
    for now, key in enumerate(uses):
        before = [then for then in range(now) if uses[then] == key]
        hits += bool(before) and len(set(uses[before[-1] + 1 : now])) < capacity
    return hits


@settings(deadline=None)
@given(CAPACITIES, st.lists(KEYS, max_size=80))
def test_hits_are_those_of_lru(capacity: int, uses: list[int]) -> None:
    cache = LruCache[int](capacity)
    hits = 0
    for key in uses:
        if key in cache:
            hits += 1
            cache.touch(key)
        else:
            assert cache.admit(key) is not None
    assert hits == brute_force_hits(capacity, uses)


OPERATIONS = st.lists(st.tuples(st.sampled_from(["admit", "touch", "pin", "unpin", "drop"]), KEYS), max_size=120)


@settings(deadline=None)
@given(CAPACITIES, OPERATIONS)
def test_never_over_capacity_and_never_without_a_pinned_key(capacity: int, operations: list[tuple[str, int]]) -> None:
    cache, pins = LruCache[int](capacity), dict.fromkeys(range(8), 0)
    for name, key in operations:
        if name == "admit" and key not in cache:
            full_of_pins = sum(bool(n) for n in pins.values()) == capacity
            assert (cache.admit(key) is None) == full_of_pins
        elif name == "touch" and key in cache:
            cache.touch(key)
        elif name == "pin" and key in cache:
            cache.pin(key)
            pins[key] += 1
        elif name == "unpin" and pins[key]:
            cache.unpin(key)
            pins[key] -= 1
        elif name == "drop" and not pins[key]:
            cache.drop(key)
        here = list(cache)
        assert len(cache) == len(here) <= capacity
        assert len(cache) + cache.num_free == capacity
        assert all(key in cache and cache.is_pinned(key) for key, n in pins.items() if n)
        slots = [cache.slot(key) for key in here]
        assert len(set(slots)) == len(slots)
        assert all(0 <= slot < capacity for slot in slots)


@settings(deadline=None)
@given(CAPACITIES, st.lists(KEYS, max_size=40), st.sets(KEYS))
def test_what_is_to_be_kept_is_not_evicted(capacity: int, uses: list[int], keep: set[int]) -> None:
    cache = LruCache[int](capacity)
    for key in uses:
        if key not in cache:
            kept = {k for k in cache if k in keep}
            assert (cache.admit(key, keep) is None) == (len(kept) == capacity)
            assert kept <= set(cache)


def test_mistakes_of_the_caller_change_nothing() -> None:
    cache = LruCache[str](1)
    cache.admit("a")
    for wrong in (lambda: cache.admit("a"), lambda: cache.pin("b"), lambda: cache.unpin("a")):
        with pytest.raises(KeyError):
            wrong()
    cache.pin("a")
    with pytest.raises(KeyError):
        cache.drop("a")
    assert list(cache) == ["a"]


@pytest.mark.parametrize("size", [0, -1])
def test_no_room_at_all_is_named(size: int) -> None:
    with pytest.raises(InvalidInput, match="capacity: must be at least 1"):
        LruCache[int](size)
    with pytest.raises(InvalidInput, match="expert_cache_size: must be at least 1"):
        CacheSettings(size)


@settings(deadline=None)
@given(st.lists(st.sets(KEYS), min_size=1, max_size=40))
def test_a_forecast_is_the_moving_average_of_use(passes: list[set[int]]) -> None:
    forecast = Forecast[int]()
    for used in passes:
        forecast.note(used)
    age = range(len(passes))[::-1]
    for key in range(8):
        expected = sum(RATE * (1 - RATE) ** n for n, used in zip(age, passes, strict=True) if key in used)
        assert forecast.of(key) == pytest.approx(expected)
        assert 0 <= forecast.of(key) < 1
    forecast.forget(0)
    assert forecast.of(0) == 0


@settings(deadline=None)
@given(CAPACITIES, st.lists(KEYS, max_size=20), st.lists(st.sets(KEYS), max_size=30), st.sets(KEYS))
def test_exchanges_pay_and_fit(capacity: int, uses: list[int], passes: list[set[int]], pinned: set[int]) -> None:
    cache, forecast = LruCache[int](capacity), Forecast[int]()
    for key in uses:
        if key not in cache:
            cache.admit(key)
    for used in passes:
        forecast.note(used)
    for key in pinned & set(cache):
        cache.pin(key)
    planned = forecast.exchanges(range(8), cache)
    loaded = [key for key, _ in planned]
    victims = [victim for _, victim in planned if victim is not None]
    assert not set(loaded) & set(cache)
    assert len(set(loaded)) == len(loaded)
    assert len(set(victims)) == len(victims)
    assert len(loaded) - len(victims) <= cache.num_free
    assert all(v in cache and not cache.is_pinned(v) for v in victims)
    assert all(forecast.of(k) > forecast.of(v) + MARGIN for k, v in planned if v is not None)


def test_a_group_that_is_always_used_comes_back_for_one_that_was_used_once() -> None:
    cache, forecast = LruCache[str](2), Forecast[str]()
    for _ in range(20):
        forecast.note({"hot", "warm"})
    cache.admit("warm")
    cache.admit("once")
    forecast.note({"hot", "warm", "once"})
    assert forecast.exchanges(["hot", "warm", "once"], cache) == [("hot", "once")]
    assert forecast.hits_first(["hot", "warm", "once"], cache) == ["once", "warm", "hot"]
