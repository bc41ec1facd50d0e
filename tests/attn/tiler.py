"""Attention by hand-written tiles in numpy, which counts what it loads and multiplies. Shares no code with attn.

Memory can be reached through `Memory.load` and `Memory.store` alone, so that no load goes uncounted.
"""

import numpy as np


class Memory:
  """Arrays in main memory, and counters of numbers that moved."""

  def __init__(self, **arrays):
    self.arrays, self.loads, self.stores, self.flops = arrays, dict.fromkeys(arrays, 0), dict.fromkeys(arrays, 0), 0

  def load(self, name, *at):
    part = self.arrays[name][at]
    self.loads[name] += part.size
    return part

  def store(self, name, value, *at):
    self.arrays[name][at] = value
    self.stores[name] += np.size(value)

  def dot(self, a, b):
    self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
    return a @ b

  @property
  def moved(self):
    return sum(self.loads.values()) + sum(self.stores.values())


def runs(n, size):
  return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def attend(q, k, v, bq, bk, seen=None):
  """One head: q [T, D], k [S, D], v [S, V], seen [T, S] bool. Returns (out, lse, Memory, visited tile elements)."""
  T, S, V = len(q), len(k), v.shape[1]
  memory, visited = Memory(q=q, k=k, v=v, out=np.zeros((T, V))), 0
  lse, seen = np.zeros(T), np.ones((T, S), bool) if seen is None else seen
  for rows in runs(T, bq):
    q_tile = memory.load('q', rows)
    n = len(q_tile)
    m, l, o = np.full(n, -np.inf), np.zeros(n), np.zeros((n, V))
    for keys in runs(S, bk):
      if not seen[rows, keys].any():
        continue
      visited += seen[rows, keys].size
      s = np.where(seen[rows, keys], memory.dot(q_tile, memory.load('k', keys).T) / np.sqrt(q.shape[1]), -np.inf)
      top = np.maximum(m, s.max(1))
      safe = np.where(np.isneginf(top), 0, top)
      p, shrink = np.exp(s - safe[:, None]), np.exp(m - safe)
      l, o, m = shrink * l + p.sum(1), shrink[:, None] * o + memory.dot(p, memory.load('v', keys)), top
    memory.store('out', o / l[:, None], rows)
    lse[rows] = m + np.log(l)
  return memory.arrays['out'], lse, memory, visited


def three_passes(q, k, v, bq, bk):
  """The same, with a sweep for the maximum, one for the sum and one for the output."""
  memory = Memory(q=q, k=k, v=v, out=np.zeros((len(q), v.shape[1])))
  for rows in runs(len(q), bq):
    q_tile = memory.load('q', rows) / np.sqrt(q.shape[1])
    logits = lambda keys, q_tile=q_tile: memory.dot(q_tile, memory.load('k', keys).T)
    top = np.max([logits(keys).max(1) for keys in runs(len(k), bk)], axis=0)[:, None]
    total = sum(np.exp(logits(keys) - top).sum(1) for keys in runs(len(k), bk))[:, None]
    out = sum(memory.dot(np.exp(logits(keys) - top) / total, memory.load('v', keys)) for keys in runs(len(k), bk))
    memory.store('out', out, rows)
  return memory.arrays['out'], memory


def gradients(q, k, v, out, lse, d_out, bq, bk, seen=None):
  """(dq, dk, dv, Memory) by tiles, queries innermost; dq is read, added to and written for each tile."""
  T, S, scale = len(q), len(k), 1 / np.sqrt(q.shape[1])
  memory = Memory(
    q=q, k=k, v=v, out=out, lse=lse, d_out=d_out, delta=np.zeros(T), dq=np.zeros_like(q), dk=np.zeros_like(k),
    dv=np.zeros_like(v),
  )  # fmt: skip
  seen = np.ones((T, S), bool) if seen is None else seen
  for rows in runs(T, bq):
    memory.store('delta', (memory.load('out', rows) * memory.load('d_out', rows)).sum(1), rows)
  for keys in runs(S, bk):
    k_tile, v_tile = memory.load('k', keys), memory.load('v', keys)
    dk, dv = np.zeros_like(k_tile), np.zeros_like(v_tile)
    for rows in runs(T, bq):
      if not seen[rows, keys].any():
        continue
      q_tile, do = memory.load('q', rows), memory.load('d_out', rows)
      s = np.where(seen[rows, keys], scale * memory.dot(q_tile, k_tile.T), -np.inf)
      p = np.exp(s - memory.load('lse', rows)[:, None])
      ds = scale * p * (memory.dot(do, v_tile.T) - memory.load('delta', rows)[:, None])
      dv, dk = dv + memory.dot(p.T, do), dk + memory.dot(ds.T, q_tile)
      memory.store('dq', memory.load('dq', rows) + memory.dot(ds, k_tile), rows)
    memory.store('dk', dk, keys)
    memory.store('dv', dv, keys)
  return memory.arrays['dq'], memory.arrays['dk'], memory.arrays['dv'], memory


def recurrence(q, k, v, chunk):
  """Linear attention sum_{s <= t} (q[t] . k[s]) v[s] by chunks. Returns (out, Memory)."""
  memory, state, out = Memory(q=q, k=k, v=v), np.zeros((q.shape[1], v.shape[1])), []
  for at in runs(len(q), chunk):
    a, b, c = memory.load('q', at), memory.load('k', at), memory.load('v', at)
    out.append(memory.dot(np.tril(memory.dot(a, b.T)), c) + memory.dot(a, state))
    state = state + memory.dot(b.T, c)
  return np.concatenate(out), memory
