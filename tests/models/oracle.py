"""The decoder in numpy float64, one token and one head at a time; it shares no code with models or attn."""

import math

import numpy as np


def decoder(params, config, tokens, segment_ids=None):
  """Logits [B, T, vocab] from {dotted path: array} of an unrolled decoder, a DecoderConfig and tokens [B, T]."""
  params = {path: np.asarray(x, np.float64) for path, x in params.items()}
  logits = []
  for b, row in enumerate(tokens):
    x = params['embed.table'][row] * (config.embed_scale or math.sqrt(config.width) / 4)
    seen = np.tril(np.ones((len(row), len(row)), bool))
    start = np.zeros(len(row), int)
    if segment_ids is not None:
      seen &= segment_ids[b][:, None] == segment_ids[b]
      for t in range(1, len(row)):
        start[t] = start[t - 1] if segment_ids[b][t] == segment_ids[b][t - 1] else t
    for i in range(config.depth):
      layer = {path.removeprefix(f'blocks.{i}.'): p for path, p in params.items() if path.startswith(f'blocks.{i}.')}
      spec = config.layers[i % len(config.layers)]
      mixed = attention(layer, config, spec, before(layer, config, 'mixer', x), seen, start)
      x = x + after(layer, config, 'mixer', mixed)
      per_token = experts if config.experts else mlp
      x = x + after(layer, config, 'mlp', per_token(layer, config, before(layer, config, 'mlp', x)))
    x = norm(x, params['norm.scale'], config)
    out = x @ (params['embed.table'].T if config.tied_embeddings else params['head.kernel'])
    logits.append(cap(out, config.logit_soft_cap))
  return np.stack(logits)


def before(layer, config, name, x):
  return x if config.norms == 'post' else norm(x, layer[f'{name}_norm.scale'], config)


def after(layer, config, name, y):
  return y if config.norms == 'pre' else norm(y, layer[f'{name}_out_norm.scale'], config)


def attention(layer, config, spec, x, seen, start):
  T, H, K = len(x), config.heads, config.kv_heads or config.heads
  D = config.head_dim or config.width // H
  q, k, v = (linear(layer, f'mixer.{name}', x) for name in 'qkv')
  if config.qk_norm == 'all':
    q, k = norm(q, layer['mixer.q_norm.scale'], config), norm(k, layer['mixer.k_norm.scale'], config)
  q, k, v = (y.reshape(T, n, D) for y, n in ((q, H), (k, K), (v, K)))
  out = np.zeros((T, H, D))
  for h in range(H):
    g = h // (H // K)
    qh, kh = q[:, h], k[:, g]
    if config.qk_norm == 'head':
      qh, kh = norm(qh, layer['mixer.q_norm.scale'], config), norm(kh, layer['mixer.k_norm.scale'], config)
    qh, kh = rotate(qh, spec), rotate(kh, spec)
    for t in range(T):
      keys = [s for s in range(T) if seen[t, s]]
      if spec.window:
        keys = [s for s in keys if t - s < spec.window]
      if spec.chunk:
        keys = [s for s in keys if (t - start[t]) // spec.chunk == (s - start[s]) // spec.chunk]
      weight = np.exp([cap(qh[t] @ kh[s] * (config.attn_scale or D**-0.5), config.attn_soft_cap) for s in keys])
      total = weight.sum() + (np.exp(layer['mixer.sinks'][h]) if config.sinks else 0)
      out[t, h] = weight / total @ v[keys, g]
  return linear(layer, 'mixer.o', out.reshape(T, -1))


def rotate(x, spec):
  """Plain and linearly scaled rotary embedding, on pairs (i, i + w / 2) of the first w channels."""
  w = int(x.shape[1] * spec.rope_fraction)
  y = x.copy()
  for t in range(len(x)):
    for i in range(w // 2):
      turn = np.exp(1j * t / spec.rope_factor * spec.rope_base ** (-2 * i / w)) * (x[t, i] + 1j * x[t, i + w // 2])
      y[t, i], y[t, i + w // 2] = turn.real, turn.imag
  return y


def experts(layer, config, x):
  scores, y = linear(layer, 'mlp.router', x), np.zeros_like(x)
  for t in range(len(x)):
    chosen = sorted(range(config.experts), key=lambda n: (-scores[t, n], n))[: config.experts_per_token]
    for n in chosen:
      own = {p.replace('mlp.experts.', 'mlp.'): a[n] for p, a in layer.items() if p.startswith('mlp.experts.')}
      share = np.exp(scores[t, n]) / np.exp(scores[t, chosen]).sum()
      y[t] += share * mlp(own, config, x[t : t + 1])[0]
  return y


def mlp(layer, config, x):
  up = linear(layer, 'mlp.up', x)
  gelu = lambda y: 0.5 * y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
  hidden = {
    'swiglu': lambda: (g := linear(layer, 'mlp.gate', x)) / (1 + np.exp(-g)) * up,
    'geglu': lambda: gelu(linear(layer, 'mlp.gate', x)) * up,
    'swiglu_clipped': lambda: (
      (g := np.minimum(linear(layer, 'mlp.gate', x), 7)) / (1 + np.exp(-1.702 * g)) * (np.clip(up, -7, 7) + 1)
    ),
    'gelu': lambda: gelu(up),
    'relu2': lambda: np.maximum(up, 0) ** 2,
  }[config.mlp]()
  return linear(layer, 'mlp.down', hidden)


def linear(layer, name, x):
  return x @ layer[f'{name}.kernel'] + layer.get(f'{name}.bias', 0)


def norm(x, scale, config):
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * (scale + config.norm_plus_one)


def cap(x, c):
  return c * np.tanh(x / c) if c else x
