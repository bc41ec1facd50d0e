"""What does the decoder of quickstart.py reach with a larger model, longer rows and more steps?

  python -m train.main --config=experiments/quickstart_long.py --workdir=runs/quickstart_long
  python -m experiments.store_result --workdir=runs/quickstart_long --out=experiments/results/quickstart_long.json

The report of a quickstart run shows the stored record beside its own figures. Same text, same split.

Claim: fewer bits per byte than xz -9e needs for the held-out files. Cost: not measured yet, meant for one GPU.
Result: not measured yet.
"""

from experiments import quickstart
from models.config import DecoderConfig, LayerSpec


def get_config():
  config = quickstart.get_config()
  layers = [LayerSpec(window=256), LayerSpec()]
  config.model = DecoderConfig(vocab=288, width=512, depth=8, heads=8, layers=layers, dtype='bfloat16')
  config.data.seq_len, config.data.batch = 1024, 64
  config.optimizer.learning_rate, config.optimizer.warmup_steps = 1e-3, 200
  config.train.steps = 4000
  config.eval.every, config.eval.batch = 500, 64
  return config
