"""Accelerations of the cloud's half: one technique a file, switched step by step by one schedule."""

from obclip_core.accelerate.schedule import LCM, NONE, PAPER_K5, PAPER_K10, Schedule, union

__all__ = ["LCM", "NONE", "PAPER_K10", "PAPER_K5", "Schedule", "union"]
