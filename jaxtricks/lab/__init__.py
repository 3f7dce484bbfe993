"""The newcomer's main job: train a small model on real images with any of the ten tricks.

`config` (what can be set), `data` (images in, batches out), `models`, `compose` (the one place that
knows all ten tricks), `loop` (one jitted step, evaluation, logging), `ablate` and `report`.
"""
