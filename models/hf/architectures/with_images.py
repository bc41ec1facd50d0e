"""Gemma 3 as it is published from 4B on: the text model inside one that also sees images. It is read, not written."""

from typing import Any

from models.config import DecoderConfig
from models.hf.architectures import tensors
from models.hf.architectures.families import GEMMA3
from models.hf.architectures.record import Architecture, Reader

NAME = 'Gemma3ForConditionalGeneration'
IMAGES = ('vision_tower.', 'multi_modal_projector.')  # tensors of what is left out
ENTRIES: tuple[str, ...] = ('text_config', 'vision_config', 'mm_tokens_per_image', 'boi_token_index', 'eoi_token_index')
ENTRIES += ('image_token_index',)


def read(record: dict, length: int | None = None) -> DecoderConfig:
  """The DecoderConfig of `text_config`; texts without images mean the same to it as to the whole model."""
  reader = Reader(NAME, record)
  text = reader.get('text_config', {}, dict)
  ties = (record.get('tie_word_embeddings', True), text.get('tie_word_embeddings', True))
  if ties != (True, True):
    reader.problem(f'tie_word_embeddings={ties[0]!r} and {ties[1]!r} in text_config (expected true)')
  if text.get('final_logit_softcapping') is not None:  # the class with images does not apply it
    reader.problem(f'final_logit_softcapping={text["final_logit_softcapping"]!r} in text_config (expected null)')
  reader.check()
  return GEMMA3.read({**text, **{key: record[key] for key in ('quantization_config',) if key in record}}, length)


def write(config: DecoderConfig) -> dict[str, Any]:
  """A DecoderConfig has no images to write."""
  raise ValueError(f'{NAME} holds a model of images, which a DecoderConfig has not: expected {GEMMA3.name}')


def settings(record: dict) -> dict[str, Any]:
  """The settings of the text model, and those beside it."""
  rest = {key: value for key, value in record.items() if key not in ENTRIES}
  return {**GEMMA3.settings(record.get('text_config', {})), **GEMMA3.settings(rest)}


GEMMA3_WITH_IMAGES = Architecture(
  name=NAME,
  model_type='gemma3',
  read_config=read,
  write_config=write,
  sources=lambda config: tensors.separate(config, 'language_model.model.'),
  ignored=lambda tensor, config: tensor.startswith(IMAGES),
  tied='language_model.lm_head.weight',
  settings=settings,
)
