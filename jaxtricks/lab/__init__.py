"""The newcomer's main job: train a small model on real images or text with any of the ten tricks.

- The command line: `cli`, `config` (settings and their checks), `commands` (one module
  each).
- A run: `data` (files to batches), `models`, `step` (the one place that knows all ten
  tricks), `trainer`.
- Devices and hosts: `distributed`, `collectives`.
- What stays: `checkpoint`, `rundir`, `writers`; and what is read: `report`, `plots`.
"""
