"""Imports run one way, experiments -> train -> models -> attn -> kernels_pallas, and `import attn` stays light."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# From the left of the house to the right: a package may import itself and what stands before it here.
PACKAGES = ['kernels_pallas', 'attn', 'models', 'train', 'experiments']
# The wheel: it brings these and nothing else, so nothing else may be needed to import it.
WHEEL, BROUGHT = ['kernels_pallas', 'attn'], {'jax', 'jaxlib', 'numpy'}
TRAINING = {'flax', 'optax', 'orbax', 'grain', 'absl', 'ml_collections', 'chex', 'tensorboardX'}


def imports(source, module, is_package=False):
  """(line, imported module, whether it runs at import) for every import in `source`, relative ones made absolute."""
  tree = ast.parse(source)
  lazy = {
    id(node)
    for scope in ast.walk(tree)
    if isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for node in ast.walk(scope)
  }
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      found = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      base = node.module or ''
      if node.level:
        here = module.split('.') if is_package else module.split('.')[:-1]
        base = '.'.join([*here[: len(here) - node.level + 1], *([base] if base else [])])
      found = [base]
    elif isinstance(node, ast.Call) and ast.unparse(node.func) in ('importlib.import_module', '__import__'):
      found = [a.value for a in node.args[:1] if isinstance(a, ast.Constant)]
    else:
      continue
    for name in found:
      yield node.lineno, name, id(node) not in lazy


def violations(source, module, is_package=False):
  """What `module` must not import, as sentences."""
  package = module.split('.')[0]
  right = {'tests', *PACKAGES[PACKAGES.index(package) + 1 :]}
  for line, name, at_import in imports(source, module, is_package):
    top = name.split('.')[0]
    if top in right:
      yield f'{module}:{line} imports {name}, to the right of {package}'
    elif package in WHEEL and top in TRAINING:
      yield f'{module}:{line} imports {name}, which {package} must not know'
    elif package in WHEEL and at_import and top not in {*PACKAGES, *BROUGHT, *sys.stdlib_module_names}:
      yield f'{module}:{line} imports {name}, which the wheel does not bring'


def files(package):
  return sorted((ROOT / package).rglob('*.py'))


@pytest.mark.parametrize('package', PACKAGES)
def test_imports_run_one_way(package):
  assert files(package), f'no Python files in {package}/'
  found = []
  for path in files(package):
    parts = path.relative_to(ROOT).with_suffix('').parts
    is_package = parts[-1] == '__init__'
    found += violations(path.read_text(), '.'.join(parts[:-1] if is_package else parts), is_package)
  assert not found, '\n'.join(found)


@pytest.mark.parametrize(
  'module, source',
  [
    ('attn.softmax', 'from models import decoder'),
    ('attn.softmax', 'import models.decoder as d'),
    ('attn.cache.storage', 'from ...models import decoder'),
    ('attn.softmax', 'def f():\n  from train import loop'),
    ('attn.softmax', 'def f():\n  import flax.nnx'),
    ('attn.softmax', 'import importlib\nimportlib.import_module("optax")'),
    ('attn.softmax', 'import matplotlib.pyplot'),
    ('kernels_pallas.softmax', 'from attn import masks'),
    ('models.decoder', 'try:\n  from train import config\nexcept ImportError: pass'),
    ('train.loop', 'from experiments import report'),
    ('experiments.report', 'from tests.attn import oracle'),
  ],
)
def test_a_wrong_import_is_found(module, source):
  assert list(violations(source, module))


@pytest.mark.parametrize(
  'module, source',
  [
    ('attn.softmax', 'import jax\nimport numpy as np\nimport functools\nfrom attn import masks'),
    ('attn.cache.storage', 'from .. import softmax\nfrom . import ring'),
    ('attn.softmax', 'def f():\n  from kernels_pallas import softmax'),
    ('attn.draw', 'def f():\n  import matplotlib.pyplot'),
    ('models.decoder', 'from flax import nnx\nfrom attn import softmax'),
    ('experiments.report', 'from train import checkpoint'),
  ],
)
def test_a_right_import_is_left_alone(module, source):
  assert not list(violations(source, module))


def test_import_attn_is_light():
  heavy = sorted({*TRAINING, *PACKAGES, 'matplotlib', 'torch', 'jax.experimental.pallas'} - {'attn'})
  code = f'import sys, attn; attn.dot_product_attention; print([m for m in {heavy} if m in sys.modules])'
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert done.stdout.strip() == '[]', f'import attn also loads {done.stdout}'
