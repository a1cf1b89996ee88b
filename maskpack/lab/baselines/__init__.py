"""Baselines: ways to solve a task with a frozen backbone, which a mask is compared with."""
