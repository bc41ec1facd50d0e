"""The picture of a catalog method's mask, or of a mask written as text: what `python -m attn NAME --draw FILE` does."""

import numpy as np

from attn import draw, masks
from attn.catalog import Method
from attn.cost import method_cost
from attn.masks import text as mask_text

T_DEFAULT = 64
DOCUMENTS = (0, 0.35, 0.5, 0.8)  # where documents begin, of the length of a row


def written(path, *, method: Method | None = None, mask: str | None = None, shape: str | None = None):
  """Draws a mask into a file.

  Args:
    path: of a .png or an .svg.
    method: whose mask is drawn, or is named above the other one.
    mask: text (attn/masks/text.py), in place of the method's own mask.
    shape: as 'T=64,S=128'; 64 queries and as many keys where it does not say.

  Returns:
    (Picture, notes): what was assumed, and how text without brackets was read.

  Raises:
    ValueError: neither method nor mask, a method without a mask, text or a path that will not do; nothing is computed.
    ImportError: matplotlib is not installed.
    OSError: the file cannot be written.
  """
  draw.check_path(path)
  T, S = lengths(shape, method)
  title, notes = (method.title if method else ''), []
  if mask is not None:
    other = mask_text.rebracketed(mask)
    if other is not None:
      read = mask_text.write(mask_text.parse(mask))
      notes.append(f'& binds tighter than |: the mask is read as {read}; if {other} was meant, put these brackets')
    made = draw.readings(mask, T, S, title=title)
  elif method is None:
    raise ValueError('--draw needs the name of a method, or --mask')
  else:
    found, words = of_method(method, T, S)
    if 'segment_ids' in method.inputs:
      notes.append(f'documents are data: drawn with {len(DOCUMENTS)} of them')
    made = draw.mask(found, T, S, title=f'{title}\n{words}')
  made.save(path)
  return made, notes


def lengths(shape: str | None, method: Method | None = None) -> tuple[int, int]:
  """T and S of a text such as 'T=64,S=128'.

  Raises:
    ValueError: as `method_cost.sizes_of`.
  """
  sizes, missing = method_cost.sizes_of(shape or f'T={T_DEFAULT}', method)
  T = T_DEFAULT if 'T' in missing else sizes.T
  return T, T if 'S' in missing else sizes.S


def of_method(method: Method, T: int, S: int) -> tuple[masks.Mask, str]:
  """The mask of a method at its record's settings, and its expression.

  Raises:
    ValueError: the method has none, or is of rows that have as many keys as queries.
  """
  mask = method.settings.get('mask')
  if method.settings.get('is_causal'):
    # As in attn/cost/method_cost.py, fewer queries than keys are the last ones of the text.
    own = masks.causal(S - T if method_cost.is_decoding(method, T, S) else 0)
    mask = own if mask is None else own & mask
  if mask is None:
    raise ValueError(
      f'{method.name} (family {method.family}) has no mask: it hides no key from any query; --mask draws one of yours'
    )
  words = mask_text.write(mask)
  if 'segment_ids' in method.inputs:
    if T != S:
      raise ValueError(f'{method.name} is of whole rows, but T={T} and S={S}')
    begins = [int(x * T) for x in DOCUMENTS]
    mask = mask & masks.document(np.searchsorted(begins, np.arange(T), side='right').astype(np.int32))
    words += ' & document(segment_ids)'
  return mask, words
