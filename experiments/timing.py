"""Times of two programs that are run in turns, so that what else the machine does meets both alike."""

import statistics
import time

import jax


def in_turns(first, second, *, seconds=10.0, least=3, most=200, progress=None):
  """Runs first, second, second, first, ... and compares neighbours.

  Each is called once before anything is timed. A call ends when its arrays are ready.

  Args:
    first: function without arguments.
    second: function without arguments.
    seconds: time to spend, about.
    least: pairs, at least.
    most: pairs, at most.
    progress: called with (pairs done, share of the time spent) after each pair.

  Returns:
    Dictionary: `first_s` and `second_s` (medians in seconds), `ratio` (median over pairs of first / second),
    `ratio_low` and `ratio_high` (quartiles), `pairs`.
  """
  once(first), once(second)
  pairs: list[tuple[float, float]] = []
  start = time.perf_counter()
  while len(pairs) < most and (len(pairs) < least or time.perf_counter() - start < seconds):
    if len(pairs) % 2:
      b, a = once(second), once(first)
    else:
      a, b = once(first), once(second)
    pairs.append((a, b))
    if progress:
      progress(len(pairs), min(1.0, (time.perf_counter() - start) / seconds))
  ratios = sorted(a / b for a, b in pairs)
  low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
  return {
    'first_s': statistics.median(a for a, _ in pairs),
    'second_s': statistics.median(b for _, b in pairs),
    'ratio': statistics.median(ratios),
    'ratio_low': low,
    'ratio_high': high,
    'pairs': len(pairs),
  }


def once(function):
  """Seconds of one call."""
  start = time.perf_counter()
  jax.block_until_ready(function())
  return time.perf_counter() - start
