"""Mods under torch.compile: Dynamo reads a mod, we trace what it read, one operator remains.

In: `with_mods(name, like, dtype, score_mod, mask_mod, *args)` met by Dynamo in a function it
compiles. Out: in its graph, one call of our operator `name` (runtime.operator) with *args, the text
of both mods (trace.written), and the tensors and numbers they capture. Dynamo runs the mods on 0-d
tensors of its own under its guards (so closures, modules and parameters are followed, and a change
recompiles or becomes an input); the small graph it makes of each is run on our proxies. What a mod
computes from captured tensors alone becomes part of the caller's graph.
Rejects what the tracer rejects, and, as a graph break, what Dynamo cannot read.

Dynamo's classes are not public: our tests pass with torch 2.11 and 2.13.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterable, Iterator
from types import CodeType
from typing import Any

import torch
from torch import Tensor, fx
from torch._compile import _disable_dynamo
from torch._ops import HigherOrderOperator
from torch.overrides import TorchFunctionMode

from flexattn.errors import FlexAttnError
from flexattn.trace import Trace, trace_mask_mod, trace_score_mod
from flexattn.trace.proxy import contains_proxy, index
from flexattn.trace.tracer import untraced
from flexattn.trace.written import NOTHING, Written, write

_NAME = "flexattn_with_mods"


class _WithMods(HigherOrderOperator):
    """What Dynamo knows functions by that take functions. Its name is asked for when Dynamo meets
    it, the moment to tell Dynamo what to do, without importing it any sooner."""

    def __init__(self) -> None:
        super().__init__(_NAME)

    @property
    def __name__(self) -> str:
        _register()
        return _NAME

    @__name__.setter
    def __name__(self, name: str) -> None:
        pass

    @_disable_dynamo
    def __call__(self, name: str, like: Tensor, dtype: torch.dtype, score_mod: Callable | None,
                 mask_mod: Callable | None, *args: Any) -> Any:
        """Without Dynamo (fake tensors, dispatch modes, export, after a graph break): the same
        operator, traced here."""
        score = NOTHING if score_mod is None else write(
            trace_score_mod(score_mod, dtype, like.device))
        mask = NOTHING if mask_mod is None else write(trace_mask_mod(mask_mod, like.device))
        captures = [[*mod.captures, *(torch.scalar_tensor(n, dtype=torch.float64,
                                                          device=like.device) for n in mod.reals)]
                    for mod in (score, mask)]
        return _operator(name)(*args, score.text, mask.text, *captures,
                               [*score.whole, *mask.whole])


with_mods = _WithMods()


def _operator(name: str) -> Any:
    """"attention", or "attention.masked" for an overload."""
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.flexattn, packet), overload or "default")


def _register() -> None:
    higher_order = sys.modules.get("torch._dynamo.variables.higher_order_ops")
    if higher_order is not None and _NAME not in higher_order._hop_name_to_variable_class:
        higher_order._hop_name_to_variable_class[_NAME] = _variable_class()


def _variable_class() -> type:
    from torch._dynamo.exc import unimplemented
    from torch._dynamo.variables.builder import wrap_fx_proxy
    from torch._dynamo.variables.higher_order_ops import TorchHigherOrderOperatorVariable

    class WithModsVariable(TorchHigherOrderOperatorVariable):
        _HOP_NAME = _NAME

        def _call_function(self, tx: Any, args: Any, kwargs: Any) -> Any:
            name, like, dtype, score_mod, mask_mod, *rest = args
            scalar = dtype.as_python_constant()
            try:
                score = _written(self, tx, like, score_mod, scalar, "score_mod")
                mask = _written(self, tx, like, mask_mod, None, "mask_mod")
            except FlexAttnError as error:  # the eager call after the graph break raises it
                unimplemented(gb_type="flexattn cannot trace a mod", context=name.value,
                              explanation=str(error), hints=[])
            mods = (score.text, mask.text, [*score.captures, *score.reals],
                    [*mask.captures, *mask.reals], [*score.whole, *mask.whole])
            given = (*(arg.as_proxy() for arg in rest), *mods)
            proxy = tx.output.create_proxy(
                "call_function", _operator(name.as_python_constant()), given, {})
            return wrap_fx_proxy(tx=tx, proxy=proxy)

    return WithModsVariable


def _written(variable: Any, tx: Any, like: Any, mod: Any, dtype: torch.dtype | None,
             role: str) -> Written:
    """The mod as text; captures and numbers as proxies of the caller's graph."""
    if mod.is_python_constant() and mod.as_python_constant() is None:
        return NOTHING
    read = tx.output.tracing_context.traced_code
    before = len(read)
    graph, outer = _speculate(variable, tx, like, mod, dtype, role)
    device = like.as_proxy().node.meta["example_value"].device
    body = _Body(tx, graph, outer, device)
    trace: Trace = (trace_mask_mod(body.run, device) if dtype is None
                    else trace_score_mod(body.run, dtype, device))
    written_out = set(map(repr, _constants(read[before:])))
    captured = {repr(n) for n in _numbers(graph)} - written_out
    found = write(trace, lambda number: repr(number) in captured)
    return Written(found.text, tuple(map(body.captured, found.captures)),
                   tuple(map(body.scalar, found.reals)), tuple(map(body.whole, found.whole)))


def _constants(values: Iterable[Any]) -> Iterator[Any]:
    """What stands in code itself; all other numbers that a mod reads may differ the next time."""
    for value in values:
        if isinstance(value, CodeType):
            yield from _constants(value.co_consts)
        elif isinstance(value, (tuple, frozenset)):
            yield from _constants(value)
        else:
            yield value


def _numbers(graph: fx.Graph) -> list[int | float]:
    found: list[Any] = []
    for node in graph.nodes:
        fx.node.map_aggregate((node.args, node.kwargs), lambda value: found.append(value)
                         if type(value) in (int, float) else None)
    return found


def _speculate(variable: Any, tx: Any, like: Any, mod: Any, dtype: torch.dtype | None,
               role: str) -> tuple[fx.Graph, dict[fx.Node, fx.Proxy]]:
    """Dynamo's graph of the mod, and for each of its nodes that is captured the caller's proxy."""
    from torch._dynamo.variables.base import VariableTracker
    from torch._dynamo.variables.higher_order_ops import discard_graph_changes, speculate_subgraph

    def scalar(dtype: torch.dtype) -> Any:
        return like.call_method(tx, "new_empty", [VariableTracker.build(tx, [])],
                                {"dtype": VariableTracker.build(tx, dtype)})

    with discard_graph_changes(tx):
        scalars = [] if dtype is None else [scalar(dtype)]
        scalars += [scalar(torch.int64) for _ in range(4)]
    # A whole number on a module is one captured value among others, not what makes its graph; and
    # a mod's defaults (lambda b, h, q_idx, kv_idx, n=limit: ...) differ from mask to mask.
    with _IndexByScalars(), torch._dynamo.config.patch(
            allow_unspec_int_on_nn_module=True, skip_guards_on_constant_func_defaults=False):
        _, graph, lifted = speculate_subgraph(
            tx, mod, scalars, {}, description=f"flexattn: {role}", source_target=variable.value,
            set_subgraph_inputs="flatten_manual")
    outer = {inner.node: proxy for proxy, inner in lifted.items()}
    _free_floats(tx, graph, outer)
    return graph, outer


def _free_floats(tx: Any, graph: fx.Graph, outer: dict[fx.Node, fx.Proxy]) -> None:
    """A captured float that Dynamo first met in this mod is the .item() of a tensor in the mod's
    graph, where no later mod can use it: it becomes a node of the caller's."""
    known = {variable.proxy.node: variable for variable in tx.output.variable_tracker_cache.values()
             if hasattr(vars(variable).get("proxy"), "node")}
    for node in graph.nodes:
        read_here = node.op == "call_method" and node.target == "item"
        if read_here and isinstance(node.meta["example_value"], torch.SymFloat):
            read = tx.output.create_proxy("call_method", "item", (outer[node.args[0]],), {})
            read.node.meta["example_value"] = node.meta["example_value"]
            outer[node] = read
            if node in known:
                known[node].proxy = read


class _IndexByScalars(TorchFunctionMode):
    """table[q_idx] on fake tensors: by the tensor q_idx, where torch would read its value."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.Tensor.__getitem__ and any(map(_is_scalar, _as_tuple(args[1]))):
            table, keys = args[0], _as_tuple(args[1])
            if any(k is Ellipsis for k in keys):
                at = next(i for i, k in enumerate(keys) if k is Ellipsis)
                gap = table.dim() - len(keys) + 1
                keys = keys[:at] + (slice(None),) * gap + keys[at + 1:]
            if all(isinstance(k, (int, Tensor)) or k == slice(None) for k in keys):
                places = [torch.tensor(k, device=table.device) if isinstance(k, int) else
                          k if isinstance(k, Tensor) else None for k in keys]
                return torch.ops.aten.index(table, places)
        return func(*args, **(kwargs or {}))


class _Body:
    """Runs Dynamo's graph of a mod on the tracer's proxies. Values that depend on none of them
    keep Dynamo's fake value, by which their proxy in the caller's graph is found again."""

    def __init__(self, tx: Any, graph: fx.Graph, outer: dict[fx.Node, fx.Proxy],
                 device: torch.device) -> None:
        self._tx, self._graph, self._outer, self._device = tx, graph, outer, device
        self._nodes: dict[int, fx.Node] = {}  # id of a fake value -> the node it is of
        self._kept: list[Any] = []

    def run(self, *scalars: Any) -> Any:
        values: dict[fx.Node, Any] = {}
        inputs, self._tape = iter(scalars), scalars[0].tape
        for node in self._graph.nodes:
            if node.op == "output":
                result = fx.map_arg(node.args[0], values.__getitem__)
                return result[0] if isinstance(result, tuple) and len(result) == 1 else result
            if node.op == "placeholder" and node not in self._outer:
                values[node] = next(inputs)
            elif node.op in ("call_function", "call_method"):
                values[node] = self._call(node, *fx.map_arg((node.args, node.kwargs),
                                                            values.__getitem__))
            else:
                values[node] = self._keep(node)
        raise AssertionError("a graph without an output")

    def _call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if contains_proxy(args) or contains_proxy(tuple(kwargs.values())):
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            return node.target(*args, **kwargs)  # type: ignore[operator]
        if node.target is operator.getitem and any(map(_is_scalar, _as_tuple(args[1]))):
            return index(self._tape, *args)  # torch would read the index's value
        if node in self._outer:
            return self._keep(node)
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
        made = untraced(self._tape, str(name), args, kwargs)
        return self._keep(node) if made is None else made

    def _keep(self, node: fx.Node) -> Any:
        value = node.meta["example_value"]
        self._nodes[id(value)] = node
        self._kept.append(value)
        return value

    def outer(self, value: Any) -> fx.Proxy:
        """The caller's proxy of a fake value; nodes of the mod it needs are added there."""
        return self._lift(self._nodes[id(value)])

    def whole(self, value: Any) -> Any:
        return value if isinstance(value, int) else self.outer(value)

    def scalar(self, value: Any) -> fx.Proxy:
        """A real number as a float64 scalar on the mod's device, in the caller's graph. A symbolic
        one moves there without anybody waiting."""
        if not isinstance(value, torch.SymFloat):
            return self._create("call_function", torch.full, ((), value),
                                {"dtype": torch.float64, "device": self._device})
        made = self._tensor(self.outer(value))
        return made if self._device.type == "cpu" else self._moved(made)

    def captured(self, value: Any) -> fx.Proxy:
        """A captured tensor on the mod's device, where a scalar need not be."""
        found = self.outer(value)
        return found if value.device == self._device else self._moved(found)

    def _moved(self, tensor: fx.Proxy) -> fx.Proxy:
        return self._create("call_method", "to", (tensor, self._device), {"non_blocking": True})

    def _tensor(self, number: fx.Proxy) -> fx.Proxy:
        """A symbolic number as a tensor, by operations on tensors down to what Dynamo was given: a
        graph that used the number would hold for one value only (torch 2.11: one that used what
        is computed of it)."""
        node = number.node
        if node.op == "call_function" and node.target in _ON_TENSORS:
            args = [self._tensor(fx.Proxy(a, number.tracer))
                    if isinstance(a, fx.Node) and isinstance(_example(a), torch.SymFloat) else a
                    for a in node.args]
            return self._create("call_function", node.target, tuple(args), {})
        one = self._create("call_function", torch.ones, ((),), {"dtype": torch.float64})
        return self._create("call_function", torch.mul, (one, number), {})

    def _lift(self, node: fx.Node) -> fx.Proxy:
        if node not in self._outer:
            args, kwargs = fx.map_arg((node.args, node.kwargs), self._lift)  # type: ignore
            self._outer[node] = self._create(node.op, node.target, args, kwargs)
        return self._outer[node]

    def _create(self, op: str, target: Any, args: Any, kwargs: Any) -> fx.Proxy:
        from torch._dynamo.utils import get_fake_value, set_example_value

        proxy = self._tx.output.create_proxy(op, target, args, kwargs)
        set_example_value(proxy.node, get_fake_value(proxy.node, self._tx,
                                                     allow_non_graph_fake=True))
        return proxy


_ON_TENSORS = frozenset({operator.add, operator.sub, operator.mul, operator.truediv, operator.neg})


def _example(node: fx.Node) -> Any:
    return node.meta.get("example_value")


def _as_tuple(key: Any) -> tuple:
    return tuple(key) if isinstance(key, (tuple, list)) else (key,)


def _is_scalar(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() == 0
