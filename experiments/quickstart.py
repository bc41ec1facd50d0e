"""How well does a small byte-level decoder model Python source after five minutes on two CPU cores?

  python -m train.main --config=experiments/quickstart.py --workdir=runs/quickstart
  python -m experiments.report --workdir=runs/quickstart

`make train` runs both. Layers alternate sliding-window and full attention; the text is the source of the Python
standard library on the machine, held out by top-level package.

Claim: at most 2.1 bits per byte on held-out files. Cost: at most 5 minutes on 2 CPU cores.
Result: not measured yet.
"""

from models.config import DecoderConfig, LayerSpec
from train.config import Config, DataConfig, EvalConfig, OptimizerConfig, TrainConfig


def get_config():
  return Config(
    model=DecoderConfig(vocab=288, width=256, depth=4, heads=4, layers=[LayerSpec(window=64), LayerSpec()]),
    # The library holds empty files and, to test decoders, badly encoded ones.
    data=DataConfig(source='python_stdlib', bad_files='skip', seq_len=256, batch=16, held_out_percent=3.0),
    optimizer=OptimizerConfig(learning_rate=3e-3, schedule='wsd', warmup_steps=30, decay_fraction=0.4),
    train=TrainConfig(steps=350),
    eval=EvalConfig(every=50),
  )
