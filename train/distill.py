"""Learning from a teacher: losses between the outputs, the hidden states and the mixers of two models.

All are sums over tokens with weights, as those of train/loss.py, so that any batch can be cut into parts and added up.
`of_models` computes those that a DistillConfig asks for, in one pass of each model.

Layers are paired by their share of the depth, so that the last stands beside the last (`teacher_layer`).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from models import size, state as model_state
from train import initial, loss, sharding
from train.config import UserError


class Teacher(NamedTuple):
  """A trained model: its DecoderConfig, the graph of models.state, and parameters {path: array} with their places."""

  config: Any
  graph: Any
  params: dict
  placed: dict


def load_teacher(settings, model_config, mesh):
  """The teacher of a run, read straight into its places.

  Args:
    settings: DistillConfig.
    model_config: DecoderConfig of the student.
    mesh: of the run.

  Returns:
    Teacher; it has no adapters.

  Raises:
    UserError: no model there, or one that cannot teach this student.
  """
  check_folder(settings, model_config, mesh)
  config, params = initial.model(settings.teacher, mesh, name='distill.teacher')
  placed = {path: array.sharding for path, array in params.items()}
  return Teacher(config, model_state.graph(config), params, placed)


def check_folder(settings, model_config, mesh=None):
  """UserError unless the folder of the teacher holds a model that can teach this student; parameters are not read.

  Args:
    settings: DistillConfig.
    model_config: DecoderConfig of the student.
    mesh: that the teacher must fit on; None means any.

  Returns:
    DecoderConfig of the teacher, without adapters.
  """
  teacher = initial.without_adapters(initial.read_config(settings.teacher, name='distill.teacher'))
  check(settings, model_config, teacher)
  if mesh is not None:
    try:
      sharding.params_sharding(model_state.abstract_params(teacher), mesh)
    except ValueError as error:
      raise UserError(f'distill.teacher={settings.teacher!r}: {error}') from error
  return teacher


def flops_per_token(settings, student, teacher, T, trained=None, *, z_loss=0.0):
  """Floating point operations of a step of `of_models` per token, nothing computed twice.

  As models.size.step_flops_per_token of the student, the forward pass of the teacher as far up as something is compared
  with it, and the pass of mixers that distill_attention has of its own.

  Args:
    settings: DistillConfig.
    student: DecoderConfig.
    teacher: DecoderConfig.
    T: tokens of a text.
    trained: paths of the student's trained parameters; None means all.
    z_loss: see train.loss.cross_entropy.
  """
  is_trunk = settings.labels or settings.outputs or settings.features or z_loss
  layers = compared(settings, student)
  total = size.step_flops_per_token(student, T, trained if is_trunk else ())
  if settings.outputs:
    total += size.flops_per_token(teacher, T)
  elif layers:
    last = max(teacher_layer(i, student.depth, teacher.depth) for i in layers)
    total += size.layers_flops_per_token(teacher, T, range(last + bool(settings.features)))
    total += 0 if settings.features else size.mixer_flops_per_token(teacher, T, [last], ())
  if settings.attention:
    total += size.mixer_flops_per_token(student, T, layers, trained)
  return total


def compared(settings, student):
  """Numbers of the student's layers that are compared with the teacher's."""
  if not (settings.features or settings.attention):
    return []
  return settings.layers or list(range(student.depth))


def check(settings, student, teacher):
  """UserError unless a model of the DecoderConfig `teacher` can teach one of the DecoderConfig `student`."""
  wrong = []
  if teacher.vocab != student.vocab:
    wrong.append(f'vocab={teacher.vocab}: expected model.vocab={student.vocab}, with the same tokens')
  on = [name for name in ('features', 'attention') if getattr(settings, name)]
  if on and teacher.width != student.width:
    wrong.append(
      f'width={teacher.width}: expected model.width={student.width} with distill.{on[0]}, or distill.{on[0]}=0'
    )
  if wrong:
    raise UserError(f'distill.teacher={settings.teacher!r} has {", and ".join(wrong)}')
  if settings.layers and not on:
    raise UserError(f'distill.layers={settings.layers} has no effect with distill.features=0 and distill.attention=0')
  if len(set(settings.layers)) < len(settings.layers):
    raise UserError(f'distill.layers={settings.layers}: expected each layer once')


def teacher_layer(layer, depth, teacher_depth):
  """The teacher's layer that stands beside a student's layer, both counted from 0.

      ceil((layer + 1) teacher_depth / depth) - 1

  Equal depths: the same layer. A teacher twice as deep: 1, 3, 5, ... A student twice as deep: 0, 0, 1, 1, ...
  Source: for whole quotients arXiv:1909.10351 (TinyBERT), its uniform mapping.
  """
  return -(-(layer + 1) * teacher_depth // depth) - 1


def outputs(student, teacher, weights, *, temperature=1.0, divergence='forward', share=0.5):
  """Divergence of two next-token distributions, summed over tokens.

      p = softmax(teacher / tau),  q = softmax(student / tau)
      forward: tau^2 sum_bt weights KL(p | q)          reverse: tau^2 sum_bt weights KL(q | p)
      jensen:  tau^2 sum_bt weights (share KL(p | m) + (1 - share) KL(q | m)),   m = share p + (1 - share) q

  The factor tau^2 keeps the size of gradients as tau grows: forward then tends to the variance of student - teacher
  over the vocabulary, halved.

  Args:
    student: [B, T, vocab] logits.
    teacher: [B, T, vocab] logits.
    weights: [B, T], 0 where a token does not count.
    temperature: tau.
    divergence: 'forward', 'reverse' or 'jensen'.
    share: of the teacher in m, in (0, 1).

  Returns:
    Scalar, at least float32, in nats.

  Raises:
    ValueError: an unknown divergence, or a share or temperature out of range.

  Source: forward arXiv:1503.02531; reverse arXiv:2306.08543; jensen arXiv:2306.13649.
  """
  if not (temperature > 0 and 0 < share < 1):
    raise ValueError(f'temperature={temperature}, share={share}: expected temperature > 0 and 0 < share < 1')
  log_q, log_p = (jax.nn.log_softmax(_wide(x) / temperature, axis=-1) for x in (student, teacher))
  if divergence == 'forward':
    found = _kl(log_p, log_q)
  elif divergence == 'reverse':
    found = _kl(log_q, log_p)
  elif divergence == 'jensen':
    log_m = jnp.logaddexp(log_p + jnp.log(share), log_q + jnp.log1p(-share))
    found = share * _kl(log_p, log_m) + (1 - share) * _kl(log_q, log_m)
  else:
    raise ValueError(f"divergence={divergence!r} must be 'forward', 'reverse' or 'jensen'")
  return temperature**2 * _total(found, weights)


def attention_maps(student, teacher, weights):
  """Divergence of attention probabilities, the mean over heads, summed over queries.

      sum_bt weights[b, t] mean_h sum_s p[b, h, t, s] log(p[b, h, t, s] / q[b, h, t, s])

  O(T^2) memory, as attention probabilities are (Attention.weights): for short texts. Keys that neither sees count
  nothing; where the student sees no key that the teacher sees, the sum is infinite. Probability that a sink takes is
  no part of the sum.

  Args:
    student: q [B, H, T, S] probabilities.
    teacher: p [B, H, T, S].
    weights: [B, T].

  Returns:
    Scalar, at least float32.
  """
  q, p = _wide(student), _wide(teacher)
  is_seen = p > 0
  # 1 where nothing is seen, in both: neither the logarithm nor its gradient may be that of 0.
  log_p, log_q = (jnp.log(jnp.where(is_seen, x, 1)) for x in (p, q))
  return _total(jnp.sum(p * (log_p - log_q), axis=-1).mean(axis=1), weights)


def squared_error(student, teacher, weights):
  """sum_bt weights[b, t] mean_e (student - teacher)^2 of [B, T, E] arrays: a scalar, at least float32."""
  return _total(jnp.square(_wide(student) - _wide(teacher)).mean(axis=-1), weights)


def relative_error(student, teacher, weights, eps=1e-6):
  """As `squared_error`, as a share of the teacher's own mean square, token by token.

      sum_bt weights[b, t] sum_e (student - teacher)^2 / (sum_e teacher^2 + eps E)

  Layers of a residual stream differ in size by orders of magnitude; so each counts the same.
  """
  student, teacher = _wide(student), _wide(teacher)
  size = jnp.square(teacher).mean(axis=-1) + eps
  return _total(jnp.square(student - teacher).mean(axis=-1) / size, weights)


def cosine_distance(student, teacher, weights, eps=1e-6):
  """sum_bt weights[b, t] (1 - cos of the angle between student and teacher), of [B, T, E] arrays. It ignores sizes."""
  student, teacher = _wide(student), _wide(teacher)
  unit = lambda x: x * jax.lax.rsqrt(jnp.square(x).sum(axis=-1, keepdims=True) + eps**2)
  return _total(1 - (unit(student) * unit(teacher)).sum(axis=-1), weights)


def of_models(student, teacher, batch, chunk, settings, *, z_loss=0.0):
  """Cross entropy with the text and what a student has yet to learn from a teacher, on a batch of train.data.Rows.

      objective = labels nll + z_loss z + outputs distill_outputs + features distill_features
                  + attention distill_attention

      distill_outputs    `outputs` of the logits
      distill_features   mean over layers of `relative_error` of the residual streams behind them
      distill_attention  mean over layers of `squared_error` of what the mixers give, when the student's mixer reads
                         what the teacher's reads: each layer learns by itself, whatever those below it have learned

  The second is differentiated through the whole student, the third only through its mixers, in a pass of their own.
  The teacher gets no gradient, and nothing of its inside is kept for the backward pass.

  Args:
    student: models.decoder.Decoder.
    teacher: Decoder with the same vocabulary and, for the last two, width.
    batch: see train.loss.of_model.
    chunk: positions whose logits, of both models, are held at a time; see train.loss.in_chunks.
    settings: DistillConfig; `layers` are the student's, see `teacher_layer`.
    z_loss: see train.loss.cross_entropy.

  Returns:
    Sums as of train.loss.cross_entropy, and those of the three above whose weight is not 0.

  Source: distill_attention: arXiv:2410.10254 (LoLCATs) and arXiv:2507.09025 (Lizard), their first stages.
  """
  where, weights = (batch.get('positions'), batch['segment_ids']), batch['weights']
  mine = compared(settings, student)
  theirs = {i: teacher_layer(i, student.depth, teacher.depth) for i in mine}
  features = ['outputs'] if settings.features else []
  kinds = [*features, *(['inputs', 'mixed'] if settings.attention else [])]
  hidden, seen = student.features(batch['tokens'], *where, layers=mine, kinds=features)
  teacher = _frozen(teacher)
  wanted, taught = teacher.features(batch['tokens'], *where, layers=list(dict.fromkeys(theirs.values())), kinds=kinds)
  speaker = student
  if not (settings.labels or settings.outputs or z_loss):  # then logits are reported, and nothing is learned from them
    speaker, hidden = _frozen(student), jax.lax.stop_gradient(hidden)

  def of(hidden, wanted, targets, weights, byte_counts):
    logits = speaker.logits(hidden)
    sums = loss.cross_entropy(logits, targets, weights, byte_counts, z_loss=z_loss)
    if settings.outputs:
      options = {'temperature': settings.temperature, 'divergence': settings.divergence}
      sums['distill_outputs'] = outputs(logits, teacher.logits(wanted), weights, **options)
    return sums

  sums = loss.in_chunks(of, (hidden, wanted, batch['targets'], weights, batch['bytes']), chunk)
  if settings.features:
    pairs = [(seen[i]['outputs'], taught[theirs[i]]['outputs']) for i in mine]
    sums['distill_features'] = sum(relative_error(x, y, weights) for x, y in pairs) / len(pairs)
  if settings.attention:
    given = student.mixed({i: taught[theirs[i]]['inputs'] for i in mine}, *where)
    pairs = [(given[i], taught[theirs[i]]['mixed']) for i in mine]
    sums['distill_attention'] = sum(squared_error(x, y, weights) for x, y in pairs) / len(pairs)
  factors = {'nll': settings.labels, 'z': z_loss}
  factors |= {f'distill_{name}': getattr(settings, name) for name in ('outputs', 'features', 'attention')}
  # Without those of factor 0, whose gradients would be computed.
  sums['objective'] = sum(factor * sums[name] for name, factor in factors.items() if factor)
  return sums


def _frozen(model):
  """The model, with parameters that no gradient flows to, so that none of its values is kept for one."""
  graph, params = nnx.split(model)
  return nnx.merge(graph, jax.tree.map(jax.lax.stop_gradient, params))


def _wide(x):
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _kl(log_p, log_q):
  return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def _total(found, weights):
  """The weighted sum; a token of weight 0 may be anything, but only where it is finite has it no gradient."""
  return (jnp.where(weights > 0, found, 0) * weights).sum()
