"""The commands: options, and what is printed. Each prints JSON instead with --json."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

import flexattn
from flexattn.cli import bench as benchmark
from flexattn.cli import doctor as examination
from flexattn.cli import tour
from flexattn.cli.target import load
from flexattn.errors import FlexAttnError
from flexattn.pictures import block_cells, plot, svg
from flexattn.pictures import text as text_picture

app = typer.Typer(name="flexattn", no_args_is_help=True, add_completion=False,
                  help="Any attention variant in a few lines of Python: look inside.")
console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Mod = Annotated[str, typer.Argument(help="module:function, or module:expression",
                                    metavar="MODULE:FUNCTION")]
Length = Annotated[int, typer.Option(min=1, help="Queries, and keys unless told.")]


@contextmanager
def mistakes() -> Iterator[None]:
    """An error of ours is a message and exit code 1, without a traceback."""
    try:
        yield
    except FlexAttnError as error:
        errors.print(Text(f"{type(error).__name__}: {error}"), soft_wrap=True)
        raise typer.Exit(1) from None


def print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Versions, devices, the kernels that will serve, and a self-check."""
    report = examination.examine()
    if as_json:
        print_json({**asdict(report), "passed": report.passed})
    else:
        for title, facts in (("versions", report.versions), ("machine", report.machine)):
            console.print(_facts(title, facts))
        console.print(_checks(report))
    raise typer.Exit(0 if report.passed else 1)


def _facts(title: str, facts: dict[str, str]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    for name, text in facts.items():
        table.add_row(name, Text(text))
    return table


def _checks(report: examination.Report) -> Table:
    table = Table("device", "dtype", "forward", "backward", "error", "seconds", "",
                  title="self-check: out and gradients against the formula in float64",
                  title_justify="left")
    for check in report.checks:
        verdict = "[green]ok" if check.passed else f"[red]{check.problem}"
        table.add_row(check.device, check.dtype, check.forward, check.backward,
                      f"{check.error:.1e}", f"{check.seconds:.2f}", verdict)
    return table


@app.command()
def explain(mod: Mod, length: Length = 1024, batch: int = 1, heads: int = 4, head_dim: int = 64,
            dtype: str = "float32",
            target: Annotated[str, typer.Option(help="cpu or gpu: whose code")] = "cpu",
            as_json: AsJson = False) -> None:
    """Graph, gradient, generated code, kernel and tile of a mod."""
    with mistakes():
        found = load(mod)
        query = torch.randn(batch, heads, length, head_dim).to(getattr(torch, dtype))
        mask = flexattn.create_block_mask(found.function, batch, heads, length, length) \
            if found.is_mask else None
        explanation = flexattn.explain(query, query, query, None if found.is_mask
                                       else found.function, mask, target=target)
    if as_json:
        print_json(explanation.to_dict())
        return
    for title, text in explanation.sections():
        console.rule(Text(title), align="left")
        code = " in " in title and not title.startswith("block")
        language = "llvm" if target == "cpu" else "python"
        console.print(Syntax(text, language, background_color="default") if code else Text(text))


@app.command()
def mask(mod: Mod, length: Length = 1024,
         kv_length: Annotated[int | None, typer.Option(min=1, help="Keys.")] = None,
         batch: int = 1, heads: int = 1, block: Annotated[int, typer.Option(min=1)] = 128,
         at: Annotated[tuple[int, int], typer.Option(help="Batch entry and head drawn.")] = (0, 0),
         png: Annotated[Path | None, typer.Option(help="Write a picture (matplotlib).")] = None,
         to_svg: Annotated[Path | None, typer.Option("--svg", help="Write a picture.")] = None,
         as_json: AsJson = False) -> None:
    """A mask_mod as a block-sparsity picture."""
    with mistakes():
        sizes = (length, kv_length or length)
        made = flexattn.create_block_mask(load(mod).function, batch, heads, *sizes,
                                          BLOCK_SIZE=block)
        query, key = (torch.empty(batch, heads, n, 64) for n in sizes)
        facts = asdict(flexattn.explain(query, key, key, None, made).picture)  # type: ignore
        small = block_cells(made.rows(), *sizes, *at, limit=(32, 32))
        cells = block_cells(made.rows(), *sizes, *at, limit=(96, 96))
        if png is not None:
            plot(cells, mod).figure.savefig(png, dpi=160)
        if to_svg is not None:
            to_svg.write_text(svg(cells, mod), encoding="utf-8")
    if as_json:
        print_json({**facts, "picture": text_picture(small)})
        return
    console.print(Text(text_picture(small, mod)))
    console.print(f"{facts['sparsity']}% of the elements are never visited: {facts['full']} full, "
                  f"{facts['partial']} partial, {facts['empty']} empty blocks")
    for path in filter(None, (png, to_svg)):
        console.print(Text(f"wrote {path}"))


@app.command()
def bench(length: Length = 1024, batch: int = 1, heads: int = 8, head_dim: int = 64,
          dtype: str = "float32", device: str = "cpu",
          rounds: Annotated[int, typer.Option(min=1)] = 5, as_json: AsJson = False) -> None:
    """This machine: ours against torch's scaled_dot_product_attention."""
    with mistakes():
        size = benchmark.Size(batch, heads, length, head_dim, dtype, device)
        total = 2 * len(benchmark.cases(size))
        steps = track(benchmark.measure(size, rounds), "measuring", total, console=errors,
                      transient=True)
        timings = list(steps)
    if as_json:
        print_json({"size": asdict(size), "timings": [{**asdict(t), "ratio": t.ratio}
                                                      for t in timings]})
        return
    table = Table("case", "step", "flexattn ms", "sdpa ms", "times faster",
                  title=f"{batch} x {heads} heads x {length} x {head_dim}, {dtype}, {device}",
                  title_justify="left")
    for t in timings:
        table.add_row(t.case, t.step, f"{t.flexattn:.2f}", f"{t.sdpa:.2f}" if t.sdpa else "-",
                      f"{t.ratio:.2f}" if t.ratio else "-")
    console.print(table)


@app.command()
def demo(length: Length = 512, as_json: AsJson = False) -> None:
    """A tour: masks drawn, a bias trained, results checked against the formula."""
    stops = list(tour.stops(length))
    if as_json:
        print_json([asdict(stop) for stop in stops])
        return
    for stop in stops:
        console.rule(Text(stop.title), align="left")
        console.print(Syntax(stop.source, "python", background_color="default"))
        console.print(Text(stop.shown))
