"""What every method must satisfy. A contract is a small named function; `check` runs all that apply to a record.

    report = contracts.check(catalog.get('sliding_window'))
    print(report)
    assert not report.broken

A method that by its nature breaks a contract waives it in its record, by name and with the reason.
"""

from attn.contracts import batches, heads, positions, transforms, values
from attn.contracts.registry import (
  CONTRACTS,
  Contract,
  ContractBroken,
  Report,
  Result,
  applicable,
  check,
  check_waivers,
  run,
)

__all__ = [
  'CONTRACTS', 'Contract', 'ContractBroken', 'Report', 'Result', 'applicable', 'batches', 'check', 'check_waivers',
  'heads', 'positions', 'run', 'transforms', 'values',
]  # fmt: skip
