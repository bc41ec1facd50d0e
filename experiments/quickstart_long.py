"""What does the decoder of quickstart.py reach with three times the steps?

  python -m train.main --config=experiments/quickstart_long.py --workdir=runs/quickstart_long
  python -m experiments.store_result --workdir=runs/quickstart_long --out=experiments/results/quickstart_long.json

The report of a quickstart run shows the stored record beside its own figures. Same model, same text, same split.

Claim: fewer held-out bits per byte than the short run. Cost: about 10 minutes on 2 CPU cores.
Result: experiments/results/quickstart_long.json, 1.54 bits per byte.
"""

from experiments import quickstart


def get_config():
  config = quickstart.get_config()
  config.train.steps *= 3
  config.eval.every = 300
  return config
