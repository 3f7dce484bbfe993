"""`make bench`: ours against the peer, alternating in one process; ratios, never absolute claims."""
