"""Studies: many recipes trained, evaluated under two protocols, and written up from the records.

    python -m gfa_jax.study --study configs/study/cifar10.py --data_dir DIR

A stopped study goes on where it stopped, and several processes with the same OUT may share one.
"""

from gfa_jax.study.plan import Claim, Protocol, Study, Trial, load_study

__all__ = ["Claim", "Protocol", "Study", "Trial", "load_study"]
