"""train.manifest and train.shelf on folders of plain files: every change is found, and a process may end anywhere."""

import errno
import hashlib
import json
import os
import pathlib
import shutil
import threading

import pytest

from train import manifest, shelf as shelves
from train.config import UserError

FILES = {'params/d/a': b'x' * 5000, 'params/_METADATA': b'{}', 'data/metadata': b'[3]', 'top': b''}


def put(folder, files=FILES):
  for name, text in files.items():
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(text)


def tree(folder):
  """{path: bytes} of a folder."""
  return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}


def save(shelf, step, keep=2):
  """What checkpoint.Checkpoints and Orbax do to files in a save."""
  shelf.begin(step)
  unfinished = shelf.folder(f'{step}.orbax-checkpoint-tmp')
  put(unfinished, {**FILES, 'step': str(step).encode()})
  os.rename(unfinished, shelf.folder(step))
  shelf.finish(step, keep)


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch):
  monkeypatch.setattr(os, 'fsync', lambda _: None)


@pytest.fixture
def saved(tmp_path):
  """A Shelf with the checkpoints 4 and 8."""
  shelf = shelves.Shelf(tmp_path)
  for step in (4, 8):
    save(shelf, step)
  return shelf


def test_manifest_holds_what_sha256_says(tmp_path):
  put(tmp_path / '7')
  manifest.write(tmp_path / '7', tmp_path / '7.json', 7)
  record = json.loads((tmp_path / '7.json').read_text())
  assert record['files'] == {name: [len(text), hashlib.sha256(text).hexdigest()] for name, text in FILES.items()}
  assert record['step'] == 7
  assert sorted(path.name for path in tmp_path.iterdir()) == ['7', '7.json']
  assert manifest.problems(tmp_path / '7', tmp_path / '7.json', 7) == []
  large = bytes(range(256)) * (manifest.CHUNK // 128) + b'end'  # some pieces
  (tmp_path / 'large').write_bytes(large)
  pieces = []
  assert manifest.digest(tmp_path / 'large', done=pieces.append) == hashlib.sha256(large).hexdigest()
  assert sum(pieces) == len(large)


@pytest.mark.parametrize('name', FILES)
def test_every_change_of_a_file_is_named(saved, name):
  path = saved.folder(8) / name
  before = path.read_bytes()
  for changed, words in (
    (before[: len(before) // 2], 'truncated'),
    (b'', 'truncated'),
    (before + b'y', 'bytes, expected'),
    (before[:-1] + bytes([before[-1] ^ 1]) if before else b'', 'its SHA-256 differs'),
    (None, 'missing'),
  ):
    if changed == before:
      continue
    path.unlink() if changed is None else path.write_bytes(changed)
    (problem,) = saved.problems(8)
    assert problem.startswith(f'{name}: ')
    assert words in problem
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(before)
    assert saved.problems(8) == []
  (path.parent / 'more').write_bytes(b'')
  assert saved.problems(8) == [f'{os.path.relpath(path.parent / "more", saved.folder(8))}: is not in the manifest']


def test_items_are_looked_at_alone(saved):
  (saved.folder(8) / 'data/metadata').write_bytes(b'[4]')
  assert saved.problems(8, items=('params',)) == []
  assert saved.problems(8, items=('data',)) == ['data/metadata: its SHA-256 differs']
  (saved.folder(8) / 'top').write_bytes(b'1')  # beside the items
  assert 'top: 1 bytes, expected 0' in manifest.summary(saved.problems(8, items=('params',)))


def damage_manifest(shelf, kind):
  path, other = (shelf.workdir / 'manifests' / f'{step}.json' for step in (8, 4))
  if kind == 'emptied':
    path.write_text('')
  elif kind == 'nothing in it':
    path.write_text('{}')
  elif kind == 'a list':
    path.write_text('[1]')
  elif kind == 'not text':
    path.write_bytes(b'\xff\xfe')
  elif kind == 'of another step':
    shutil.copy(other, path)
  elif kind == 'changed':
    path.write_text(path.read_text().replace('"top": [\n   0', '"top": [\n   1'))
  elif kind == 'without a file':  # as one would who removes both
    record = json.loads(path.read_text())
    del record['files']['top']
    path.write_text(json.dumps(record))
    (shelf.folder(8) / 'top').unlink()
  elif kind == 'removed':
    path.unlink()
  elif kind == 'folder removed':
    shutil.rmtree(shelf.folder(8))
  elif kind == 'folder of another step':
    shutil.rmtree(shelf.folder(8))
    shutil.copytree(shelf.folder(4), shelf.folder(8))
  elif kind == 'a later step':  # folder and manifest under another number
    shelf.folder(8).rename(shelf.folder(12))
    path.rename(path.with_name('12.json'))


KINDS = {
  'emptied': 'expected a manifest',
  'nothing in it': 'expected a manifest',
  'a list': 'expected a manifest',
  'not text': 'expected a manifest',
  'of another step': 'manifest of step 4, expected 8',
  'changed': 'its own SHA-256 differs',
  'without a file': 'its own SHA-256 differs',
  'removed': '8.json: missing',
  'folder removed': 'the folder is missing',
  'folder of another step': 'step: its SHA-256 differs',
  'a later step': 'manifest of step 8, expected 12',
}


@pytest.mark.parametrize('kind', KINDS)
def test_the_newest_whole_one_is_used_and_the_bad_one_kept(saved, kind):
  damage_manifest(saved, kind)
  had = tree(saved.workdir)
  said: list[str] = []
  assert saved.newest_whole(said.append) == 4
  (line,) = said
  step = 12 if kind == 'a later step' else 8
  assert line.startswith(f'checkpoint of step {step}: ')
  assert KINDS[kind] in line
  assert line.endswith(f'moved to bad_checkpoints/{step}.0')
  assert saved.steps() == [4]
  assert sorted(had.values()) == sorted(tree(saved.workdir).values())  # nothing is lost
  save(saved, step)
  assert saved.newest_whole(pytest.fail) == step


def test_the_same_step_may_be_bad_again(saved):
  for i in range(3):
    (saved.folder(8) / 'top').write_bytes(b'?')
    assert saved.newest_whole(lambda _: None) == 4
    assert (saved.workdir / 'bad_checkpoints' / f'8.{i}').is_dir()
    save(saved, 8)


def test_no_whole_one_is_an_error_that_changes_nothing(saved):
  for step in (4, 8):
    (saved.folder(step) / 'params/d/a').write_bytes(b'x')
  had = tree(saved.workdir)
  with pytest.raises(UserError, match=r'(?s)no checkpoint is whole; nothing was changed.*step 8: params/d/a: 1 bytes, '
                     r'expected 5,000, truncated\n  step 4: params/d/a'):  # fmt: skip
    saved.newest_whole(pytest.fail)
  assert tree(saved.workdir) == had
  shutil.rmtree(saved.workdir / 'manifests')
  with pytest.raises(UserError, match='no checkpoint is whole'):
    saved.newest_whole(pytest.fail)
  with pytest.raises(UserError, match='the folder is missing'):
    save(saved, 12)
    shutil.rmtree(saved.workdir / 'checkpoints')
    saved.newest_whole(pytest.fail)


def test_nothing_at_all_is_a_new_run(tmp_path):
  assert shelves.Shelf(tmp_path).newest_whole(pytest.fail) == 0
  assert shelves.Shelf(tmp_path).steps() == []
  assert list(tmp_path.iterdir()) == []


class Killed(BaseException):
  """Stands for the end of the process."""


def dying(monkeypatch, after):
  """Lets `after` changes of the file system happen, then ends the 'process'. Returns the list of all that did."""
  done: list[str] = []
  lock = threading.Lock()  # files are hashed in threads

  def counted(name, real):
    def call(*args, **options):
      with lock:
        if len(done) == after:
          raise Killed
        done.append(name)
      return real(*args, **options)

    return call

  for owner, name in (
    (os, 'replace'), (os, 'fsync'), (os, 'unlink'), (os, 'rmdir'), (os, 'rename'), (os, 'mkdir'), (json, 'dump'),
    (pathlib.Path, 'touch'), (pathlib.Path, 'unlink'), (pathlib.Path, 'rename'), (pathlib.Path, 'write_bytes'),
  ):  # fmt: skip
    monkeypatch.setattr(owner, name, counted(name, getattr(owner, name)))
  return done


def test_a_process_may_end_at_any_change_of_the_disk(tmp_path, monkeypatch):
  """Saves step 12 with 4 and 8 there, of which 4 is then deleted; ends after 0, 1, 2, ... changes; looks; goes on."""
  after, is_over, seen = 0, False, set()
  while not is_over:
    shelf = shelves.Shelf(tmp_path / str(after))
    shelf.workdir.mkdir()
    for step in (4, 8):
      save(shelf, step)
    with monkeypatch.context() as patched:
      dying(patched, after)
      try:
        save(shelf, 12)
        is_over = True
      except Killed:
        pass
    if after % 3 == 1:  # and once more while it is being looked at
      with monkeypatch.context() as patched, pytest.raises(Killed):
        dying(patched, after // 3)
        shelf.newest_whole(lambda _: None)
        raise Killed
    newest = shelf.newest_whole(lambda _: None)
    seen.add(newest)
    assert newest in (8, 12)
    assert (shelf.folder(newest) / 'step').read_text() == str(newest)
    assert shelf.problems(newest) == []
    if is_over:
      assert shelf.steps() == [8, 12]
    save(shelf, 16)
    assert shelf.newest_whole(pytest.fail) == 16
    assert shelf.steps() == [newest, 16]
    assert {path.name for path in (shelf.workdir / 'checkpoints').iterdir()} == {str(newest), '16'}
    assert {path.name for path in (shelf.workdir / 'manifests').iterdir()} == {f'{newest}.json', '16.json'}
    after += 1
  assert seen == {8, 12}
  assert after > 30


def test_a_first_save_cut_short_begins_anew_aloud(tmp_path, monkeypatch):
  shelf = shelves.Shelf(tmp_path)
  with monkeypatch.context() as patched:
    patched.setattr(manifest, 'write', lambda *_: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
      save(shelf, 4)
  said: list[str] = []
  assert shelf.newest_whole(said.append) == 0
  assert said == ['checkpoint of step 4: the run ended before its manifest was written; deleted']
  assert list((tmp_path / 'checkpoints').iterdir()) == list((tmp_path / 'manifests').iterdir()) == []
  assert not (tmp_path / 'bad_checkpoints').exists()


def to_another_disk(monkeypatch, *, is_full=False):
  """Renames from checkpoints/ to elsewhere fail, as where that is a link."""
  real, real_copy = pathlib.Path.rename, shutil.copytree

  def rename(path, to):
    if path.parent.name == 'checkpoints' != to.parent.name:
      raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
    return real(path, to)

  def copytree(path, to, *args, **options):
    real_copy(path, to, *args, **options)
    if is_full:
      raise shutil.Error([(path, to, 'No space left on device')])

  monkeypatch.setattr(pathlib.Path, 'rename', rename)
  monkeypatch.setattr(shutil, 'copytree', copytree)


def test_a_bad_one_is_moved_to_another_disk(saved, monkeypatch):
  (saved.folder(8) / 'top').write_bytes(b'?')
  had = tree(saved.workdir)
  to_another_disk(monkeypatch)
  said: list[str] = []
  assert saved.newest_whole(said.append) == 4
  assert said[0].endswith('; moved to bad_checkpoints/8.0')
  assert not saved.folder(8).exists()
  assert sorted(had.values()) == sorted(tree(saved.workdir).values())


def test_a_bad_one_that_cannot_be_moved_is_told_and_does_not_count(saved, monkeypatch):
  (saved.folder(8) / 'top').write_bytes(b'?')
  had = tree(saved.workdir)
  to_another_disk(monkeypatch, is_full=True)
  said: list[str] = []
  assert saved.newest_whole(said.append) == 4
  assert '8 cannot be moved to ' in said[0]
  assert 'No space left' in said[0]
  assert saved.steps() == [4]
  assert sorted(had.values()) == sorted(tree(saved.workdir).values())
  with pytest.raises(FileExistsError):  # it is not written over
    save(saved, 8)
  saved.give_up(8)
  assert saved.folder(8).is_dir()


def test_giving_up_frees_what_was_not_finished(saved, monkeypatch):
  with monkeypatch.context() as patched:
    patched.setattr(manifest, 'write', lambda *_: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
      save(saved, 12)
  assert saved.folder(12).is_dir()
  for step in (4, 12):
    saved.give_up(step)
  assert sorted(path.name for path in (saved.workdir / 'checkpoints').iterdir()) == ['4', '8']
  assert saved.newest_whole(pytest.fail) == 8


def test_names_of_others_stay(saved):
  (saved.workdir / 'manifests' / 'x.deleting').touch()
  for name in ('16.deleted.mine', '16.orbax-checkpoint-tmp.old', '016'):
    (saved.workdir / 'checkpoints' / name).mkdir()
  for name in ('8.deleted', '12.orbax-checkpoint-tmp', '12.orbax-checkpoint-tmp-17'):
    (saved.workdir / 'checkpoints' / name).mkdir()
  (saved.folder(8) / 'params' / '.nfs000012').write_bytes(b'open elsewhere')
  said: list[str] = []
  assert saved.newest_whole(said.append) == 8
  assert said == []
  kept = {path.name for path in (saved.workdir / 'checkpoints').iterdir()}
  assert {'4', '8', '16.deleted.mine', '16.orbax-checkpoint-tmp.old', '016'} <= kept
  assert not kept & {'8.deleted', '12.orbax-checkpoint-tmp', '12.orbax-checkpoint-tmp-17'}


def test_files_are_hashed_at_the_same_time(tmp_path, monkeypatch):
  monkeypatch.setattr(os, 'cpu_count', lambda: 2)
  both = threading.Barrier(2, timeout=10)
  real = manifest.digest
  monkeypatch.setattr(manifest, 'digest', lambda *args, **options: (both.wait() and 0) or real(*args, **options))
  put(tmp_path / '7')
  manifest.write(tmp_path / '7', tmp_path / '7.json', 7)
