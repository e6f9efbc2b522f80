"""The study of pairs: every cell of the grid of sources, targets, methods, re-initialisations and seeds."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from dwm_fast import ops
from dwm_fast.bank import fingerprint, make_domain, write_mask_file
from dwm_fast.bank.adopt import weight_names
from dwm_fast.errors import InputError
from dwm_fast.pacs.pairs import figures, report, table
from dwm_fast.pacs.pairs.finding import finding
from dwm_fast.pacs.pairs.lab import Mask, PairLab, Run
from dwm_fast.pacs.study import Stage, Study
from dwm_fast.pacs.words import said_of

if TYPE_CHECKING:
    from rich.table import Table


class PairStudy(Study):
    """Runs a configuration without a sequence; arguments, resuming and progress as `Study`."""

    lab: PairLab

    def make_lab(self) -> PairLab:
        lab = PairLab(self.config, self.data, self.folder, self.device)
        for source, target in self.config.pairs():
            for method in self._masking() if lab.classes_differ(source, target) else []:
                if lab.seen(method, target) is not None:
                    raise InputError(
                        f"method '{method}' looks at the target through the source's head, and {source} and {target} "
                        "have different classes; leave the method out, or take domains with the same classes"
                    )
        return lab

    def sources(self) -> list[str]:
        return list(dict.fromkeys(s for s, _ in self.config.pairs()))

    def stages(self) -> Iterator[Stage]:
        for seed, source in itertools.product(self.config.seeds, self.sources()):
            yield self.source_stage(source, seed, f"source {source}")
            for cell in self._masks(source, seed):
                yield self._mask_stage(*cell)
            for run in self._runs(seed):
                if run.source == source:
                    yield self._tune_stage(run)

    def _masks(self, source: str, seed: int) -> Iterator[tuple[str, str, int, str | None]]:
        """(source, method, seed, target that the method sees or None) of every mask on a source."""
        targets = [t for s, t in self.config.pairs() if s == source]
        for method in self._masking():
            for seen in dict.fromkeys(self.lab.seen(method, target) for target in targets):
                yield source, method, seed, seen

    def _mask_stage(self, source: str, method: str, seed: int, target: str | None) -> Stage:
        def run() -> str:
            given = self.lab.mask(source, method, seed, target).figures
            return f"keeps {given['fraction_kept']:.1%}, masked accuracy {given['masked_accuracy']:.3f}"

        planned = self.lab.mask_stage(source, method, seed, target)
        label = f"mask {source}, {method}" + (f" for {target}" if target else "")
        return Stage(planned[0], label, run, [planned], (self.lab.source_stage(source, seed)[0],))

    def _tune_stage(self, run: Run) -> Stage:
        def tune() -> str:
            shared = [row for row in self.lab.rows(run) if row["view"] == "shared"]
            return "; ".join(f"source {r['source_after']:.3f}, target {r['target_after']:.3f}" for r in shared)

        label = f"{run.source} -> {run.target}, {run.method}" + (f", {run.init}" if run.init != "-" else "")
        needs = [self.lab.source_stage(run.source, run.seed)[0]]
        if run.method != "none":
            seen = self.lab.seen(run.method, run.target)
            needs.append(self.lab.mask_stage(run.source, run.method, run.seed, seen)[0])
        return Stage(f"{run.name}-seed{run.seed}", label, tune, self.lab.tune_stages(run), tuple(needs))

    def _runs(self, seed: int) -> list[Run]:
        """The grid of one seed; "none" has no re-initialisation and always runs first, as the baseline."""
        ways = [("none", "-"), *itertools.product(self._masking(), self.config.inits)]
        return [Run(*pair, *way, seed) for pair, way in itertools.product(self.config.pairs(), ways)]

    def _masking(self) -> list[str]:
        return [method for method in self.config.methods if method != "none"]

    def results(self) -> dict[str, Any]:
        seeds, sources = self.config.seeds, self.sources()
        cells = [cell for seed, source in itertools.product(seeds, sources) for cell in self._masks(source, seed)]
        masks = {cell: self.lab.mask(*cell) for cell in cells}
        methods = list(dict.fromkeys(method for _, method, _, target in cells if target is None))
        rows = [row for seed in seeds for run in self._runs(seed) for row in self.lab.rows(run)]
        return {
            "format": 1,
            **self.measured(
                sources=[self.lab.source(s, k).figures for k, s in itertools.product(seeds, sources)],
                masks=[mask.figures for mask in masks.values()],
                rows=[_with_gains(row, rows) for row in rows],
                overlap=[
                    {
                        "method": m,
                        "seed": k,
                        "a": a,
                        "b": b,
                        "jaccard": _jaccard(masks[a, m, k, None], masks[b, m, k, None]),
                    }
                    for k, m in itertools.product(seeds, methods)
                    for a, b in itertools.combinations(sources, 2)
                ],
            ),
        }

    def files(self, results: dict[str, Any]) -> Iterator[tuple[str, str | bytes]]:
        rows = table.paper_table(results)
        yield "results.csv", table.rows_csv(results)
        yield "table.csv", table.to_csv(rows)
        yield "table.md", f"{table.to_markdown(rows)}\n{said_of(results['data'])}\n"
        drawn = figures.draw_all(results)
        yield from ((f"figures/{name}", content) for name, content in drawn.items())
        yield "report.html", report.page(results, drawn, self.command())

    def write(self, results: dict[str, Any]) -> None:
        """As `Study.write`, and the masks before."""
        for seed, source in itertools.product(self.config.seeds, self.sources()):
            for cell in self._masks(source, seed):
                self._write_mask(*cell)
        super().write(results)

    def _write_mask(self, source: str, method: str, seed: int, target: str | None) -> None:
        """A keep mask as a mask file, one bit per weight: masks/<method>-<source>[-<target>]-seed<k>.safetensors."""
        folder = self.folder / "masks"
        folder.mkdir(exist_ok=True)
        found = self.lab.mask(source, method, seed, target).found
        weights = self.lab.source(source, seed).end
        keep = weight_names(found.keep or {}, weights)
        record = make_domain(
            source,
            keep,
            method=method,
            classes=self.data.classes_of(source),
            options={"data": self.data.name, "seed": seed, "backbone": self.config.backbone},
            fingerprint=fingerprint({name: weights[name] for name in keep}),
        )
        domains = source if target is None else f"{source}-{target}"
        write_mask_file(folder / f"{method}-{domains}-seed{seed}.safetensors", record)

    def summary(self, results: dict[str, Any]) -> tuple[Table, list[str]]:
        return table.to_rich(table.paper_table(results)), finding(results)


def _with_gains(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row with S gain and T drop against the first way of "none" on the same source, target and seed."""
    base: Mapping[str, Any] = next(
        r for r in rows if r["method"] == "none" and all(r[k] == row[k] for k in ("source", "target", "seed"))
    )
    return {
        **row,
        "s_gain": row["source_after"] - base["source_after"],
        "t_drop": row["target_after"] - base["target_after"],
    }


def _jaccard(a: Mask, b: Mask) -> float:
    assert a.found.keep is not None
    assert b.found.keep is not None
    names = [n for n, mask in a.found.keep.items() if mask.shape == b.found.keep[n].shape]  # heads may differ
    bits_a, bits_b = (ops.pack([keep[n] for n in names]) for keep in (a.found.keep, b.found.keep))
    return ops.jaccard(bits_a, bits_b, [a.found.keep[n].numel() for n in names])
