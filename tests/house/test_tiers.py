"""The two tiers: what makes a test slow is read before it runs, and a fast one that is slow fails."""

import ast
from types import SimpleNamespace

import pytest

from support import guard, tiers

pytest_plugins = ["pytester"]

CODE = """
import os
import subprocess
from functools import partial

from phased_consistency.trainer.training import loop
from phased_consistency.trainer.training.loop import train as run
from support.runs import start_pcm


def once(config):
    return loop.train(config)


def twice(config):
    once(config)
    return run(config)


def again_and_again(configs):
    return [run(config) for config in configs]


def in_a_loop(configs):
    for config in configs:
        once(config)


def refused(config):
    with pytest.raises(ValueError, match="no"):
        run(config)
    run(config)


def by_a_helper_of_its_own(config):
    def helper():
        return run(config)

    assert helper() == helper()


def imported_here():
    from phased_consistency.trainer.training.loop import Run

    Run(), Run()


def other_things(run):
    run(), run(), os.getcwd()


def a_process():
    start_pcm("train")


def another():
    subprocess.run(["true"])


def by_the_command(pcm):
    pcm("train", "a=1")
    pcm("train", "--dry-run")


def by_the_command_twice(pcm, fails):
    fails(1, "train", "a=1")
    pcm("train", "a=1")
"""


@pytest.fixture(scope="module")
def traits(tmp_path_factory):
    """The traits of a function above, by its name."""
    file = tmp_path_factory.mktemp("source") / "read.py"
    file.write_text(CODE)
    source = tiers.Source("read", file)
    known = {f"read.{name}": node for name, node in source.defined.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            tiers, "source_of", lambda module, real=tiers.source_of: source if module == "read" else real(module)
        )
        yield lambda name: tiers.traits_of(f"read.{name}") if f"read.{name}" in known else pytest.fail(name)


@pytest.mark.parametrize(
    ("name", "trainings"),
    [
        ("once", 1),
        ("twice", 2),
        ("again_and_again", 2),
        ("in_a_loop", 2),
        ("refused", 1),
        ("by_a_helper_of_its_own", 2),
        ("imported_here", 2),
        ("other_things", 0),
        ("by_the_command", 1),
        ("by_the_command_twice", 2),
    ],
)
def test_trainings_are_counted(name, trainings, traits):
    assert traits(name).trainings == trainings
    assert bool(traits(name).reasons()) == (trainings > 1)


@pytest.mark.parametrize("name", ["a_process", "another"])
def test_processes_are_seen(name, traits):
    assert traits(name).reasons() == ["starts a process"]


def test_every_name_that_is_looked_for_is_there():
    """A name that has moved would be looked for in vain."""
    ours = [name for name in (*tiers.TRAINING, *tiers.COSTLY) if name.startswith((tiers.PACKAGE, "support."))]
    assert len(ours) > 5
    for name in ours:
        module, _, last = name.rpartition(".")
        path = tiers.ROOT.joinpath(
            *(["tests", *module.split(".")] if name.startswith("support") else module.split(".")[1:])
        )
        defined = {node.name for node in ast.parse(path.with_suffix(".py").read_text()).body if hasattr(node, "name")}
        assert last in defined, name
    for name in tiers.READ:
        path = tiers.ROOT.joinpath(*name.split(".")[1:])
        assert path.is_dir() or path.with_suffix(".py").is_file(), name


def test_the_suite_is_sorted(request):
    """Known tests of each kind, where they are collected: this run's own."""
    marked = {item.nodeid: item.get_closest_marker("slow") for item in request.session.items}
    kinds = {
        "tests/trainer/training/test_kills.py::test_killed_runs_end_in_the_same_bytes": True,
        "tests/trainer/training/test_processes.py::test_they_keep_in_step": True,
        "tests/trainer/training/test_faults.py::test_too_little_memory": True,
        "tests/samplers/test_phases.py::test_targets_chain": False,
        "tests/trainer/training/test_update.py::test_a_clock_adds_up_its_parts": False,
    }
    assert {name: bool(marked[name]) for name in kinds if name in marked} == {
        name: slow for name, slow in kinds.items() if name in marked
    }


# --- the guard


FAST = {
    "a_process": (
        "import sys\ndef test_it():\n    sys.audit('subprocess.Popen', 'sh', [], None, None)\n",
        "starts a process",
    ),
    "one_not_there": (
        "import sys\ndef test_it():\n    sys.audit('subprocess.Popen', 'no-such', [], None, None)\n",
        None,
    ),
    "time": (
        "import time\ndef test_it():\n    end = time.process_time() + 0.3\n    while time.process_time() < end: pass\n",
        "of CPU time, more than 0.2",
    ),
    "waiting": ("import time\ndef test_it():\n    time.sleep(0.3)\n", None),
    "trains": ("from loop import Run\ndef test_it():\n    Run(), Run()\n", "trains 2 times"),
    "trains_once": ("from loop import Run\ndef test_it():\n    Run()\n", None),
    "shared": (
        "import pytest\nfrom loop import Run\n@pytest.fixture(scope='module')\ndef runs():\n    return Run(), Run()\n"
        "def test_it(runs):\n    Run()\n",
        None,
    ),
    "slow": ("import pytest, sys\n@pytest.mark.slow\ndef test_it():\n    sys.audit('os.fork')\n", None),
}


@pytest.mark.parametrize("case", FAST)
def test_a_fast_test_that_is_slow_fails_with_a_sentence(case, pytester, monkeypatch):
    text, fault = FAST[case]
    monkeypatch.setattr(guard, "LIMIT", 0.2)
    monkeypatch.setattr(guard, "TRAINING_MODULE", "loop")
    pytester.makepyfile(loop="class Run:\n    def __init__(self):\n        pass\n")
    pytester.makeini("[pytest]\nmarkers = slow: x\n")
    file = pytester.makepyfile(text)
    watching = guard.Tiers(judging=True)
    monkeypatch.setattr(guard, "traits_of_test", lambda item: SimpleNamespace(reasons=list))
    result = pytester.inline_run(file, "-p", "no:cacheprovider", plugins=[watching])
    passed, _, failed = result.listoutcomes()
    assert (len(passed), len(failed)) == ((0, 1) if fault else (1, 0))
    if fault:
        said = str(failed[0].longrepr)
        assert fault in said and "which `make check` runs" in said and said.count("\n") == 0
