"""Writes the files beside this one: what the published PyTorch classes compute, for test_logits.py to compare with.

  python -m tests.models.hf.cases.make             writes NAME.json and NAME.npz of every case, or of those named
  python -m tests.models.hf.cases.make --check     saves every case with models.hf and loads that in PyTorch again

Needs torch and transformers (the files were written with 2.13 and 5.23). NAME.json holds the config.json and the names,
dtypes and shapes of the tensors as `save_pretrained` writes them; their values follow from the names (`value`).
NAME.npz holds

  tokens, positions [3, 24], logits [3, 24, vocab]   a text, one with padding on its left, one on its right; positions
                                                     are -1 there, and logits mean nothing
  prompts [3, 12], lengths [3], continuation [3, 12] greedy decoding of a ragged batch; prompts are padded on their left
"""

import argparse
import json
import pathlib
import tempfile
import zlib

import numpy as np

FOLDER = pathlib.Path(__file__).parent
VOCAB, T, PADDING, NEW = 61, 24, (0, 4, 5), 12
LENGTHS = (12, 5, 9)
UNPACKED = ['model.layers.*.self_attn', 'model.layers.*.mlp.router', 'model.embed_tokens', 'lm_head']

COMMON = {
  'vocab_size': VOCAB,
  'hidden_size': 24,
  'intermediate_size': 40,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'max_position_embeddings': 32,
  'rms_norm_eps': 1e-3,
  'pad_token_id': 0,
  'bos_token_id': 1,
  'eos_token_id': 2,
}
GEMMA = {'head_dim': 10, 'query_pre_attn_scalar': 7}
LONG_ROPE = {'rope_type': 'longrope', 'short_factor': [1.0, 1.1, 1.3], 'long_factor': [1.5, 2.5, 4.0]}
GPT_OSS = {
  'head_dim': 10,
  'num_hidden_layers': 4,
  'intermediate_size': 20,
  'sliding_window': 6,
  'num_local_experts': 5,
  'num_experts_per_tok': 2,
  'rope_parameters': {
    'rope_type': 'yarn',
    'rope_theta': 150.0,
    'factor': 4.0,
    'original_max_position_embeddings': 8,
    'beta_fast': 0.6,
    'beta_slow': 0.1,
    'truncate': False,
  },
}
PHI = {'hidden_size': 32, 'max_position_embeddings': 64}

# name: (class, entries of its configuration)
CASES = {
  'llama2': ('LlamaForCausalLM', {'num_key_value_heads': 4}),
  'llama3': (
    'LlamaForCausalLM',
    {
      'head_dim': 12,
      'rope_parameters': {
        'rope_type': 'llama3',
        'rope_theta': 10000.0,
        'factor': 8.0,
        'low_freq_factor': 0.25,
        'high_freq_factor': 2.0,
        'original_max_position_embeddings': 16,
      },
    },
  ),
  'llama_tied': (
    'LlamaForCausalLM',
    {'tie_word_embeddings': True, 'attention_bias': True, 'mlp_bias': True, 'head_dim': 10},
  ),
  'llama_linear': (
    'LlamaForCausalLM',
    {'rope_parameters': {'rope_type': 'linear', 'rope_theta': 500.0, 'factor': 4.0}},
  ),
  'llama_yarn': (
    'LlamaForCausalLM',
    {
      'head_dim': 12,
      'rope_parameters': {
        'rope_type': 'yarn',
        'rope_theta': 100.0,
        'factor': 4.0,
        'original_max_position_embeddings': 8,
        'beta_fast': 0.3,
        'beta_slow': 0.1,
        'mscale': 0.707,
        'mscale_all_dim': 1.5,
      },
    },
  ),
  'mistral_window': ('MistralForCausalLM', {'sliding_window': 6}),
  'mistral': ('MistralForCausalLM', {'sliding_window': None, 'head_dim': 10, 'num_key_value_heads': 1}),
  'qwen2': (
    'Qwen2ForCausalLM',
    {'num_hidden_layers': 4, 'use_sliding_window': True, 'sliding_window': 5, 'max_window_layers': 2},
  ),
  'qwen3': ('Qwen3ForCausalLM', {'head_dim': 10, 'tie_word_embeddings': True}),
  'gemma2': (
    'Gemma2ForCausalLM',
    {
      **GEMMA,
      'num_hidden_layers': 4,
      'sliding_window': 6,
      'attn_logit_softcapping': 3.0,
      'final_logit_softcapping': 12.0,
    },
  ),
  'gemma3': (
    'Gemma3ForCausalLM',
    {
      **GEMMA,
      'num_hidden_layers': 6,
      'sliding_window': 5,
      'rope_parameters': {
        'full_attention': {'rope_type': 'linear', 'rope_theta': 1000.0, 'factor': 8.0},
        'sliding_attention': {'rope_type': 'default', 'rope_theta': 100.0},
      },
    },
  ),
  'gemma3_images': (
    'Gemma3ForConditionalGeneration',
    {
      'text_config': {**COMMON, **GEMMA, 'layer_types': ['sliding_attention', 'full_attention'], 'sliding_window': 5},
      'vision_config': {
        'hidden_size': 8,
        'intermediate_size': 8,
        'num_hidden_layers': 1,
        'num_attention_heads': 2,
        'image_size': 4,
        'patch_size': 2,
      },
      'mm_tokens_per_image': 4,
      'image_token_index': VOCAB - 1,
    },
  ),
  'phi3': (
    'Phi3ForCausalLM',
    {**PHI, 'sliding_window': 7, 'rope_parameters': {'rope_type': 'default', 'partial_rotary_factor': 0.5}},
  ),
  'phi3_short': (
    'Phi3ForCausalLM',
    {
      **PHI,
      'original_max_position_embeddings': 40,
      'rope_parameters': {**LONG_ROPE, 'rope_theta': 10000.0, 'partial_rotary_factor': 0.75},
    },
  ),
  'phi3_long': (
    'Phi3ForCausalLM',
    {
      **PHI,
      'original_max_position_embeddings': 8,
      'rope_parameters': {**LONG_ROPE, 'rope_theta': 10000.0, 'partial_rotary_factor': 0.75},
    },
  ),
  'olmo2': ('Olmo2ForCausalLM', {}),
  'gpt_oss': ('GptOssForCausalLM', GPT_OSS),
  'gpt_oss_mxfp4': ('GptOssForCausalLM', {**GPT_OSS, 'hidden_size': 32, 'intermediate_size': 32}),  # packs have 32
}


def value(name, shape):
  """The tensor that every case has under this name, here and in test_logits.py."""
  rng = np.random.default_rng(zlib.crc32(name.encode()))
  if name.endswith(('_blocks', '_scales')):  # MXFP4: two numbers a byte; the power of two of 32 of them, plus 127
    return rng.integers(*((0, 256) if name.endswith('_blocks') else (122, 127)), shape).astype(np.uint8)
  x = rng.standard_normal(shape)
  if name.endswith('norm.weight'):
    x = 1 + 0.3 * x
  elif name.endswith('bias') or len(shape) == 1:  # sinks too
    x = 0.3 * x
  elif 'experts' in name:  # [expert, in, out]; large enough for the clip at 7 to matter
    x = 4 * x / np.sqrt(shape[-2])
  elif 'embed_tokens' in name:
    x = 0.5 * x
  else:
    x = (5 if 'lm_head' in name else 1.5) * x / np.sqrt(shape[-1])
  return x.astype(np.float32)


def build(name, folder):
  """Writes a checkpoint of the case in the published form; returns (config.json, {tensor: [dtype, shape]})."""
  import safetensors.numpy
  import transformers

  kind, entries = CASES[name]
  model_class = getattr(transformers, kind)
  common = {} if 'text_config' in entries else COMMON
  model = model_class(model_class.config_class(**{**common, **entries}))
  model.save_pretrained(folder)
  config = json.loads((folder / 'config.json').read_text())
  path = folder / 'model.safetensors'
  shapes = {key: x.shape for key, x in safetensors.numpy.load_file(path).items()}
  if 'mxfp4' in name:
    shapes = dict(part for key, shape in shapes.items() for part in packed(key, shape))
    config['quantization_config'] = {'quant_method': 'mxfp4', 'modules_to_not_convert': UNPACKED}
    (folder / 'config.json').write_text(json.dumps(config))
  tensors = {key: value(key, shape) for key, shape in sorted(shapes.items())}
  safetensors.numpy.save_file(tensors, path, {'format': 'pt'})
  return config, {key: [str(x.dtype), list(x.shape)] for key, x in tensors.items()}


def packed(key, shape):
  """Names and shapes of the tensors in which MXFP4 stores an expert's [expert, in, out]; others stay."""
  if not key.endswith('_proj'):
    return [(key, shape)]
  N, width_in, width_out = shape
  parts = (N, width_out, width_in // 32)
  return [(f'{key}_blocks', (*parts, 16)), (f'{key}_scales', parts)]


def load(kind, folder):
  """The published class with the weights of the folder; every tensor must have come from there."""
  import torch
  import transformers

  is_packed = 'quantization_config' in json.loads((pathlib.Path(folder) / 'config.json').read_text())
  unpack = {'quantization_config': transformers.Mxfp4Config(dequantize=True)} if is_packed else {}
  model, info = getattr(transformers, kind).from_pretrained(
    folder, attn_implementation='eager', dtype=torch.float32, output_loading_info=True, **unpack
  )
  lost = {key: info[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys') if info[key]}
  assert not lost, lost
  return model.eval()


def logits(model, tokens, positions):
  """[B, T, vocab] of tokens [B, T]; positions are -1 where there is padding."""
  import torch

  is_text = torch.from_numpy((positions >= 0).astype(np.int64))
  ids = torch.from_numpy(np.maximum(positions, 0).astype(np.int64))
  with torch.no_grad():
    out = model(input_ids=torch.from_numpy(tokens).long(), attention_mask=is_text, position_ids=ids, use_cache=False)
  return out.logits.numpy().astype(np.float32)


def decode(model, prompts, lengths):
  """Greedy continuation [B, NEW] of prompts padded on the left, and the smallest lead of a best token."""
  import torch

  model.generation_config.eos_token_id = None
  is_text = np.arange(prompts.shape[1]) >= prompts.shape[1] - np.asarray(lengths)[:, None]
  out = model.generate(
    torch.from_numpy(prompts).long(),
    attention_mask=torch.from_numpy(is_text.astype(np.int64)),
    max_new_tokens=NEW,
    do_sample=False,
    pad_token_id=0,
    output_scores=True,
    return_dict_in_generate=True,
  )
  best = torch.stack(out.scores).topk(2, dim=-1).values
  return out.sequences[:, prompts.shape[1] :].numpy().astype(np.int32), float((best[..., 0] - best[..., 1]).min())


def texts():
  """Tokens and positions [3, T]."""
  tokens = np.random.default_rng(0).integers(3, VOCAB, (len(PADDING), T)).astype(np.int32)
  positions = np.tile(np.arange(T, dtype=np.int32), (len(PADDING), 1))
  positions[1] -= PADDING[1]
  positions[2, T - PADDING[2] :] = -1
  positions = np.maximum(positions, -1)
  return np.where(positions < 0, 0, tokens), positions


def make(name):
  """Writes the two files of a case."""
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    config, shapes = build(name, folder)
    model = load(CASES[name][0], folder)
  tokens, positions = texts()
  out = logits(model, tokens, positions)
  for seed in range(100):  # until no choice is a close one, which rounding could turn, and texts do not go in circles
    prompts = np.random.default_rng(seed).integers(3, VOCAB, (len(LENGTHS), max(LENGTHS))).astype(np.int32)
    prompts[np.arange(max(LENGTHS)) < max(LENGTHS) - np.asarray(LENGTHS)[:, None]] = 0
    continuation, lead = decode(model, prompts, LENGTHS)
    if lead > 0.05 and np.mean([len(set(row)) for row in continuation.tolist()]) >= 3:
      break
  else:
    raise ValueError(f'{name}: no prompts were found whose continuations have clear choices')
  (FOLDER / f'{name}.json').write_text(dumps({'config': config, 'tensors': shapes}))
  np.savez_compressed(
    FOLDER / f'{name}.npz',
    tokens=tokens,
    positions=positions,
    logits=out,
    prompts=prompts,
    lengths=np.asarray(LENGTHS, np.int32),
    continuation=continuation,
  )
  print(f'{name}: logits within {np.abs(out).max():.1f}, spread {out.std():.2f}, lead {lead:.3f} (seed {seed})')


def dumps(record):
  """JSON with one line for each entry of config and tensors."""
  lines = lambda part: ',\n'.join(f'    {json.dumps(key)}: {json.dumps(x)}' for key, x in part.items())
  return '{\n' + ',\n'.join(f'  {json.dumps(key)}: {{\n{lines(part)}\n  }}' for key, part in record.items()) + '\n}\n'


def check(name):
  """Saves the case with models.hf, loads that with the published class and compares its logits with the file's."""
  from models import hf

  kind = CASES[name][0]
  expected = np.load(FOLDER / f'{name}.npz')
  with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
    build(name, pathlib.Path(first))
    loaded = hf.load(pathlib.Path(first))
    kind = 'Gemma3ForCausalLM' if kind == 'Gemma3ForConditionalGeneration' else kind  # its text model alone
    hf.save(pathlib.Path(second), loaded.model, loaded.config, architecture=kind, settings=loaded.settings)
    out = logits(load(kind, second), expected['tokens'], expected['positions'])
  is_text = expected['positions'] >= 0
  error = np.abs(out - expected['logits'])[is_text].max()
  print(f'{name}: largest difference {error:.1e} of {np.abs(expected["logits"]).max():.1f}')
  assert error <= 1e-6 * np.abs(expected['logits']).max(), name


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('names', nargs='*', help='cases; all of them if none is named')
  parser.add_argument('--check', action='store_true', help='compare our export with the files, write nothing')
  args = parser.parse_args()
  for name in args.names or CASES:
    (check if args.check else make)(name)


if __name__ == '__main__':
  main()
