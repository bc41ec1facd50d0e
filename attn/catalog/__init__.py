"""The catalog: one record per method, from which the tests, the command line and the method table are made.

    catalog.get('sliding_window')        # the record
    catalog.methods(family='exact')      # all records of a family
    catalog.register(Method(...))        # docs/adding_a_method.md
"""

import difflib

from attn.catalog import biases, exact, planned, rotary
from attn.catalog.method import FAMILIES, Input, Limit, Method, State

__all__ = ['FAMILIES', 'Input', 'Limit', 'Method', 'State', 'get', 'methods', 'register', 'table']

_METHODS: dict[str, Method] = {}


def get(name: str) -> Method:
  """The record called `name`.

  Raises:
    ValueError: there is none; the message suggests names that look alike.
  """
  if name in _METHODS:
    return _METHODS[name]
  words = name.lower().replace('-', '_').replace(' ', '_')
  near = difflib.get_close_matches(words, _METHODS, n=3, cutoff=0.5)
  near += [x for x in _METHODS if x not in near and (words in x or words in _METHODS[x].title.lower())][: 3 - len(near)]
  hint = f'did you mean {" or ".join(near)}?' if near else '`python -m attn` lists the methods'
  raise ValueError(f'method={name!r} is not in the catalog: {hint}')


def methods(family: str | None = None) -> tuple[Method, ...]:
  """All records, or those of one family, in the order of the catalog.

  Raises:
    ValueError: no such family.
  """
  if family is not None and family not in FAMILIES:
    raise ValueError(f'family={family!r} must be one of {", ".join(FAMILIES)}')
  return tuple(x for x in _METHODS.values() if family in (None, x.family))


def register(record: Method) -> Method:
  """Adds a record, and returns it.

  Raises:
    ValueError: the name is taken, or a contract is waived that does not exist.
  """
  if record.name in _METHODS:
    raise ValueError(f'method={record.name!r} is in the catalog already ({_METHODS[record.name].title})')
  if record.waived:
    from attn import contracts

    contracts.check_waivers(record)
  _METHODS[record.name] = record
  return record


def table() -> str:
  """The methods as a Markdown table, as it stands in README.md."""
  rows = ['| method | family | paper | idea |', '|---|---|---|---|']
  for x in _METHODS.values():
    rows.append(f'| `{x.name}` | {x.family} | [{x.authors}]({x.url}) | {x.idea} |')
  return '\n'.join(rows) + '\n'


for _record in (*exact.METHODS, *planned.METHODS, *rotary.METHODS, *biases.METHODS):
  register(_record)
