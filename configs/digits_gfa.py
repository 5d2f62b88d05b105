from gfa_jax.config import *
def get_config():
    return TrainConfig(batch_size=64, train_steps=1000,
        data=DataConfig(name="digits", num_validation=300),
        model=ModelConfig(name="cnn4", input_mean=(0.305,), input_std=(0.376,)),
        threat=ThreatConfig(epsilon=.15),
        gfa=GFAConfig(weight=4.0, input_weight=3.0),
        loop=LoopConfig(eval_every=250))
