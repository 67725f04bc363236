"""Signals to one process of several, which a launcher passes on."""

import signal

import pytest

from phased_consistency.trainer.system import stopping


def test_a_signal_that_a_launcher_passes_on_is_no_second_one(monkeypatch):
    """The terminal's Ctrl-C comes to each process, and from the launcher again."""
    said = []
    with stopping.Stopper(said.append, launched=True) as stopper, stopper.saving("Stopping."):
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)
        assert stopper.stop_requested and len(said) == 1
        monkeypatch.setattr(stopping, "PASSED_ON", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
