"""The models suite: training steps and generation of transformers' models, by attention.

In: the options of benchmarks.run. Out: rows, a generator for each section. Shapes are those of
Gemma 2, Mistral and Llama 3, scaled down on a CPU; weights are random. "without attention"
replaces attention by a copy of its values: what is missing to a provider's time is attention's
share. A provider that cannot run a case, or for which it is too large, is named on stderr and left
out.
"""

from __future__ import annotations

import argparse
import copy
import gc
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks.measure import Times, interleaved, synchronize
from benchmarks.report import Row
from flexattn.integrations.transformers import register

DEVICE = "cpu"
WITHOUT = "without attention"
PROVIDERS = {"ours": "flexattn", "sdpa": "sdpa", "eager": "eager", "flex": "flex_attention",
             WITHOUT: "none"}


@dataclass(frozen=True)
class Workload:
    """A model, and the sequences it sees."""

    name: str
    config: Any
    batch: int
    length: int
    dtype: torch.dtype
    device: str

    @property
    def shape(self) -> str:
        c = self.config
        return (f"B{self.batch} S{self.length} layers{c.num_hidden_layers} "
                f"H{c.num_attention_heads}/{c.num_key_value_heads} D{c.head_dim} "
                f"hidden{c.hidden_size} window{getattr(c, 'sliding_window', None)}")


def _sizes(hidden: int, inner: int, heads: int, kv_heads: int, head_dim: int, layers: int,
           length: int, window: int) -> dict[str, Any]:
    return {"vocab_size": 8192, "hidden_size": hidden, "intermediate_size": inner,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim,
            "num_hidden_layers": layers, "max_position_embeddings": 2 * length,
            "sliding_window": window, "use_cache": False}


def small() -> Iterator[Workload]:
    """For two cores. Gemma 2 alternates a window of half the length with full layers; Mistral has
    a window of a quarter in every layer."""
    for name, kind, kv_heads, inner, window in (
            ("gemma2", transformers.Gemma2Config, 4, 2048, 512),
            ("mistral", transformers.MistralConfig, 2, 1792, 256)):
        config = kind(**_sizes(512, inner, 8, kv_heads, 64, 4, 1024, window))
        yield Workload(name, config, 1, 1024, torch.float32, "cpu")


def large() -> Iterator[Workload]:
    """For one GPU: a sliding and a full layer of Gemma 2 9B at its full length; and, since SDPA
    knows no softcap, the same without it."""
    sizes = _sizes(3584, 14336, 16, 8, 256, 2, 8192, 4096)
    for name, cap in (("gemma2", 50.0), ("gemma2_no_softcap", None)):
        config = transformers.Gemma2Config(**sizes, attn_logit_softcapping=cap)
        yield Workload(name, config, 1, 8192, torch.bfloat16, "cuda")


def served() -> Iterator[Workload]:
    """For one GPU: four layers of Llama 3 8B."""
    sizes = _sizes(4096, 14336, 32, 8, 128, 4, 8192, 0)
    del sizes["sliding_window"]
    yield Workload("llama3", transformers.LlamaConfig(**sizes), 16, 4096, torch.bfloat16, "cuda")


CASES = ("gemma2", "gemma2_no_softcap", "mistral", "llama3")


def _chosen(workloads: Iterator[Workload], options: argparse.Namespace) -> Iterator[Workload]:
    return (w for w in workloads if not options.cases or w.name in options.cases)


def training(options: argparse.Namespace) -> Iterator[Row]:
    """One step: forward, backward, AdamW."""
    for workload in _chosen(small() if options.device == "cpu" else large(), options):
        yield from _compare(workload, _training_step, options)


def generation(options: argparse.Namespace) -> Iterator[Row]:
    """Greedy tokens after a prompt, with a cache that grows."""
    cpu = options.device == "cpu"
    for workload in _chosen(small() if cpu else served(), options):
        if cpu:
            workload = replace(workload, batch=4, length=512)
        yield from _compare(workload, partial(_generation, new=32 if cpu else 256), options,
                            warm=partial(_generation, new=8))


SECTIONS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "training": training, "generation": generation,
}


Make = Callable[[Any, Workload], Callable[[], object]]


def _compare(workload: Workload, make: Make, options: argparse.Namespace,
             warm: Make | None = None) -> Iterator[Row]:
    """One model serves all providers, told before each run whose attention to use. `warm` makes a
    shorter run that meets all that is to be compiled."""
    register()
    transformers.AttentionInterface.register("none", _values_alone)
    transformers.AttentionMaskInterface.register("none", lambda *_, **__: None)
    torch._dynamo.config.recompile_limit = 64  # torch's flex_attention is to stay compiled
    net = _model(workload)
    run = make(net, workload)
    first = warm(net, workload) if warm else run
    asked = [*options.providers, WITHOUT] if options.providers else PROVIDERS
    runs = {name: partial(_run_with, net, attention, run)
            for name, attention in PROVIDERS.items() if name in asked and _serves(name, workload)
            and _runs(name, partial(_run_with, net, attention, first), workload)}
    times = interleaved(runs, rounds=options.rounds, device=workload.device)
    for name, t in times.items():
        yield Row(workload.name, workload.shape, str(workload.dtype).removeprefix("torch."), name,
                  t.median * 1e3, spread=t.spread, rate=_share(t, times[WITHOUT]),
                  rate_unit="% attention", ours_is_faster=t.slower_than(times["ours"])
                  if "ours" in times and name != "ours" else None)


def _runs(name: str, run: Callable[[], object], workload: Workload) -> bool:
    """Whether it does, once; how long that took, or why not, is said."""
    start = time.perf_counter()
    try:
        run()
        synchronize(workload.device)
        print(f"\n{workload.name}, {name}: first run {time.perf_counter() - start:.1f} s",
              file=sys.stderr, flush=True)
    except Exception as problem:
        print(f"\n{workload.name}, {name}: {type(problem).__name__}: {str(problem)[:120]}",
              file=sys.stderr, flush=True)
        return False
    finally:
        gc.collect()
        if workload.device != "cpu":
            torch.get_device_module(workload.device).empty_cache()
    return True


def _run_with(net: Any, attention: str, run: Callable[[], object]) -> object:
    net.set_attn_implementation(attention)
    return run()


def _share(t: Times, without: Times) -> float:
    return 100 * (1 - without.median / t.median)


def _serves(name: str, workload: Workload) -> bool:
    """SDPA has no softcap; torch's flex_attention has no backward on a CPU."""
    softcap = getattr(workload.config, "attn_logit_softcapping", None) is not None
    return not (name == "sdpa" and softcap) and not (name == "flex" and workload.device == "cpu")


def _values_alone(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor,
                  *_: Any, **__: Any) -> tuple[Tensor, None]:
    """Every query gets the value of its own head and position; no scores."""
    groups = query.shape[1] // value.shape[1]
    own = value[:, :, -query.shape[2]:].transpose(1, 2)
    return own.repeat_interleave(groups, 2).contiguous(), None


def _model(workload: Workload) -> Any:
    torch.manual_seed(0)
    with torch.device(workload.device):
        return transformers.AutoModelForCausalLM.from_config(
            copy.deepcopy(workload.config), dtype=workload.dtype, attn_implementation="eager")


def _tokens(workload: Workload) -> Tensor:
    shape = (workload.batch, workload.length)
    return torch.randint(3, workload.config.vocab_size, shape, device=workload.device)


def _training_step(net: Any, workload: Workload) -> Callable[[], object]:
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5, fused=True)
    tokens = _tokens(workload)

    def step() -> None:
        net(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _generation(net: Any, workload: Workload, new: int) -> Callable[[], object]:
    net.eval()
    tokens = _tokens(workload)
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False,
               "use_cache": True, "attention_mask": torch.ones_like(tokens), "pad_token_id": 0}
    return lambda: net.generate(tokens, **options)
