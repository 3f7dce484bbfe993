"""The commands of the lab, one module each: what `jaxtricks NAME` runs."""
