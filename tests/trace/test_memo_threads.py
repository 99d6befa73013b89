"""Threads that meet one mod at the same time."""

import threading

import torch

import flexattn
from flexattn.reference import attention
from flexattn.trace import memo, tracer
from tests.trace.remembered import CPU, TABLE, score, times


def test_threads():
    wrong = []

    def read(x, table):
        return memo.score_mod(lambda s, b, h, i, j: s * x + table[h], torch.float32, CPU)

    def work(seed):
        for step in range(200):
            table, x = torch.randn(4), float((seed + step) % 7)
            mod = read(x, table)
            if mod.captures[0] is not table or mod.numbers != (x,):
                wrong.append(x)

    for x in (7.0, 8.0):  # from the second value on it is an argument
        read(x, TABLE)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_threads_that_meet_a_number_at_once(monkeypatch, no_number_has_varied):
    """One thread builds the graph of a constant while another sees that the number varies."""
    simplify, others = tracer.simplify, [threading.Thread(target=score, args=(times(9.0),))]

    def interrupted(graph):
        while others:
            other = others.pop()
            other.start()
            other.join()
        return simplify(graph)

    monkeypatch.setattr(tracer, "simplify", interrupted)
    q = torch.randn(1, 1, 8, 16)
    for factor in (2.0, 9.0, 5.0, 2.0):
        torch.testing.assert_close(flexattn.flex_attention(q, q, q, times(factor)),
                                   attention(q, q, q, times(factor))[0])
