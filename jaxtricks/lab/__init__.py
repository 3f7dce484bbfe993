"""The newcomer's main job: train a small model on real images or text with any of the ten tricks.

- What is asked for: `config`; `compose`, the one place that knows all ten tricks; `models`.
- A run: `data` (files to batches), `examples`, `loop` (one jitted step), `evaluation`, `trainer`, `train`.
- Devices and hosts: `placement` (what lies where), `feed` (what each host reads), `hosts`, `collectives`.
- Nothing is lost: `checkpoint`, `rundir`, `interrupt`, `divergence`, `about`; `recorded` and `jsons` (what
  may be damaged).
- What is left to read: `writers`, `runs`, `run_report`, `compare`; `ablate`, `greedy` and `report`;
  `find_lr`.
"""
