"""The order of samples: nothing is left out, buckets in their proportion, and any position without those before it."""

import time
from collections import Counter

import numpy as np
import pytest

from phased_consistency.trainer.data.order import Order

# Sample numbers by bucket.
BUCKETS = [np.array([0, 3, 6, 9, 12]), np.array([1, 2, 4]), np.array([5, 7, 8, 10, 11, 13, 14])]


def groups(order, count):
    return [order.samples(number * order.group, order.group) for number in range(count)]


def test_one_buckets_passes_are_whole_and_in_orders_of_their_own():
    stream = Order([np.arange(10)], 4, 7).samples(0, 200)
    passes = [tuple(stream[at : at + 10]) for at in range(0, 200, 10)]
    assert all(sorted(one) == list(range(10)) for one in passes) and len(set(passes)) == 20


def test_a_group_is_of_one_bucket():
    homes = {int(sample): number for number, bucket in enumerate(BUCKETS) for sample in bucket}
    assert all(len({homes[sample] for sample in group}) == 1 for group in groups(Order(BUCKETS, 4, 0), 100))


def test_a_buckets_own_passes_are_whole_across_its_groups():
    """Samples that a bucket has left at the end of a pass come in its next group."""
    stream = groups(Order(BUCKETS, 4, 0), 150)
    for bucket in BUCKETS:
        samples = [sample for group in stream for sample in group if group[0] in bucket]
        passes = len(samples) // len(bucket)
        assert passes > 5
        for number in range(passes):
            assert sorted(samples[number * len(bucket) : (number + 1) * len(bucket)]) == bucket.tolist()


def test_in_each_round_every_sample_is_seen_as_often():
    stream = groups(Order(BUCKETS, 4, 0), 2 * 15)
    for start in (0, 15):
        counts = Counter(sample for group in stream[start : start + 15] for sample in group)
        assert counts == dict.fromkeys(range(15), 4)


def test_the_buckets_come_in_another_order_each_round_and_for_each_seed():
    def kinds(seed, start):
        return [
            next(i for i, b in enumerate(BUCKETS) if g[0] in b)
            for g in groups(Order(BUCKETS, 4, seed), 45)[start:][:15]
        ]

    assert len({tuple(kinds(seed, start)) for seed in (0, 1) for start in (0, 15, 30)}) == 6


@pytest.mark.parametrize("buckets", [BUCKETS, [np.arange(10)]])
def test_any_position_is_known_without_those_before_it(buckets):
    whole = Order(buckets, 6, 3).samples(0, 600)
    for position, count in ((0, 1), (599, 1), (17, 40), (251, 6), (30, 300)):
        assert Order(buckets, 6, 3).samples(position, count) == whole[position : position + count]
    backwards = Order(buckets, 6, 3)
    assert [backwards.samples(at, 1)[0] for at in reversed(range(600))] == whole[::-1]


def test_more_processes_see_together_what_one_sees():
    alone = Order(BUCKETS, 6, 3)
    for update in range(50):
        shares = [Order(BUCKETS, 6, 3).samples(update * 6 + rank * 2, 2) for rank in range(3)]
        assert sum(shares, []) == alone.samples(update * 6, 6)


def test_a_far_position_of_a_million_samples_is_found_fast():
    cut = np.split(np.random.default_rng(0).permutation(1_000_000), [10, 300_003, 700_000])
    order = Order(cut, 64, 1)
    started = time.perf_counter()
    samples = order.samples(10**8, 64)
    first = time.perf_counter() - started
    assert len({next(i for i, bucket in enumerate(cut) if sample in bucket) for sample in samples}) == 1
    started = time.perf_counter()
    order.samples(10**8 + 64, 64)
    assert first < 5 and time.perf_counter() - started < 0.5


def test_an_empty_bucket_is_refused():
    with pytest.raises(ValueError, match=r"2 buckets of \[3, 0\] samples: none may be empty"):
        Order([np.arange(3), np.arange(0)], 2, 0)
