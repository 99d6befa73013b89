"""`make demo`: train a byte-level transformer on packed real files, compare, write demo.html.

About a minute on two cores. `--seconds` sets how long to train, `--out` where the page goes.
"""

from __future__ import annotations

import argparse
import inspect
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import flexattn
from examples.demo import page
from examples.demo.attentions import with_flexattn, with_sdpa, with_torch_flex
from examples.demo.corpus import Batch, Corpus
from examples.demo.model import Attention, Decoder, alibi, documents_causal
from flexattn.analysis.gradient import gradient
from flexattn.trace import specialize, trace_score_mod

PICTURE_BLOCK = 32
WAYS: dict[str, Callable[[Tensor], Attention]] = {
    "flexattn": with_flexattn,
    "SDPA with a mask tensor": with_sdpa,
    "torch flex_attention, eager": with_torch_flex,
}


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument("--seconds", type=float, default=40, help="how long to train")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=2048, help="bytes in a packed sequence")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("demo.html"))
    options = parser.parse_args(words)

    torch.manual_seed(options.seed)
    corpus = Corpus(options.batch, options.length, options.seed)
    model = Decoder()
    batch = next(corpus)
    summary = describe(model, corpus, batch)
    print(summary)
    losses, rate = train(model, corpus, options.seconds)
    print(f"loss {losses[0]:.3f} -> {mean(losses[-10:]):.3f} nats a byte in {len(losses)} steps, "
          f"{rate:,.0f} tokens/s")
    agreement = compare_losses(model, batch)
    print(agreement)
    speeds = measure(model, batch)
    for speed in speeds:
        print(f"  {speed.name:28}{tokens(speed.training)} training{tokens(speed.forward)} forward")
    story = tell(model, batch, losses, speeds, summary, agreement)
    options.out.write_text(page.page(story), encoding="utf-8")
    print(f"wrote {options.out}")


def describe(model: Decoder, corpus: Corpus, batch: Batch) -> str:
    weights = sum(p.numel() for p in model.parameters())
    documents = int(batch.documents[:, -1].float().mean().add(1).round())
    return (f"A byte-level decoder of {weights / 1e6:.1f} M weights, trained on excerpts of "
            f"{len(corpus.files)} files of the Python standard library, about {documents} packed "
            f"to a sequence of {corpus.length} bytes, {corpus.batch} sequences a step.")


def train(model: Decoder, corpus: Corpus, seconds: float) -> tuple[list[float], float]:
    """Trains for so many seconds; gives the loss of every step, and tokens a second."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, total_iters=15)
    losses: list[float] = []
    start = time.perf_counter()
    with tqdm(total=round(seconds), unit="s", desc="training", bar_format=
              "{desc} {bar} {n:.0f}/{total_fmt} s{postfix}") as bar:
        while not losses or time.perf_counter() - start < seconds:
            batch = next(corpus)
            loss = step(model, optimizer, batch, with_flexattn(batch.documents))
            warmup.step()
            losses.append(loss)
            elapsed = time.perf_counter() - start
            rate = len(losses) * corpus.batch * corpus.length / elapsed
            bar.set_postfix_str(f" loss {mean(losses[-10:]):.3f}, {rate:,.0f} tokens/s")
            bar.update(min(elapsed, seconds) - bar.n)
    return losses, rate


def step(model: Decoder, optimizer: torch.optim.Optimizer, batch: Batch,
         attention: Attention) -> float:
    loss = model.loss(batch.inputs, batch.targets, attention)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def compare_losses(model: Decoder, batch: Batch) -> str:
    """The same weights have to give the same loss, whoever computes the attention."""
    with torch.no_grad():
        ours, sdpa = (model.loss(batch.inputs, batch.targets, way(batch.documents)).item()
                      for way in (with_flexattn, with_sdpa))
    difference = abs(ours - sdpa) / sdpa
    if difference > 1e-5:
        raise SystemExit(f"flexattn and SDPA disagree: loss {ours:.7f} and {sdpa:.7f}")
    return (f"Same weights, same bytes: loss {ours:.6f} with flexattn, {sdpa:.6f} with SDPA "
            f"(relative difference {difference:.0e}).")


def measure(model: Decoder, batch: Batch, rounds: int = 3) -> list[page.Speed]:
    """Tokens a second of every way, measured in turns; masks are made anew for every batch, as
    in training."""
    def forward(way: Callable[[Tensor], Attention]) -> None:
        with torch.no_grad():
            model.loss(batch.inputs, batch.targets, way(batch.documents))

    def training(way: Callable[[Tensor], Attention]) -> None:
        model.zero_grad()
        model.loss(batch.inputs, batch.targets, way(batch.documents)).backward()

    jobs = [(name, run) for name in WAYS for run in (training, forward)
            if not (run is training and WAYS[name] is with_torch_flex)]
    best = {job: 0.0 for job in jobs}
    for _ in tqdm(range(rounds), desc="comparing", leave=False):
        for name, run in jobs:
            start = time.perf_counter()
            run(WAYS[name])
            rate = batch.documents.numel() / (time.perf_counter() - start)
            best[name, run] = max(best[name, run], rate)
    return [page.Speed(name, best.get((name, training)), best[name, forward]) for name in WAYS]


def tell(model: Decoder, batch: Batch, losses: list[float], speeds: list[page.Speed], summary: str,
         agreement: str) -> page.Story:
    mod = specialize(trace_score_mod(alibi(torch.ones(6, requires_grad=True)), torch.float32,
                                     torch.device("cpu")))
    grid = block_kinds(batch.documents)
    empty = sum(row.count(0) for row in grid) / sum(map(len, grid))
    return page.Story(
        summary=summary,
        machine=f"{platform.platform()}, {torch.get_num_threads()} threads, torch "
                f"{torch.__version__}",
        losses=losses, agreement=agreement, speeds=speeds, mask=grid,
        mask_note=f"One packed sequence in blocks of {PICTURE_BLOCK} x {PICTURE_BLOCK}: "
                  f"{empty:.0%} of them are empty.",
        source=inspect.getsource(alibi) + "\n" + inspect.getsource(documents_causal),
        graph=str(mod.graph), gradient=str(gradient(mod.graph).graph),
        sample=sample(model))


def block_kinds(documents: Tensor) -> list[list[int]]:
    """0 empty, 1 partial, 2 full for every block of the first sequence."""
    length = documents.shape[1]
    mask = flexattn.create_block_mask(documents_causal(documents[:1]), 1, None, length, length,
                                      BLOCK_SIZE=PICTURE_BLOCK)
    grid = torch.zeros(-(-length // PICTURE_BLOCK), -(-length // PICTURE_BLOCK), dtype=torch.int)
    for kind, counts, indices in ((1, mask.kv_num_blocks, mask.kv_indices),
                                  (2, mask.full_kv_num_blocks, mask.full_kv_indices)):
        assert counts is not None and indices is not None
        for row, (count, columns) in enumerate(zip(counts[0, 0], indices[0, 0], strict=True)):
            grid[row, columns[:count].long()] = kind
    return grid.tolist()


def sample(model: Decoder, prompt: str = "def ", length: int = 240) -> str:
    text = torch.tensor([list(prompt.encode())])
    with torch.no_grad():
        while text.shape[1] < length:
            attention = with_flexattn(torch.zeros_like(text))
            chances = torch.softmax(model(text, attention)[0, -1] / 0.7, -1)
            text = torch.cat([text, torch.multinomial(chances, 1)[None]], dim=1)
    return bytes(text[0].tolist()).decode(errors="replace")


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def tokens(rate: float | None) -> str:
    return f"{rate:>9,.0f} tokens/s" if rate else f"{'-':>18}"


if __name__ == "__main__":
    main()
