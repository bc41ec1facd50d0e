"""The training loop, one function read from top to bottom."""

import collections
import contextlib
import math
import time

import jax
import numpy as np

from models import size
from train import (
  checkpoint,
  config as configs,
  data,
  distill,
  initial,
  interrupt,
  metrics,
  peak,
  processes,
  program as programs,
  sharding,
  summary,
  workdir as workdirs,
)
from train.data import corpus as corpora, store

LATE = 2  # steps that the host starts before it reads the figures of the one before them
PROFILE_FROM = 10  # steps after the start, when everything has been compiled


class NotFinite(ArithmeticError):
  """A loss, gradient or parameter is infinite or NaN. The message names the step and what its batch was cut from."""


def run(config, workdir):
  """Trains a model as a config says, or goes on with the run that a folder holds.

  Args:
    config: train.config.Config; it is checked and copied.
    workdir: folder of the run: new, empty, or with a run of the same config.

  Returns:
    The contents of result.json.

  Raises:
    UserError: a setting, file or folder that does not fit; nothing was overwritten.
    NotFinite: the run cannot go on; no checkpoint holds what is not finite.
    SaveFailed: a checkpoint could not be written.
    Interrupted: SIGINT or SIGTERM after the first step, when it was saved.
  """
  with contextlib.ExitStack() as at_end:
    # 1. Folder, text, shapes and placements.
    config, workdir = configs.load(config), workdirs.expand(workdir)
    is_writer = jax.process_index() == 0
    corpora.check_outside(config.data, workdir)
    if result := workdirs.finished(workdir, workdirs.check(workdir, config), config):
      if is_writer:
        print(f'This run is finished; nothing was computed again.\n{summary.footer(result)}')
      return result
    mesh = sharding.make_mesh(config.mesh)
    teacher_config, models = None, {}
    if config.distill.teacher:
      teacher_config = distill.check_folder(config.distill, config.model, mesh)
      models['distill.teacher'] = config.distill.teacher
    if config.train.init_from and not workdirs.saved_steps(workdir):
      initial.check(config.train.init_from, config.model)
      models['train.init_from'] = config.train.init_from
    program = programs.make(config, mesh)  # jitted steps and placements; nothing is compiled yet

    found = processes.first_only(
      lambda: {name: initial.identity(folder, name=name) for name, folder in models.items()}, 'identity'
    )

    def prepare():
      """What one process does for all: takes the folder and prepares the text."""
      at_end.enter_context(workdirs.lock(workdir))
      stored = workdirs.check(workdir, config)  # again: nobody else can change it from here on
      corpus = store.open_or_prepare(config.data, workdir, vocab=config.model.vocab)
      workdirs.check_corpus(workdir, stored, corpus)
      identities = workdirs.check_models(workdir, stored, found)
      workdirs.write_run(workdir, config, corpus, size.parameters(config.model), identities)

    processes.first_only(prepare, 'prepare')
    corpus = store.open_or_prepare(config.data, workdir, vocab=config.model.vocab, is_writer=False)
    unit, teaching = corpus.unit, []
    if config.distill.teacher:
      teacher = distill.load_teacher(config.distill, config.model, mesh)
      program, teaching = programs.make(config, mesh, teacher), [teacher.params]

    # 2. Data: numpy rows, which `to_global` makes global arrays of.
    T, B, eval_B = config.data.seq_len, config.data.batch, config.eval.batch or config.data.batch
    by_rows = program.by_rows
    rows = data.training_rows(corpus, config.data)
    held_rows = data.held_out_rows(corpus, config.data, config.eval.stride)
    batches = data.batches(rows, B, by_rows, config.seed)
    count = min(len(held_rows), summary.rows_of(config.eval.bytes, corpus, held_rows) or len(held_rows))
    some_rows, all_rows = np.arange(count) * len(held_rows) // count, np.arange(len(held_rows))

    # 3. State and place in the data, from the newest checkpoint or from the start; what was written up to there.
    saved = at_end.enter_context(checkpoint.Checkpoints(workdir, config.checkpoint))
    start, state = saved.restore(program.abstract, program.placed, batches)
    if state is None:
      folder = config.train.init_from
      state = program.first_state(initial.params(folder, config.model, program.placed.params) if folder else None)
    if is_writer:
      print(summary.header(config, workdir, corpus, rows, program, start), flush=True)
    writer = metrics.Writer(workdir, start, has_tensorboard=config.log.tensorboard, is_on=is_writer)
    progress = metrics.Progress(
      start, config.train.steps, plain_seconds=config.log.plain_seconds, unit=unit, is_on=is_writer
    )
    at_end.callback(writer.close)
    at_end.callback(progress.close)
    flops_per_token = size.step_flops_per_token(config.model, T, program.trainable)
    if teacher_config:
      flops_per_token = distill.flops_per_token(
        config.distill, config.model, teacher_config, T, program.trainable, z_loss=config.train.z_loss
      )
    peak_flops, peak_source = peak.flops(mesh, config.train.peak_flops)
    pending: collections.deque = collections.deque()  # (step, row numbers, sums on the devices), not read yet
    saved_at, compile_seconds = time.monotonic(), 0.0

    def settle(late):
      """Reads the figures of all but the last `late` steps: adds them up, logs, stops if they are not finite."""
      while len(pending) > late:
        at, chosen, sums = pending.popleft()
        sums = jax.device_get(sums)
        if sums['is_finite']:
          window.add(sums, is_timed=at > start + 1)
        else:
          leave_out(at, rows.where(chosen), sums)
        progress.done(at)
        if at % config.log.every == 0 or at == config.train.steps:
          log(at)

    def leave_out(at, places, sums):
      """A step of which something is not finite: the device has left it out, or the run ends."""
      figures = {name: str(value) for name, value in summary.figures(sums).items()}
      writer.write('not_finite', at, {**figures, 'rows': places, 'skipped': int(sums['skipped'])})
      if not 0 < sums['skipped'] <= config.train.skip_nonfinite:
        raise NotFinite(summary.not_finite(at, saved.newest(), sums, places, config.train.skip_nonfinite))
      progress.say(summary.skipped(at, sums, places, config.train.skip_nonfinite))
      window.leave_out()

    def log(at):
      """Writes a train line of the steps since the last."""
      if window.steps:
        values = window.values(writer.seconds, flops_per_token, peak_flops)
        writer.write('train', at, values)
        progress.show(values)

    def save(at):
      """Saves in the background, after a train line, so that the lines up to a checkpoint are the steps up to it."""
      log(at)
      if not program.is_finite(state.averaged):
        raise NotFinite(f'step {at}: a parameter is not finite; {summary.last_checkpoint(saved.newest())}')
      saved.save(at, state, batches)

    def evaluate(at, chosen):
      """Evaluates on some held-out rows and writes an eval line; None if a signal came, which ends it."""
      began = time.monotonic()
      totals: collections.Counter = collections.Counter()
      waiting: collections.deque = collections.deque()
      for _, local, arrays in data.in_order(held_rows, chosen, eval_B, by_rows):
        waiting.append(program.eval_step(state.averaged, data.to_global(local, arrays, eval_B, by_rows)))
        if len(waiting) > LATE:
          totals.update(metrics.as_floats(waiting.popleft()))
        if watch.asked():
          return None
      for sums in waiting:
        totals.update(metrics.as_floats(sums))
      if not math.isfinite(totals['nll']):
        raise NotFinite(f'step {at}: loss on held-out text is not finite; {summary.last_checkpoint(saved.newest())}')
      values = {f'bits_per_{unit}': metrics.bits(totals), f'{unit}s': round(totals['bytes'])}
      values |= {'is_all': len(chosen) == len(held_rows), 'seconds': time.monotonic() - began}
      writer.write('eval', at, values)
      progress.say(f'step {at:,}: {summary.evaluated(values, unit)}')
      return values

    if config.train.profile_steps and start + PROFILE_FROM >= config.train.steps:
      left = config.train.steps - start
      progress.say(f'no profile: it would begin {PROFILE_FROM} steps after the start, and {left} are left')

    # 4. The loop. The host waits only for figures that are LATE steps old, to evaluate and to save.
    watch = interrupt.Watch()
    at_end.enter_context(jax.set_mesh(mesh))
    evaluated = processes.first_only(lambda: writer.evaluated, 'evaluated')
    if is_due(start, config.eval.every) and evaluated < start < config.train.steps:
      evaluate(start, some_rows)  # a signal ended it
    window = metrics.Window(unit, program.also)
    for step in range(start + 1, config.train.steps + 1):
      began, is_last, profiled = time.monotonic(), step == config.train.steps, step - start - PROFILE_FROM
      if config.train.profile_steps and profiled == 0:
        settle(0)
        jax.profiler.start_trace(str(workdir / 'profile'))
      chosen, local, arrays = next(batches)
      state, sums = program.train_step(state, data.to_global(local, arrays, B, by_rows), *teaching)
      pending.append((step, chosen, sums))
      if step == start + 1:
        jax.block_until_ready(sums)
        compile_seconds = time.monotonic() - began
        window.pause(compile_seconds)
        at_end.enter_context(watch)  # before, there is nothing to save, and a compiler would hold a signal up
      settle(LATE)
      saved.check()
      if 0 <= profiled < config.train.profile_steps and (profiled + 1 == config.train.profile_steps or is_last):
        settle(0)
        jax.profiler.stop_trace()
        progress.say(f'profile of {profiled + 1} steps: tensorboard --logdir={workdir / "profile"}')

      number, is_late = watch.asked(), False
      if jax.process_count() == 1 or step % config.log.every == 0:
        seconds = config.checkpoint.seconds
        (is_late,) = processes.agreed(bool(seconds) and time.monotonic() - saved_at > seconds)
      is_eval = is_due(step, config.eval.every) and not is_last and not number
      is_save = is_due(step, config.checkpoint.every) or is_late or is_last or number
      if is_eval or is_save:
        settle(0)
        began = time.monotonic()
        if is_eval:
          evaluate(step, some_rows)
          number = watch.asked()  # it ends an evaluation, which the same command does again
        if is_save or number:
          save(step)
          saved_at = time.monotonic()
        window.pause(time.monotonic() - began)
      if number:
        saved.wait()
        raise interrupt.Interrupted(number, step)

    # 5. All held-out text, and what the run came to.
    saved.wait()
    if (skipped := int(state.skipped)) == config.train.steps:
      raise NotFinite(f'all {skipped} steps were left out, since none was finite: nothing was learned')
    evaluation = evaluate(config.train.steps, all_rows)
    if evaluation is None:
      raise interrupt.Interrupted(watch.asked(), config.train.steps)
    speed = writer.tokens / writer.seconds if writer.seconds else 0.0
    result = summary.result(
      config,
      corpus,
      mesh,
      evaluation,
      skipped=skipped,
      seconds=writer.seconds,
      compile_seconds=compile_seconds,
      tokens_per_second=speed,
      flops_per_token=flops_per_token,
      peak_flops=peak_flops,
      peak_source=peak_source,
      mfu=speed * flops_per_token / peak_flops if peak_flops else 0.0,
    )
    if is_writer:
      workdirs.write_json(workdir / workdirs.RESULT, result)
    progress.say(summary.footer(result))
    return result


def is_due(step, every):
  """Whether something happens at a step that happens every so many; 0 means never."""
  return bool(every) and step % every == 0
