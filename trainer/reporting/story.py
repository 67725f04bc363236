"""The story of a run from its folder: its log, its LoRA files and its pictures, put together for a page."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ...samplers.families import family_title
from ..config.config import Config
from ..config.load import flat
from ..config.presets import PRESETS
from ..lora.describe import describe
from ..objectives import OBJECTIVES
from ..system.locks import only_run
from .log import KILLED, LOG, LogLine, read_log, without_places
from .progress import duration, roughly

Table = list[tuple[str, ...]]
STEP = re.compile(r"-(\d{7})$")  # the end of the name of a LoRA that was saved on the way
BESIDE = ("validation", "previews", "saving")  # parts of the time that are no training


@dataclass(frozen=True)
class Story:
    """One run, as its folder tells it. lines: of its log. damaged: gets a sentence on each file that cannot be read."""

    folder: Path
    lines: list[LogLine]
    damaged: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, folder: Path) -> Story:
        """The story of the run in a folder. Raises ValueError for a folder without a log."""
        lines = read_log(folder)
        if not any(line["kind"] == "start" for line in lines):
            raise ValueError(
                f"{folder} holds no {LOG}: it is not the folder of a run, the run has not come to its first update, or "
                "it is of an earlier version."
            )
        return cls(folder, lines)

    def of_kind(self, kind: str) -> list[LogLine]:
        """The lines of one kind, in their order."""
        return [line for line in self.lines if line["kind"] == kind]

    @cached_property
    def start(self) -> LogLine:
        """The last start, whose settings are those of the run."""
        return self.of_kind("start")[-1]

    @cached_property
    def settings(self) -> dict[str, Any]:
        return self.start["settings"]

    @property
    def name(self) -> str:
        return Path(self.settings["name"]).name  # of files in the folder, whatever a log says

    @cached_property
    def updates(self) -> list[LogLine]:
        return self.of_kind("update")

    @cached_property
    def measured(self) -> list[LogLine]:
        """The lines of the validations."""
        return self.of_kind("validation")

    @property
    def step(self) -> int:
        """The update that the last start has come to."""
        return self.starts[-1]["to"]

    @property
    def steps(self) -> int:
        """The updates that the run is to have."""
        return self.settings["train"]["steps"]

    @property
    def rate(self) -> float | None:
        """Updates a second of the last start, as its newest update tells; None before there is one."""
        newest = self.updates[-1] if self.updates else {}
        samples = newest.get("samples per second") if newest.get("step", 0) > self.start["step"] else None
        return samples / self.start["samples per update"] if samples else None

    @property
    def seconds_left(self) -> float | None:
        """How long the updates that are left take at that rate; None where there is none yet."""
        return (self.steps - self.step) / self.rate if self.rate else None

    @cached_property
    def state(self) -> tuple[str, str]:
        """(state, reason): finished, stopped, failed, killed or running, and why in words."""
        last = next(line for line in reversed(self.lines) if line["kind"] in ("start", "end"))
        if last["kind"] == "end":
            return last["how"], last.get("reason", "")
        if _is_running(self.folder):
            return "running", "the run is under way"
        return "killed", f"{KILLED}; the same command goes on from its last checkpoint"

    # --- what came out

    @cached_property
    def loras(self) -> dict[str, dict[str, Any]]:
        """The facts of `describe` on the LoRA of the last save ("last"), and on the best where there is one
        ("best"), each with its "name" and the sentence on its "test"."""
        best = self.folder / f"{self.name}-best.safetensors"
        final = self.folder / f"{self.name}.safetensors"
        saved = (p for p in self.folder.glob(f"{self.name}-*.safetensors") if STEP.search(p.stem))
        files = {"last": final if final.is_file() else max(saved, default=None), "best": best if self.best else None}
        sentences = {line["file"]: line["sentence"] for line in self.of_kind("saved")}

        loras = {}
        for which, path in files.items():
            if path and path.is_file():
                try:
                    facts = describe(path)
                except ValueError as error:
                    self.damaged.append(f"{path.name} is left out: {without_places(str(error))}")
                    continue
                loras[which] = facts | {"name": path.name, "test": sentences.get(path.name, "")}
        return loras

    @cached_property
    def title(self) -> str:
        """A few words on what the run makes."""
        lora = next(iter(self.loras.values()), None)
        base, family = self.settings["base"]["path"], self.settings["base"]["family"]
        if lora is None:
            return f"{self.settings['objective']['name']} from {base}"
        return f"{lora['method']} LoRA for {family_title(lora['family'] or family)}, made from {base}"

    @property
    def best(self) -> dict[str, Any]:
        """ "step", "figure" and "value" of the best LoRA; empty before there is one."""
        return (self.measured[-1]["best"] if self.measured else None) or {}

    def figures(self) -> tuple[list[str], Table]:
        """Columns and rows of a table: the figures of the first validation, at the best update, of the last,
        and of the last without averaging where there is that."""
        by_step = {line["step"]: line for line in self.measured}
        if not by_step:
            return [], []

        last, best = max(by_step), self.best.get("step")
        chosen = {"first": min(by_step), "best": best, "last": last}
        columns = {
            f"{which}: update {step}": by_step[step]["figures"] for which, step in chosen.items() if step in by_step
        }
        if by_step[last]["plain"]:
            columns |= {"last, not averaged": by_step[last]["plain"]}
        names = list(by_step[last]["figures"])
        rows = [(name, *(_number(figures.get(name)) for figures in columns.values())) for name in names]
        return list(columns), rows

    # --- what it cost

    @cached_property
    def starts(self) -> list[dict[str, Any]]:
        """Each start with its end; the end of one that is under way, or was killed, as far as it is known.

        Keys: "from" and "to" which update, "time", "seconds", "how", "reason", and what else the line of its end holds.
        """
        starts: list[dict[str, Any]] = []
        for line in self.lines:
            if line["kind"] == "start":
                begun = {"from": line["step"], "to": line["step"], "time": line["time"]}
                starts.append(begun | {"seconds": 0.0, "reason": ""})
            elif line["kind"] == "end":
                starts[-1] |= {"to": line["step"], **{k: v for k, v in line.items() if k not in ("kind", "step")}}
            elif "how" not in starts[-1]:
                starts[-1] |= {"to": line["step"], "seconds": line.get("seconds", starts[-1]["seconds"])}
        if "how" not in starts[-1]:
            starts[-1] |= dict(zip(("how", "reason"), self.state, strict=True))
        return starts

    def costs(self) -> Table:
        """Time, work and memory, over all starts."""
        seconds = sum(start["seconds"] for start in self.starts)
        done = sum(start["to"] - start["from"] for start in self.starts)
        samples = done * self.start["samples per update"]

        rows = [("time from the first update on", duration(seconds)), ("starts", str(len(self.starts)))]
        if expected := self.start.get("expected seconds"):
            rows.append(("expected of the last start, before it", f"about {roughly(expected)}"))
        if self.starts[-1]["how"] == "running" and self.seconds_left is not None:
            rows.append(("left", f"about {roughly(self.seconds_left)}"))
        again = f", {done - self.step} of them twice" if done > self.step else ""
        rows.append(("updates", f"{self.step} of {self.steps}{again}"))
        rows.append(("samples seen in training", f"{samples:,}"))
        if seconds:
            rows.append(("samples per second, all included", f"{samples / seconds:.3g}"))
        memory = [start["peak memory"] for start in self.starts if start.get("peak memory")]
        if memory:
            holder = "GPU" if self.start["device"]["kind"] == "cuda" else "process"
            rows.append((f"peak memory of the {holder}", f"{max(memory):.2f} GiB"))
        return rows

    def parts(self) -> list[tuple[str, float]]:
        """(part, its share) of the time of all starts that tell it, the largest first."""
        parts: Counter[str] = Counter()
        for start in self.starts:
            parts.update(start.get("parts", {}))
        total = parts.total() or 1.0
        return [(name, seconds / total) for name, seconds in parts.most_common() if seconds / total >= 0.0005]

    # --- what it was made with

    def changed(self) -> Table:
        """Settings that are not the preset's, or without a preset not the defaults: key, value, and the value there."""
        before = starting_point(self.settings, self.start["preset"])
        now = flat(self.settings)
        return [(k, json.dumps(v), _value(before, k)) for k, v in now.items() if k not in before or v != before[k]]

    def all_settings(self) -> Table:
        """(key, value) of every setting."""
        return [(key, json.dumps(value)) for key, value in flat(self.settings).items()]

    def notes(self) -> list[str]:
        """Sentences that a reader must know, each once, the latest start's last."""
        notes = [note for start in self.of_kind("start") for note in start["notes"]]
        for start in self.of_kind("start"):
            for change in start.get("changes", []):
                changes = ", ".join(f"{key} {then} to {now}" for key, (then, now) in change["changed"].items())
                notes.append(f"Settings changed after update {change['step']}: {changes}.")
        return list(dict.fromkeys([*notes, *self.damaged]))


def starting_point(settings: dict[str, Any], preset: str | None) -> dict[str, Any]:
    """The values that a run begins from, by dotted key: the sections' defaults, then the preset's."""
    values: dict[str, Any] = {}
    for name, info in Config.model_fields.items():
        section = OBJECTIVES[settings["objective"]["name"]] if name == "objective" else info.annotation
        if hasattr(section, "model_fields"):
            values |= {f"{name}.{k}": f.get_default() for k, f in section.model_fields.items() if not f.is_required()}
        elif not info.is_required():
            values[name] = info.get_default()
    if preset in PRESETS:
        values |= flat(PRESETS[preset].values)
    return json.loads(json.dumps(values))  # lists for tuples, as in the log


def _is_running(folder: Path) -> bool:
    """Whether a run holds the folder."""
    try:
        with only_run(folder, lambda _: None):
            return False
    except ValueError:
        return True
    except OSError:  # it cannot be written at all
        return False


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _value(settings: dict[str, Any], key: str) -> str:
    return json.dumps(settings[key]) if key in settings else ""
