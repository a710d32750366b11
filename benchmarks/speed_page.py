"""Tables and plots of ``speed.py`` for docs/speed.md: ``speed.py --page``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pieces import Row, insert
from speed import SYSTEMS

TRAININGS = (("3BPA", 5, "molecules/s"), ("3BPA", 32, "molecules/s"), ("Si", 2, "crystals/s"))
NAMES = {
    "mace-small": "mace-torch small", "mace-medium": "mace-torch medium",
    "nequip-small": "NequIP, two layers", "nequip-medium": "NequIP, four layers",
    "sevenn": "SevenNet-0", "matgl": "TensorNet", "chgnet": "CHGNet",
}  # fmt: skip
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#785ef0", "#000000")
MARKERS = "osD^vPX*<>"
NOTHING = "Not recorded yet."
Cell = Callable[[Row], str]


def write_page(rows: Sequence[Row], docs: Path) -> None:
    """Write the results of each processor into docs/speed.md, plots into docs/images."""
    cpus = list(dict.fromkeys(row["cpu"] for row in rows))
    parts = []
    for k, cpu in enumerate(cpus):
        mine = Results([row for row in rows if row["cpu"] == cpu])
        parts += mine.section(cpu, docs / "images", "" if k == 0 else f"_{k + 1}")
    insert(docs / "speed.md", "speed", "\n\n".join(parts) or NOTHING)


def label(model: str) -> str:
    return NAMES.get(model, f"`{model}`")


def number(x: float) -> str:
    return f"{x:.0f}" if abs(x) >= 100 else f"{x:.3g}"


def times_faster(row: Row) -> float | None:
    """Than the reference in the same run."""
    return row["reference_ms"] / row["ms"] if row.get("reference_ms") and "ms" in row else None


class Results:
    """Rows of one processor."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        # Ours first.
        models = dict.fromkeys(row["model"] for row in rows)
        self.models = sorted(models, key=lambda m: m in NAMES)
        self.reference = next((r["reference"] for r in rows if "reference" in r), "")
        # The first makes the page; the others have a table.
        found = {(row["dtype"], -row["threads"], row["allocator"] != "tuned") for row in rows}
        self.settings = [
            {"dtype": dtype, "threads": -less, "allocator": "default" if untuned else "tuned"}
            for dtype, less, untuned in sorted(found)
        ]
        self.main = self.settings[0]

    def one(self, **key: Any) -> Row:
        return next((row for row in self.rows if key.items() <= row.items()), {})

    def table(
        self, columns: Sequence[tuple[str, dict[str, Any]]], cell: Cell, head: str = "model"
    ) -> str:
        """Models against what is measured; a row or column with nothing in it is left out."""
        cells = {
            (model, title): cell(row) if (row := self.one(model=model, **key)) else ""
            for model in self.models
            for title, key in columns
        }
        titles = [t for t, _ in columns if any(cells[m, t] for m in self.models)]
        lines = [f"| {head} | {' | '.join(titles)} |", "|---|" + "---:|" * len(titles)]
        lines += [
            f"| {label(m)} | {' | '.join(cells[m, t] for t in titles)} |"
            for m in self.models
            if any(cells[m, t] for t in titles)
        ]
        return "\n".join(lines) if titles else ""

    def relative_memory(self, row: Row) -> str:
        """MiB, and in brackets in units of the reference."""
        if "peak_MiB" not in row:
            return ""
        work = {k: row[k] for k in (*self.main, "system", "training", "batch") if k in row}
        other = self.one(model=self.reference, **work).get("peak_MiB")
        share = f" ({row['peak_MiB'] / other:.2f})" if other else ""
        return number(row["peak_MiB"]) + share

    def section(self, cpu: str, images: Path, suffix: str) -> list[str]:
        systems = [(name, {"system": name, **self.main}) for name in SYSTEMS]
        trainings = [
            (f"{s} by {b}: {unit}", {"training": s, "batch": b, **self.main})
            for s, b, unit in TRAININGS
        ]
        settings = [
            (" ".join(map(str, s.values())), {"system": "Si216", **s}) for s in self.settings
        ]
        main, than = "{dtype}, threads: {threads}, allocator {allocator}", label(self.reference)
        main = main.format(**self.main)

        def ms(row: Row) -> str:
            return number(row["ms"]) if "ms" in row else ""

        def ratio(row: Row) -> str:
            return number(x) if (x := times_faster(row)) else ""

        parts = [
            (f"### Time\n\nms for a step, {main}.", self.table(systems, ms)),
            ("", self.scaling_plot(images / f"speed{suffix}.png")),
            (f"Times faster than {than} in the same run:", self.table(systems, ratio)),
            (
                f"### Memory\n\nPeak above the loaded model in MiB (in units of {than}), {main}.",
                self.table(systems, self.relative_memory),
            ),
            (
                "### Where the time goes\n\nPercent in finding neighbours / in Python around the "
                "model / in the model.",
                self.table(systems, shares),
            ),
            (
                "### Other settings\n\nms for a step of Si 216: precision, threads, allocator.",
                self.table(settings, ms),
            ),
            (
                f"### Training on forces\n\nStructures per second (times faster than {than}), "
                f"{main}.",
                self.table(trainings, per_second),
            ),
            ("", self.training_plot(images / f"speed_training{suffix}.png")),
            (
                f"Peak of memory of a step in MiB (in units of {than}):",
                self.table(trainings, self.relative_memory),
            ),
            ("### Against what we set out to reach", self.goals()),
            ("### Versions", self.versions()),
            ("### Left out", self.left_out()),
        ]
        text = [part for title, body in parts if body for part in (title, body) if part]
        return [f"## {cpu}", *([warning] if (warning := self.busy()) else []), *text]

    def busy(self) -> str:
        """A warning if other programs had part of the machine."""
        shares = [r["processors"] for r in self.rows if r["threads"] == 1 and "processors" in r]
        shares = shares or [r["processors"] / r["threads"] for r in self.rows if "processors" in r]
        share = sum(shares) / max(len(shares), 1)
        if share > 0.85:
            return ""
        return (
            f"**The machine was busy**: processes had {100 * share:.0f} % of what they asked for."
        )

    def scaling_plot(self, path: Path) -> str:
        """Time and memory for each atom against the number of atoms."""
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator

        figure = Figure(figsize=(12, 5.6), layout="constrained")
        axes = figure.subplots(1, 2)
        for k, model in enumerate(self.models):
            rows = [
                self.one(model=model, system=s, **self.main) for s in SYSTEMS if s != "molecule"
            ]
            rows = [row for row in rows if "ms" in row]
            for axis, quantity in zip(axes, ("ms", "peak_MiB"), strict=True):
                points = [(r["atoms"], r[quantity] / r["atoms"]) for r in rows if r[quantity] > 0]
                if points:
                    axis.loglog(
                        *zip(*points, strict=True),
                        "--" if model in NAMES else "-",
                        color=COLORS[k % len(COLORS)],
                        marker=MARKERS[k % len(MARKERS)],
                        label=label(model).strip("`"),
                        ms=6,
                    )
        sizes = [int(s[2:]) for s in SYSTEMS if s != "molecule"]
        for axis, text in zip(
            axes,
            ("time for each atom and step / ms", "peak memory for each atom / MiB"),
            strict=True,
        ):
            axis.set_xlabel("atoms (silicon)")
            axis.set_ylabel(text)
            axis.set_xticks(sizes, [str(n) for n in sizes])
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        handles, labels = axes[0].get_legend_handles_labels()
        if not handles:
            return ""
        figure.legend(handles, labels, loc="outside right upper", title="dashed: other packages")
        figure.savefig(path, dpi=110)
        return f"![time and memory for each atom against the number of atoms](images/{path.name})"

    def training_plot(self, path: Path) -> str:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(12, 5), layout="constrained")
        axes = figure.subplots(1, len(TRAININGS), sharey=True)
        models = [
            m
            for m in self.models
            if any(self.one(model=m, training=t[0], **self.main) for t in TRAININGS)
        ]
        for axis, (name, batch, unit) in zip(axes, TRAININGS, strict=True):
            rows = [self.one(model=m, training=name, batch=batch, **self.main) for m in models]
            values = [1e3 * batch / r["ms"] if "ms" in r else 0.0 for r in rows]
            colors = [COLORS[1] if m in NAMES else COLORS[0] for m in models]
            bars = axis.barh([label(m).strip("`") for m in models], values, color=colors)
            axis.bar_label(bars, [number(v) if v else "" for v in values], padding=3)
            axis.margins(x=0.18)
            axis.set_xlabel(unit)
            axis.set_title(f"{name}, batches of {batch}")
        if not models:
            return ""
        axes[0].invert_yaxis()
        figure.savefig(path, dpi=110)
        return f"![structures per second in training](images/{path.name})"

    def goals(self) -> str:
        """Facet small, as it is and compiled, beside the reference and TensorNet."""
        owns = [m for m in ("facet:small", "facet:small+compile") if m in self.models]
        other, lines = self.reference, []

        def value(key: str, model: str, **work: Any) -> float | None:
            return self.one(model=model, **work, **self.main).get(key)

        def faster(own: str, against: str, **work: Any) -> float | None:
            a, b = (times_faster(self.one(model=m, **work, **self.main)) for m in (own, against))
            return a / b if a and b else None

        def add(what: str, values: list[float | None], goal: str, unit: str = "") -> None:
            if any(values):
                cells = (number(x) + unit if x else "" for x in values)
                lines.append(f"| {what} | {' | '.join(cells)} | {goal} |")

        for system, against, goal in (
            ("Si216", other, 10), ("Si216", "matgl", 5), ("molecule", other, 6), ("Si8", other, 6),
        ):  # fmt: skip
            found = [faster(own, against, system=system) for own in owns]
            add(f"{system}, times faster than {label(against)}", found, f"≥ {goal}")
        for system in ("molecule", "Si8"):
            add(system, [value("ms", own, system=system) for own in owns], "≤ 5 ms", " ms")
        peaks = [value("peak_MiB", m, system="Si1000") for m in (*owns, other)]
        shares = [x / peaks[-1] if x and peaks[-1] else None for x in peaks[:-1]]
        add(f"Si1000, memory in units of {label(other)}", shares, "≤ 0.2")
        for batch in (5, 32):
            found = [faster(own, other, training="3BPA", batch=batch) for own in owns]
            add(f"training, batches of {batch}, times faster than {label(other)}", found, "≥ 8")
        head = f"| what | {' | '.join(label(own) for own in owns)} | goal |"
        return "\n".join([head, "|---|" + "---:|" * (len(owns) + 1), *lines]) if lines else ""

    def versions(self) -> str:
        lines = ["| model | parameters | versions |", "|---|---:|---|"]
        for model in self.models:
            rows = [r for r in self.rows if r["model"] == model and "versions" in r]
            sizes = [
                r["parameters"] for r in rows if "parameters" in r and r.get("system") != "molecule"
            ]
            every = dict.fromkeys(r["versions"] for r in rows)
            size = f"{sizes[0]:,}".replace(",", " ") if sizes else ""
            lines.append(f"| {label(model)} | {size} | {'; '.join(every)} |")
        return "\n".join(lines)

    def left_out(self) -> str:
        """What has no numbers, and why."""
        found: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            if "left_out" in row:
                found.setdefault((row["model"], row["left_out"]), []).append(row)
        lines = []
        for (model, reason), rows in found.items():
            works = dict.fromkeys(
                r.get("system") or f"{r['training']} by {r['batch']}" for r in rows
            )
            # What is the same in all of them.
            setting = [str(v) for k in self.main for v in {r[k] for r in rows} if alike(rows, k)]
            where = f" ({', '.join(setting)})" if setting else ""
            lines.append(f"- {label(model)}, {', '.join(works)}{where}: {reason}")
        return "\n".join(lines)


def alike(rows: Sequence[Row], key: str) -> bool:
    return len({row[key] for row in rows}) == 1


def shares(row: Row) -> str:
    keys = ("share_neighbors", "share_python", "share_model")
    return " / ".join(f"{100 * row[k]:.0f}" for k in keys) if keys[0] in row else ""


def per_second(row: Row) -> str:
    if "ms" not in row:
        return ""
    ratio = times_faster(row)
    return number(1e3 * row["batch"] / row["ms"]) + (f" ({number(ratio)})" if ratio else "")
