"""Which tests one worker of pytest-xdist runs together, and in which order they are begun."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from host.server import hosts
from support.guard import is_fast

ROOT = Path(__file__).resolve().parents[2]
FOREIGN = ("host", "web")  # folders of tests/ whose tests share one server, and one browser
SHARED = ('scope="module"', 'scope="class"')  # a fixture that the tests of a file share


class Spread:
    """A plugin of pytest: the longest groups of tests first, so that none is left for one worker at the end."""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        if hasattr(config, "workerinput"):  # in a worker: a run in one process keeps the order of the files
            in_order(items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_make_scheduler(self, config: pytest.Config, log):
        from xdist.scheduler import LoadScopeScheduling

        class Groups(LoadScopeScheduling):
            def _split_scope(self, nodeid: str) -> str:
                return group_of(nodeid)

        config.option.loadscopereorder = False  # the order is ours
        return Groups(config, log)


def group_of(nodeid: str) -> str:
    """The tests of a server or its browser are a group, and so are those of a file that share a fixture; any other test
    is one by itself."""
    file = nodeid.partition("::")[0]
    folder = file.removeprefix("tests/").partition("/")[0]
    if folder in FOREIGN:
        return " ".join([folder, *(host.parent.name for host in hosts() if f"[{host.parent.name}" in nodeid)])
    return file if shares(file) else nodeid


@cache
def shares(file: str) -> bool:
    """Whether tests of a file share a fixture."""
    text = (ROOT / file).read_text(encoding="utf-8")
    return any(scope in text for scope in SHARED)


def in_order(items: list[pytest.Item]) -> None:
    """Hosts and browsers first, then groups by how many slow tests they have."""
    groups = {item: group_of(item.nodeid) for item in items}
    slow = Counter(groups[item] for item in items if not is_fast(item))

    def rank(item: pytest.Item) -> tuple[bool, int, str]:
        group = groups[item]
        return not group.startswith(FOREIGN), -slow[group], group if slow[group] else ""

    items.sort(key=rank)
