"""models.decoder.Decoder in eager PyTorch: the same formulas, sizes and parameters, for experiments/bench_core.py.

Attention is PyTorch's fused one, the optimizer its fused AdamW; nothing is compiled. Only what the benchmark needs is
here: full causal layers, SwiGLU, rotary positions without scaling, tied embeddings, no biases.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from attn import positions


class Attention(nn.Module):
  """Causal attention with rotary positions."""

  def __init__(self, config):
    super().__init__()
    self.heads, self.kv_heads, self.head_dim = config.heads, config.K, config.D
    self.q = nn.Linear(config.width, self.heads * self.head_dim, bias=False)
    self.k = nn.Linear(config.width, self.kv_heads * self.head_dim, bias=False)
    self.v = nn.Linear(config.width, self.kv_heads * self.head_dim, bias=False)
    self.o = nn.Linear(self.heads * self.head_dim, config.width, bias=False)

  def forward(self, x, cos, sin):
    B, T, _ = x.shape
    q = rotate(self.q(x).view(B, T, self.heads, self.head_dim), cos, sin).transpose(1, 2)
    k = rotate(self.k(x).view(B, T, self.kv_heads, self.head_dim), cos, sin).transpose(1, 2)
    v = self.v(x).view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
    return self.o(out.transpose(1, 2).reshape(B, T, -1))


class Block(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x))."""

  def __init__(self, config):
    super().__init__()
    self.mixer_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
    self.mlp_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
    self.mixer = Attention(config)
    self.mlp = nn.ModuleDict(
      {
        'gate': nn.Linear(config.width, config.F, bias=False),
        'up': nn.Linear(config.width, config.F, bias=False),
        'down': nn.Linear(config.F, config.width, bias=False),
      }
    )

  def forward(self, x, cos, sin):
    x = x + self.mixer(self.mixer_norm(x), cos, sin)
    y = self.mlp_norm(x)
    return x + self.mlp['down'](F.silu(self.mlp['gate'](y)) * self.mlp['up'](y))


class Decoder(nn.Module):
  """The twin of models.decoder.Decoder(config); modules are named as its parameter paths are.

  Args:
    config: DecoderConfig.
    T: tokens a row, for which rotary angles are prepared.

  Raises:
    ValueError: a setting that the twin does not have.
  """

  def __init__(self, config, T):
    super().__init__()
    check(config)
    self.input_scale = config.input_scale
    self.embed = nn.Embedding(config.vocab, config.width)
    self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
    self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
    inverse, _ = positions.frequencies(config.layers[0].rotary(), config.D)
    angles = np.arange(T)[:, None] * np.asarray(inverse)
    self.register_buffer('cos', torch.tensor(np.cos(angles)[:, None], dtype=torch.float32))
    self.register_buffer('sin', torch.tensor(np.sin(angles)[:, None], dtype=torch.float32))

  def forward(self, tokens):
    """[B, T] ids -> logits [B, T, vocab]."""
    x = self.input_scale * self.embed(tokens)
    for block in self.blocks:
      x = block(x, self.cos, self.sin)
    return F.linear(self.norm(x), self.embed.weight)

  def copy_from(self, params):
    """Takes over {path: array}, as models.state.split gives them; a path without a counterpart is a KeyError."""
    mine = dict(self.named_parameters())
    with torch.no_grad():
      for path, array in params.items():
        name = path.replace('.kernel', '.weight').replace('.scale', '.weight').replace('.table', '.weight')
        value = torch.tensor(np.asarray(array))
        mine.pop(name).copy_(value.T if path.endswith('.kernel') else value)
    if mine:
      raise ValueError(f'params={sorted(params)}: expected also values for {sorted(mine)}')


def rotate(x, cos, sin):
  """x [B, T, H, D] turned by the angles of its positions, first half of D against second half."""
  a, b = x.chunk(2, dim=-1)
  return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def make_step(model, config):
  """A function (tokens, targets) -> loss that trains `model` by one step of an OptimizerConfig at a constant rate."""
  decayed = [p for p in model.parameters() if p.ndim > 1]
  others = [p for p in model.parameters() if p.ndim <= 1]
  groups = [{'params': decayed, 'weight_decay': config.weight_decay}, {'params': others, 'weight_decay': 0.0}]
  betas = (config.b1, config.b2)
  optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.eps, fused=True)

  def step(tokens, targets):
    optimizer.zero_grad(set_to_none=True)
    loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    loss.backward()
    if config.clip_norm:
      nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
    optimizer.step()
    return float(loss.detach())

  return step


def check(config):
  """ValueError for settings of a DecoderConfig that the twin does not have."""
  expected = {'mlp': 'swiglu', 'tied_embeddings': True, 'qk_norm': '', 'sinks': False, 'attn_bias': ''}
  expected |= {'norms': 'pre', 'norm_plus_one': False, 'attn_scale': 0.0, 'experts': 0, 'mlp_bias': False}
  expected |= {'attn_soft_cap': 0.0, 'logit_soft_cap': 0.0, 'scan': False, 'dtype': 'float32'}
  for name, value in expected.items():
    if getattr(config, name) != value:
      raise ValueError(f'{name}={getattr(config, name)!r}, expected {value!r}: the twin has nothing else')
  for spec in config.layers:
    if spec.window or spec.chunk or spec.rope_scaling or spec.rope_fraction != 1 or spec != config.layers[0]:
      raise ValueError(f'layers={config.layers}, expected equal layers that see all and rotate all')
