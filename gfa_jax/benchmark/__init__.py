"""How fast compiled training steps and attacks are: ``python -m gfa_jax.benchmark``."""
