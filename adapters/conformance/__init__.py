"""The conformance suite: proves what an adapter declares, and what every adapter must do. For authors of plugins.

from onegpu.adapters.conformance import Conformance

class TestGain(Conformance):
    adapter = "gain"                        # name of the entry point
    config = {"targets": ["down_proj"]}     # settings that suit models with a hidden size of 256; {} for defaults
"""

from .suite import CHECKS, Check, Conformance, Outcome, Report, prove

__all__ = ["CHECKS", "Check", "Conformance", "Outcome", "Report", "prove"]
