"""`pioneer-tunnel diagnose`: what stands between a gateway and its relay, step by step."""
