"""How well does a small byte-level decoder model Python source after five minutes on two CPU cores?

  python -m train.main --config=experiments/quickstart.py --workdir=runs/quickstart
  python -m experiments.report --workdir=runs/quickstart

`make train` runs both. Layers alternate sliding-window and full attention; the text is the source of the Python
standard library on the machine, held out by top-level package.

Claim: at most 2.1 bits per byte on held-out files. Cost: at most 5 minutes on 2 CPU cores.
Result: experiments/results/quickstart.json, shown in README.md.
"""

from models.config import DecoderConfig, LayerSpec
from train.config import Config, DataConfig, EvalConfig, OptimizerConfig, TrainConfig


def get_config():
  # Short rows, small batches: with so few tokens many steps are worth more than long contexts.
  layers = [LayerSpec(window=64), LayerSpec()]
  return Config(
    model=DecoderConfig(vocab=264, width=192, depth=4, heads=6, qk_norm='head', layers=layers),
    # The library holds empty files and, to test decoders, badly encoded ones.
    data=DataConfig(source='python_stdlib', bad_files='skip', seq_len=256, batch=8, held_out_percent=1.5),
    optimizer=OptimizerConfig(learning_rate=2.5e-3, schedule='wsd', warmup_steps=30, decay_fraction=0.5),
    train=TrainConfig(steps=1100),
    # Every byte of held-out text is predicted from at least half a row before it.
    eval=EvalConfig(every=100, bytes=32768, batch=64, stride=128),
  )
