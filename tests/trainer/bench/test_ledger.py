"""What an operation asks of a GPU, by closed forms; the meta device, whose tensors hold nothing, stands for it."""

import pytest
import torch

from phased_consistency.samplers import VPSchedule
from phased_consistency.trainer.bench.ledger import Ledger, LedgerClock, Tally


@pytest.fixture
def ledger():
    ledger = Ledger("meta")
    with ledger:
        yield ledger


def on_gpu(*shape, **settings):
    return torch.empty(*shape, device="meta", **settings)


def test_a_product_is_one_launch_that_moves_its_operands(ledger):
    x, w = on_gpu(64, 32), on_gpu(32, 16)
    assert ledger.total().launches == 0, "bare memory takes no kernel"
    y = x @ w
    assert ledger.total() == Tally(
        launches=1, flop=2 * 64 * 32 * 16, moved=4 * (64 * 32 + 32 * 16 + 64 * 16), peak=4 * (64 * 32 + 32 * 16 + 1024)
    )
    y.t()[0].detach().view_as(y[:, 0])
    assert ledger.total().launches == 1, "views take none"
    y.to(torch.bfloat16)
    assert (
        ledger.launched == {"mm float32": 1, "_to_copy bfloat16": 1} and ledger.moved["_to_copy bfloat16"] == 1024 * 6
    )


def test_what_is_freed_no_longer_counts(ledger):
    kept = on_gpu(1000)
    for _ in range(3):
        kept + 1  # one at a time
    del _
    assert (ledger.now, ledger.most) == (4 * 1000, 4 * 2000)
    torch.empty(10_000)
    assert ledger.most == 4 * 2000, "what is in main memory is none of the GPU's"


def test_parts_add_up_and_the_outer_one_counts(ledger):
    clock, x = LedgerClock(ledger), on_gpu(8)
    with clock.part("teacher"):
        x + 1
        with clock.part("target"):
            x + 1
    with clock.part("backward"):
        x + 1
    x + 1
    assert {name: part.launches for name, part in ledger.parts.items()} == {"other": 1, "teacher": 2, "backward": 1}
    assert ledger.total().launches == 4 and ledger.total().moved == 4 * 2 * 32
    ledger.clear()
    assert ledger.total() == Tally() and ledger.now == 32


def test_copies_wait_but_for_pinned_ones_that_need_not(ledger):
    here, there = torch.empty(6), on_gpu(6)
    pinned = here.pin_memory()
    for run, waits in (
        (lambda: here.to("meta"), 1),
        (lambda: here.to("meta", non_blocking=True), 1),  # from pageable memory the host must stage it first
        (lambda: there.copy_(here, non_blocking=True), 1),
        (lambda: pinned.to("meta"), 1),
        (lambda: pinned.to("meta", non_blocking=True), 0),
        (lambda: there.copy_(pinned, non_blocking=True), 0),
    ):
        before = ledger.total()
        run()
        after = ledger.total()
        assert (after.copies - before.copies, after.waits - before.waits, after.copied - before.copied) == (
            1,
            waits,
            24,
        )
    there.copy_(there)
    assert ledger.total().copies == 6, "on one side it is a launch"


def test_a_number_that_is_read_is_a_wait_with_its_line():
    ledger = Ledger("meta")
    with ledger:
        assert on_gpu(3).sum().item() == 1.0 and bool((on_gpu(3) > 0).any())
    assert ledger.total().waits == 2 and all(line.startswith("test_ledger.py:") for _, line in ledger.places)
    schedule = VPSchedule.from_betas()
    with ledger:
        schedule.alpha(on_gpu(1, dtype=torch.long))  # brings the table to the GPU
    ((kind, line),) = [place for place in ledger.places if place[1].startswith("samplers/schedule.py")]
    assert kind == "copy that waits" and line.partition(":")[2].isdigit()
