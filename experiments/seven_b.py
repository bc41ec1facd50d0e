"""What does a 7B decoder, trained on rows of 8,192 tokens with 0.5 M tokens a step, need of a TPU pod?

  python -m train.compile_report --config=experiments/seven_b.py --topology=v5e:16x16
  python -m train.main --config=experiments/seven_b.py --workdir=SHARED/seven_b --distributed --config.data.source=...

The mesh is one for 256 chips. For the 512 of a v5p:8x8x8, --config.mesh.fsdp=8 --config.mesh.context=8
--config.mesh.tensor=8 give each axis of the mesh one of the pod. Which text, and its tokenizer, is for --config.data to
say: docs/data.md.

Claim: fits into the 16 GiB of a v5e chip. Cost: two compilations.
Result: experiments/results/compile_report.json, shown in docs/scaling.md.
"""

from models.config import DecoderConfig, LayerSpec
from train.config import CheckpointConfig, Config, DataConfig, EvalConfig, MeshConfig, OptimizerConfig, TrainConfig


def get_config():
  # Products in bfloat16, parameters and statistics in float32. The backward pass computes a layer again, but for
  # attention: that is the dearest part, and its result is small.
  model = DecoderConfig(
    vocab=32768,
    width=4096,
    depth=32,
    heads=32,
    kv_heads=8,
    mlp_width=14336,
    layers=[LayerSpec(rope_base=500000.0)],
    tied_embeddings=False,
    remat='attention',
    scan=True,
    dtype='bfloat16',
  )
  return Config(
    model=model,
    data=DataConfig(packing='documents', seq_len=8192, batch=64),
    optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2000, final_fraction=0.1),
    train=TrainConfig(steps=100_000, loss_chunk=4096, z_loss=1e-4, skip_nonfinite=10),
    mesh=MeshConfig(data=1, fsdp=16, context=4, tensor=4),
    eval=EvalConfig(every=1000, bytes=2**24),
    checkpoint=CheckpointConfig(seconds=900.0, keep=3),
  )
