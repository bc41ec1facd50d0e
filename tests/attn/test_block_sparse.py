"""attn.block_sparse against numpy loops over the expanded blocks: values and gradients, lists of every kind."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from attn import bias as biases, block_sparse, masks, plan, softmax, tiled
from tests.attn import oracle

B, T, S, H, K, D, V = 2, 19, 22, 4, 2, 3, 2
BQ, BK = 8, 4
NQ, NK = 3, 6
BLOCKS = {'T': T, 'S': S, 'block_q': BQ, 'block_kv': BK}
STREAMING = masks.causal(2) & (masks.window(5, 2) | masks.sink(1))


def may(i, j):
  """STREAMING, pair by pair."""
  return j <= i + 2 and (j >= i - 5 or j < 1)


def arrays(seed=0, dtype=np.float64):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.normal(size=shape).astype(dtype)
  return {
    'q': draw(B, T, H, D), 'k': draw(B, S, K, D), 'v': draw(B, S, K, V), 'bias': draw(1, H, T, 1),
    'logit_bias': draw(B, S, K), 'sinks': draw(H), 'd_out': draw(B, T, H, V), 'd_lse': draw(B, T, H),
  }  # fmt: skip


def choice(Bm, Hm, rows, seed=1):
  """Random blocks [Bm, Hm, rows, NK], with a row that chose nothing and a column that nobody chose."""
  chosen = np.random.default_rng(seed).random((Bm, Hm, rows, NK)) < 0.6
  chosen[:, :, 1 if rows == NQ else slice(8, 16)] = False
  chosen[..., 2] = False
  return chosen


def expanded(x):
  """[Bm, Hm, NQ or T, NK] as pairs [B, H, T, S], one at a time."""
  Bm, Hm, rows, _ = x.shape
  out = np.zeros((B, H, T, S), bool)
  for b, h, t, s in np.ndindex(*out.shape):
    out[b, h, t, s] = x[b % Bm, h * Hm // H, t if rows == T else t // BQ, s // BK]
  return out


def pairs(chosen, partial=True, mask=may):
  """What may be seen: the pair's block was chosen, and the mask allows it where the block is partial."""
  allowed = oracle.dense(lambda b, h, i, j, t, s: mask(i, j), T, S, batch=B, heads=H)
  return expanded(chosen) & (allowed | ~expanded(np.broadcast_to(partial, (*chosen.shape[:2], NQ, NK))))


def compare(x, made, mask, seen, names=('q', 'k', 'v', 'bias', 'logit_bias', 'sinks'), jit_plan=False, **options):
  """Values and gradients, log-sum-exp included, are those of the oracle on the pairs `seen`."""
  floats = {name: x[name] for name in names}

  def run(floats, made):
    f = lambda floats: block_sparse.attend(**floats, plan=made, mask=mask, return_residual=True, **options)
    results, back = jax.vjp(f, floats)
    return results, back((x['d_out'], x['d_lse']))[0]

  with jax.enable_x64(True):
    run = jax.jit(run) if jit_plan else jax.jit(functools.partial(run, made=made))
    (out, lse), grads = run(floats, made) if jit_plan else run(floats)
  want = oracle.attend(**floats, mask=seen, **options)
  oracle.assert_close(out, want[0], name='out')
  oracle.assert_close(lse, want[1], name='lse')
  wanted = oracle.gradients(**floats, mask=seen, d_out=x['d_out'], d_lse=x['d_lse'], **options)
  for name, grad in grads.items():
    oracle.assert_close(grad, wanted[name], name=f'gradient of {name}')


@pytest.mark.parametrize('Bm, Hm', [(1, 1), (2, 1), (1, 2), (2, 4)])
@pytest.mark.parametrize('kind', ['static', 'traced'])
def test_chosen_blocks(Bm, Hm, kind):
  chosen = choice(Bm, Hm, NQ)
  made = plan.from_blocks(chosen, **BLOCKS)
  compare(arrays(), made, STREAMING, pairs(chosen), jit_plan=kind == 'traced', soft_cap=1.5)


@pytest.mark.parametrize('Bm, Hm', [(1, 1), (2, 2)])
def test_full_blocks_skip_the_mask(Bm, Hm):
  chosen, partial = choice(Bm, Hm, NQ), choice(Bm, Hm, NQ, seed=5)
  made = plan.from_blocks(chosen, partial=partial, **BLOCKS)
  ragged = np.zeros((NQ, NK), bool)
  ragged[-1], ragged[:, -1] = True, True
  compare(arrays(), made, STREAMING, pairs(chosen, partial | ragged))


@pytest.mark.parametrize('Bm, Hm, kind', [(1, 1, 'static'), (2, 2, 'traced'), (1, 4, 'static')])
def test_choices_of_single_queries(Bm, Hm, kind):
  chosen = choice(Bm, Hm, T)
  compare(arrays(), plan.from_rows(chosen, **BLOCKS), STREAMING, pairs(chosen), jit_plan=kind == 'traced')


def test_lists_of_an_estimator_under_jit():
  """Top-2 key blocks by a score, made inside the compiled function."""
  x = arrays()
  scores = np.random.default_rng(3).normal(size=(B, K, NQ, NK))
  picked = np.argsort(-scores, axis=-1, kind='stable')[..., :2]
  chosen = np.zeros((B, K, NQ, NK), bool)
  np.put_along_axis(chosen, picked, True, axis=-1)

  @jax.jit
  def f(q, k, v, scores):
    lists = jax.lax.top_k(scores, 2)[1]
    made = plan.from_lists(lists, jnp.full(lists.shape[:3], 2), **BLOCKS)
    return block_sparse.attend(q, k, v, made, mask=STREAMING, return_residual=True)

  with jax.enable_x64(True):
    out, lse = f(x['q'], x['k'], x['v'], scores)
  want = oracle.attend(x['q'], x['k'], x['v'], mask=pairs(chosen))
  oracle.assert_close(out, want[0])
  oracle.assert_close(lse, want[1])


@pytest.mark.parametrize('name', ['causal', 'streaming', 'everything', 'nothing'])
def test_plan_of_a_mask_is_the_mask(name):
  mask, pair = {
    'causal': (masks.causal(), lambda i, j: j <= i), 'streaming': (STREAMING, may),
    'everything': (masks.everything(), lambda i, j: True), 'nothing': (~masks.everything(), lambda i, j: False),
  }[name]  # fmt: skip
  made = plan.of(mask, T, S, block_q=BQ, block_kv=BK)
  compare(arrays(), made, mask, pairs(np.ones((1, 1, NQ, NK), bool), mask=pair))


def test_what_else_hides_keys_hides_them_in_full_tiles():
  x, lengths = arrays(), np.array([6, 3])
  made = plan.of(masks.causal(), T, S, block_q=BQ, block_kv=BK)
  assert (plan.blocks(made)[0, 0, :, :2] == masks.FULL).any(0).all(), 'full tiles are cut'
  seen = pairs(np.ones((1, 1, NQ, NK), bool), mask=lambda i, j: j <= i)
  seen = seen & (np.arange(S) < lengths[:, None])[:, None, None]
  with jax.enable_x64(True):
    got = block_sparse.attend(
      x['q'], x['k'], x['v'], made, mask=masks.causal(), key_value_seq_lengths=lengths, return_residual=True
    )
  for one, want in zip(got, oracle.attend(x['q'], x['k'], x['v'], mask=seen)):
    oracle.assert_close(one, want)


def test_score_and_dropout_and_documents_per_list():
  """Options that need places in the tile agree with 'reference', which the oracle holds."""
  x, chosen = arrays(), choice(2, 2, NQ)
  ids = np.sort(np.random.default_rng(2).integers(0, 3, (B, S)))
  made, mask = plan.from_blocks(chosen, **BLOCKS), masks.causal(2) & masks.document(ids[:, :T], ids)
  dense = jnp.asarray(expanded(chosen))
  positions = np.arange(S) * 2 + np.array([[0], [1]])

  def options(slopes):
    return {
      'score': biases.score(lambda s, b, h, i, j, slopes: s - slopes[h] * abs(i - j), slopes), 'dropout_rate': 0.3,
      'dropout_key': jax.random.key(1), 'positions': positions[:, :T], 'kv_positions': positions,
    }  # fmt: skip

  def loss(f, q, k, v, slopes):
    return jnp.sum(x['d_out'] * f(q, k, v, **options(slopes)))

  ours = lambda *a, **o: block_sparse.attend(*a, made, mask=mask, **o)
  wanted = lambda *a, **o: softmax.attend(*a, mask=mask & masks.array(dense), implementation='reference', **o)
  with jax.enable_x64(True):
    args = (x['q'], x['k'], x['v'], np.array([0.5, 0.1, 0.0, 1.0]))
    got, want = (jax.jit(jax.grad(functools.partial(loss, f), (0, 1, 2, 3)))(*args) for f in (ours, wanted))
  for name, one, other in zip(('q', 'k', 'v', 'slopes'), got, want):
    oracle.assert_close(one, other, name=name)


def test_finite_differences():
  x, chosen = arrays(), choice(1, 2, NQ)
  made = plan.from_blocks(chosen, **BLOCKS)
  f = jax.jit(lambda q, k, v: block_sparse.attend(q, k, v, made, mask=STREAMING))
  with jax.enable_x64(True):
    check_grads(f, (x['q'], x['k'], x['v']), order=1, modes=['rev'])


def test_order_of_the_list_does_not_matter():
  x, chosen = arrays(), choice(2, 2, NQ)
  made = plan.from_blocks(chosen, **BLOCKS)
  back = jax.tree.map(lambda y: y[:, :, ::-1] if y.ndim == 3 else y, made)
  with jax.enable_x64(True):
    call, _ = softmax.checked(x['q'], x['k'], x['v'])
    one, other = (tiled.visit(block_sparse.work(p, STREAMING, is_open=False), call)[0] for p in (made, back))
  oracle.assert_close(one, other)


def test_vmap_remat_and_second_use():
  x = arrays(dtype=np.float32)
  made = plan.of(STREAMING, T, S, block_q=BQ, block_kv=BK)
  f = lambda q, k, v: block_sparse.attend(q[None], k[None], v[None], made, mask=STREAMING)[0]
  whole = jax.jit(lambda *a: block_sparse.attend(*a, made, mask=STREAMING))(x['q'], x['k'], x['v'])
  np.testing.assert_allclose(jax.jit(jax.vmap(f))(x['q'], x['k'], x['v']), whole, rtol=2e-5, atol=2e-6)
  loss = lambda q: (f(q, x['k'][0], x['v'][0]) ** 2).sum()
  one, other = (jax.jit(jax.grad(g))(x['q'][0]) for g in (loss, jax.checkpoint(loss)))
  np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-6)


def test_work_follows_the_plan():
  """The compiled loop's length is the number of tiles in the plan, so a thin plan is little work."""
  mask, n = masks.causal() & masks.window(31), 2048
  made = plan.of(mask, n, block_q=64, block_kv=64)
  assert made.nnz.max() == 2 * n // 64 - 1
  runs = block_sparse.work(made, mask, is_open=True).runs
  assert sum(run.q_id.size for run in runs) == made.nnz.max()
  q, k = (jax.ShapeDtypeStruct((1, n, 1, 16), np.float32) for _ in range(2))
  f = jax.grad(lambda q, k, v: block_sparse.attend(q, k, v, made, mask=mask).sum(), (0, 1, 2))
  memory = jax.jit(f).lower(q, k, k).compile().memory_analysis()
  assert memory.temp_size_in_bytes < n * n / 2  # no [T, S] array, not even of bits


@pytest.mark.parametrize(
  'change, words',
  [
    ({'is_causal': True}, 'is_causal'),
    ({'implementation': 'xla'}, 'the plan decides'),
    ({'plan': plan.of(masks.causal(), T, T, block_q=8, block_kv=4)}, f'S={T}'),
    ({'plan': plan.of(masks.causal(), T, S, block_q=5, block_kv=4)}, 'multiple of 8'),
    ({'plan': 'causal'}, 'expected a Plan'),
    ({'mask': None}, 'mask=None, and some tiles of the plan are partly hidden'),
    ({'positions': np.arange(T), 'kv_positions': np.arange(S)}, 'the plan was made without positions'),
    ({'plan': plan.of(masks.causal(), T, S, block_q=8, block_kv=4, positions=np.arange(T))}, 'made with positions'),
    ({'window': 3}, 'window is not an option of block_sparse.attend: expected one of bias, '),
    ({'mask': masks.document(np.zeros(3, int))}, r'expected \[19\]'),
    ({'scale': 'x'}, 'scale'),
  ],
)
def test_rejects(change, words):
  x = arrays(dtype=np.float32)
  made = plan.of(masks.causal(), T, S, block_q=8, block_kv=4)
  with pytest.raises(ValueError, match=words):
    block_sparse.attend(x['q'], x['k'], x['v'], **{'plan': made, 'mask': masks.causal(), **change})


def test_second_order_is_refused():
  x = arrays(dtype=np.float32)
  made = plan.of(masks.causal(), T, S, block_q=8, block_kv=4)
  f = lambda q: block_sparse.attend(q, x['k'], x['v'], made, mask=masks.causal()).sum()
  with pytest.raises(NotImplementedError, match='reference'):
    jax.hessian(f)(x['q'])


def test_pairs_of_the_tests_differ():
  """The cases above are not all the same: blocks, rows and heads matter."""
  seen = [pairs(choice(*shape, rows)) for shape, rows in itertools.product([(1, 1), (2, 2)], (NQ, T))]
  assert len({x.tobytes() for x in seen}) == len(seen)
  assert all(x.any() and not x[:, :, 8:16].any() for x in seen)


@pytest.mark.parametrize('kind', ['static', 'arrays', 'lists of their own'])
def test_nothing_comes_from_blocks_that_were_not_chosen(kind):
  """Row 1 chose nothing and row 0 the second block of keys: NaN in the first block reaches nobody."""
  chosen = np.array([[[[False, True], [False, False]]]])
  chosen = chosen if kind == 'static' else np.repeat(chosen, 2, axis=0)
  made = plan.from_blocks(chosen, T=16, S=16, block_q=8, block_kv=8)
  made = jax.tree.map(jnp.asarray, made) if kind == 'arrays' else made
  q, k, v = (np.random.default_rng(i).normal(size=(2, 16, 1, 4)) for i in range(3))
  k[:, :8] = v[:, :8] = np.nan
  f = lambda q, k, v: block_sparse.attend(q, k, v, made, mask=masks.everything())
  with jax.enable_x64(True):
    out, back = jax.vjp(f, q, k, v)
    grads = back(np.where(np.arange(16)[:, None, None] < 8, 1.0, np.nan) * np.ones_like(out))
  want, _ = oracle.attend(q[:, :8], k[:, 8:], v[:, 8:])
  oracle.assert_close(out[:, :8], want)
  np.testing.assert_array_equal(out[:, 8:], 0)
  assert all(np.isfinite(grad).all() for grad in grads)


def test_row_bits_of_many_key_blocks():
  chosen = np.random.default_rng(4).random((1, 1, 16, 70)) < 0.2
  made, keys = plan.from_rows(chosen, T=16, S=140, block_q=8, block_kv=2), (1, 140, 1, 4)
  q, k, v = (np.random.default_rng(i).normal(size=shape) for i, shape in enumerate([(1, 16, 1, 4), keys, keys]))
  want = oracle.attend(q, k, v, mask=np.repeat(chosen, 2, axis=3))
  with jax.enable_x64(True):
    for one in (made, jax.tree.map(jnp.asarray, made)):
      got = block_sparse.attend(q, k, v, one, mask=masks.everything(), return_residual=True)
      for a, b in zip(got, want):
        oracle.assert_close(a, b)


def test_calls_outside_of_jit_are_compiled_once(caplog):
  x = arrays(dtype=np.float32)
  made = plan.of(STREAMING, T, S, block_q=BQ, block_kv=BK)
  loss = jax.value_and_grad(lambda q: block_sparse.attend(q, x['k'], x['v'], made, mask=STREAMING).sum())
  loss(x['q'])
  with jax.log_compiles():
    for _ in range(3):
      loss(x['q'])
    assert 'Compiling' not in caplog.text
  with jax.log_compiles():
    jax.jit(lambda y: y * 2.5)(x['q'])
  assert 'Compiling' in caplog.text, 'the log says when something is compiled'


def test_lists_of_their_own_on_explicit_axes_are_refused():
  mesh = jax.make_mesh((2, 2), ('b', 'h'))
  x, made = arrays(dtype=np.float32), plan.from_blocks(choice(1, 2, NQ), **BLOCKS)
  with jax.set_mesh(mesh):
    q, k, v = (jax.device_put(x[name], jax.P('b', None, 'h')) for name in 'qkv')
    with pytest.raises(ValueError, match='Explicit mesh axes: expected a call inside'):
      block_sparse.attend(q, k, v, made, mask=STREAMING)
    spec, lists = jax.P('b', None, 'h'), jax.tree.map(lambda _: jax.P(None, 'h'), made)
    local = lambda q, k, v, made: block_sparse.attend(q, k, v, made, mask=STREAMING)
    run = jax.jit(jax.shard_map(local, in_specs=(spec, spec, spec, lists), out_specs=spec))
    got = run(q, k, v, jax.tree.map(jax.reshard, made, lists))
  np.testing.assert_allclose(got, oracle.attend(*(x[n] for n in 'qkv'), mask=pairs(choice(1, 2, NQ)))[0], atol=1e-5)
